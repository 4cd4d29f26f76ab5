"""Multi-scale deformable attention (Deformable DETR): the operator and the module around it.

The operator runs as a C++ kernel from the extension ``psf._C`` where that has one for the device,
else as plain PyTorch. ``PSF_DISABLE_EXTENSION=1`` in the environment forces plain PyTorch.

Shapes: N images, Q queries, L levels, S = sum_l H_l * W_l positions, M heads, D channels a head,
C = M * D channels, P sampling points.
"""

import functools
import logging
import math
import os
from collections.abc import Sequence
from importlib import import_module

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_BUILD_COMMAND = "pip install --no-build-isolation -e ."


def _load_extension() -> str | None:
    """Register ``torch.ops.psf.*``. Returns why it could not be, or None."""
    if os.environ.get("PSF_DISABLE_EXTENSION") == "1":
        return "PSF_DISABLE_EXTENSION=1 is set"
    try:
        import_module("psf._C")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "psf._C":
            return f"the extension psf._C is not built; build it with: {_BUILD_COMMAND}"
        cause = " ".join(str(error).split())
        return (
            f"the extension psf._C does not load, as when it was built against another torch "
            f"({cause}); build it again with: {_BUILD_COMMAND}"
        )
    return None


_NO_EXTENSION_REASON = _load_extension()


def _kernel_devices() -> tuple[str, ...]:
    """Devices whose tensors the extension has kernels for; meta tensors go to the fake kernel."""
    if _NO_EXTENSION_REASON is not None:
        return ()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return ("cpu", "meta", *(["cuda"] if has_kernel("psf::ms_deform_attn", "CUDA") else []))


_KERNEL_DEVICES = _kernel_devices()

SpatialShapes = Sequence[tuple[int, int]] | Tensor


def has_extension() -> bool:
    """Whether the kernels of ``psf._C`` are in use."""
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
    if device in _KERNEL_DEVICES:
        return torch.ops.psf.ms_deform_attn(
            value, _flatten(spatial_shapes), sampling_locations, attention_weights
        )
    # Logging is not traceable, and a compiled call is not the slow thing the line warns of.
    if not torch.compiler.is_compiling():
        _warn_of_fallback(_NO_EXTENSION_REASON or _no_kernel_reason(device))
    if _autocasts(device) and value.dtype != torch.float64:
        value = value.to(torch.get_autocast_dtype(device))
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
    device = value.device.type
    if device in _KERNEL_DEVICES:
        return torch.ops.psf.ms_deform_attn_fused(
            value, _flatten(spatial_shapes), reference_points, sampling_offsets, attention_logits
        )
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
        return centres + offsets / sizes[:, None]
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
    start = 0
    for level, (h, w) in enumerate(zip(sizes[::2], sizes[1::2], strict=True)):
        pixels = heads[..., start : start + h * w].unflatten(-1, (h, w))  # (N * M, D, H_l, W_l)
        output = output + _sample_level(pixels, locations[:, :, level], weights[:, :, level])
        start += h * w
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
    reason = f"psf._C was built without kernels for {device} tensors"
    return (
        f"{reason}; build it again with: FORCE_CUDA=1 {_BUILD_COMMAND}"
        if device == "cuda"
        else reason
    )


def _autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _flatten(spatial_shapes: SpatialShapes) -> list[int]:
    """H_0, W_0, H_1, W_1, ... on the host."""
    pairs: Sequence[Sequence[int]]
    if isinstance(spatial_shapes, Tensor):
        pairs = spatial_shapes.tolist() if spatial_shapes.dim() == 2 else [[]]
    else:
        pairs = spatial_shapes
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"spatial_shapes must be (H, W) of every level, got {spatial_shapes}")
    return [size for pair in pairs for size in pair]


# What the plain and the fused operator call their samples and what these are weighted by.
_PLAIN_NAMES = ("sampling_locations", "attention_weights")
_FUSED_NAMES = ("sampling_offsets", "attention_logits")


