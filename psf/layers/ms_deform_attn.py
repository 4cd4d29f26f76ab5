"""Multi-scale deformable attention (Deformable DETR): the operator and the module around it.

The operator runs as a C++ or CUDA kernel of the library ``psf/_C.so`` where that has one for the
device, else as plain PyTorch. ``PSF_DISABLE_EXTENSION=1`` in the environment forces plain PyTorch.

Shapes: N images, Q queries, L levels, S = sum_l H_l * W_l positions, M heads, D channels per head,
C = M * D channels, P sampling points.
"""

import functools
import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

_BUILD_COMMAND = "pip install --no-build-isolation -e ."


def _load_library() -> str | None:
    """Register ``torch.ops.psf.*``. Returns why it could not be, or None."""
    if os.environ.get("PSF_DISABLE_EXTENSION") == "1":
        return "PSF_DISABLE_EXTENSION=1 is set"
    path = Path(__file__).parents[1] / "_C.so"
    if not path.is_file():
        return f"psf/_C.so is not built; build it with: {_BUILD_COMMAND}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        cause = " ".join(str(error.__cause__ or error).split())
        return (
            f"psf/_C.so does not load with torch {torch.__version__}, as with one older than 2.10 "
            f"({cause}); build it again with: {_BUILD_COMMAND}"
        )
    return None


_NO_EXTENSION_REASON = _load_library()


def _find_kernel_devices() -> tuple[str, ...]:
    if _NO_EXTENSION_REASON is not None:
        return ()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return ("cpu", "meta", *(["cuda"] if has_kernel("psf::ms_deform_attn", "CUDA") else []))


# Types of devices whose tensors the library takes; of meta, the fake kernel.
KERNEL_DEVICES = _find_kernel_devices()

SpatialShapes = Sequence[tuple[int, int]] | Tensor


def has_extension() -> bool:
    """Whether the kernels of ``psf/_C.so`` are in use."""
    return _NO_EXTENSION_REASON is None


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """
    Sample ``value`` at a few points of every level and sum the samples with the given weights.

    Differentiable once. Any tensor may be empty or non-contiguous. Under autocast ``value`` is
    converted to the autocast type, the locations are not.

    Args:
        value: (N, S, M, D), levels concatenated.
        spatial_shapes: (H_l, W_l) of each level, or (L, 2) int64; a tensor on an accelerator costs
            a synchronisation.
        sampling_locations: (N, Q, M, L, P, 2), (x, y) with the level spanning [0, 1]. Keep them
            in float32: lower precision moves the samples by visible fractions of a pixel.
        attention_weights: (N, Q, M, L, P).

    Returns:
        (N, Q, M * D) of ``value``'s type. What lies outside a level contributes 0; points more
        than a pixel outside, infinite or NaN contribute 0 altogether and get no gradient.
    """
    device = value.device.type
    value = _autocast(value)
    if device in KERNEL_DEVICES:
        op = torch.ops.psf.ms_deform_attn
        return _call(op, value, spatial_shapes, sampling_locations, attention_weights)
    # Logging cannot be traced, and a compiled call is not the slow one that the line warns of.
    if not torch.compiler.is_compiling():
        _warn_of_fallback(_NO_EXTENSION_REASON or _no_kernel_reason(device))
    return ms_deform_attn_reference(value, spatial_shapes, sampling_locations, attention_weights)


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """
    :func:`ms_deform_attn` with the arithmetic before it: softmax, and places from offsets.

    Saves memory and time: neither locations nor weights are ever written. Differentiable once.

    Args:
        value: (N, S, M, D), levels concatenated.
        spatial_shapes: (H_l, W_l) of each level, or (L, 2) int64.
        reference_points: (N, Q, L, 2), (x, y) with the level spanning [0, 1], or (N, Q, L, 4)
            boxes (cx, cy, w, h) in the same unit. Keep them in float32.
        sampling_offsets: (N, Q, M, L, P, 2), in pixels around points, in halves of the box's size
            over P around boxes.
        attention_logits: (N, Q, M, L, P), before the softmax over the L * P samples.

    Returns:
        (N, Q, M * D) of ``value``'s type.
    """
    if value.device.type in KERNEL_DEVICES:
        samples = (reference_points, sampling_offsets, attention_logits)
        op = torch.ops.psf.ms_deform_attn_fused
        return _call(op, _autocast(value), spatial_shapes, *samples)
    # The chain, whose last part runs as plain PyTorch and says so.
    locations = sampling_locations(reference_points, sampling_offsets, spatial_shapes)
    return ms_deform_attn(
        value, spatial_shapes, locations, _attention_weights(attention_logits, locations.dtype)
    )


