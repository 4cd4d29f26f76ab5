"""Mask decoder: cross-attention whose attention logits become the predicted masks.

Paper, section 3.4. The decoder of the authors' release is in ``release_decoder.py``; both are made
of :class:`MaskDecoderLayer` and used in the same way.

Shapes: N images, Q thing queries, T stuff queries (one per stuff class), K thing classes, L levels,
S positions, M heads, C = M * D channels, R queries of one image that get a mask.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from psf.layers.transformer import ClassHead, FeedForward, init_linear_weights
from psf.modeling.encoder import Memory, Shape
from psf.modeling.location_decoder import LocationPredictions
from psf.modeling.mask_head import MaskHead

# The official code's value in its mask decoders (1e-5 elsewhere).
LAYER_NORM_EPS = 1e-6


class LayerOutput(NamedTuple):
    """What one layer of a mask decoder returns."""

    query: Tensor  # (N, Q, C) refined queries
    q: Tensor  # (N, M, Q, D) projected queries; q @ k^T are the attention logits
    k: Tensor  # (N, M, S, D) projected positions


class MatchedQueries(NamedTuple):
    """The queries of every image that get a mask."""

    things: list[Tensor]  # N x (R_things,) int64 in [0, Q)
    stuff: list[Tensor]  # N x (R_stuff,) int64 in [0, T), also the classes


class MaskPredictions(NamedTuple):
    """The predictions of all layers of a mask decoder in training (deep supervision).

    The numbers of layers may differ between the fields.
    """

    thing_logits: Tensor  # (layers, N, Q, K) class logits
    stuff_logits: Tensor  # (layers, N, T), each stuff query for its own class
    thing_masks: list[list[Tensor]]  # layers x N x (R_things, h, w) mask logits
    stuff_masks: list[list[Tensor]]  # layers x N x (R_stuff, h, w)


class MaskAttention(nn.Module):
    """Multi-head cross-attention that also returns what its logits are made of."""

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
        self.mask_head = MaskHead(num_heads=num_heads, num_levels=num_levels)
        init_linear_weights(self)

    def forward(self, query: Tensor, memory: Memory) -> LayerOutput:
        """
        Args:
            query: (N, Q, C).
            memory: the encoder's tokens, keys and values.

        Returns:
            Attended queries, and the projections.
        """
        q = split_heads(self.q_proj(query), self.num_heads)
        k = split_heads(self.k_proj(memory.features), self.num_heads)
        v = split_heads(self.v_proj(memory.features), self.num_heads)
        visible = None if memory.padding_mask is None else ~memory.padding_mask[:, None, None]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return LayerOutput(self.out_proj(attended.transpose(1, 2).flatten(2)), q, k)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(N, S, C) to (N, M, S, D)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class MaskDecoderLayer(nn.Module):
    """Mask attention and a feed-forward network, each with a residual and LayerNorm (post-norm)."""

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        num_levels: int,
        feedforward_dim: int,
        self_attention: bool = False,
    ) -> None:
        """
        Args:
            dim: channels C.
            num_heads: attention heads M.
            num_levels: feature levels L of the memory.
            feedforward_dim: hidden channels of the feed-forward network.
            self_attention: queries first attend to each other (released decoder, stuff).
        """
        super().__init__()
        self.cross_attn = MaskAttention(dim=dim, num_heads=num_heads, num_levels=num_levels)
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.ffn = FeedForward(dim=dim, hidden_dim=feedforward_dim, activation=nn.GELU)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.self_attn: nn.MultiheadAttention | None = None
        if self_attention:
            self.self_attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)
            nn.init.xavier_uniform_(self.self_attn.out_proj.weight)  # the others are so by default
            self.norm3 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)

    def forward(self, query: Tensor, memory: Memory) -> LayerOutput:
        """
        Args:
            query: (N, Q, C).
            memory: the encoder's tokens.

        Returns:
            Refined queries, and the projections of the cross-attention.
        """
        if self.self_attn is not None:
            query = self.norm3(query + self.self_attn(query, query, query, need_weights=False)[0])
        attended, q, k = self.cross_attn(query, memory)
        query = self.norm1(query + attended)
        query = self.norm2(query + self.ffn(query))
        return LayerOutput(query, q, k)


class JointMaskDecoder(nn.Module):
    """The paper's mask decoder: thing and stuff queries go through the same layers."""

    # From mask logits, after upsampling, to mask probabilities, and the largest of these.
    mask_activation: Callable[[Tensor], Tensor] = staticmethod(torch.sigmoid)
    greatest_mask_value = 1.0

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
            num_levels: the finest levels L of the memory that make keys and masks.
            feedforward_dim: hidden channels of the feed-forward networks.
        """
        super().__init__()
        self.num_layers = num_layers
        self.num_levels = num_levels
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
        self, memory: Memory, query: Tensor, num_layers: int | None = None
    ) -> list[LayerOutput]:
        """
        Args:
            memory: the encoder's tokens.
            query: (N, Q, C) location-aware thing queries.
            num_layers: use the first ``num_layers`` layers; None: all.

        Returns:
            The outputs of every used layer, for thing queries, then stuff queries.
        """
        memory = memory.finest(self.num_levels)
        stuff_query = self.stuff_query.weight.expand(len(query), -1, -1)
        query = torch.cat([query, stuff_query], dim=1)  # (N, Q + T, C)
        outputs = []
        for layer in self.layers[:num_layers]:
            outputs.append(layer(query, memory))
            query = outputs[-1].query
        return outputs

    def predict_classes(
        self, outputs: Sequence[LayerOutput], locations: LocationPredictions, *, last_only: bool
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            outputs: of :meth:`forward`.
            locations: of the location decoder.
            last_only: of the last used layer, instead of every layer.

        Returns:
            Logits of things (layers, N, Q, K), and of every stuff query's own class (layers, N, T).
        """
        num_things = locations.query.shape[1]
        things, stuff = [], []
        for layer in range(len(outputs))[-1 if last_only else 0 :]:
            query = outputs[layer].query
            things.append(self.thing_heads[layer](query[:, :num_things]))
            stuff.append(self.stuff_heads[layer](query[:, num_things:]).squeeze(-1))
        return torch.stack(things), torch.stack(stuff)

    def predict_masks(
        self,
        outputs: Sequence[LayerOutput],
        locations: LocationPredictions,
        memory: Memory,
        valid_shapes: Sequence[Sequence[Shape]],
        queries: MatchedQueries,
        *,
        last_only: bool,
    ) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        """
        Args:
            outputs: of :meth:`forward`.
            locations: of the location decoder.
            memory: the encoder's tokens.
            valid_shapes: N x L x (h_l, w_l) of the part of each map that is not padding.
            queries: those that get a mask.
            last_only: of the last used layer, instead of every layer.

        Returns:
            Mask logits at the finest level, without padding, of things, layers x N x
            (R_things, h, w), and of stuff, layers x N x (R_stuff, h, w).
        """
        heads = [cast(MaskDecoderLayer, layer).cross_attn.mask_head for layer in self.layers]
        memory = memory.finest(self.num_levels)
        make = partial(mask_logits, outputs, heads, memory, valid_shapes, last_only=last_only)
        num_things = locations.query.shape[1]
        return make(queries.things), make([num_things + index for index in queries.stuff])


def mask_logits(
    outputs: Sequence[LayerOutput],
    heads: Sequence[MaskHead],
    memory: Memory,
    valid_shapes: Sequence[Sequence[Shape]],
    index: Sequence[Tensor],
    *,
    last_only: bool,
) -> list[list[Tensor]]:
    """
    Make masks of the attention logits of some queries.

    Args:
        outputs: layers x outputs.
        heads: the mask head of each of these layers; there may be more heads.
        memory: whose L levels are the keys.
        valid_shapes: N x (at least L) x (h_l, w_l).
        index: N x (R,) int64 queries.
        last_only: of the last output, instead of every output.

    Returns:
        layers x N x (R, h, w).
    """
    num_levels = len(memory.spatial_shapes)
    layers = list(zip(outputs, heads, strict=False))[-1 if last_only else 0 :]
    return [
        [
            head(q.index_select(1, i), k, memory.spatial_shapes, valid[:num_levels])
            for q, k, i, valid in zip(
                output.q.unbind(), output.k.unbind(), index, valid_shapes, strict=True
            )
        ]
        for output, head in layers
    ]
