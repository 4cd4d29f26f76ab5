"""Pixel encoder: feature maps to tokens, refined by multi-scale deformable self-attention.

Paper, section 3.2 "Transformer encoder". Shapes: N images, L levels, S = sum_l H_l * W_l positions,
C channels.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from psf.layers.blocks import deformable_attention_block, feed_forward_block
from psf.layers.ms_deform_attn import MSDeformAttn
from psf.layers.transformer import FeedForward, sine_position_encoding

Shape = tuple[int, int]


class Memory(NamedTuple):
    """The encoder's tokens and where they lie."""

    features: Tensor  # (N, S, C), levels concatenated from fine to coarse
    padding_mask: Tensor | None  # (N, S) bool, True on padding; None when there is no padding
    spatial_shapes: list[Shape]  # L x (H_l, W_l), of the padded maps
    valid_shapes: list[list[Shape]]  # N x L x (h, w), the part of each map that is not padding
    # (N, L, 2) float32, the same numbers for a compiled program that is not to depend on them
    valid_shapes_tensor: Tensor | None = None

    @property
    def valid_ratios(self) -> Tensor:
        """(N, L, 2) the valid part of each map as (x, y) fractions of the padded map, in (0, 1]."""
        return _of_sizes(self, _valid_ratios)

    def valid_sizes(self) -> Tensor:
        """(N, L, 2) float32 height and width of the part of each map that is not padding."""
        if self.valid_shapes_tensor is not None:
            return self.valid_shapes_tensor
        return _as_tensor(self.valid_shapes, len(self.spatial_shapes), self.features.device)

    def finest(self, num_levels: int) -> "Memory":
        """The tokens of the ``num_levels`` finest levels."""
        size = sum(h * w for h, w in self.spatial_shapes[:num_levels])
        return Memory(
            features=self.features[:, :size],
            padding_mask=None if self.padding_mask is None else self.padding_mask[:, :size],
            spatial_shapes=self.spatial_shapes[:num_levels],
            valid_shapes=[image[:num_levels] for image in self.valid_shapes],
            valid_shapes_tensor=(
                None
                if self.valid_shapes_tensor is None
                else self.valid_shapes_tensor[:, :num_levels]
            ),
        )


class InputProjection(nn.ModuleList):
    """A 1x1 convolution and a group normalisation for each feature map (Deformable DETR).

    Coarser levels than the backbone has come from 3x3 convolutions of stride 2, the first of the
    backbone's coarsest map, every other of the level before it (Deformable DETR, section 4.1).

    The normalisation sees a whole map: give it the maps of one image size at a time, so that the
    statistics of an image do not depend on what it is batched with.
    """

    def __init__(self, in_channels: Sequence[int], dim: int, num_levels: int) -> None:
        """
        Args:
            in_channels: C_l of the backbone's maps, fine to coarse.
            dim: channels C.
            num_levels: levels L, at least as many as there are maps.
        """
        super().__init__()
        for channels in in_channels:
            self.append(_projection(nn.Conv2d(channels, dim, kernel_size=1, bias=False)))
        channels = in_channels[-1]
        for _ in range(num_levels - len(in_channels)):
            convolution = nn.Conv2d(channels, dim, 3, stride=2, padding=1, bias=False)
            self.append(_projection(convolution))
            channels = dim

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """(N, C_l, H_l, W_l) of each map of the backbone to L x (N, C, H_l, W_l)."""
        projections = list(self)
        levels = [project(x) for project, x in zip(projections, features, strict=False)]
        coarsest = features[-1]
        for project in projections[len(features) :]:
            coarsest = project(coarsest)
            levels.append(coarsest)
        return levels


def _projection(convolution: nn.Conv2d) -> nn.Sequential:
    nn.init.xavier_uniform_(convolution.weight)
    return nn.Sequential(convolution, nn.GroupNorm(32, convolution.out_channels))