def _check_inputs(
    value: Tensor,
    sizes: Sequence[int],
    samples: Tensor,
    weights: Tensor,
    names: tuple[str, str] = _PLAIN_NAMES,
) -> None:
    """What the C++ kernels check too, for the reference and the fake kernels."""
    for name, tensor, shape in (
        ("value", value, "(N, S, M, D)"),
        (names[0], samples, "(N, Q, M, L, P, 2)"),
        (names[1], weights, "(N, Q, M, L, P)"),
    ):
        dims = shape.count(",") + 1
        _check(tensor.dim() == dims, f"{name} must have shape {shape}, got {list(tensor.shape)}")
        _check(tensor.is_floating_point(), f"{name} must be floating point, got {tensor.dtype}")
    num_images, num_positions, num_heads, _ = value.shape
    num_queries, num_points = samples.shape[1], samples.shape[4]
    for size in sizes:
        _check(size >= 0, f"spatial_shapes must not be negative, got {list(sizes)}")
    area = sum(h * w for h, w in zip(sizes[::2], sizes[1::2], strict=True))
    _check(
        num_positions == area,
        f"value has S = {num_positions} positions, but H * W of spatial_shapes {list(sizes)} "
        f"sum to {area}",
    )
    expected = [num_images, num_queries, num_heads, len(sizes) // 2, num_points, 2]
    _check_shape(
        names[0],
        samples,
        expected,
        f"(N, Q, M, L, P, 2) = {expected} to match value {list(value.shape)} and spatial_shapes "
        f"{list(sizes)}",
    )
    _check_shape(
        names[1],
        weights,
        expected[:-1],
        f"(N, Q, M, L, P) = {expected[:-1]} to match {names[0]}",
    )


def _check_reference_points(reference_points: Tensor, sampling_offsets: Tensor) -> None:
    num_images, num_queries, _, num_levels = sampling_offsets.shape[:4]
    expected = [num_images, num_queries, num_levels]
    given = list(reference_points.shape)
    _check(
        len(given) == 4 and given[:3] == expected and given[3] in (2, 4),
        "reference_points must be (N, Q, L, 2) or (N, Q, L, 4) with (N, Q, L) = "
        f"{expected} to match sampling_offsets, got {given}",
    )


def _check_shape(name: str, tensor: Tensor, expected: Sequence[int], description: str) -> None:
    for given, wanted in zip(tensor.shape, expected, strict=True):
        _check(given == wanted, f"{name} must have shape {description}, got {list(tensor.shape)}")


def _check(condition: bool, message: str) -> None:
    # Not an `if`: for sizes that are only known when a compiled program runs, this becomes a check
    # in the program.
    torch._check(condition, lambda: f"ms_deform_attn: {message}")


if has_extension():

    @torch.library.register_fake("psf::ms_deform_attn")
    def _fake(
        value: Tensor,
        spatial_shapes: Sequence[int],
        sampling_locations: Tensor,
        attention_weights: Tensor,
        *,
        deterministic: bool = False,
    ) -> Tensor:
        _check_inputs(value, spatial_shapes, sampling_locations, attention_weights)
        num_images, _, num_heads, num_channels = value.shape
        return value.new_empty(num_images, sampling_locations.shape[1], num_heads * num_channels)

    @torch.library.register_fake("psf::ms_deform_attn_backward")
    def _fake_backward(
        grad_output: Tensor,
        value: Tensor,
        spatial_shapes: Sequence[int],
        sampling_locations: Tensor,
        attention_weights: Tensor,
        output_mask: Sequence[bool],
        *,
        deterministic: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        _check_inputs(value, spatial_shapes, sampling_locations, attention_weights)
        inputs = (value, sampling_locations, attention_weights)
        grad_value, grad_locations, grad_weights = (
            tensor.new_empty(tensor.shape if wanted else 0)
            for tensor, wanted in zip(inputs, output_mask, strict=True)
        )
        return grad_value, grad_locations, grad_weights

    @torch.library.register_fake("psf::ms_deform_attn_fused")
    def _fake_fused(
        value: Tensor,
        spatial_shapes: Sequence[int],
        reference_points: Tensor,
        sampling_offsets: Tensor,
        attention_logits: Tensor,
        *,
        deterministic: bool = False,
    ) -> Tensor:
        _check_inputs(value, spatial_shapes, sampling_offsets, attention_logits, _FUSED_NAMES)
        _check_reference_points(reference_points, sampling_offsets)
        num_images, _, num_heads, num_channels = value.shape
        return value.new_empty(num_images, sampling_offsets.shape[1], num_heads * num_channels)

    @torch.library.register_fake("psf::ms_deform_attn_fused_backward")
    def _fake_fused_backward(
        grad_output: Tensor,
        value: Tensor,
        spatial_shapes: Sequence[int],
        reference_points: Tensor,
        sampling_offsets: Tensor,
        attention_logits: Tensor,
        output_mask: Sequence[bool],
        *,
        deterministic: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        _check_inputs(value, spatial_shapes, sampling_offsets, attention_logits, _FUSED_NAMES)
        _check_reference_points(reference_points, sampling_offsets)
        inputs = (value, reference_points, sampling_offsets, attention_logits)
        grads = [
            tensor.new_empty(tensor.shape if wanted else 0)
            for tensor, wanted in zip(inputs, output_mask, strict=True)
        ]
        return grads[0], grads[1], grads[2], grads[3]


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
