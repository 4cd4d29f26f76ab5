import numpy as np
import pytest
from detectron2.data import transforms as T

from psf.data import PanopticDatasetMapper, build_augmentations
from psf.data.augmentation import distort_colors
from psf.data.resampling import augment, transform_image, transform_index_map


def test_unknown_augmentation(cfg):
    cfg.INPUT.AUGMENTATION = "mosaic"
    with pytest.raises(ValueError, match=r"INPUT\.AUGMENTATION is 'mosaic'; known: \['fixed_crop'"):
        build_augmentations(cfg, True)


@pytest.mark.parametrize(("flip", "expected"), [("none", 0), ("horizontal", 1), ("vertical", 1)])
def test_flip_of_the_config(cfg, flip, expected):
    cfg.INPUT.RANDOM_FLIP = flip
    flips = [a for a in build_augmentations(cfg, True) if isinstance(a, T.RandomFlip)]
    assert len(flips) == expected
    assert all(
        (f.horizontal, f.vertical) == (flip == "horizontal", flip == "vertical") for f in flips
    )


def test_half_of_the_images_are_cropped_as_in_detr(cfg):
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.INPUT.CROP.ENABLED = True
    augmentations = T.AugmentationList(build_augmentations(cfg, is_train=True))
    np.random.seed(0)
    image = np.zeros((800, 1000, 3), dtype=np.uint8)
    cropped = 0
    for _ in range(60):
        aug_input = T.AugInput(image)
        transforms = augmentations(aug_input).transforms
        assert min(aug_input.image.shape[:2]) == 64
        if len(transforms) == 3:
            resize, crop, _ = transforms
            cropped += 1
            assert resize.new_h in (400, 500, 600)
            assert 384 <= crop.h <= 600
            assert 384 <= crop.w <= 600
    assert 18 <= cropped <= 42


@pytest.mark.parametrize("library", ["pillow", "opencv"])
@pytest.mark.parametrize("recipe", ["multi_scale", "large_scale_jitter", "fixed_crop", "test"])
@pytest.mark.parametrize("size", [(20000, 2), (1, 4000), (1, 1)])
def test_extreme_shapes_keep_a_pixel(cfg, recipe, library, size):
    """Detectron2 would resize to 0 pixels, or crop 0 of them."""
    cfg.INPUT.RESIZE_LIBRARY = library
    if recipe != "test":
        cfg.INPUT.AUGMENTATION = recipe
    cfg.INPUT.IMAGE_SIZE = 100
    cfg.INPUT.CROP.ENABLED = True
    if recipe == "fixed_crop":
        cfg.INPUT.CROP.SIZE = [60, 50]
    else:
        cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = "relative", [0.2, 0.3]
    augmentations = T.AugmentationList(build_augmentations(cfg, recipe != "test"))
    image = np.full((*size, 3), 7, dtype=np.uint8)
    for seed in range(6):
        np.random.seed(seed)
        result, transforms = augment(image, augmentations)
        assert min(result.shape[:2]) >= 1
        assert result.size < 40e6
        index_map = transform_index_map(np.ones(size, dtype=np.uint8), transforms)
        assert index_map.shape == result.shape[:2]
        assert index_map.any()


@pytest.mark.parametrize("key", ["MAX_SIZE_TRAIN", "MAX_SIZE_TEST", "IMAGE_SIZE", "MIN_SCALE"])
def test_sizes_of_nothing_are_refused(cfg, key):
    cfg.INPUT[key] = 0
    with pytest.raises(ValueError, match=rf"INPUT\.{key} is 0, but must be positive"):
        build_augmentations(cfg, is_train=False)


def test_resizing_a_window_has_the_bits_of_pillow():
    rng = np.random.default_rng(0)
    for _ in range(150):
        h, w, new_h, new_w = (int(v) for v in rng.integers(1, 60, 4))
        image = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
        resize = T.ResizeTransform(h, w, new_h, new_w)
        y, x = int(rng.integers(new_h)), int(rng.integers(new_w))
        crop = T.CropTransform(x, y, int(rng.integers(1, 70)), int(rng.integers(1, 70)))
        expected = crop.apply_image(resize.apply_image(image))
        np.testing.assert_array_equal(transform_image(image, [resize, crop]), expected)
        index_map = image[..., 0] + 256 * image[..., 1].astype(np.int32)
        found = transform_index_map(index_map, [resize, crop])
        for byte in (0, 1):
            expected = crop.apply_segmentation(resize.apply_segmentation(image[..., byte].copy()))
            np.testing.assert_array_equal(found >> 8 * byte & 255, expected)


def test_color_augmentation():
    """Each call differs; a gray stays gray, within brightness and contrast."""
    np.random.seed(0)
    gray = np.full((4, 5, 3), 100, dtype=np.uint8)
    images = [distort_colors(gray) for _ in range(50)]
    assert len({image.tobytes() for image in images}) > 25
    for image in images:
        assert (image == image[..., :1]).all()
        assert (100 - 32) * 0.5 - 1 <= image[0, 0, 0] <= (100 + 32) * 1.5


def test_colors_are_augmented_in_training_only(cfg):
    cfg.INPUT.COLOR_AUG_SSD = True
    assert PanopticDatasetMapper(cfg, is_train=True).color_augmentation
    assert not PanopticDatasetMapper(cfg, is_train=False).color_augmentation
