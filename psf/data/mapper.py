"""The dataset mapper: from a record of a panoptic data set to the input of the model.

Shapes: H x W the image file, h x w the augmented image, G ground-truth segments.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from psf.images import read_image
from psf.panoptic_png import read_panoptic_ids, unknown_ids

from .augmentation import build_augmentations, distort_colors
from .class_map import ClassMap, model_classes
from .coco_panoptic import register_listed
from .index_masks import IndexMasks, TargetInstances, tight_boxes
from .resampling import augment, transform_index_map


class _Targets(NamedTuple):
    """The targets of an image before augmentation."""

    index_map: NDArray[np.integer]  # (H, W), 1 + the target at each pixel; 0 is none
    classes: list[int]  # G classes of the model


class _Runs(NamedTuple):
    """Runs of pixels of one segment, in pixel order."""

    segments: NDArray[np.intp]  # 1 + the segment's position in the JSON; 0 is void
    lengths: NDArray[np.intp]  # pixels


class PanopticDatasetMapper:
    """
    Reads, augments and converts one image of a panoptic data set.

    In training the result has ``instances`` with ``gt_classes`` (G,) int64, the model's classes
    (things 0..K-1, then stuff); ``gt_boxes`` (G, 4), absolute xyxy, tight around the masks; and
    ``gt_masks``, :class:`IndexMasks` of (G, h, w). Crowds, void and segments outside a crop are not
    targets; the segments of a stuff class are one target.
    """

    @configurable
    def __init__(
        self,
        *,
        augmentations: Sequence[T.Augmentation],
        image_format: str,
        class_map: ClassMap | None,
        color_augmentation: bool = False,
        class_maps: Mapping[str, ClassMap] | None = None,
        draw_seeds: bool = False,
    ) -> None:
        """
        Args:
            augmentations: geometric, applied to the image and to its masks.
            image_format: "RGB" or "BGR", the channels of the result.
            class_map: the model's classes; None for inference, which makes no ``instances``.
            color_augmentation: distort the colours as SSD, after the geometry.
            class_maps: the model's classes by ``dataset_name`` of a record; None: ``class_map``
                holds for all.
            draw_seeds: add a random ``seed`` to every image, for denoising and sampled points.
        """
        self.draw_seeds = draw_seeds
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.class_map = class_map
        self.color_augmentation = color_augmentation
        self.class_maps = class_maps

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        register_listed(cfg.DATASETS.REGISTER)
        class_maps = _class_maps(cfg.DATASETS.TRAIN) if is_train else {}
        return {
            "augmentations": build_augmentations(cfg, is_train),
            "image_format": cfg.INPUT.FORMAT,
            "class_map": class_maps[cfg.DATASETS.TRAIN[0]] if is_train else None,
            "class_maps": class_maps if len(set(class_maps.values())) > 1 else None,
            "color_augmentation": is_train and cfg.INPUT.COLOR_AUG_SSD,
            "draw_seeds": is_train
            and (
                cfg.MODEL.PSF.LOCATION_DECODER.DENOISING.GROUPS > 0
                or cfg.MODEL.PSF.MASK_POINTS.WEIGHT > 0
            ),
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """
        Args:
            dataset_dict: an image in Detectron2's format, with ``pan_seg_file_name`` and
                ``segments_info`` in training (:func:`psf.data.load_coco_panoptic`). Not modified.

        Returns:
            A copy with ``image`` (3, h, w) uint8 and, in training, ``instances`` and perhaps
            ``seed``.
        """
        result = dict(dataset_dict)
        image = read_image(result["file_name"], self.image_format)
        utils.check_image_size(result, image)  # also fills in height and width if absent
        pixels, transforms = augment(image, self.augmentations)
        if self.color_augmentation:
            pixels = distort_colors(pixels)
        # Image and index map share a storage, so that a worker sends them as one file.
        memory = _empty_planes(*pixels.shape[:2])
        planes = memory.numpy()
        _split_channels(pixels, planes[:3])
        result["image"] = memory[:3]
        if self.class_map is not None:
            targets = _read_targets(result, image.shape[:2], self._class_map_of(result))
            index_map = transform_index_map(targets.index_map, transforms)
            if index_map.dtype == np.uint8:
                planes[3] = index_map
                indices = memory[3]
            else:
                indices = torch.from_numpy(np.require(index_map, requirements=["C", "W"]))
            result["instances"] = _to_instances(indices, targets.classes)
        if self.draw_seeds:
            result["seed"] = int(np.random.randint(2**31))
        return result

    def _class_map_of(self, record: dict[str, Any]) -> ClassMap:
        if self.class_maps is None:
            assert self.class_map is not None
            return self.class_map
        name = record.get("dataset_name", "")
        if name not in self.class_maps:
            raise ValueError(
                f"'{record['file_name']}': the data sets of DATASETS.TRAIN number their classes "
                "differently, and this record does not say which one it is of ('dataset_name'). "
                "Register them with psf.data.register_panoptic or DATASETS.REGISTER."
            )
        return self.class_maps[name]


def _class_maps(names: Sequence[str]) -> dict[str, ClassMap]:
    """The classes of the data sets, which must have the same, in the order of the first's."""
    if not names:
        raise ValueError("DATASETS.TRAIN is empty. Name at least one registered data set.")
    first, *others = [MetadataCatalog.get(name) for name in names]
    return {
        first.name: ClassMap.from_metadata(first),
        **{other.name: model_classes(other, first) for other in others},
    }


