"""Mask head: attention logits become masks, without a map of every head ever being stored.

:func:`mask_maps_reference` is the definition; :func:`mask_maps` gives the same numbers a few
queries at a time and computes the logits again in the backward pass, so that training keeps the
queries, the keys and one map a query. On a CPU the kernels of ``psf._C`` do that, a tile of
positions at a time.

Shapes: n images of one size, R queries whose masks are wanted, S positions, L levels, M heads,
D channels a head.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from psf.layers.native import has_cpu_kernels
from psf.modeling.pixel_encoder import Shape

# Attention logits (over images, heads, queries and positions) that exist at a time: 32 MiB in
# float32. Fewer would make matrix products too small to be fast, more would not make them faster.
CHUNK_SIZE = 1 << 23


class Levels(NamedTuple):
    """Where the maps of the images lie in the keys; the same for all of them."""

    padded: tuple[Shape, ...]  # L x (H_l, W_l), of the maps that the S positions run through
    valid: tuple[Shape, ...]  # L x (h, w), the part of each that is not padding


class HeadWeights(NamedTuple):
    """The parameters of a mask head."""

    projection: Tensor  # (L, M, M), of each level's heads
    bias: Tensor  # (L, M)
    weight: Tensor  # (L, M), of all heads in the mask
    mask_bias: Tensor  # (1,)


def mask_maps_reference(q: Tensor, k: Tensor, levels: Levels, weights: HeadWeights) -> Tensor:
    """Same as :func:`mask_maps`, all at once in plain PyTorch: its definition."""
    logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # (n, M, R, S)
    maps: Tensor = weights.mask_bias
    start = 0
    for level, ((height, width), (h, w)) in enumerate(
        zip(levels.padded, levels.valid, strict=True)
    ):
        own = logits[..., start : start + height * width].unflatten(-1, (height, width))
        own = own[..., :h, :w].permute(0, 2, 3, 4, 1)  # (n, R, h, w, M)
        projection, bias, weight = (x[level].to(own.dtype) for x in weights[:3])
        score = F.linear(F.linear(own, projection, bias).relu(), weight[None])  # (n, R, h, w, 1)
        score = score.flatten(0, 1).permute(0, 3, 1, 2)  # queries as the batch, may be empty
        # A linear map commutes with bilinear upsampling, so each level is reduced to one channel
        # before it is upsampled: M times less memory than upsampling the heads.
        maps = maps + F.interpolate(
            score, size=levels.valid[0], mode="bilinear", align_corners=False
        )
        start += height * width
    return maps.reshape(len(q), q.shape[2], *levels.valid[0])


def mask_maps(q: Tensor, k: Tensor, levels: Levels, weights: HeadWeights) -> Tensor:
    """
    The masks of queries from their attention logits (paper, section 3.4).

    Every level's logits are projected by a linear layer over the heads and rectified; the heads of
    all levels, upsampled to the finest, are summed with weights. Differentiable once.

    Args:
        q: (n, M, R, D); R may be 0.
        k: (n, M, S, D), of the same type; levels concatenated from fine to coarse.
        levels: their sizes.
        weights: of the head.

    Returns:
        (n, R, h, w) maps at the finest level, without activation; at least float32.
    """
    if has_cpu_kernels(q, k, *weights):
        native: Tensor = _NativeMaskMaps.apply(q, k, levels, *weights)
        return native
    scaled = q * q.shape[-1] ** -0.5
    parameters = (x.to(q.dtype) for x in weights[:3])
    bias = weights.mask_bias.to(torch.promote_types(q.dtype, torch.float32))
    maps: Tensor = _MaskMaps.apply(scaled, k, levels, *parameters, bias)
    return maps


class _NativeMaskMaps(torch.autograd.Function):
    """The kernels of the extension. Saves nothing but its inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        levels: Levels,
        projection: Tensor,
        bias: Tensor,
        weight: Tensor,
        mask_bias: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(q, k, projection, bias, weight)
        ctx.sizes = padded, valid = tuple([x for size in sizes for x in size] for sizes in levels)
        maps: Tensor = torch.ops.psf.mask_maps.default(
            q, k, padded, valid, projection, bias, weight, mask_bias
        )
        return maps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, *parameters = ctx.saved_tensors
        grad_q, grad_k, *grads = torch.ops.psf.mask_maps_backward.default(
            grad, q, k, *ctx.sizes, *parameters
        )
        return grad_q, grad_k, None, *grads


