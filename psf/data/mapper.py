"""From the dict of a panoptic data set to the input of the model.

Shapes: H x W the image file, h x w the augmented image, G ground-truth segments.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Boxes, Instances
from numpy.typing import NDArray
from scipy.ndimage import find_objects

from psf.panoptic_png import read_panoptic_ids

from .class_map import ClassMap
from .images import read_image

# DETR's crop (datasets/coco.py): half of the images are cropped after a resize to one of these.
_CROP_PROBABILITY = 0.5
_SHORT_SIDE_BEFORE_CROP = [400, 500, 600]


class _Targets(NamedTuple):
    """The ground truth of an image that is trained on."""

    index_map: NDArray[np.integer]  # (H, W), 1 + the target at each pixel; 0 is none
    classes: list[int]  # G classes of the model


class PanopticDatasetMapper:
    """
    Reads, augments and converts one image of a panoptic data set.

    In training the result has ``instances`` with ``gt_classes`` (G,) int64, the model's classes
    (things 0..K-1, then stuff); ``gt_boxes`` (G, 4), absolute xyxy, tight around the masks; and
    ``gt_masks`` BitMasks (G, h, w). Crowds and void are never targets, segments of one stuff class
    are one target, and what a crop removes is dropped.
    """

    @configurable
    def __init__(
        self,
        *,
        augmentations: Sequence[T.Augmentation],
        image_format: str,
        class_map: ClassMap | None,
    ) -> None:
        """
        Args:
            augmentations: applied to the image and to its masks.
            image_format: "RGB" or "BGR", the channels of the result.
            class_map: the model's classes; None for inference, which makes no ``instances``.
        """
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.class_map = class_map

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        return {
            "augmentations": build_augmentations(cfg, is_train),
            "image_format": cfg.INPUT.FORMAT,
            "class_map": _common_class_map(cfg.DATASETS.TRAIN) if is_train else None,
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """
        Args:
            dataset_dict: an image in Detectron2's format, with ``pan_seg_file_name`` and
                ``segments_info`` in training (:func:`psf.data.load_coco_panoptic`). Not modified.

        Returns:
            A copy with ``image`` (3, h, w) uint8 and, in training, ``instances``.
        """
        result = dict(dataset_dict)
        image = read_image(result["file_name"], self.image_format)
        utils.check_image_size(result, image)  # also fills in height and width if absent
        image_shape = image.shape[:2]
        aug_input = T.AugInput(image)
        transforms = self.augmentations(aug_input)
        channels_first = np.array(aug_input.image.transpose(2, 0, 1), order="C")
        result["image"] = torch.from_numpy(channels_first)  # (3, h, w)
        if self.class_map is not None:
            targets = _read_targets(result, image_shape, self.class_map)
            index_map = _transform(targets.index_map, transforms, len(targets.classes))
            result["instances"] = _to_instances(index_map, targets.classes)
        return result


def build_augmentations(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """Resize and, in training, flip and DETR's crop if ``INPUT.CROP.ENABLED``."""
    if not is_train:
        return [T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)]
    augmentations: list[T.Augmentation] = []
    if cfg.INPUT.RANDOM_FLIP != "none":
        horizontal = cfg.INPUT.RANDOM_FLIP == "horizontal"
        augmentations.append(T.RandomFlip(horizontal=horizontal, vertical=not horizontal))
    if cfg.INPUT.CROP.ENABLED:
        crop = [
            T.ResizeShortestEdge(_SHORT_SIDE_BEFORE_CROP, sample_style="choice"),
            T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE),
        ]
        augmentations.append(T.RandomApply(T.AugmentationList(crop), prob=_CROP_PROBABILITY))
    augmentations.append(
        T.ResizeShortestEdge(
            cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
        )
    )
    return augmentations


def _common_class_map(names: Sequence[str]) -> ClassMap:
    """The classes of the data sets, which must be the same in all of them."""
    if not names:
        raise ValueError("DATASETS.TRAIN is empty. Name at least one registered data set.")
    first, *others = [ClassMap.from_metadata(MetadataCatalog.get(name)) for name in names]
    for name, other in zip(names[1:], others, strict=True):
        if other != first:
            raise ValueError(
                f"DATASETS.TRAIN: the classes of '{names[0]}' and '{name}' differ. Train on data "
                "sets with the same classes only."
            )
    return first