class EncoderLayer(nn.Module):
    """Deformable self-attention and a feed-forward network, each with a residual and LayerNorm."""

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        feedforward_dim: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.self_attn = MSDeformAttn(
            dim=dim, num_levels=num_levels, num_heads=num_heads, num_points=num_points
        )
        self.dropout = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.ffn = FeedForward(
            dim=dim, hidden_dim=feedforward_dim, dropout=dropout, activation=nn.ReLU
        )
        self.norm2 = nn.LayerNorm(dim)

    def forward(
        self,
        tokens: Tensor,
        position: Tensor,
        reference_points: Tensor,
        spatial_shapes: list[Shape],
        padding_mask: Tensor | None,
    ) -> Tensor:
        """
        Args:
            tokens: (N, S, C).
            position: (N or 1, S, C), added to the queries only.
            reference_points: (N, S, L, 2) each token's own place (x, y), in units of the padded
                maps.
            spatial_shapes: (H_l, W_l) of each level.
            padding_mask: (N, S) bool, True on padding.

        Returns:
            (N, S, C).
        """
        tokens = deformable_attention_block(
            tokens,
            position,
            reference_points,
            tokens,
            spatial_shapes,
            padding_mask,
            self.self_attn,
            self.dropout,
            self.norm1,
        )
        return feed_forward_block(tokens, self.ffn, self.norm2)


class PixelEncoder(nn.Module):
    """The paper's transformer encoder: tokens attend to a few points of every level."""

    def __init__(
        self,
        *,
        dim: int,
        num_levels: int,
        num_layers: int,
        num_heads: int,
        num_points: int,
        feedforward_dim: int,
        dropout: float,
    ) -> None:
        """
        Args:
            dim: channels C.
            num_levels: feature levels L.
            num_layers: encoder layers (paper: 6).
            num_heads: attention heads.
            num_points: sampling points a head and level.
            feedforward_dim: hidden channels of the feed-forward networks.
            dropout: probability, after the attention and in the feed-forward networks.
        """
        super().__init__()
        self.dim = dim
        self.level_embed = nn.Parameter(torch.randn(num_levels, dim))
        self.layers = nn.ModuleList(
            EncoderLayer(
                dim=dim,
                num_heads=num_heads,
                num_levels=num_levels,
                num_points=num_points,
                feedforward_dim=feedforward_dim,
                dropout=dropout,
            )
            for _ in range(num_layers)
        )

    def forward(
        self,
        maps: Sequence[Tensor],
        valid_shapes: list[list[Shape]],
        *,
        valid_shapes_tensor: Tensor | None = None,
        padded: bool | None = None,
    ) -> Memory:
        """
        Args:
            maps: L x (N, C, H_l, W_l) projected feature maps, fine to coarse, padded on the right
                and at the bottom to a common size.
            valid_shapes: N x L x (h, w) the part of each map that is not padding; empty if given as
                a tensor.
            valid_shapes_tensor: (N, L, 2) float32, what a compiled program takes instead.
            padded: whether anything is padding; None: as ``valid_shapes`` say.

        Returns:
            The refined tokens. Those in the padding are finite but mean nothing.
        """
        if len(maps) != len(self.level_embed):
            raise ValueError(f"expected {len(self.level_embed)} feature maps, got {len(maps)}")
        spatial_shapes = [(m.shape[-2], m.shape[-1]) for m in maps]
        memory = Memory(
            features=torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1),
            padding_mask=None,
            spatial_shapes=spatial_shapes,
            valid_shapes=valid_shapes,
            valid_shapes_tensor=valid_shapes_tensor,
        )
        if padded is None:
            padded = any(image != spatial_shapes for image in valid_shapes)
        if padded:
            memory = memory._replace(padding_mask=_padding_mask(memory))
        position = self._positions(memory)
        reference_points = _of_sizes(memory, _reference_points)
        tokens = memory.features
        for layer in self.layers:
            tokens = layer(tokens, position, reference_points, spatial_shapes, memory.padding_mask)
        return memory._replace(features=tokens)

    def _positions(self, memory: Memory) -> Tensor:
        """(N or 1, S, C) sine encoding of the place plus the learned embedding of the level."""
        alike = (
            memory.valid_shapes_tensor is None and len(set(map(tuple, memory.valid_shapes))) == 1
        )
        if alike:  # so are the places
            memory = memory._replace(valid_shapes=memory.valid_shapes[:1])
        sines = _of_sizes(memory, _sines, self.dim)
        positions = [sine + self.level_embed[level] for level, sine in enumerate(sines)]
        return torch.cat(positions, dim=1).to(memory.features.dtype)


