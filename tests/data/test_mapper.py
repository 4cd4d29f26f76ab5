import copy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.structures import BitMasks
from PIL import Image
from plain_mapper import PlainMapper

from psf.data import (
    ClassMap,
    PanopticDatasetMapper,
    build_augmentations,
    panoptic_metadata,
)
from psf.data.index_masks import TargetInstances

# Contiguous ids 0, 1 are things; 2, 3 stuff (conftest.py).
CLASS_MAP = ClassMap(thing_ids=(0, 1), stuff_ids=(2, 3))
BIG_ID = 255 + 256 * 7 + 65536 * 200


def segment(segment_id, category_id, iscrowd=0):
    isthing = category_id < 2
    return {"id": segment_id, "category_id": category_id, "isthing": isthing, "iscrowd": iscrowd}


# 0 void, 1 and BIG_ID dogs, 2 a crowd of cats, 3 and 4 both sky, 5 grass.
IDS = np.array(
    [
        [3, 3, 3, 0, 4, 4],
        [1, 1, 3, 0, 4, 2],
        [1, 5, 5, 5, BIG_ID, 2],
        [5, 5, 5, 5, BIG_ID, BIG_ID],
    ]
)
SEGMENTS = [
    segment(5, 3),
    segment(1, 1),
    segment(2, 0, iscrowd=1),
    segment(3, 2),
    segment(BIG_ID, 1),
    segment(4, 2),
]


def write(folder, ids, image=None):
    """Save an id map and an image (by default the id map itself) and return the record."""
    ids = np.asarray(ids)
    rgb = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=-1).astype(np.uint8)
    Image.fromarray(rgb).save(folder / "panoptic.png")
    (image or Image.fromarray(rgb)).save(folder / "image.png")
    return {
        "file_name": str(folder / "image.png"),
        "pan_seg_file_name": str(folder / "panoptic.png"),
        "image_id": 7,
        "height": ids.shape[0],
        "width": ids.shape[1],
        "segments_info": [],
    }


@pytest.fixture
def record(tmp_path):
    return {**write(tmp_path, IDS), "segments_info": copy.deepcopy(SEGMENTS)}


def make_mapper(*augmentations, class_map=CLASS_MAP):
    return PanopticDatasetMapper(
        augmentations=augmentations, image_format="RGB", class_map=class_map
    )


def reference_targets(ids, segments, class_map):
    """Slow and obvious: [(class, mask, box)], in the order of the segments."""
    targets = []
    for s in segments:
        if s["iscrowd"]:
            continue
        model_class = class_map.to_model(s["category_id"], is_thing=s["isthing"])
        mask = ids == s["id"]
        same = [t for t in targets if t[0] == model_class and not s["isthing"]]
        if same:
            same[0][1] |= mask
        else:
            targets.append([model_class, mask])
    result = []
    for model_class, mask in targets:
        y, x = np.nonzero(mask)
        if len(x):
            result.append((model_class, mask, [x.min(), y.min(), x.max() + 1, y.max() + 1]))
    return result


def assert_targets(instances, expected):
    assert instances.gt_classes.tolist() == [c for c, _, _ in expected]
    assert instances.gt_classes.dtype == torch.int64
    assert instances.gt_boxes.tensor.dtype == torch.float32
    assert instances.gt_boxes.tensor.tolist() == [[float(v) for v in box] for _, _, box in expected]
    assert instances.gt_masks.tensor.dtype == torch.bool
    assert instances.gt_masks.tensor.shape == (len(expected), *instances.image_size)
    for mask, (_, expected_mask, _) in zip(instances.gt_masks.tensor, expected, strict=True):
        np.testing.assert_array_equal(mask.numpy(), expected_mask)


# ------------------------------------------------------------------------------------- targets


def test_an_image_without_segments(tmp_path):
    record = write(tmp_path, np.zeros((3, 5), dtype=int))
    instances = make_mapper()(record)["instances"]
    assert instances.image_size == (3, 5)
    assert_targets(instances, [])
    with pytest.raises(ValueError, match=r"no panoptic ground truth.*DATASETS\.TRAIN"):
        make_mapper()({**record, "pan_seg_file_name": None})


