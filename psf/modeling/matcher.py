"""Bipartite matching between thing queries and ground-truth things (paper, section 3.5).

Shapes: N images, Q queries and G ground-truth things of one image, K thing classes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from psf.layers.boxes import cxcywh_to_xyxy, generalized_box_iou
from psf.layers.native import has_cpu_kernels
from psf.modeling.losses import FOCAL_ALPHA, dice_cost, focal_cost


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
    num_points: int = 0  # random points at which masks are compared; 0: everywhere


def match(cost: Tensor) -> Assignment:
    """
    Assign each segment to a different query at the least total cost.

    Args:
        cost: (Q, G); either may be 0, and G may exceed Q: then the dearest segments go without. NaN
            and infinite entries count as dearer than all others: a diverged model gets some
            assignment, and a non-finite loss that the trainer names.
    """
    ((assignment,),) = _match_all(cost.flatten()[None, None], [(cost.shape[0], cost.shape[1])])
    return assignment


@torch.no_grad()
def match_things(
    logits: Tensor,
    boxes: Tensor,
    labels: Sequence[Tensor],
    gt_boxes: Sequence[Tensor],
    weights: MatchingWeights,
) -> list[list[Assignment]]:
    """
    Match predictions by class, L1 distance and generalised IoU of boxes.

    Args:
        logits: (layers, N, Q, K).
        boxes: (layers, N, Q, 4) cxcywh in [0, 1].
        labels: N x (G,) int64 in [0, K).
        gt_boxes: N x (G, 4) cxcywh in [0, 1].
        weights: of the three terms.

    Returns:
        layers x N assignments.
    """
    sizes = [(logits.shape[2], len(image)) for image in labels]
    if has_cpu_kernels(boxes):
        costs = torch.ops.psf.things_cost.default(
            *(logits.to(boxes.dtype), boxes, list(labels)),
            *([image.to(boxes.dtype) for image in gt_boxes], *weights, FOCAL_ALPHA),
        )
        return _match_all(costs, sizes)
    # Filled up to the most things of an image; the filling's costs are left aside.
    padded_labels = pad_sequence(list(labels), batch_first=True)  # (N, G)
    padded_boxes = pad_sequence(list(gt_boxes), batch_first=True)  # (N, G, 4)
    cost = detection_cost(logits, boxes, padded_labels, padded_boxes, weights)
    return _match_all(cost.flatten(2), sizes, cost.shape[2:])


class MaskPairs(NamedTuple):
    """The predictions and the things of one image whose masks are to be compared."""

    logits: Tensor  # (Q, K)
    boxes: Tensor  # (Q, 4) cxcywh in [0, 1]
    masks: Tensor  # (Q, H, W) soft masks, >= 0
    labels: Tensor  # (G,) int64 in [0, K)
    gt_boxes: Tensor  # (G, 4) cxcywh in [0, 1]
    gt_masks: Tensor  # (G, H, W) in [0, 1]


@torch.no_grad()
def match_masks(images: Sequence[MaskPairs], weights: MaskMatchingWeights) -> list[Assignment]:
    """
    Match predictions by masks, too.

    Args:
        images: what is compared in each.
        weights: of the terms, and how many points of the masks are looked at.

    Returns:
        One assignment an image.
    """
    costs = []
    for image in images:
        cost = detection_cost(
            image.logits, image.boxes, image.labels, image.gt_boxes, weights.detection
        )
        masks, gt_masks = image.masks.float(), image.gt_masks
        if weights.num_points:
            masks, gt_masks = _at_random_points(masks, gt_masks, weights.num_points)
        costs.append(cost + weights.dice_weight * dice_cost(masks, gt_masks))
    sizes = [(cost.shape[0], cost.shape[1]) for cost in costs]
    # As one row each, filled up, for one transfer.
    rows = pad_sequence([cost.flatten() for cost in costs], batch_first=True)
    return _match_all(rows[None], sizes)[0]


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


def _match_all(
    costs: Tensor, sizes: Sequence[tuple[int, int]], padded: Sequence[int] | None = None
) -> list[list[Assignment]]:
    """
    Solve all assignment problems of a batch on the CPU, with one transfer there and one back.

    Args:
        costs: (layers, N, P), in every row of P numbers a matrix.
        sizes: N x (Q, G) of the matrices.
        padded: (Q', G') that the rows are matrices of, of which the first Q and G count; None:
            the first Q * G numbers are the matrix.

    Returns:
        layers x N assignments, on the device of the costs.
    """
    # NumPy from here on: a tensor operation takes about as long as one of these problems.
    found = []
    finite = costs.nan_to_num(nan=1e6, posinf=1e6, neginf=-1e6)  # see match()
    for layer in finite.cpu().numpy():
        for row, (num_queries, num_segments) in zip(layer, sizes, strict=True):
            if padded is None:
                matrix = row[: num_queries * num_segments].reshape(num_queries, num_segments)
            else:
                matrix = row.reshape(padded)[:num_queries, :num_segments]
            found.append(np.stack(linear_sum_assignment(matrix)))  # (2, pairs)
    pairs = torch.from_numpy(np.concatenate(found, axis=1)).to(costs.device, torch.int64)
    split = pairs.split([problem.shape[1] for problem in found], dim=1)
    assignments = [Assignment(*pair.unbind()) for pair in split]
    return [assignments[i : i + len(sizes)] for i in range(0, len(assignments), len(sizes))]


def detection_cost(
    logits: Tensor, boxes: Tensor, labels: Tensor, gt_boxes: Tensor, weights: MatchingWeights
) -> Tensor:
    """
    The cost of every pair by class, L1 distance and generalised IoU of boxes.

    Args:
        logits: (..., Q, K).
        boxes: (..., Q, 4) cxcywh in [0, 1].
        labels: (G,) int64 in [0, K), or (N, G) where the logits are (..., N, Q, K).
        gt_boxes: (G, 4) cxcywh in [0, 1], or (N, G, 4).
        weights: of the three terms.

    Returns:
        (..., Q, G).
    """
    boxes, gt_boxes = boxes.float()[..., :, None, :], gt_boxes[..., None, :, :]
    cost = weights.class_weight * focal_cost(logits.float(), labels)
    cost = cost + weights.l1_weight * (boxes - gt_boxes).abs().sum(-1)
    giou = generalized_box_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(gt_boxes))
    return cost - weights.giou_weight * giou
