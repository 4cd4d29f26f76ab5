"""Panoptic ground truth of one image, read from its PNG.

Shapes: H x W pixels of the image.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from psf.panoptic_png import read_panoptic_ids


class PanopticSegmentation(NamedTuple):
    """Detectron2's ``panoptic_seg``, of a prediction or of the ground truth."""

    panoptic_seg: Tensor  # (H, W) int32, the id of the segment at each pixel; 0 is void
    segments_info: list[dict[str, Any]]  # id, category_id (contiguous), isthing, ... of each


def load_ground_truth(dataset_dict: dict[str, Any]) -> PanopticSegmentation:
    """
    Read the ground truth of an image.

    Args:
        dataset_dict: a record of a panoptic data set, with ``pan_seg_file_name`` and
            ``segments_info``.

    Returns:
        The segments, those of the record; nothing of the record is changed or shared.

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
    unknown = set(np.unique(ids).tolist()) - {info["id"] for info in segments_info} - {0}
    if unknown:
        raise ValueError(
            f"The panoptic PNG '{path}' has segment ids {sorted(unknown)} that its JSON does not "
            "list. PNG and JSON are of different versions: copy both again."
        )
    return PanopticSegmentation(torch.from_numpy(ids), segments_info)