def test_only_a_crowd(tmp_path):
    record = write(tmp_path, np.full((3, 5), 2))
    record["segments_info"] = [segment(2, 0, iscrowd=1)]
    assert_targets(make_mapper()(record)["instances"], [])


def test_targets_by_hand(record):
    """Order of the JSON; the two skies are one target; boxes end after the last pixel."""
    result = make_mapper()(record)
    instances = result["instances"]
    assert instances.gt_classes.tolist() == [3, 1, 2, 1]  # grass, dog, sky, dog
    assert instances.gt_boxes.tensor.tolist() == [
        [0, 2, 4, 4],
        [0, 1, 2, 3],
        [0, 0, 6, 2],
        [4, 2, 6, 4],
    ]
    assert instances.gt_masks.tensor.sum((1, 2)).tolist() == [7, 3, 7, 3]
    assert_targets(instances, reference_targets(IDS, SEGMENTS, CLASS_MAP))


def test_the_record_is_kept_and_not_modified(record):
    before = copy.deepcopy(record)
    result = make_mapper(T.Resize((8, 12)))(record)
    assert record == before
    for key in ("file_name", "image_id", "height", "width"):
        assert result[key] == before[key]
    assert result["image"].shape == (3, 8, 12)
    assert result["image"].dtype == torch.uint8
    assert result["instances"].image_size == (8, 12)


def test_inference_reads_no_annotations(record):
    for key in ("pan_seg_file_name", "segments_info", "height", "width"):
        del record[key]
    result = make_mapper(class_map=None)(record)
    assert "instances" not in result
    assert (result["height"], result["width"]) == IDS.shape


def test_classes_follow_the_class_map(record):
    """The same picture in a data set whose contiguous ids interleave."""
    class_map = ClassMap(thing_ids=(0, 3), stuff_ids=(1, 2))
    contiguous = {0: 0, 1: 3, 2: 1, 3: 2}
    for s in record["segments_info"]:
        s["category_id"] = contiguous[s["category_id"]]
    instances = make_mapper(class_map=class_map)(record)["instances"]
    assert instances.gt_classes.tolist() == [3, 1, 2, 1]


@pytest.mark.parametrize("count", [254, 255, 256, 600])
def test_many_segments(tmp_path, count):
    ids = np.zeros((30, 24), dtype=int)
    ids.ravel()[:count] = 1 + np.random.default_rng(0).choice((1 << 24) - 1, count, replace=False)
    record = write(tmp_path, ids)
    record["segments_info"] = [segment(int(i), 1) for i in ids.ravel()[:count]]
    flipped = make_mapper(T.RandomFlip(prob=1.0))(record)["instances"]
    assert_targets(flipped, reference_targets(ids[:, ::-1], record["segments_info"], CLASS_MAP))


# ------------------------------------------------------------------------------- augmentations


@pytest.mark.parametrize(("height", "width"), [(1, 1), (20, 400), (400, 20)])
def test_extreme_shapes(tmp_path, height, width):
    record = write(tmp_path, np.full((height, width), 9))
    record["segments_info"] = [segment(9, 2)]
    result = make_mapper(T.ResizeShortestEdge(64, 96), T.RandomFlip())(record)
    h, w = result["image"].shape[1:]
    assert max(h, w) <= 96
    assert_targets(result["instances"], [(2, np.ones((h, w), dtype=bool), [0, 0, w, h])])


def test_from_config(cfg, record):
    trained = PanopticDatasetMapper(cfg, is_train=True)
    assert trained.class_map == CLASS_MAP
    assert trained(record)["image"].shape == (3, 64, 96)
    tested = PanopticDatasetMapper(cfg, is_train=False)(record)
    assert tested["image"].shape == (3, 48, 72)
    assert "instances" not in tested


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_channel_order(cfg, tmp_path, image_format):
    cfg.INPUT.FORMAT = image_format
    record = write(tmp_path, np.zeros((4, 4), dtype=int), Image.new("RGB", (4, 4), (10, 20, 30)))
    image = PanopticDatasetMapper(cfg, is_train=True)(record)["image"]
    expected = [10, 20, 30] if image_format == "RGB" else [30, 20, 10]
    assert image[:, 0, 0].tolist() == expected