# Positions of all images up to which what depends on sizes alone is kept for the next batch: at
# COCO's sizes it would take memory, and little of the time.
FEW_POSITIONS = 1 << 12

T = TypeVar("T")


def _of_sizes(memory: Memory, function: Callable[..., T], *args: int) -> T:
    """``function(spatial_shapes, valid_sizes, *args)``; the result is not to be changed."""
    few = len(memory.features) * memory.features.shape[1] <= FEW_POSITIONS
    plain = type(memory.features) is Tensor and memory.valid_shapes_tensor is None
    if not few or not plain or torch.compiler.is_compiling():
        return function(memory.spatial_shapes, memory.valid_sizes(), *args)
    shapes, valid = tuple(memory.spatial_shapes), tuple(map(tuple, memory.valid_shapes))
    return cast(T, _kept(function, shapes, valid, memory.features.device, *args))


@functools.lru_cache(maxsize=16)
def _kept(
    function: Callable[..., Any],
    shapes: tuple[Shape, ...],
    valid: tuple[tuple[Shape, ...], ...],
    device: torch.device,
    *args: int,
) -> Any:
    with torch.inference_mode(False), torch.no_grad():  # for training, too
        return function(shapes, _as_tensor(valid, len(shapes), device), *args)


def _as_tensor(
    valid_shapes: Sequence[Sequence[Shape]], num_levels: int, device: torch.device
) -> Tensor:
    """N x L x (h, w) to (N, L, 2) float32."""
    sizes = torch.tensor(valid_shapes, dtype=torch.float32, device=device)
    return sizes.view(len(valid_shapes), num_levels, 2)  # N may be 0


def _valid_ratios(shapes: Sequence[Shape], valid: Tensor) -> Tensor:
    """(N, L, 2) of :attr:`Memory.valid_ratios`."""
    ratios = [
        torch.stack([valid[:, level, 1] / width, valid[:, level, 0] / height], dim=-1)
        for level, (height, width) in enumerate(shapes)
    ]
    return torch.stack(ratios, dim=1)


def _sines(shapes: Sequence[Shape], valid: Tensor, dim: int) -> list[Tensor]:
    """L x (N, H_l * W_l, C) sine encodings."""
    return [
        sine_position_encoding(shape, valid[:, level], dim, device=valid.device).flatten(1, 2)
        for level, shape in enumerate(shapes)
    ]


def _padding_mask(memory: Memory) -> Tensor:
    """(N, S) bool, True on padding."""
    masks = []
    sizes = memory.valid_sizes()
    for level, (height, width) in enumerate(memory.spatial_shapes):
        valid = sizes[:, level]
        rows = torch.arange(height, device=valid.device) >= valid[:, :1]  # (N, H_l)
        columns = torch.arange(width, device=valid.device) >= valid[:, 1:]  # (N, W_l)
        masks.append((rows[:, :, None] | columns[:, None]).flatten(1))
    return torch.cat(masks, dim=1)


def _reference_points(shapes: Sequence[Shape], valid: Tensor) -> Tensor:
    """(N, S, L, 2) the centre of every token (x, y), in units of each level's padded map."""
    device = valid.device
    centres = []
    for level, (height, width) in enumerate(shapes):
        own = valid[:, level]
        y = (torch.arange(height, device=device) + 0.5) / own[:, :1]  # (N, H_l), > 1 in padding
        x = (torch.arange(width, device=device) + 0.5) / own[:, 1:]
        grid = torch.stack(
            [x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=-1
        )
        centres.append(grid.flatten(1, 2))  # (N, H_l * W_l, 2)
    return torch.cat(centres, dim=1)[:, :, None] * _valid_ratios(shapes, valid)[:, None]
