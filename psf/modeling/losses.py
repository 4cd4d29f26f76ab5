"""Losses and matching costs as pure functions.

Shapes: Q predictions, G ground-truth segments of one image, K classes; ... is any shape.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

# RetinaNet's constants, kept by Deformable DETR and the paper (section 3.6).
FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2.0


def sigmoid_focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """
    Focal loss (arXiv 1708.02002) of independent binary classifiers.

    Args:
        logits: (...).
        targets: (...) in {0, 1}, of the logits' dtype.

    Returns:
        (...), the loss of every element.
    """
    probability = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    miss = targets * (1 - probability) + (1 - targets) * probability
    alpha = targets * FOCAL_ALPHA + (1 - targets) * (1 - FOCAL_ALPHA)
    return alpha * miss**FOCAL_GAMMA * cross_entropy


def dice_loss(masks: Tensor, targets: Tensor, eps: float = 1e-6) -> Tensor:
    """
    Dice loss with squared denominators (V-Net), the paper's L_seg.

    Args:
        masks: (G, H, W) soft masks, >= 0.
        targets: (G, H, W) in [0, 1].
        eps: added to each squared sum, against empty masks (official code).

    Returns:
        (G,): 1 - 2 sum(m t) / (sum(m^2) + sum(t^2)).
    """
    masks, targets = masks.flatten(1), targets.flatten(1)
    overlap = 2 * (masks * targets).sum(1)
    return 1 - overlap / (masks.square().sum(1) + eps + targets.square().sum(1) + eps)


def focal_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """
    The change of the focal loss if a prediction were assigned to a segment (Deformable DETR).

    Args:
        logits: (..., Q, K).
        labels: (G,) int64 in [0, K).

    Returns:
        (..., Q, G).
    """
    chosen = logits[..., labels]
    ones = torch.ones_like(chosen)
    return sigmoid_focal_loss(chosen, ones) - sigmoid_focal_loss(chosen, 1 - ones)


def dice_cost(masks: Tensor, gt_masks: Tensor, eps: float = 1e-3) -> Tensor:
    """
    1 - Dice coefficient of every pair of a prediction and a segment.

    Args:
        masks: (Q, H, W) soft masks, >= 0.
        gt_masks: (G, H, W) in [0, 1].
        eps: added to each squared sum, against empty masks (official code).

    Returns:
        (Q, G).
    """
    masks, gt_masks = masks.flatten(1), gt_masks.flatten(1)
    overlap = 2 * masks @ gt_masks.T
    norms = (masks.square().sum(1) + eps)[:, None] + (gt_masks.square().sum(1) + eps)
    return 1 - overlap / norms