def test_data_sets_of_different_classes_cannot_be_mixed(cfg):
    cfg.DATASETS.TRAIN = ("test_mapper", "test_mapper_other")
    message = "classes of data set 'test_mapper_other' are not those of 'test_mapper': stuff .*sky"
    with pytest.raises(ValueError, match=message):
        PanopticDatasetMapper(cfg, is_train=True)
    cfg.DATASETS.TRAIN = ()
    with pytest.raises(ValueError, match=r"DATASETS\.TRAIN is empty"):
        PanopticDatasetMapper(cfg, is_train=True)


def test_data_sets_with_their_classes_in_another_order(cfg, tmp_path):
    """A grass is the same class of the model in both; a record must say where it is from."""
    other = MetadataCatalog.get("test_mapper_other")
    other.__dict__.update(panoptic_metadata(other.categories[::-1]))
    cfg.DATASETS.TRAIN = ("test_mapper", "test_mapper_other")
    mapper = PanopticDatasetMapper(cfg, is_train=True)
    mapper.augmentations = T.AugmentationList([])
    record = write(tmp_path, np.full((3, 5), 7))
    for name, contiguous_id in (("test_mapper", 3), ("test_mapper_other", 2)):
        infos = [{"id": 7, "category_id": contiguous_id, "isthing": False, "iscrowd": 0}]
        result = mapper({**record, "segments_info": infos, "dataset_name": name})
        assert result["instances"].gt_classes.tolist() == [3]
    with pytest.raises(ValueError, match="does not say which one it is of"):
        mapper({**record, "segments_info": infos})


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("key", ["file_name", "pan_seg_file_name"])
def test_missing_files_are_named(record, key):
    Path(record[key]).unlink()
    with pytest.raises(FileNotFoundError, match=f"{Path(record[key]).name}' does not exist"):
        make_mapper()(record)


def test_size_that_differs_from_the_json(record):
    record["width"] = 99
    with pytest.raises(SizeMismatchError, match=r"image\.png, got \(6, 4\), expect \(99, 4\)"):
        make_mapper()(record)


def test_size_that_differs_from_the_png(record):
    Image.new("RGB", (5, 4)).save(record["pan_seg_file_name"])
    message = r"panoptic\.png' is 5x4 pixels, but its image '.*image\.png' is 6x4"
    with pytest.raises(ValueError, match=message):
        make_mapper()(record)


def test_segment_that_the_json_lacks(record):
    del record["segments_info"][4]
    message = rf"panoptic\.png' has segment ids \[{BIG_ID}\] that its JSON does not list"
    with pytest.raises(ValueError, match=message):
        make_mapper()(record)


def test_segment_that_the_png_lacks(record):
    record["segments_info"].append(segment(77, 0))
    message = r"panoptic\.png' has no pixel of the segments \[77\] of its JSON"
    with pytest.raises(ValueError, match=message):
        make_mapper()(record)


# ----------------------------------------------------------------------------------- real images


# ------------------------------------------------------------------- against the plain mapper

RECIPES = {
    "shorter side": ["INPUT.MIN_SIZE_TRAIN", (40, 64, 97)],
    "crop": [
        *("INPUT.MIN_SIZE_TRAIN", (40, 64, 97)),
        *("INPUT.CROP.ENABLED", True),
        *("INPUT.CROP.SIZE", [384, 600]),
    ],
    "large-scale jitter": ["INPUT.AUGMENTATION", "large_scale_jitter", "INPUT.IMAGE_SIZE", 96],
    "fixed crop": [
        *("INPUT.AUGMENTATION", "fixed_crop", "INPUT.MIN_SIZE_TRAIN", (40, 64, 97)),
        *("INPUT.CROP.SIZE", [50, 70]),
    ],
}