def _read_targets(
    record: dict[str, Any], image_shape: tuple[int, int], class_map: ClassMap
) -> _Targets:
    """The targets of an image of ``image_shape`` (H, W)."""
    path = record["pan_seg_file_name"]
    if path is None:
        raise ValueError(
            f"'{record['file_name']}' has no panoptic ground truth: its JSON lists no annotations. "
            "Train on a data set with annotations (DATASETS.TRAIN)."
        )
    ids = read_panoptic_ids(path)
    if ids.shape != image_shape:
        raise ValueError(
            f"'{path}' is {ids.shape[1]}x{ids.shape[0]} pixels, but its image "
            f"'{record['file_name']}' is {image_shape[1]}x{image_shape[0]}. They must match."
        )
    segments = record["segments_info"]
    runs = _find_segments(ids, [s["id"] for s in segments], path)
    classes: list[int] = []
    # One byte per pixel if that can count the targets; 0 is void.
    dtype = np.uint8 if len(segments) < 256 else np.int32
    target_of_segment = np.zeros(len(segments) + 1, dtype=dtype)
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
    index_map = np.repeat(target_of_segment[runs.segments], runs.lengths).reshape(ids.shape)
    return _Targets(index_map, classes)


def _find_segments(ids: NDArray[np.uint32], segment_ids: Sequence[int], path: str) -> _Runs:
    """
    Find the segments of the JSON in the PNG, run by run of equal ids.

    Args:
        ids: (H, W), as in the PNG.
        segment_ids: as in the JSON.
        path: the PNG, for the messages.
    """
    # Segments are compact, so looking up runs of equal ids is faster than looking up pixels.
    flat = ids.ravel()
    starts = np.append(0, np.flatnonzero(flat[1:] != flat[:-1]) + 1)
    known_ids = np.array([0, *segment_ids], dtype=np.uint32)
    order = known_ids.argsort()
    position = np.searchsorted(known_ids[order], flat[starts])
    segments = order[np.minimum(position, len(segment_ids))]

    unknown = flat[starts][known_ids[segments] != flat[starts]]
    if unknown.size:
        raise ValueError(unknown_ids(path, np.unique(unknown).tolist(), segment_ids))
    is_absent = np.bincount(segments, minlength=len(known_ids)) == 0
    absent = known_ids[1:][is_absent[1:]]
    if absent.size:
        raise ValueError(
            f"'{path}' has no pixel of the segments {absent[:5].tolist()} of its JSON. Remove them "
            "from segments_info or correct the PNG."
        )
    return _Runs(segments, np.diff(starts, append=flat.size))


def _empty_planes(height: int, width: int) -> Tensor:
    """(4, height, width) uint8, uninitialised."""
    planes = torch.empty((4, height, width), dtype=torch.uint8)
    # A worker sends tensors through shared memory. Allocated there they are not copied again, which
    # cuts the transfer to a third.
    return planes if get_worker_info() is None else planes.share_memory_()


def _split_channels(image: NDArray[np.uint8], planes: NDArray[np.uint8]) -> None:
    """(h, w, 3) -> (3, h, w); several times faster than a transposed copy."""
    contiguous = np.ascontiguousarray(image)
    for channel in range(3):
        cv2.extractChannel(contiguous, channel, dst=planes[channel])


def _to_instances(index_map: Tensor, classes: Sequence[int]) -> Instances:
    """The targets that are visible in the augmented index map (h, w)."""
    extents = tight_boxes(index_map.numpy(), len(classes))
    visible = np.flatnonzero(extents[:, 2])  # x1 is 0 where there is no pixel
    instances = TargetInstances(tuple(index_map.shape))
    gt_classes = np.array(classes, dtype=np.int64)[visible]
    instances.gt_classes = torch.from_numpy(gt_classes)
    instances.gt_boxes = Boxes(torch.from_numpy(extents[visible].astype(np.float32)))
    instances.gt_masks = IndexMasks(index_map, tuple((visible + 1).tolist()))
    return instances
