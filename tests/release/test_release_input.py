"""What the released models are fed: sizes, pixels, masks and crops of the authors' pipeline.

All of it is reached exactly, with OpenCV 5.0.0.
"""

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image
from PIL import Image
from release_cases import SMALL, arrays, numbers, release_cfg, small_model

from psf.data import PanopticDatasetMapper, build_augmentations
from psf.data.resampling import SizeInput, transform_image, transform_index_map
from psf.data.resize import OpenCVResizeTransform
from psf.predictor import Predictor

CROPS = range(4)


@pytest.fixture
def case(source):
    return {key: value.numpy() for key, value in arrays(source, "misc/pipeline").items()}


@pytest.fixture
def cfg():
    """The recorded pipelines were made for small images."""
    options = ["INPUT.MIN_SIZE_TEST", 80, "INPUT.MAX_SIZE_TEST", 133, "INPUT.CROP.SIZE", [38, 60]]
    return release_cfg("R50_24ep", [*SMALL, *options])


def test_sizes(source, cfg):
    recorded = numbers(source, "misc/resize_sizes")
    assert len(recorded) == 75
    for entry in recorded:
        cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = sorted(entry["scale"])
        size = SizeInput(entry["h"], entry["w"])
        for augmentation in build_augmentations(cfg, is_train=False):
            augmentation(size)
        assert size.image.shape[:2] == (entry["new_h"], entry["new_w"]), entry


@pytest.mark.parametrize("index", range(4))
def test_the_mapper_in_tests(case, cfg, index, tmp_path):
    """From the file to what the backbone gets: every bit."""
    Image.fromarray(case[f"test/{index}/rgb_uint8"]).save(tmp_path / "image.png")
    result = PanopticDatasetMapper(cfg, False)({"file_name": str(tmp_path / "image.png")})
    (found,) = small_model().preprocess_images([result])
    assert torch.equal(found, torch.from_numpy(case[f"test/{index}/tensor"]))
    assert (result["height"], result["width"]) == tuple(case[f"test/{index}/ori_shape"][:2])


def test_the_predictor(case, cfg, tmp_path, monkeypatch):
    torch.save({"model": small_model().state_dict()}, tmp_path / "weights.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    predictor = Predictor(cfg)
    fed = []
    preprocess = predictor.model.preprocess_images

    def record(inputs):
        fed.extend(preprocess(inputs))
        return preprocess(inputs)

    monkeypatch.setattr(predictor.model, "preprocess_images", record)
    for index in range(4):
        predictor(case[f"test/{index}/rgb_uint8"][:, :, ::-1])
        assert torch.equal(fed[-1], torch.from_numpy(case[f"test/{index}/tensor"]))


def test_pillow_gives_other_pixels(case, cfg, tmp_path):
    """Of the reduced images: this is what the key is for."""
    cfg.INPUT.RESIZE_LIBRARY = "pillow"
    Image.fromarray(case["test/3/rgb_uint8"]).save(tmp_path / "image.png")
    result = PanopticDatasetMapper(cfg, False)({"file_name": str(tmp_path / "image.png")})
    (found,) = small_model().preprocess_images([result])
    assert (found - torch.from_numpy(case["test/3/tensor"])).abs().max() > 0.5


def transforms_to(case, name, *before):
    """``before``, then the resize to the size of a recorded result."""
    height, width = case["train_in/rgb_uint8"].shape[:2]
    size = SizeInput(height, width)
    for transform in before:
        size.transform(transform)
    height, width = size.image.shape[:2]
    new_height, new_width = case[f"{name}/img_bgr"].shape[:2]
    return [*before, OpenCVResizeTransform(height, width, new_height, new_width)]


def crop(case, i):
    height, width, y, x = case[f"train/crop{i}/crop_h_w_offset_y_x"].tolist()
    return T.CropTransform(x, y, width, height)


def assert_recorded(case, name, transforms):
    """The image, and the masks one by one: they overlap."""
    image = transform_image(case["train_in/rgb_uint8"], transforms)
    np.testing.assert_array_equal(image[:, :, ::-1], case[f"{name}/img_bgr"])
    # What a crop leaves nothing of is not there.
    masks = [transform_index_map(mask, transforms) for mask in case["train_in/masks"]]
    recorded = [mask for mask in case[f"{name}/masks"] if mask.any()]
    np.testing.assert_array_equal([mask for mask in masks if mask.any()], recorded)


def test_training_without_a_crop(case):
    assert_recorded(case, "train/flip", [T.HFlipTransform(120)])
    for name in ("train/resize_up", "train/resize_down"):
        assert_recorded(case, name, transforms_to(case, name))


@pytest.mark.parametrize("i", CROPS)
def test_training_with_a_crop(case, i):
    name = f"train/crop{i}_then_resize"
    assert_recorded(case, name, transforms_to(case, name, crop(case, i)))


@pytest.mark.parametrize("i", CROPS)
def test_crops_are_drawn_in_the_same_order_from_the_same_ranges(case, cfg, i, monkeypatch):
    bounds = []
    drawn = iter(case[f"train/crop{i}/crop_h_w_offset_y_x"].tolist())

    def randint(low, high=None):
        bounds.append([0, low] if high is None else [low, high])
        return next(drawn)

    _, cropping, _ = build_augmentations(cfg, is_train=True)
    random_crop = cropping.aug.augs[1]
    monkeypatch.setattr(np.random, "randint", randint)
    found = random_crop.get_transform(case["train_in/rgb_uint8"])
    assert bounds == case[f"train/crop{i}/randint_bounds"].tolist()
    expected = crop(case, i)
    assert (found.y0, found.x0, found.h, found.w) == (
        *(expected.y0, expected.x0),
        *(expected.h, expected.w),
    )


def test_every_resize_of_the_training_recipe_is_opencvs(cfg, case, tmp_path):
    """Through the mapper, against the recipe's transforms applied one by one."""
    Image.fromarray(case["train_in/rgb_uint8"]).save(tmp_path / "image.png")
    cfg.INPUT.MIN_SIZE_TRAIN = (60, 110)
    augmentations = T.AugmentationList(build_augmentations(cfg, is_train=True))
    mapper = PanopticDatasetMapper(
        augmentations=[augmentations], image_format="RGB", class_map=None
    )
    kinds = set()
    for seed in range(20):
        np.random.seed(seed)
        found = mapper({"file_name": str(tmp_path / "image.png")})["image"]
        np.random.seed(seed)
        size = SizeInput(90, 120)
        augmentations(size)
        image = read_image(str(tmp_path / "image.png"), "RGB")
        for transform in size.transforms:
            image = transform.apply_image(image)
            kinds.add(type(transform))
        np.testing.assert_array_equal(found.permute(1, 2, 0), image)
    assert kinds == {T.HFlipTransform, OpenCVResizeTransform, T.CropTransform}


def test_names(cfg):
    cfg.INPUT.RESIZE_LIBRARY = "imagemagick"
    with pytest.raises(
        ValueError, match=r"RESIZE_LIBRARY is 'imagemagick'; known: \['pillow', 'op"
    ):
        build_augmentations(cfg, is_train=False)
