"""Losses and matching costs as pure functions.

Shapes: Q predictions, G ground-truth segments of one image, K classes; ... is any shape.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from psf.modeling.mask_head import resize_masks

# RetinaNet's constants, kept by Deformable DETR and the paper (section 3.6).
FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2.0

DICE_EPS = 1e-6  # added to each squared sum, against empty masks (official code)

# Pixels of upsampled masks that exist at a time in the Dice loss: 16 MiB in float32.
CHUNK_SIZE = 1 << 22

# From so many pixels on, the Dice loss upsamples again in the backward pass: 1 MiB in float32.
MOST_STORED = 1 << 18


def sigmoid_focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """
    Focal loss (arXiv 1708.02002) of independent binary classifiers.

    Args:
        logits: (...).
        targets: (...) in {0, 1}, of the logits' dtype.

    Returns:
        (...), the loss of every element.
    """
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    sign = 1 - 2 * targets
    miss = (logits * sign).sigmoid()  # probability of the wrong answer
    alpha = (1 - FOCAL_ALPHA) + (2 * FOCAL_ALPHA - 1) * targets
    return alpha * miss**FOCAL_GAMMA * cross_entropy


def quality_focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """
    Focal loss of scores that should tell the quality of a box or mask (arXiv 2006.04388).

    Args:
        logits: (...).
        targets: (...) in [0, 1], the quality; 0 where the class is absent.

    Returns:
        (...), 0 where the probability is the quality.
    """
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    alpha = torch.where(targets > 0, FOCAL_ALPHA, 1 - FOCAL_ALPHA)
    return alpha * (logits.sigmoid() - targets).abs() ** FOCAL_GAMMA * cross_entropy


def dice_loss(masks: Tensor, targets: Tensor, eps: float = DICE_EPS) -> Tensor:
    """
    Dice loss with squared denominators (V-Net), the paper's L_seg.

    Args:
        masks: (..., G, H, W) mask probabilities, >= 0.
        targets: (G, H, W) in [0, 1].
        eps: added to each squared sum, against empty masks.

    Returns:
        (..., G): 1 - 2 sum(m t) / (sum(m^2) + sum(t^2)).
    """
    masks, targets = masks.flatten(-2), targets.flatten(-2)
    overlap = 2 * (masks * targets).sum(-1)
    return 1 - overlap / (masks.square().sum(-1) + eps + targets.square().sum(-1) + eps)


def upsampled_dice_loss(
    mask_logits: Tensor, targets: Tensor, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """
    Dice loss of mask logits that are upsampled bilinearly and then activated.

    Large masks are upsampled again in the backward pass, a few at a time, instead of stored.

    Args:
        mask_logits: (layers, G, h, w).
        targets: (G, H, W) in [0, 1], the same for all layers.
        activation: elementwise; gives mask probabilities >= 0.

    Returns:
        (layers, G).
    """
    num_layers, num_segments = mask_logits.shape[:2]
    pixels = num_layers * targets.shape[-2] * targets.shape[-1]  # of one segment

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        # Upsampled before activation: the slope of logits places edges within a cell.
        masks = resize_masks(logits.flatten(0, 1), targets.shape[-2:])
        return dice_loss(activation(masks).unflatten(0, logits.shape[:2]), targets)

    if pixels * num_segments <= MOST_STORED:
        return loss(mask_logits, targets)
    step = max(1, CHUNK_SIZE // pixels)
    parts = zip(mask_logits.split(step, dim=1), targets.split(step), strict=True)
    losses = [
        checkpoint(loss, *part, use_reentrant=False, preserve_rng_state=False) for part in parts
    ]
    return torch.cat(losses, dim=1)


def point_loss(
    mask_logits: Tensor, masks: Tensor, num_points: int, generator: torch.Generator
) -> Tensor:
    """
    Binary cross-entropy at random points, most of them where masks are uncertain.

    PointRend's sampling with Mask2Former's numbers (arXiv 2112.01527, section 3.3): of three times
    as many points the most uncertain make three quarters, the others are anywhere. Unlike there
    the points are the same for all layers, chosen by the last.

    Args:
        mask_logits: (layers, G, h, w), bilinear between the centres of cells.
        masks: (G, H, W) bool.
        num_points: at which each mask is compared.
        generator: on the CPU.

    Returns:
        (layers, G), the mean over the points.
    """
    device, (num_masks, height, width) = masks.device, masks.shape
    candidates = torch.rand(num_masks, 3 * num_points, 2, generator=generator).to(device)
    logits = mask_logits.transpose(0, 1)  # (G, layers, h, w)
    with torch.no_grad():
        certainty = _sample(logits[:, -1:], candidates)[:, 0].abs()  # (G, 3 num_points)
        num_uncertain = 3 * num_points // 4
        index = certainty.topk(num_uncertain, largest=False).indices
        uncertain = candidates.gather(1, index[..., None].expand(-1, -1, 2))
        points = torch.cat([uncertain, candidates[:, : num_points - num_uncertain]], dim=1)
        size = torch.tensor([width, height], device=device)
        x, y = (points * size).long().minimum(size - 1).unbind(-1)  # (G, num_points)
        targets = masks[torch.arange(num_masks, device=device)[:, None], y, x].to(logits.dtype)
    sampled = _sample(logits, points)  # (G, layers, num_points)
    targets = targets[:, None].expand_as(sampled)
    losses = F.binary_cross_entropy_with_logits(sampled, targets, reduction="none")
    return losses.mean(-1).T


def _sample(maps: Tensor, points: Tensor) -> Tensor:
    """(G, channels, h, w) at (G, P, 2) points (x, y) in [0, 1] to (G, channels, P)."""
    grid = 2 * points[:, :, None].to(maps.dtype) - 1
    sampled = F.grid_sample(maps, grid, padding_mode="border", align_corners=False)
    return sampled.squeeze(-1)


def shrink_masks(masks: Tensor, size: Sequence[int]) -> Tensor:
    """(G, H, W) bool to (G, *size) in [0, 1], bilinear; a few at a time, as floats are large."""
    step = max(1, CHUNK_SIZE // max(1, masks.shape[-2] * masks.shape[-1]))
    return torch.cat([resize_masks(part.float(), size) for part in masks.split(step)])


def focal_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """
    The change of the focal loss if a prediction were assigned to a segment (Deformable DETR).

    Args:
        logits: (..., Q, K).
        labels: (G,) int64 in [0, K), or (N, G) where the logits are (..., N, Q, K).

    Returns:
        (..., Q, G).
    """
    index = labels[..., None, :].expand(*logits.shape[:-1], labels.shape[-1])
    chosen = logits.gather(-1, index)
    probability = chosen.sigmoid()
    positive = (1 - probability) ** FOCAL_GAMMA * -F.logsigmoid(chosen)
    negative = probability**FOCAL_GAMMA * -F.logsigmoid(-chosen)
    return FOCAL_ALPHA * positive - (1 - FOCAL_ALPHA) * negative


def dice_cost(masks: Tensor, gt_masks: Tensor, eps: float = 1e-3) -> Tensor:
    """
    1 - Dice coefficient of every pair of a prediction and a segment.

    Args:
        masks: (Q, H, W) mask probabilities, >= 0.
        gt_masks: (G, H, W) in [0, 1].
        eps: added to each squared area, against empty masks (official code).

    Returns:
        (Q, G).
    """
    masks, gt_masks = masks.flatten(1), gt_masks.flatten(1)
    overlap = 2 * masks @ gt_masks.T
    norms = (masks.square().sum(1) + eps)[:, None] + (gt_masks.square().sum(1) + eps)
    return 1 - overlap / norms