def big_record(folder):
    """60 x 90 pixels of noise, with patches as segments."""
    ids = np.kron(IDS, np.ones((15, 15), dtype=int))
    noise = np.random.default_rng(0).integers(0, 256, (*ids.shape, 3), dtype=np.uint8)
    record = write(folder, ids, Image.fromarray(noise))
    return {**record, "segments_info": copy.deepcopy(SEGMENTS)}


def merge_stuff(instances):
    """{class: masks and boxes} of a plain mapper's instances, as the model is trained on them."""
    targets = []
    for i in range(len(instances)):
        c, mask = int(instances.gt_classes[i]), instances.gt_masks.tensor[i]
        same = [t for t in targets if t[0] == c and c >= 2]
        if same:
            same[0][1] |= mask
        else:
            targets.append([c, mask.clone()])
    targets = [(c, mask) for c, mask in targets if mask.any()]
    masks = torch.stack([mask for _, mask in targets]) if targets else torch.zeros(0, 1, 1)
    boxes = BitMasks(masks).get_bounding_boxes()
    return [(c, mask.numpy(), box.tolist()) for (c, mask), box in zip(targets, boxes, strict=True)]


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("flip", ["horizontal", "vertical"])
def test_equals_the_plain_mapper_bit_for_bit(cfg, tmp_path, recipe, flip):
    record = big_record(tmp_path)
    cfg.merge_from_list([*recipe, "INPUT.RANDOM_FLIP", flip, "INPUT.FORMAT", "RGB"])
    ours, plain = PanopticDatasetMapper(cfg), PlainMapper(build_augmentations(cfg, True))
    for seed in range(8):
        results = []
        for mapper in (ours, plain):
            np.random.seed(seed)
            results.append(mapper(record))
        assert torch.equal(results[0]["image"], results[1]["image"])
        assert_targets(results[0]["instances"], merge_stuff(results[1]["instances"]))


@pytest.mark.parametrize(
    "augmentation",
    [T.RandomRotation([20, 20]), T.RandomContrast(0.5, 0.6)],
)
def test_any_augmentation_of_detectron2_works(tmp_path, augmentation):
    record = big_record(tmp_path)
    results = []
    for mapper in (make_mapper(augmentation), PlainMapper([augmentation])):
        np.random.seed(3)
        results.append(mapper(record))
    assert torch.equal(results[0]["image"], results[1]["image"])
    assert_targets(results[0]["instances"], merge_stuff(results[1]["instances"]))


def test_what_a_worker_sends_arrives(record):
    expected = make_mapper()(record)
    loader = torch.utils.data.DataLoader(
        [record] * 2, batch_size=None, num_workers=1, collate_fn=make_mapper()
    )
    for received in loader:
        assert torch.equal(received["image"], expected["image"])
        instances = received["instances"]
        assert isinstance(instances, TargetInstances)
        assert_targets(instances, reference_targets(IDS, SEGMENTS, CLASS_MAP))
    copied = copy.deepcopy(expected["instances"])
    assert_targets(copied, reference_targets(IDS, SEGMENTS, CLASS_MAP))
    assert len(expected["instances"][torch.tensor([0, 2])]) == 2


def test_image_and_masks_share_one_file_on_the_way(record):
    """One storage, which is in shared memory before it is sent."""
    mapper = make_mapper()
    (received,) = torch.utils.data.DataLoader(
        [record], batch_size=None, num_workers=1, collate_fn=partial(with_shared, mapper)
    )
    assert received["was_shared"]
    for result in (mapper(record), received):
        image, index_map = result["image"], result["instances"].gt_masks.index_map
        assert index_map.data_ptr() - image.data_ptr() == image.numel()
        assert index_map.untyped_storage().data_ptr() == image.untyped_storage().data_ptr()


def with_shared(mapper, record):
    """What the mapper makes, and whether the image is in shared memory before it is sent."""
    result = mapper(record)
    return {**result, "was_shared": result["image"].is_shared()}
