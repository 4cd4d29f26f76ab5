"""Inputs of the operator, and its definition one sample at a time.

Shapes as in psf/layers/ms_deform_attn.py: N images, Q queries, L levels, S positions, M heads, D
channels per head, P sampling points.
"""

import itertools

import pytest
import torch

from psf.layers.ms_deform_attn import has_extension

needs_extension = pytest.mark.skipif(not has_extension(), reason="psf/_C.so is not in use")

SHAPES = [(5, 4), (1, 3), (1, 1)]
SIZES = [5, 4, 1, 3, 1, 1]


def off_the_knots(locations, shapes):
    """Move each coordinate to the nearest at least 1/4 pixel from where the derivative jumps."""
    sizes = torch.tensor(shapes, device="cpu").view(-1, 2).flip(-1)[:, None].double()  # (L, 1, 2)
    sizes = sizes.clamp(min=1)  # a location in an empty level is a number, too
    pixels = locations * sizes - 0.5
    return (pixels.floor() + (pixels - pixels.floor()).clamp(0.25, 0.75) + 0.5) / sizes


def inputs(
    shapes=SHAPES, images=2, queries=7, heads=2, channels=3, points=2, dtype=torch.float64, seed=0
):
    """Locations reach half a level beyond every border."""
    generator = torch.Generator("cpu").manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    positions = sum(h * w for h, w in shapes)
    value = torch.randn(images, positions, heads, channels, **draw)
    locations = 2 * torch.rand(images, queries, heads, len(shapes), points, 2, **draw) - 0.5
    weights = torch.rand(images, queries, heads, len(shapes), points, **draw)
    locations = off_the_knots(locations, shapes)
    place = {"dtype": dtype, "device": torch.get_default_device()}
    return value.to(**place), shapes, locations.to(**place), weights.to(**place)


def loop(value, shapes, locations, weights):
    """The definition, one sample and one pixel at a time, differentiable."""
    images, _, heads, channels = value.shape
    queries, levels, points = locations.shape[1], locations.shape[3], locations.shape[4]
    out = value.new_zeros(images, queries, heads, channels)
    starts = list(itertools.accumulate((h * w for h, w in shapes), initial=0))
    for n, q, m, level, p in itertools.product(
        *map(range, (images, queries, heads, levels, points))
    ):
        height, width = shapes[level]
        x = locations[n, q, m, level, p, 0] * width - 0.5
        y = locations[n, q, m, level, p, 1] * height - 0.5
        for row, column in itertools.product(range(height), range(width)):
            if abs(x - column) < 1 and abs(y - row) < 1:
                share = (1 - abs(x - column)) * (1 - abs(y - row)) * weights[n, q, m, level, p]
                pixel = value[n, starts[level] + row * width + column, m]
                index = tuple(map(torch.tensor, (n, q, m)))
                out = out.index_put(index, share * pixel, accumulate=True)
    return out.flatten(2)


def fused_inputs(shapes=SHAPES, *, coordinates=2, dtype=torch.float64, seed=0, **sizes):
    """Offsets that lead to the locations of :func:`inputs`, from points or boxes."""
    value, shapes, locations, _ = inputs(shapes, seed=seed, **sizes)
    images, queries, _, levels, points = locations.shape[:5]
    generator = torch.Generator("cpu").manual_seed(seed + 1)
    draw = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    reference = (0.2 + 0.6 * torch.rand(images, queries, levels, coordinates, **draw)).to(locations)
    shift = locations - reference[:, :, None, :, None, :2]
    if coordinates == 2:
        unit = 1 / torch.tensor(shapes).flip(-1)[:, None].clamp(min=1).to(locations)
    else:
        unit = reference[:, :, None, :, None, 2:] / 2 / points
    logits = torch.randn(*locations.shape[:-1], **draw).to(locations)
    tensors = (value, reference, shift / unit, logits)
    value, *rest = (t.to(dtype) for t in tensors)
    return value, shapes, *rest


def chain(value, shapes, reference, offsets, logits):
    """What the fused operator stands for, level by level."""
    locations = torch.empty_like(offsets)
    for level, (h, w) in enumerate(shapes):
        point = reference[:, :, None, level, None]  # (N, Q, 1, 1, 2 or 4)
        if point.shape[-1] == 2:
            unit = torch.tensor([1 / w, 1 / h], dtype=offsets.dtype)
        else:
            unit = point[..., 2:] / 2 / offsets.shape[-2]
        locations[:, :, :, level] = point[..., :2] + offsets[:, :, :, level] * unit
    weights = logits.exp() / logits.exp().sum((-1, -2), keepdim=True)
    return loop(value, shapes, locations, weights)


def gradients(op, value, shapes, *rest):
    """Output and gradients of an operator, plain or fused."""
    leaves = [t.detach().clone().requires_grad_() for t in (value, *rest)]
    out = op(leaves[0], shapes, *leaves[1:])
    grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out.detach(), torch.autograd.grad(out, leaves, grad)


def transposed(tensor):
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)
