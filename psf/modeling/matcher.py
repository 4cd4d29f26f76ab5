"""Bipartite matching between thing queries and ground-truth things (paper, section 3.5).

Shapes: N images, Q queries and G ground-truth things of one image, K thing classes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from psf.layers.boxes import cxcywh_to_xyxy, generalized_box_iou
from psf.modeling.losses import dice_cost, focal_cost


class Matching(NamedTuple):
    """The pairs of one image."""

    query: Tensor  # (min(Q, G),) int64, ascending
    target: Tensor  # (min(Q, G),) int64, the ground-truth thing of each query


class MatchingWeights(NamedTuple):
    """Weights of the matching cost; Deformable DETR's and the paper's are 2, 5, 2."""

    class_weight: float
    l1_weight: float
    giou_weight: float


class MaskMatchingWeights(NamedTuple):
    """Weights of a matching that also compares masks; the official code's are 4, 5, 2 and 2."""

    detection: MatchingWeights
    dice_weight: float
    num_points: int = 0  # compare masks at so many random points; 0: everywhere


@torch.no_grad()
def match_boxes(
    pred_logits: Tensor,
    pred_boxes: Tensor,
    labels: Sequence[Tensor],
    gt_boxes: Sequence[Tensor],
    weights: MatchingWeights,
) -> list[list[Matching]]:
    """
    Match predictions by class, L1 distance and generalised IoU of boxes.

    Args:
        pred_logits: (layers, N, Q, K).
        pred_boxes: (layers, N, Q, 4) cxcywh in [0, 1].
        labels: N x (G,) int64 in [0, K).
        gt_boxes: N x (G, 4) cxcywh in [0, 1].
        weights: of the three terms.

    Returns:
        layers x N matchings.
    """
    padded_labels = pad_sequence(list(labels), batch_first=True)  # (N, G)
    padded_boxes = pad_sequence(list(gt_boxes), batch_first=True)  # (N, G, 4)
    cost = detection_cost(pred_logits, pred_boxes, padded_labels, padded_boxes, weights)
    cost = cost.cpu()  # of all layers and images: one synchronisation with the device
    counts = [len(image) for image in labels]
    device = pred_boxes.device
    return [
        [match(image[:, :count], device) for image, count in zip(layer, counts, strict=True)]
        for layer in cost
    ]


@torch.no_grad()
def match_masks(
    pred_masks: Tensor, gt_masks: Tensor, cost: Tensor, weights: MaskMatchingWeights
) -> Matching:
    """
    Match the predictions of one image by masks, too.

    Args:
        pred_masks: (Q, H, W) mask probabilities, >= 0.
        gt_masks: (G, H, W) in [0, 1].
        cost: (Q, G) of :func:`detection_cost`.
        weights: of the masks, and the points at which they are compared.
    """
    pred_masks = pred_masks.float()
    if weights.num_points:
        pred_masks, gt_masks = _at_random_points(pred_masks, gt_masks, weights.num_points)
    return match(cost + weights.dice_weight * dice_cost(pred_masks, gt_masks), cost.device)


def match(cost: Tensor, device: torch.device | None = None) -> Matching:
    """
    Give every segment a different query at the least total cost.

    Args:
        cost: (Q, G); either may be 0. If there are more segments than queries, the costliest stay
            unmatched. NaN and infinite costs count as larger than all others, so that a diverged
            model gets a matching, and then a non-finite loss that the trainer reports.
        device: of the result; None: that of the cost.
    """
    finite = cost.nan_to_num(nan=1e6, posinf=1e6, neginf=-1e6)
    query, target = linear_sum_assignment(finite.cpu().numpy())
    device = device or cost.device
    return Matching(
        torch.as_tensor(query, dtype=torch.int64, device=device),
        torch.as_tensor(target, dtype=torch.int64, device=device),
    )


def detection_cost(
    pred_logits: Tensor,
    pred_boxes: Tensor,
    labels: Tensor,
    gt_boxes: Tensor,
    weights: MatchingWeights,
) -> Tensor:
    """
    The cost of every pair by class, L1 distance and generalised IoU of boxes.

    Args:
        pred_logits: (..., Q, K).
        pred_boxes: (..., Q, 4) cxcywh in [0, 1].
        labels: (G,) int64 in [0, K), or (N, G) where the logits are (..., N, Q, K).
        gt_boxes: (G, 4) cxcywh in [0, 1], or (N, G, 4).
        weights: of the three terms.

    Returns:
        (..., Q, G).
    """
    boxes, gt_boxes = pred_boxes.float()[..., :, None, :], gt_boxes[..., None, :, :]
    cost = weights.class_weight * focal_cost(pred_logits.float(), labels)
    cost = cost + weights.l1_weight * (boxes - gt_boxes).abs().sum(-1)
    giou = generalized_box_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(gt_boxes))
    return cost - weights.giou_weight * giou


def _at_random_points(masks: Tensor, gt_masks: Tensor, num_points: int) -> tuple[Tensor, Tensor]:
    """Both (..., H, W) at the same random points, (..., num_points, 1), as in Mask2Former."""
    points = torch.rand(1, num_points, 1, 2, device=masks.device) * 2 - 1  # the image is [-1, 1]
    first, second = (
        F.grid_sample(
            x[:, None], points.expand(len(x), -1, -1, -1).to(x.dtype), align_corners=False
        )[:, 0]
        for x in (masks, gt_masks)
    )
    return first, second
