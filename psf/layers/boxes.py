"""Boxes: conversions and generalised intersection over union.

``boxes`` are (cx, cy, w, h), ``boxes_xyxy`` are (x0, y0, x1, y1); any unit. Shapes: ... is any
number of leading dimensions, broadcast where two tensors are given.
"""

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) centres and sizes to corners."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """(..., 4) corners to centres and sizes."""
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def generalized_box_iou(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor, eps: float = 1e-6) -> Tensor:
    """
    Generalised IoU (arXiv 1902.09630) of broadcast pairs of boxes.

    Args:
        boxes1_xyxy: (..., 4) corners; pass (Q, 1, 4) and (G, 4) for all pairs.
        boxes2_xyxy: (..., 4) corners.
        eps: least union and least enclosing area, so that empty boxes give finite values.

    Returns:
        (...), in [-1, 1].
    """
    size1 = boxes1_xyxy[..., 2:] - boxes1_xyxy[..., :2]
    size2 = boxes2_xyxy[..., 2:] - boxes2_xyxy[..., :2]
    low = torch.maximum(boxes1_xyxy[..., :2], boxes2_xyxy[..., :2])
    high = torch.minimum(boxes1_xyxy[..., 2:], boxes2_xyxy[..., 2:])
    overlap = (high - low).clamp(min=0).prod(dim=-1)
    union = (size1.prod(dim=-1) + size2.prod(dim=-1) - overlap).clamp(min=eps)
    hull_low = torch.minimum(boxes1_xyxy[..., :2], boxes2_xyxy[..., :2])
    hull_high = torch.maximum(boxes1_xyxy[..., 2:], boxes2_xyxy[..., 2:])
    hull = (hull_high - hull_low).clamp(min=0).prod(dim=-1).clamp(min=eps)
    return overlap / union - (hull - union) / hull


def masks_to_boxes(masks: Tensor) -> Tensor:
    """
    The tight box of every mask.

    Args:
        masks: (G, H, W) bool.

    Returns:
        (G, 4) float corners (x0, y0, x1, y1) in pixels, the far edge exclusive; zeros for an empty
        mask.
    """
    columns, rows = masks.any(dim=1), masks.any(dim=2)  # (G, W), (G, H)
    boxes = torch.stack(
        [_first(columns), _first(rows), _last(columns) + 1, _last(rows) + 1], dim=-1
    )
    return boxes.where(columns.any(dim=-1, keepdim=True), 0).float()


def _first(flags: Tensor) -> Tensor:
    """Index of the first True of (G, n), 0 where there is none."""
    return flags.to(torch.uint8).argmax(dim=-1)


def _last(flags: Tensor) -> Tensor:
    return flags.shape[-1] - 1 - _first(flags.flip(-1))
