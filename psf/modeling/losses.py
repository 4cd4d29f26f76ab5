"""Losses and matching costs as pure functions.

Shapes: Q predictions, G ground-truth segments of one image, K classes; ... is any shape.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from psf.layers.native import has_cpu_kernels
from psf.modeling.postprocessing import as_they_are, resize_maps

# RetinaNet's constants, kept by Deformable DETR and the paper (section 3.6).
FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2.0

DICE_EPS = 1e-6  # added to each squared sum, against empty masks (official code)

# Pixels of upsampled masks that exist at a time in the Dice loss: 16 MiB in float32.
CHUNK_SIZE = 1 << 22


def sigmoid_focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """
    Focal loss (arXiv 1708.02002) of independent binary classifiers; differentiable once, by logits.

    Args:
        logits: (...).
        targets: in {0, 1}, of the logits' dtype; its shape broadcasts to theirs.

    Returns:
        (...), the loss of every element.
    """
    loss: Tensor = _SigmoidFocalLoss.apply(logits, targets)
    return loss


class _SigmoidFocalLoss(torch.autograd.Function):
    """
    With s = 1 for a target of 0 and -1 for 1, z = s x is the logit of the wrong answer, q =
    sigmoid(z) its probability, and softplus(z) the cross-entropy:

        loss = alpha q^gamma softplus(z),
        d loss / dx = s alpha q^gamma (gamma (1 - q) softplus(z) + q).

    One node, as autograd's own would be twenty small operations.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        sign = 1 - 2 * targets
        alpha = (1 - FOCAL_ALPHA) + (2 * FOCAL_ALPHA - 1) * targets
        wrong = logits * sign
        miss = wrong.sigmoid()
        cross_entropy = _softplus(wrong)
        scale = alpha * miss**FOCAL_GAMMA
        if ctx.needs_input_grad[0]:
            slope = torch.add(miss, (1 - miss) * cross_entropy, alpha=FOCAL_GAMMA)
            ctx.save_for_backward(slope.mul_(scale).mul_(sign))
        return scale.mul_(cross_entropy)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None


def _softplus(x: Tensor) -> Tensor:
    """log(1 + e^x). From 40 on this is x even in float64; torch's own threshold is 20."""
    return F.softplus(x, threshold=40)


def dice_loss(masks: Tensor, targets: Tensor, eps: float = DICE_EPS) -> Tensor:
    """
    Dice loss with squared denominators (V-Net), the paper's L_seg.

    Args:
        masks: (G, H, W) soft masks, >= 0.
        targets: (G, H, W) in [0, 1].
        eps: added to each squared sum, against empty masks.

    Returns:
        (G,): 1 - 2 sum(m t) / (sum(m^2) + sum(t^2)).
    """
    masks, targets = masks.flatten(1), targets.flatten(1)
    overlap = 2 * (masks * targets).sum(1)
    return 1 - overlap / (masks.square().sum(1) + eps + targets.square().sum(1) + eps)


def upsampled_dice_loss(
    maps: Tensor, targets: Tensor, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """
    Dice loss of maps that are upsampled bilinearly and then activated.

    Same as :func:`dice_loss` of the upsampled masks, but the backward pass computes these again, a
    few at a time, so that nothing of their size is stored. Differentiable once, by the maps.

    Args:
        maps: (layers, G, h, w), which share the targets.
        targets: (G, H, W) in [0, 1].
        activation: element by element, of the upsampled maps; differentiable.

    Returns:
        (layers, G).
    """
    loss: Tensor
    if _has_dice_kernel(maps, targets, activation):
        sigmoid = activation is torch.sigmoid
        loss = torch.ops.psf.upsampled_dice_loss.default(maps, targets, sigmoid, DICE_EPS)
    else:
        loss = _UpsampledDiceLoss.apply(maps, targets, activation)
    return loss


def _has_dice_kernel(maps: Tensor, targets: Tensor, activation: Callable[[Tensor], Tensor]) -> bool:
    return activation in (torch.sigmoid, as_they_are) and has_cpu_kernels(maps, targets)


class _UpsampledDiceLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, maps: Tensor, targets: Tensor, activation: Callable[[Tensor], Tensor]
    ) -> Tensor:
        overlap, norms = (maps.new_empty(maps.shape[:2]) for _ in range(2))
        for rows in _chunks(maps, targets):
            masks = activation(_upsample(maps[:, rows], targets))  # (layers, r, H, W)
            own, target = masks.flatten(2).transpose(0, 1), targets[rows].flatten(1)
            # Products and norms rather than sums of products: nothing else of their size.
            overlap[:, rows] = 2 * torch.bmm(own, target[..., None])[..., 0].T
            squares = [torch.linalg.vector_norm(x, dim=-1).square() for x in (own, target)]
            norms[:, rows] = squares[0].T + DICE_EPS + squares[1] + DICE_EPS
        ctx.save_for_backward(maps, targets, overlap, norms)
        ctx.activation = activation
        return 1 - overlap / norms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        maps, targets, overlap, norms = ctx.saved_tensors
        by_target = -2 * grad / norms
        by_mask = 2 * grad * overlap / norms.square()
        grad_maps = torch.empty_like(maps)
        for rows in _chunks(maps, targets):
            upsampled = _upsample(maps[:, rows], targets)
            with torch.enable_grad():
                upsampled.requires_grad_()
                masks = ctx.activation(upsampled)
            grad_masks = masks.detach() * by_mask[:, rows, None, None]
            grad_masks.addcmul_(targets[rows], by_target[:, rows, None, None])
            (grad_upsampled,) = torch.autograd.grad(masks, upsampled, grad_masks)
            size = maps[:, rows].flatten(0, 1)[None].shape
            # Maps as channels, not as images: twice as fast on a CPU.
            grad_maps[:, rows] = torch.ops.aten.upsample_bilinear2d_backward(
                grad_upsampled.flatten(0, 1)[None], targets.shape[-2:], size, False
            ).view_as(grad_maps[:, rows])
        return grad_maps, None, None


def _upsample(maps: Tensor, targets: Tensor) -> Tensor:
    """(layers, r, h, w) to the targets' size (layers, r, H, W)."""
    return resize_maps(maps.flatten(0, 1), targets.shape[-2:]).unflatten(0, maps.shape[:2])


def _chunks(maps: Tensor, targets: Tensor) -> Iterator[slice]:
    """Runs through the G segments, so many at a time that their upsampled masks are few enough."""
    num_segments, height, width = targets.shape
    step = max(1, CHUNK_SIZE // max(1, len(maps) * height * width))
    for start in range(0, num_segments, step):
        yield slice(start, min(start + step, num_segments))


def shrink_masks(masks: Tensor, size: Sequence[int]) -> Tensor:
    """(G, H, W) bool to (G, *size) in [0, 1], bilinear; a few at a time, as floats are large."""
    step = max(1, CHUNK_SIZE // max(1, masks.shape[-2] * masks.shape[-1]))
    return torch.cat([resize_maps(part.float(), size) for part in masks.split(step)])


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
    positive = (1 - probability) ** FOCAL_GAMMA * _softplus(-chosen)
    negative = probability**FOCAL_GAMMA * _softplus(chosen)
    return FOCAL_ALPHA * positive - (1 - FOCAL_ALPHA) * negative


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
