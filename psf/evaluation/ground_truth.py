"""Panoptic ground truth: of one image, as Detectron2's output, and of a data set, as PQ needs it.

Shapes: H x W pixels of the image.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from psf.data.annotations import read_panoptic_json
from psf.panoptic_png import read_panoptic_ids, unknown_ids

from .panoptic_quality import TruthSegment

_SEGMENT = np.dtype([("id", "u4"), ("category_id", "i8"), ("area", "f8"), ("iscrowd", "?")])


class PanopticSegmentation(NamedTuple):
    """Detectron2's ``panoptic_seg``, of a prediction or of the ground truth."""

    panoptic_seg: Tensor  # (H, W) int32, the id of the segment at each pixel; 0 is void
    segments_info: list[dict[str, Any]]  # id, category_id (contiguous), isthing, ... of each


def load_ground_truth(dataset_dict: dict[str, Any]) -> PanopticSegmentation:
    """
    Read the ground truth of a record of a panoptic data set.

    Raises:
        FileNotFoundError: the PNG does not exist.
        ValueError: the record has no ground truth, the PNG is damaged, or it has an id that the
            record does not list.
    """
    path = dataset_dict.get("pan_seg_file_name")
    if path is None:
        raise ValueError(
            f"'{dataset_dict['file_name']}' has no panoptic ground truth ('pan_seg_file_name'). "
            "Use a data set with annotations."
        )
    ids = read_panoptic_ids(path).astype(np.int32)
    segments_info = [dict(info) for info in dataset_dict["segments_info"]]
    known = [info["id"] for info in segments_info]
    unknown = set(np.unique(ids).tolist()) - {*known, 0}
    if unknown:
        raise ValueError(unknown_ids(path, unknown, known))
    return PanopticSegmentation(torch.from_numpy(ids), segments_info)


class AnnotatedImage(NamedTuple):
    """The annotation of an image, in about 0.7 KB."""

    file_name: str  # of the PNG
    packed_segments: NDArray[Any]  # (G,) of _SEGMENT

    @property
    def segments(self) -> dict[int, TruthSegment]:
        """The segments by id."""
        return {row[0]: TruthSegment(*row[1:]) for row in self.packed_segments.tolist()}


class PanopticAnnotations(NamedTuple):
    """What PQ needs of a JSON in the COCO panoptic format."""

    categories: list[dict[str, Any]]
    images: dict[Any, AnnotatedImage] | None  # by image id; None: a test set without annotations
    file_names: dict[Any, str]  # of all images, by image id


def read_annotations(path: str) -> PanopticAnnotations:
    """
    Read a JSON in the COCO panoptic format.

    Raises:
        FileNotFoundError, ValueError: as :func:`psf.data.annotations.read_panoptic_json`.
    """
    data = read_panoptic_json(path)
    names = {image_id: image["file_name"] for image_id, image in data.images.items()}
    if data.annotations is None:
        annotated = None
    else:
        annotated = {a["image_id"]: pack(a) for a in data.annotations}
    return PanopticAnnotations(data.categories, annotated, names)


def pack(annotation: dict[str, Any]) -> AnnotatedImage:
    """Keep what PQ needs of an annotation."""
    segments = [
        (s["id"], s["category_id"], s.get("area", math.nan), s.get("iscrowd", 0))
        for s in annotation["segments_info"]
    ]
    return AnnotatedImage(annotation["file_name"], np.array(segments, dtype=_SEGMENT))