def _read_targets(
    record: dict[str, Any], image_shape: tuple[int, int], class_map: ClassMap
) -> _Targets:
    """The targets of an image of ``image_shape`` (H, W)."""
    path = record["pan_seg_file_name"]
    if path is None:  # known to have no annotation
        return _Targets(np.zeros(image_shape, dtype=np.uint8), [])
    ids = read_panoptic_ids(path)
    if ids.shape != image_shape:
        raise ValueError(
            f"'{path}' is {ids.shape[1]}x{ids.shape[0]} pixels, but its image "
            f"'{record['file_name']}' is {image_shape[1]}x{image_shape[0]}. They must match."
        )
    segments = record["segments_info"]
    segment_map = _index_segments(ids, [s["id"] for s in segments], path)

    classes: list[int] = []
    target_of_segment = np.zeros(len(segments) + 1, dtype=segment_map.dtype)  # 0 stays void
    latest_target: dict[int, int] = {}  # of each class
    for i, segment in enumerate(segments, start=1):
        if segment["iscrowd"]:
            continue
        model_class = class_map.to_model(segment["category_id"], is_thing=segment["isthing"])
        if segment["isthing"] or model_class not in latest_target:
            classes.append(model_class)
            latest_target[model_class] = len(classes)
        # Unlike the official code: segments of one stuff class are united. There the last write
        # of an indexed assignment with duplicates wins, which is undefined (MODEL.md, Q21).
        target_of_segment[i] = latest_target[model_class]
    return _Targets(target_of_segment[segment_map], classes)


def _index_segments(
    ids: NDArray[np.uint32], segment_ids: Sequence[int], path: str
) -> NDArray[np.integer]:
    """
    Replace the segment ids of a PNG by 1 + their position in the JSON.

    Args:
        ids: (H, W), as in the PNG.
        segment_ids: as in the JSON.
        path: the PNG, for the messages.
    """
    # Segments are compact: it pays to look up each run of equal ids instead of each pixel.
    flat = ids.ravel()
    starts = np.flatnonzero(np.append(True, flat[1:] != flat[:-1]))
    lengths = np.diff(starts, append=flat.size)
    known_ids = np.array([0, *segment_ids], dtype=np.uint32)
    order = known_ids.argsort()
    position = np.searchsorted(known_ids[order], flat[starts])
    segment_of_run = order[np.minimum(position, len(segment_ids))]

    unknown = flat[starts][known_ids[segment_of_run] != flat[starts]]
    if unknown.size:
        raise ValueError(
            f"'{path}' contains segment ids {np.unique(unknown)[:5].tolist()} that its JSON lacks. "
            "Add them to segments_info or paint them 0 (void)."
        )
    is_absent = np.bincount(segment_of_run, minlength=len(known_ids)) == 0
    absent = known_ids[1:][is_absent[1:]]
    if absent.size:
        raise ValueError(
            f"'{path}' has no pixel of the segments {absent[:5].tolist()} of its JSON. Remove them "
            "from segments_info or correct the PNG."
        )
    dtype = np.uint8 if len(segment_ids) < 256 else np.int32
    return np.repeat(segment_of_run.astype(dtype), lengths).reshape(ids.shape)


def _transform(
    index_map: NDArray[np.integer], transforms: T.Transform, max_index: int
) -> NDArray[np.integer]:
    """Transform an index map, byte by byte: only for uint8 has Detectron2 an exact resize."""
    result = transforms.apply_segmentation(index_map.astype(np.uint8))
    if max_index > 255:
        high_byte = transforms.apply_segmentation((index_map >> 8).astype(np.uint8))
        result = result.astype(np.int32) + 256 * high_byte.astype(np.int32)
    return result


def _to_instances(index_map: NDArray[np.integer], classes: Sequence[int]) -> Instances:
    """The targets that are visible in the augmented index map (h, w)."""
    visible = [  # the slices in y and x that contain each target
        (i, extent)
        for i, extent in enumerate(find_objects(index_map, max_label=len(classes)))
        if extent is not None
    ]
    masks = torch.empty(len(visible), *index_map.shape, dtype=torch.bool)
    for mask, (i, _) in zip(masks, visible, strict=True):
        np.equal(index_map, i + 1, out=mask.numpy())
    boxes = [(x.start, y.start, x.stop, y.stop) for _, (y, x) in visible]
    instances = Instances(index_map.shape)
    instances.gt_classes = torch.tensor([classes[i] for i, _ in visible], dtype=torch.int64)
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_masks = BitMasks(masks)
    return instances
