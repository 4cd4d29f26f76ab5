"""Boxes: conversions and generalised intersection over union.

``boxes`` are (cx, cy, w, h), ``boxes_xyxy`` are (x0, y0, x1, y1); any unit. Shapes: ... is any
number of leading dimensions, broadcast where two tensors are given.
"""

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) centres and sizes to corners."""
    centre, size = boxes.split(2, dim=-1)
    half = size / 2
    return torch.cat([centre - half, centre + half], dim=-1)


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
    low1, high1 = boxes1_xyxy.split(2, dim=-1)
    low2, high2 = boxes2_xyxy.split(2, dim=-1)
    overlap, union = _overlap_and_union(boxes1_xyxy, boxes2_xyxy, eps)
    hull_size = torch.maximum(high1, high2) - torch.minimum(low1, low2)
    hull = _area(hull_size.clamp(min=0)).clamp(min=eps)
    return overlap / union - (hull - union) / hull


def box_iou(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor, eps: float = 1e-6) -> Tensor:
    """IoU of broadcast pairs of boxes, (...) in [0, 1]; as :func:`generalized_box_iou`."""
    overlap, union = _overlap_and_union(boxes1_xyxy, boxes2_xyxy, eps)
    return overlap / union


def _overlap_and_union(
    boxes1_xyxy: Tensor, boxes2_xyxy: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    low1, high1 = boxes1_xyxy.split(2, dim=-1)
    low2, high2 = boxes2_xyxy.split(2, dim=-1)
    overlap = _area((torch.minimum(high1, high2) - torch.maximum(low1, low2)).clamp(min=0))
    return overlap, (_area(high1 - low1) + _area(high2 - low2) - overlap).clamp(min=eps)


def _area(size: Tensor) -> Tensor:
    """(..., 2) sides to (...). Not prod(): its gradient is many operations."""
    width, height = size.unbind(-1)
    return width * height


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