def ms_deform_attn_fused_reference(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """Same as :func:`ms_deform_attn_fused`, in plain PyTorch: its definition."""
    locations = sampling_locations(reference_points, sampling_offsets, spatial_shapes)
    return ms_deform_attn_reference(
        value, spatial_shapes, locations, _attention_weights(attention_logits, locations.dtype)
    )


def sampling_locations(
    reference_points: Tensor, sampling_offsets: Tensor, spatial_shapes: SpatialShapes
) -> Tensor:
    """
    The places that offsets from points or boxes mean (Deformable DETR, sections 4.1 and A.4).

    Args:
        reference_points: (N, Q, L, 2) points or (N, Q, L, 4) boxes.
        sampling_offsets: (N, Q, M, L, P, 2), in pixels around points, in halves of the box's size
            over P around boxes.
        spatial_shapes: (H_l, W_l) of each level, or (L, 2) int64.

    Returns:
        (N, Q, M, L, P, 2), (x, y) with the level spanning [0, 1]; at least float32, also under
        autocast.
    """
    if reference_points.dim() != 4 or reference_points.shape[-1] not in (2, 4):
        raise ValueError(
            "reference_points must be (N, Q, L, 2) or (N, Q, L, 4), got "
            f"{list(reference_points.shape)}"
        )
    dtype = torch.promote_types(sampling_offsets.dtype, torch.float32)
    offsets = sampling_offsets.to(dtype)
    references = reference_points.to(dtype)[:, :, None, :, None]  # (N, Q, 1, L, 1, 2 or 4)
    centres = references[..., :2]
    if references.shape[-1] == 2:
        sizes = torch.as_tensor(spatial_shapes, device=offsets.device).flip(-1)  # (L, 2): W, H
        return centres + offsets / sizes[:, None].clamp(min=1)  # of empty levels: not NaN
    return centres + offsets / offsets.shape[-2] * references[..., 2:] * 0.5


def _attention_weights(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Softmax of (N, Q, M, L, P) over the last two dimensions together."""
    return logits.to(dtype).flatten(3).softmax(-1).view_as(logits)


def ms_deform_attn_reference(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """
    Same as :func:`ms_deform_attn`, in plain PyTorch: the definition the kernels are held to.
    It has no autocast rule.
    """
    sizes = _flatten(spatial_shapes)
    if not torch.compiler.is_compiling():  # the compiler cannot trace messages that hold sizes
        _check_inputs(value, sizes, sampling_locations, attention_weights)
    num_images, _, num_heads, num_channels = value.shape
    num_queries = sampling_locations.shape[1]
    dtype = torch.promote_types(value.dtype, torch.float32)
    heads = value.to(dtype).permute(0, 2, 3, 1).flatten(0, 1)  # (N * M, D, S)
    locations = sampling_locations.to(dtype).transpose(1, 2).flatten(0, 1)  # (N * M, Q, L, P, 2)
    weights = attention_weights.to(dtype).transpose(1, 2).flatten(0, 1)  # (N * M, Q, L, P)
    output = heads.new_zeros(num_images * num_heads, num_channels, num_queries)
    shapes = list(zip(sizes[::2], sizes[1::2], strict=True))
    for level, rows in enumerate(heads.split([h * w for h, w in shapes], dim=-1)):
        pixels = rows.unflatten(-1, shapes[level])  # (N * M, D, H_l, W_l)
        output = output + _sample_level(pixels, locations[:, :, level], weights[:, :, level])
    output = output.reshape(num_images, num_heads * num_channels, num_queries)
    return output.transpose(1, 2).to(value.dtype)


def _sample_level(pixels: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """
    Args:
        pixels: (B, D, H, W), B = N * M.
        locations: (B, Q, P, 2), (x, y) with the level spanning [0, 1].
        weights: (B, Q, P).

    Returns:
        (B, D, Q): the weighted sums over P.
    """
    if 0 in pixels.shape[2:]:
        pixels = F.pad(pixels, (0, 1, 0, 1))  # grid_sample asks for a pixel: zeros
    h, w = pixels.shape[2:]
    x = locations[..., 0] * w - 0.5
    y = locations[..., 1] * h - 0.5
    inside = (x > -1) & (x < w) & (y > -1) & (y < h)  # (B, Q, P), False for NaN
    # grid_sample spans [-1, 1]; -3 is outside for every size. where() also stops the gradients.
    grid = torch.where(inside[..., None], 2 * locations - 1, -3.0)
    samples = F.grid_sample(pixels, grid, padding_mode="zeros", align_corners=False)  # (B, D, Q, P)
    return (samples * torch.where(inside, weights, 0.0)[:, None]).sum(-1)


@functools.cache
def _warn_of_fallback(reason: str) -> None:
    """Once per process and reason."""
    logging.getLogger(__name__).warning("ms_deform_attn runs as plain PyTorch: %s", reason)


def _no_kernel_reason(device: str) -> str:
    reason = f"psf/_C.so was built without kernels for {device} tensors"
    return (
        f"{reason}; build it again with: FORCE_CUDA=1 {_BUILD_COMMAND}"
        if device == "cuda"
        else reason
    )


def _autocast(value: Tensor) -> Tensor:
    """In the autocast type, if autocast is on for its device; float64 stays."""
    device = value.device.type
    if value.dtype == torch.float64 or device == "meta":
        return value
    # Compilers of torch 2.10 cannot trace the first, and have no devices without autocast.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    if available and torch.is_autocast_enabled(device):
        value = value.to(torch.get_autocast_dtype(device))
    return value


def _flatten(spatial_shapes: SpatialShapes) -> list[int]:
    """H_0, W_0, H_1, W_1, ... on the host."""
    pairs: Sequence[Sequence[int]]
    if isinstance(spatial_shapes, Tensor):
        pairs = spatial_shapes.tolist() if spatial_shapes.dim() == 2 else [[]]
    else:
        pairs = spatial_shapes
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"spatial_shapes must be (H, W) of every level, got {spatial_shapes}")
    sizes = [size for pair in pairs for size in pair]
    # torch.jit.trace records sizes as tensors; here they become constants of the trace.
    return [int(size) for size in sizes] if torch.jit.is_tracing() else sizes


def _call(op: Any, value: Tensor, spatial_shapes: SpatialShapes, *rest: Tensor) -> Tensor:
    """Run an operator of the library."""
    sizes = _flatten(spatial_shapes)
    if torch.compiler.is_compiling():
        return op(value, sizes, *rest)  # the fake kernel checks the inputs
    if forward_ad._current_level >= 0:
        for tensor in (value, *rest):
            if forward_ad.unpack_dual(tensor).tangent is not None:  # which PyTorch would ignore
                raise RuntimeError("ms_deform_attn: forward-mode derivatives are not implemented")
    try:
        return op(value, sizes, *rest)
    except RuntimeError as error:
        refusal = error
    # Checked here only now, since it takes as long as the operator on small inputs.
    _check_inputs(value, sizes, *rest)
    raise refusal


def _check_inputs(value: Tensor, sizes: Sequence[int], *rest: Tensor) -> None:
    """
    Raise an error that names what is wrong.

    Args:
        value: (N, S, M, D).
        sizes: H_0, W_0, H_1, W_1, ...
        rest: what else the operator takes: locations and weights; or, fused, references, offsets
            and logits.
    """
    *references, samples, weights = rest
    names = (
        ("sampling_offsets", "attention_logits")
        if references
        else ("sampling_locations", "attention_weights")
    )
    _check_tensor("value", value, "(N, S, M, D)", 4)
    _check_tensor(names[0], samples, "(N, Q, M, L, P, 2)", 6)
    _check_tensor(names[1], weights, "(N, Q, M, L, P)", 5)
    for size in sizes:
        _check(size >= 0, lambda: f"spatial_shapes must not be negative, got {list(sizes)}")
    n, s, m, _ = value.shape
    q, p = samples.shape[1], samples.shape[4]
    area = sum(h * w for h, w in zip(sizes[::2], sizes[1::2], strict=True))
    _check(
        s == area,
        lambda: (
            f"value has S = {s} positions, but H * W of spatial_shapes {list(sizes)} sum to {area}"
        ),
    )
    expected = [n, q, m, len(sizes) // 2, p, 2]
    _check_shape(
        (names[0], samples, "(N, Q, M, L, P, 2)"),
        expected,
        lambda: f"value {list(value.shape)} and spatial_shapes {list(sizes)}",
    )
    _check_shape((names[1], weights, "(N, Q, M, L, P)"), expected[:-1], lambda: names[0])
    for points in references:
        shape = "(N, Q, L, 2) or (N, Q, L, 4)"
        _check_tensor("reference_points", points, shape, 4)
        wanted = [n, q, len(sizes) // 2, 4 if points.shape[3] == 4 else 2]
        _check_shape(("reference_points", points, shape), wanted, lambda: names[0])


def _check_tensor(name: str, tensor: Tensor, shape: str, dims: int) -> None:
    given = tensor.shape
    _check(len(given) == dims, lambda: f"{name} must have shape {shape}, got {list(given)}")
    _check(tensor.is_floating_point(), lambda: f"{name} must be floating point, got {tensor.dtype}")


def _check_shape(
    named: tuple[str, Tensor, str], expected: Sequence[int], source: Callable[[], str]
) -> None:
    name, tensor, shape = named
    for given, wanted in zip(tensor.shape, expected, strict=True):
        _check(
            given == wanted,
            lambda: (
                f"{name} must have shape {shape} = {list(expected)} to match {source()}, "
                f"got {list(tensor.shape)}"
            ),
        )


def _check(condition: Any, message: Callable[[], str]) -> None:
    condition = bool(condition) if torch.jit.is_tracing() else condition
    if condition is not True:
        # Not an `if`: for sizes that are only known when a compiled program runs, this becomes a
        # check in the program.
        torch._check(condition, lambda: f"ms_deform_attn: {message()}")


# ---- the kernels' autograd and fake kernels ------------------------------------------------------


def _fake(value: Tensor, spatial_shapes: Sequence[int], *rest: Tensor) -> Tensor:
    _check_inputs(value, spatial_shapes, *rest)
    num_images, _, num_heads, num_channels = value.shape
    return value.new_empty(num_images, rest[-1].shape[1], num_heads * num_channels)


def _fake_backward(
    grad_output: Tensor, value: Tensor, spatial_shapes: Sequence[int], *rest: Any
) -> tuple[Tensor, ...]:
    *samples, output_mask, _ = rest
    _check_inputs(value, spatial_shapes, *samples)
    return tuple(
        tensor.new_empty(tensor.shape if wanted else 0)
        for tensor, wanted in zip((value, *samples), output_mask, strict=True)
    )


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    value, ctx.sizes, *rest = inputs
    ctx.save_for_backward(value, *rest)


def _backward(op: Any) -> Callable[[Any, Tensor], tuple[Tensor | None, ...]]:
    """The backward of an operator that has the given one for its gradients."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        value, *rest = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[0], *ctx.needs_input_grad[2:]]
        deterministic = torch.are_deterministic_algorithms_enabled()
        grads = op(grad, value, ctx.sizes, *rest, wanted, deterministic)
        kept = [g if flag else None for g, flag in zip(grads, wanted, strict=True)]
        return kept[0], None, *kept[1:]

    return backward


def _refuse(ctx: Any, *grads: Tensor) -> None:
    """The backward of a backward, which would otherwise silently give no gradient."""
    raise RuntimeError("ms_deform_attn: second derivatives are not implemented")


def _register(name: str) -> None:
    torch.library.register_fake(name, _fake)
    torch.library.register_fake(f"{name}_backward", _fake_backward)
    op = getattr(torch.ops.psf, f"{name.removeprefix('psf::')}_backward").default
    torch.library.register_autograd(name, _backward(op), setup_context=_save)
    torch.library.register_autograd(f"{name}_backward", _refuse)


if has_extension():
    _register("psf::ms_deform_attn")
    _register("psf::ms_deform_attn_fused")


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention: every query samples a few points it chooses itself."""

    def __init__(
        self, *, dim: int, num_levels: int, num_heads: int = 8, num_points: int = 4
    ) -> None:
        """
        Args:
            dim: channels C of queries and values; a multiple of ``num_heads``.
            num_levels: feature levels L concatenated in the value.
            num_heads: attention heads M.
            num_points: sampling points P of a head in every level.
        """
        super().__init__()
        if dim % num_heads != 0:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        self.num_levels = num_levels
        self.num_heads = num_heads
        self.num_points = num_points
        self.sampling_offsets = nn.Linear(dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(dim, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Deformable DETR's: head m looks in direction m, point p looks p + 1 pixels far."""
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)  # (M, 2)
        directions /= directions.abs().amax(-1, keepdim=True)  # onto the square around the query
        distances = torch.arange(1, self.num_points + 1)
        offsets = directions[:, None, None] * distances[:, None]  # (M, 1, P, 2)
        offsets = offsets.expand(-1, self.num_levels, -1, -1)
        self.sampling_offsets.bias.copy_(offsets.flatten())
        for zeros in (
            self.sampling_offsets.weight,
            self.attention_weights.weight,
            self.attention_weights.bias,
            self.value_proj.bias,
            self.output_proj.bias,
        ):
            nn.init.zeros_(zeros)
        nn.init.xavier_uniform_(self.value_proj.weight)
        nn.init.xavier_uniform_(self.output_proj.weight)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        value: Tensor,
        spatial_shapes: SpatialShapes,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            query: (N, Q, C).
            reference_points: (N, Q, L, 2), (x, y) with the level spanning [0, 1], or
                (N, Q, L, 4) boxes (cx, cy, w, h) in the same unit.
            value: (N, S, C), levels concatenated.
            spatial_shapes: (H_l, W_l) of each level, or (L, 2) int64.
            padding_mask: (N, S) bool, True on padding, where the value counts as 0.

        Returns:
            (N, Q, C).
        """
        split = (self.num_heads, self.num_levels, self.num_points)
        value = self.value_proj(value)
        if padding_mask is not None:
            value = value.masked_fill(padding_mask[..., None], 0.0)
        output = ms_deform_attn_fused(
            value.unflatten(-1, (self.num_heads, -1)),
            spatial_shapes,
            reference_points,
            self.sampling_offsets(query).unflatten(-1, (*split, 2)),
            self.attention_weights(query).unflatten(-1, split),
        )
        return self.output_proj(output)
