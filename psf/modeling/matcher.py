"""Bipartite matching between thing queries and ground-truth things (paper, section 3.5).

Shapes: Q queries and G ground-truth things of one image, K thing classes.
"""

from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from psf.layers.boxes import cxcywh_to_xyxy, generalized_box_iou
from psf.modeling.losses import dice_cost, focal_cost


class Assignment(NamedTuple):
    """Which thing query is responsible for which ground-truth thing; min(Q, G) pairs."""

    query: Tensor  # (min(Q, G),) int64, ascending
    segment: Tensor  # (min(Q, G),) int64


class MatchingWeights(NamedTuple):
    """Weights of the terms of the matching cost; Deformable DETR's and the paper's are 2, 5, 2."""

    class_weight: float
    l1_weight: float
    giou_weight: float


class MaskMatchingWeights(NamedTuple):
    """Weights of the matching that also compares masks; the official code's are 4, 5, 2 and 2."""

    detection: MatchingWeights
    dice_weight: float


def match(cost: Tensor) -> Assignment:
    """
    Assign each segment to a different query at the least total cost.

    Args:
        cost: (Q, G); either may be 0, and G may exceed Q: then the dearest segments go without. NaN
            and infinite entries count as dearer than all others: a diverged model gets some
            assignment, and a non-finite loss that the trainer names.
    """
    finite = cost.nan_to_num(nan=1e6, posinf=1e6, neginf=-1e6)
    query, segment = linear_sum_assignment(finite.cpu().numpy())
    return Assignment(
        torch.as_tensor(query, dtype=torch.int64), torch.as_tensor(segment, dtype=torch.int64)
    )


@torch.no_grad()
def match_things(
    logits: Tensor, boxes: Tensor, labels: Tensor, gt_boxes: Tensor, weights: MatchingWeights
) -> list[Assignment]:
    """
    Match the predictions of one image by class, L1 distance and generalised IoU of boxes.

    Args:
        logits: (layers, Q, K).
        boxes: (layers, Q, 4) cxcywh in [0, 1].
        labels: (G,) int64 in [0, K).
        gt_boxes: (G, 4) cxcywh in [0, 1].
        weights: of the three terms.

    Returns:
        One assignment a layer.
    """
    # One transfer for all layers, then the assignment problems are solved on the CPU.
    layers = detection_cost(logits, boxes, labels, gt_boxes, weights).cpu()
    return [Assignment(*(index.to(logits.device) for index in match(layer))) for layer in layers]


@torch.no_grad()
def match_masks(
    logits: Tensor,
    boxes: Tensor,
    masks: Tensor,
    labels: Tensor,
    gt_boxes: Tensor,
    gt_masks: Tensor,
    weights: MaskMatchingWeights,
) -> Assignment:
    """
    Match predictions of one image by masks, too.

    Args:
        logits: (Q, K).
        boxes: (Q, 4) cxcywh in [0, 1].
        masks: (Q, H, W) soft masks, >= 0.
        labels: (G,) int64 in [0, K).
        gt_boxes: (G, 4) cxcywh in [0, 1].
        gt_masks: (G, H, W) in [0, 1].
        weights: of the four terms.
    """
    cost = detection_cost(logits, boxes, labels, gt_boxes, weights.detection)
    cost = cost + weights.dice_weight * dice_cost(masks.float(), gt_masks)
    return Assignment(*(index.to(logits.device) for index in match(cost)))


def detection_cost(
    logits: Tensor, boxes: Tensor, labels: Tensor, gt_boxes: Tensor, weights: MatchingWeights
) -> Tensor:
    """
    The cost of every pair by class, L1 distance and generalised IoU of boxes.

    Args:
        logits: (..., Q, K).
        boxes: (..., Q, 4) cxcywh in [0, 1].
        labels: (G,) int64 in [0, K).
        gt_boxes: (G, 4) cxcywh in [0, 1].
        weights: of the three terms.

    Returns:
        (..., Q, G).
    """
    boxes = boxes.float()
    cost = weights.class_weight * focal_cost(logits.float(), labels)
    cost = cost + weights.l1_weight * (boxes[..., :, None, :] - gt_boxes).abs().sum(-1)
    giou = generalized_box_iou(cxcywh_to_xyxy(boxes)[..., :, None, :], cxcywh_to_xyxy(gt_boxes))
    return cost - weights.giou_weight * giou
