"""Transformer encoder: feature maps to tokens, refined by multi-scale deformable self-attention.

Paper, section 3.2 "Transformer encoder". Shapes: N images, L levels, S = sum_l H_l * W_l positions,
C channels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from psf.layers.ms_deform_attn import MSDeformAttn
from psf.layers.transformer import FeedForward, sine_position_encoding

Shape = tuple[int, int]


class Memory(NamedTuple):
    """The encoder's tokens and their places."""

    features: Tensor  # (N, S, C), levels concatenated from fine to coarse
    padding_mask: Tensor | None  # (N, S) bool, True on padding; None: there is no padding
    spatial_shapes: list[Shape]  # L x (H_l, W_l), of the padded maps
    valid_ratios: Tensor  # (N, L, 2) in (0, 1], (x, y) fractions of the maps that are not padding

    def finest(self, num_levels: int) -> "Memory":
        """The tokens of the ``num_levels`` finest levels."""
        size = sum(h * w for h, w in self.spatial_shapes[:num_levels])
        return Memory(
            features=self.features[:, :size],
            padding_mask=None if self.padding_mask is None else self.padding_mask[:, :size],
            spatial_shapes=self.spatial_shapes[:num_levels],
            valid_ratios=self.valid_ratios[:, :num_levels],
        )


class InputProjection(nn.ModuleList):
    """A 1x1 convolution and a group normalisation for each feature map (Deformable DETR).

    Coarser levels than the backbone's come from 3x3 convolutions of stride 2: the first from the
    backbone's coarsest map, every other from the level before it (Deformable DETR, section 4.1).

    The normalisation sees a whole map: give it the maps of one image size at a time, so that the
    statistics of an image do not depend on its batch.
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
            reference_points: (N, S, L, 2), each token's own place (x, y) in units of the padded
                maps.
            spatial_shapes: (H_l, W_l) of each level.
            padding_mask: (N, S) bool, True on padding.

        Returns:
            (N, S, C).
        """
        attended = self.self_attn(
            tokens + position, reference_points, tokens, spatial_shapes, padding_mask
        )
        tokens = self.norm1(tokens + self.dropout(attended))
        return self.norm2(tokens + self.ffn(tokens))


class TransformerEncoder(nn.Module):
    """The paper's transformer encoder: every token attends to a few points of every level."""

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
            num_points: sampling points per head and level.
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
        self, feature_maps: Sequence[Tensor], valid_sizes: Tensor, *, padded: bool
    ) -> Memory:
        """
        Args:
            feature_maps: L x (N, C, H_l, W_l), fine to coarse, padded on the right and at the
                bottom to a common size.
            valid_sizes: (N, L, 2) float32, (h, w) of the part of each map that is not padding.
            padded: whether there is any padding; without it the padding mask is None.

        Returns:
            The refined tokens. Those in the padding are finite but mean nothing.
        """
        if len(feature_maps) != len(self.level_embed):
            raise ValueError(
                f"expected {len(self.level_embed)} feature maps, got {len(feature_maps)}"
            )
        shapes = [(m.shape[-2], m.shape[-1]) for m in feature_maps]
        padding_mask = _padding_mask(shapes, valid_sizes) if padded else None
        valid_ratios = _valid_ratios(shapes, valid_sizes)
        tokens = torch.cat([m.flatten(2).transpose(1, 2) for m in feature_maps], dim=1)
        position = self._positions(shapes, valid_sizes if padded else valid_sizes[:1])
        position = position.to(tokens.dtype)
        reference_points = _reference_points(shapes, valid_sizes, valid_ratios)
        for layer in self.layers:
            tokens = layer(tokens, position, reference_points, shapes, padding_mask)
        return Memory(tokens, padding_mask, shapes, valid_ratios)

    def _positions(self, shapes: Sequence[Shape], valid_sizes: Tensor) -> Tensor:
        """(N or 1, S, C) sine encoding of the place plus the learned embedding of the level."""
        positions = [
            sine_position_encoding(shape, valid_sizes[:, level], self.dim).flatten(1, 2)
            + self.level_embed[level]
            for level, shape in enumerate(shapes)
        ]
        return torch.cat(positions, dim=1)


def _valid_ratios(shapes: Sequence[Shape], valid_sizes: Tensor) -> Tensor:
    """(N, L, 2) of :attr:`Memory.valid_ratios`."""
    ratios = [
        torch.stack([valid_sizes[:, level, 1] / width, valid_sizes[:, level, 0] / height], dim=-1)
        for level, (height, width) in enumerate(shapes)
    ]
    return torch.stack(ratios, dim=1)


def _padding_mask(shapes: Sequence[Shape], valid_sizes: Tensor) -> Tensor:
    """(N, S) bool, True on padding."""
    masks = []
    for level, (height, width) in enumerate(shapes):
        valid = valid_sizes[:, level]
        rows = torch.arange(height, device=valid.device) >= valid[:, :1]  # (N, H_l)
        columns = torch.arange(width, device=valid.device) >= valid[:, 1:]  # (N, W_l)
        masks.append((rows[:, :, None] | columns[:, None]).flatten(1))
    return torch.cat(masks, dim=1)


def _reference_points(shapes: Sequence[Shape], valid_sizes: Tensor, valid_ratios: Tensor) -> Tensor:
    """(N, S, L, 2) the centre of every token (x, y), in units of each level's padded map."""
    device = valid_sizes.device
    centres = []
    for level, (height, width) in enumerate(shapes):
        own = valid_sizes[:, level]
        y = (torch.arange(height, device=device) + 0.5) / own[:, :1]  # (N, H_l), > 1 in padding
        x = (torch.arange(width, device=device) + 0.5) / own[:, 1:]
        grid = torch.stack(
            [x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=-1
        )
        centres.append(grid.flatten(1, 2))  # (N, H_l * W_l, 2)
    return torch.cat(centres, dim=1)[:, :, None] * valid_ratios[:, None]