class _MaskMaps(torch.autograd.Function):
    """Plain PyTorch, from scaled queries. Saves nothing but its inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        levels: Levels,
        projection: Tensor,
        bias: Tensor,
        weight: Tensor,
        mask_bias: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(q, k, projection, bias, weight)
        ctx.levels = levels
        n, _, num_queries, _ = q.shape
        target = levels.valid[0]
        maps = mask_bias.expand(n, num_queries, *target).contiguous()
        keys = [_valid_keys(k, levels, level) for level in range(len(levels.valid))]
        for rows in _chunks(q, levels):
            own = q[:, :, rows]
            for level, shape in enumerate(levels.valid):
                logits = _logits(own, keys[level])
                hidden = _hidden(logits, projection[level], bias[level])
                score = torch.matmul(weight[level], hidden).view(-1, 1, *shape)  # (n * r, 1, h, w)
                if shape != target:
                    score = F.interpolate(score, target, mode="bilinear", align_corners=False)
                maps[:, rows] += score.view(n, -1, *target)
        return maps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, projection, bias, weight = ctx.saved_tensors
        levels: Levels = ctx.levels
        n, num_heads, _, _ = q.shape
        target = levels.valid[0]
        # Sums over positions and chunks are kept in the type of the result.
        grad_q, grad_k = torch.zeros_like(q), k.new_zeros(k.shape)
        grad_projection, grad_bias, grad_weight = (
            torch.zeros_like(x, dtype=grad.dtype) for x in (projection, bias, weight)
        )
        keys = [_valid_keys(k, levels, level) for level in range(len(levels.valid))]
        for rows in _chunks(q, levels):
            own, r = q[:, :, rows], rows.stop - rows.start
            for level, shape in enumerate(levels.valid):
                grad_score = grad[:, rows].to(q.dtype)
                if shape != target:
                    # Maps as channels, not as images: twice as fast on a CPU.
                    grad_score = torch.ops.aten.upsample_bilinear2d_backward(
                        grad_score.reshape(1, n * r, *target), target, [1, n * r, *shape], False
                    )
                grad_score = grad_score.reshape(n, 1, -1)
                logits = _logits(own, keys[level])  # (n, M, r * s)
                hidden = _hidden(logits, projection[level], bias[level])
                grad_weight[level] += (hidden @ grad_score.transpose(1, 2)).sum((0, 2))
                # What goes on through the rectifier, but for the factor of the head's weight.
                passed = hidden.gt_(0).mul_(grad_score)
                own_weight = weight[level]
                grad_bias[level] += own_weight * passed.sum((0, 2))
                grad_projection[level] += own_weight[:, None] * (
                    passed @ logits.transpose(1, 2)
                ).sum(0)
                weighted = (projection[level] * own_weight[:, None]).T  # (M, M): rows of the logits
                grad_logits = torch.bmm(weighted.expand(n, -1, -1), passed)
                grad_logits = grad_logits.view(n * num_heads, r, -1)
                grad_q[:, :, rows] += (grad_logits @ keys[level]).view_as(own)
                grad_keys = grad_logits.transpose(1, 2) @ own.reshape(n * num_heads, r, -1)
                _add_to_valid(grad_k, grad_keys.view(n, num_heads, -1, q.shape[-1]), levels, level)
        grads = (
            x.to(y.dtype)
            for x, y in zip(
                (grad_projection, grad_bias, grad_weight), (projection, bias, weight), strict=True
            )
        )
        return grad_q, grad_k, None, *grads, grad.sum().view(1)


def _chunks(q: Tensor, levels: Levels) -> Iterator[slice]:
    """Runs through the queries (n, M, R, D), so many at a time that their logits are few enough."""
    n, num_heads, num_queries, _ = q.shape
    positions = max(h * w for h, w in levels.valid)
    step = max(1, CHUNK_SIZE // max(1, n * num_heads * positions))
    for start in range(0, num_queries, step):
        yield slice(start, min(start + step, num_queries))


def _valid_keys(k: Tensor, levels: Levels, level: int) -> Tensor:
    """(n * M, h * w, D) the keys of one level without padding."""
    keys = _level(k, levels, level)
    (height, width), (h, w) = levels.padded[level], levels.valid[level]
    if (h, w) != (height, width):
        keys = keys.unflatten(2, (height, width))[:, :, :h, :w].flatten(2, 3)
    return keys.flatten(0, 1)


def _add_to_valid(grad_k: Tensor, grad: Tensor, levels: Levels, level: int) -> None:
    """Add (n, M, h * w, D) to the places of (n, M, S, D) that :func:`_valid_keys` takes."""
    shape, valid = levels.padded[level], levels.valid[level]
    own = _level(grad_k, levels, level).unflatten(2, shape)
    own[:, :, : valid[0], : valid[1]] += grad.unflatten(2, valid)


def _level(k: Tensor, levels: Levels, level: int) -> Tensor:
    areas = [h * w for h, w in levels.padded]
    start = sum(areas[:level])
    return k[:, :, start : start + areas[level]]


def _logits(q: Tensor, keys: Tensor) -> Tensor:
    """(n, M, r * s) from scaled queries (n, M, r, D) and keys (n * M, s, D)."""
    n, num_heads = q.shape[:2]
    return torch.bmm(q.flatten(0, 1), keys.transpose(1, 2)).view(n, num_heads, -1)


def _hidden(logits: Tensor, projection: Tensor, bias: Tensor) -> Tensor:
    """(n, M, r * s) the rectified projection of logits of one level."""
    projection = projection.expand(len(logits), -1, -1)
    return torch.baddbmm(bias[:, None], projection, logits).relu_()
