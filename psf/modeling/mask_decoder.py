"""Mask decoder: cross-attention whose attention maps become the predicted masks.

Paper, section 3.4. Shapes: N images, Q thing queries, T stuff queries (one a stuff class), K thing
classes, L levels, S positions, M heads, C = M * D channels, R queries of one image whose masks are
wanted.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from psf.layers.transformer import ClassHead, FeedForward, init_linear_weights
from psf.modeling.location_decoder import Locations
from psf.modeling.pixel_encoder import Memory

# The official code's value in its mask decoders (1e-5 elsewhere).
LAYER_NORM_EPS = 1e-6


class MaskPredictions(NamedTuple):
    """What one layer of a mask decoder predicts."""

    thing_logits: Tensor  # (N, Q, K)
    stuff_logits: Tensor  # (N, T), each stuff query for its own class
    mask_logits: list[Tensor]  # N x (R, h, w) at the finest level, unpadded


class MaskAttention(nn.Module):
    """Multi-head cross-attention that can also turn its attention maps into masks."""

    def __init__(self, *, dim: int, num_heads: int, num_levels: int) -> None:
        """
        Args:
            dim: channels C of queries and memory; a multiple of ``num_heads``.
            num_heads: attention heads M.
            num_levels: feature levels L of the memory.
        """
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)
        # About 200 parameters make the mask, so the attention itself must learn where to look.
        self.level_projs = nn.ModuleList(nn.Linear(num_heads, num_heads) for _ in range(num_levels))
        self.mask_proj = nn.Linear(num_heads * num_levels, 1)
        init_linear_weights(self)

    def forward(
        self, query: Tensor, memory: Memory, mask_queries: Sequence[Tensor] | None
    ) -> tuple[Tensor, list[Tensor]]:
        """
        Args:
            query: (N, Q + T, C).
            memory: the encoder's tokens, keys and values.
            mask_queries: N x (R,) int64 indices of the queries whose masks are wanted; None: no
                masks.

        Returns:
            Attended queries (N, Q + T, C), and N x (R, h, w) mask logits (empty without
            ``mask_queries``).
        """
        q = self._split_heads(self.q_proj(query))  # (N, M, Q + T, D)
        k = self._split_heads(self.k_proj(memory.features))  # (N, M, S, D)
        v = self._split_heads(self.v_proj(memory.features))
        visible = None if memory.padding_mask is None else ~memory.padding_mask[:, None, None]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        masks = []
        if mask_queries is not None:
            masks = [
                self._masks(q[image][:, index], k[image], memory, image)
                for image, index in enumerate(mask_queries)
            ]
        return self.out_proj(attended.transpose(1, 2).flatten(2)), masks

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _masks(self, q: Tensor, k: Tensor, memory: Memory, image: int) -> Tensor:
        """Mask logits (R, h, w) of one image from queries (M, R, D) and keys (M, S, D)."""
        logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # (M, R, S)
        target = memory.valid_shapes[image][0]
        weights = self.mask_proj.weight.split(self.num_heads, dim=1)  # L x (1, M)
        fused: Tensor = self.mask_proj.bias
        # A linear map commutes with bilinear upsampling, so each level is reduced to one channel
        # before it is upsampled: M times less memory than upsampling the heads.
        for level, (projection, weight) in enumerate(zip(self.level_projs, weights, strict=True)):
            level_logits = self._level_logits(logits, memory, image, level)  # (R, h_l, w_l, M)
            score = F.linear(projection(level_logits).relu(), weight)  # (R, h_l, w_l, 1)
            score = score.permute(0, 3, 1, 2)  # queries as the batch, which may be empty
            if score.shape[-2:] != target:
                score = F.interpolate(score, size=target, mode="bilinear", align_corners=False)
            fused = fused + score[:, 0]
        return fused

    @staticmethod
    def _level_logits(logits: Tensor, memory: Memory, image: int, level: int) -> Tensor:
        """The valid part (R, h_l, w_l, M) of one level of attention logits (M, R, S)."""
        height, width = memory.spatial_shapes[level]
        start = sum(h * w for h, w in memory.spatial_shapes[:level])
        h, w = memory.valid_shapes[image][level]
        maps = logits[:, :, start : start + height * width].unflatten(-1, (height, width))
        return maps[:, :, :h, :w].permute(1, 2, 3, 0)


class MaskDecoderLayer(nn.Module):
    """Mask attention and a feed-forward network, each with a residual and LayerNorm (post-norm)."""

    def __init__(self, *, dim: int, num_heads: int, num_levels: int, feedforward_dim: int) -> None:
        super().__init__()
        self.cross_attn = MaskAttention(dim=dim, num_heads=num_heads, num_levels=num_levels)
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.ffn = FeedForward(dim=dim, hidden_dim=feedforward_dim, activation=nn.GELU)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)

    def forward(
        self, query: Tensor, memory: Memory, mask_queries: Sequence[Tensor] | None
    ) -> tuple[Tensor, list[Tensor]]:
        """
        Args:
            query: (N, Q + T, C).
            memory: the encoder's tokens.
            mask_queries: N x (R,) int64 queries whose masks are wanted, or None.

        Returns:
            Refined queries (N, Q + T, C), and N x (R, h, w) mask logits.
        """
        attended, masks = self.cross_attn(query, memory, mask_queries)
        query = self.norm1(query + attended)
        return self.norm2(query + self.ffn(query)), masks


class JointMaskDecoder(nn.Module):
    """The paper's mask decoder: thing and stuff queries go through the same layers."""

    def __init__(
        self,
        *,
        dim: int,
        num_thing_classes: int,
        num_stuff_classes: int,
        num_layers: int,
        num_heads: int,
        num_levels: int,
        feedforward_dim: int,
    ) -> None:
        """
        Args:
            dim: channels C.
            num_thing_classes: K.
            num_stuff_classes: T, also the number of stuff queries.
            num_layers: decoder layers (paper: 6), each with its own class heads and mask head.
            num_heads: attention heads M.
            num_levels: feature levels L of the memory.
            feedforward_dim: hidden channels of the feed-forward networks.
        """
        super().__init__()
        self.stuff_query = nn.Embedding(num_stuff_classes, dim)
        self.layers = nn.ModuleList(
            MaskDecoderLayer(
                dim=dim,
                num_heads=num_heads,
                num_levels=num_levels,
                feedforward_dim=feedforward_dim,
            )
            for _ in range(num_layers)
        )
        self.thing_heads = nn.ModuleList(
            ClassHead(dim, num_thing_classes) for _ in range(num_layers)
        )
        self.stuff_heads = nn.ModuleList(ClassHead(dim, 1) for _ in range(num_layers))

    def forward(
        self,
        memory: Memory,
        locations: Locations,
        mask_queries: Sequence[Tensor],
        *,
        deep_supervision: bool,
        num_layers: int | None = None,
    ) -> list[MaskPredictions]:
        """
        Args:
            memory: the encoder's tokens.
            locations: the location-aware thing queries.
            mask_queries: N x (R,) int64 queries whose masks are wanted; thing queries count from 0,
                the stuff query of class i is Q + i.
            deep_supervision: predict after every layer; otherwise the earlier layers compute no
                classes and no masks.
            num_layers: use only so many of the first layers; None: all.

        Returns:
            The predictions of every used layer, or of the last used one only.
        """
        batch_size, num_things = locations.query.shape[:2]
        stuff_query = self.stuff_query.weight.expand(batch_size, -1, -1)
        query = torch.cat([locations.query, stuff_query], dim=1)  # (N, Q + T, C)
        layers = list(zip(self.layers, self.thing_heads, self.stuff_heads, strict=True))
        layers = layers[:num_layers]
        predictions = []
        for i, (layer, thing_head, stuff_head) in enumerate(layers):
            predict = deep_supervision or i == len(layers) - 1
            query, masks = layer(query, memory, mask_queries if predict else None)
            if predict:
                predictions.append(
                    MaskPredictions(
                        thing_logits=thing_head(query[:, :num_things]),
                        stuff_logits=stuff_head(query[:, num_things:]).squeeze(-1),
                        mask_logits=masks,
                    )
                )
        return predictions
