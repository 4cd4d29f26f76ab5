"""Mask decoders: cross-attention whose attention maps become the predicted masks.

:class:`JointMaskDecoder` is the paper's (section 3.4), :class:`DecoupledMaskDecoder` the authors'
released one. Both are stacks of :class:`MaskDecoderLayer` and return the same results.

Shapes: N images, Q thing queries, T stuff queries (one a stuff class), K thing classes, L levels,
S positions, M heads, C = M * D channels, R queries of one image whose masks are wanted.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from psf.layers.blocks import (
    feed_forward_block,
    runs_as_one,
    self_attention_block,
)
from psf.layers.linear import ConvolutionalLinear
from psf.layers.native import is_hooked
from psf.layers.transformer import (
    FEW_CHANNELS,
    ClassHead,
    FeedForward,
    attention,
    class_logits,
    init_linear_weights,
)
from psf.modeling.location_decoder import Locations
from psf.modeling.mask_head import HeadWeights, Levels, mask_maps
from psf.modeling.pixel_encoder import Memory, Shape
from psf.modeling.postprocessing import as_they_are

# The official code's value in its mask decoders (1e-5 elsewhere).
LAYER_NORM_EPS = 1e-6


class MaskQueries(NamedTuple):
    """The queries of every image whose masks are wanted."""

    things: list[Tensor]  # N x (R_things,) int64 in [0, Q)
    stuff: list[Tensor]  # N x (R_stuff,) int64 in [0, T), also the classes


class DeepPredictions(NamedTuple):
    """What the layers of a mask decoder predict in training, each to be supervised.

    There may be more layers with masks than with classes.
    """

    thing_logits: Tensor  # (layers, N, Q, K), layers may be 0
    stuff_logits: Tensor  # (layers, N, T), each stuff query for its own class
    thing_maps: list[list[Tensor]]  # layers x N x (R_things, h, w) at the finest level, unpadded
    stuff_maps: list[list[Tensor]]  # layers x N x (R_stuff, h, w)
    activation: Callable[[Tensor], Tensor]  # turns maps, once resized, into soft masks >= 0


class Projections(NamedTuple):
    """The projected queries and positions whose products are the attention logits."""

    q: Tensor  # (N, M, queries, D)
    k: Tensor  # (N, M, S, D)


class MaskGroup(NamedTuple):
    """The queries whose masks are wanted, of n images whose maps have one valid size."""

    images: list[int]  # n
    query: Tensor  # (n, R) int64 queries, filled up to the most of an image with query 0
    rows: Tensor | None  # int64 in [0, n * R), those that are no filling; None: there is none
    places: list[int]  # of every part of them, in the list that was given to group_queries
    counts: list[int]  # queries of every part


class ClassPredictions(NamedTuple):
    """What a mask decoder predicts at inference before it makes masks, and from what."""

    thing_logits: Tensor  # (N, Q, K)
    stuff_logits: Tensor  # (N, T), each stuff query for its own class
    projections: Projections  # for predict_masks, of the attention that makes the last masks
    thing_query: Tensor | None  # (N, Q, C) where things have layers of their own to go through


class AttentionMaps(nn.Module):
    """What makes masks of attention logits; base of the two modules below."""

    PROJECTIONS: tuple[str, ...] = ("q_proj", "k_proj")
    q_proj: nn.Linear
    k_proj: nn.Linear

    def __init__(self, *, dim: int, num_heads: int, num_levels: int) -> None:
        """
        Args:
            dim: channels C of queries and memory; a multiple of ``num_heads``.
            num_heads: attention heads M.
            num_levels: feature levels L of the memory.
        """
        super().__init__()
        self.num_heads = num_heads
        for name in self.PROJECTIONS:
            self.add_module(name, nn.Linear(dim, dim))
        # About 200 parameters make the mask, so the attention itself must learn where to look.
        self.level_projs = nn.ModuleList(nn.Linear(num_heads, num_heads) for _ in range(num_levels))
        self.mask_proj = nn.Linear(num_heads * num_levels, 1)
        init_linear_weights(self)

    def project(self, query: Tensor, features: Tensor) -> Projections:
        """Queries (N, Q, C) and features (N, S, C), every head's apart."""
        return Projections(
            self.split_heads(self.q_proj(query)), self.split_heads(self.k_proj(features))
        )

    def split_heads(self, x: Tensor) -> Tensor:
        """(N, S, C) to (N, M, S, D)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def maps(
        self, projections: Projections, memory: Memory, groups: Sequence[MaskGroup]
    ) -> list[Tensor]:
        """
        Make masks.

        Args:
            projections: of :meth:`project`.
            memory: the encoder's tokens, which were projected.
            groups: of :func:`group_queries`.

        Returns:
            N * parts x (R, h, w), before any activation, in the order of the queries given there.
        """
        q, k = projections
        weights = self._head_weights()
        maps: dict[int, Tensor] = {}
        for group in groups:
            index = group.query[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[-1])
            together = len(group.images) == len(q)  # as nearly always: nothing to copy
            queries = (q if together else q[group.images]).gather(2, index)  # (n, M, R, D)
            keys = k if together else k[group.images]
            valid = tuple(memory.valid_shapes[group.images[0]])
            levels = Levels(tuple(memory.spatial_shapes), valid)
            filled = mask_maps(queries, keys, levels, weights).flatten(0, 1)
            # One gather and one split: their gradients are a kernel each, that of slices is many.
            own = filled if group.rows is None else filled.index_select(0, group.rows)
            maps.update(zip(group.places, own.split(group.counts), strict=True))
        return [maps[place] for place in sorted(maps)]

    def _head_weights(self) -> HeadWeights:
        layers = cast(Iterable[nn.Linear], self.level_projs)
        weights, biases = zip(*((layer.weight, layer.bias) for layer in layers), strict=True)
        return HeadWeights(
            projection=torch.stack(weights),
            bias=torch.stack(biases),
            weight=self.mask_proj.weight.view(-1, self.num_heads),
            mask_bias=self.mask_proj.bias,
        )


class Attended(NamedTuple):
    """Queries after an attention, and what masks can be made of."""

    query: Tensor  # (N, Q, C)
    projections: Projections


class MaskAttention(AttentionMaps):
    """Multi-head cross-attention that can also turn its attention logits into masks."""

    PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
    v_proj: nn.Linear
    out_proj: nn.Linear

    def forward(self, query: Tensor, features: Tensor, padding_mask: Tensor | None) -> Attended:
        """
        Args:
            query: (N, Q, C).
            features: (N, S, C), keys and values.
            padding_mask: (N, S) bool, True where nothing attends to; None: nowhere.
        """
        q, k = self.project(query, features)
        v = self.v_proj(features).unflatten(-1, (self.num_heads, -1))
        visible = None if padding_mask is None else ~padding_mask
        attended = attention(q.transpose(1, 2), k.transpose(1, 2), v, visible)
        return Attended(self.out_proj(attended), Projections(q, k))


class MaskTail(AttentionMaps):
    """Only the masks of an attention: what the released decoder has after its last layer."""

    def forward(self, query: Tensor, memory: Memory, groups: Sequence[MaskGroup]) -> list[Tensor]:
        """
        Args:
            query: (N, Q, C).
            memory: the encoder's tokens.
            groups: the queries whose masks are wanted.

        Returns:
            As :meth:`maps`.
        """
        return self.maps(self.project(query, memory.features), memory, groups)


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

    def forward(
        self, query: Tensor, memory: Memory, groups: Sequence[MaskGroup] | None
    ) -> tuple[Tensor, list[Tensor]]:
        """
        Args:
            query: (N, Q, C).
            memory: the encoder's tokens.
            groups: the queries whose masks are wanted, or None.

        Returns:
            Refined queries (N, Q, C), and the maps of :meth:`AttentionMaps.maps`.
        """
        return self.cross_attended(self.self_attended(query), memory, groups)

    def self_attended(self, query: Tensor) -> Tensor:
        """(N, Q, C) to (N, Q, C): the queries after they have seen each other, if they do."""
        if self.self_attn is None:
            return query
        return self_attention_block(query, None, self.self_attn, None, self.norm3)

    def cross_attended(
        self, query: Tensor, memory: Memory, groups: Sequence[MaskGroup] | None
    ) -> tuple[Tensor, list[Tensor]]:
        """The rest of :meth:`forward`; masks are made of the queries that come in here."""
        refined, projections = self.refine(query, memory.features, memory.padding_mask)
        if groups is None:
            return refined, []
        return refined, self.cross_attn.maps(projections, memory, groups)

    def refine(self, query: Tensor, features: Tensor, padding_mask: Tensor | None) -> Attended:
        """
        What :meth:`cross_attended` does before masks: all sizes are those of its tensors.

        Args:
            query: (N, Q, C), self-attended.
            features: (N, S, C) of the memory.
            padding_mask: (N, S) bool or None, likewise.

        Returns:
            Refined queries, and projections of those that came in.
        """
        query, projections = self._attend(query, features, padding_mask)
        return Attended(feed_forward_block(query, self.ffn, self.norm2), projections)

    def _attend(self, query: Tensor, features: Tensor, padding_mask: Tensor | None) -> Attended:
        """The cross-attention with its residual and normalisation, in training as one operator."""
        attention, norm = self.cross_attn, self.norm1
        layers = [attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj]
        if (
            type(attention) is not MaskAttention
            or is_hooked(attention)
            or query.shape[-1] > FEW_CHANNELS * attention.num_heads
            or features.dtype != query.dtype
            or not runs_as_one(query, norm, layers)
        ):
            attended, projections = attention(query, features, padding_mask)
            return Attended(norm(query + attended), projections)
        query, q, k = torch.ops.psf.cross_attention_block.default(
            query,
            features,
            None if padding_mask is None else ~padding_mask,
            *(parameter for layer in layers for parameter in (layer.weight, layer.bias)),
            norm.weight,
            norm.bias,
            norm.eps,
            attention.num_heads,
            type(attention.k_proj) is ConvolutionalLinear,
        )
        return Attended(query, Projections(attention.split_heads(q), attention.split_heads(k)))


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
        self, memory: Memory, locations: Locations, mask_queries: MaskQueries
    ) -> DeepPredictions:
        """
        Args:
            memory: the encoder's tokens.
            locations: the location-aware thing queries.
            mask_queries: the queries whose masks are wanted.

        Returns:
            The predictions of every layer.
        """
        memory = memory.finest(self.num_levels)
        query = self._queries(locations)
        groups = _groups_of_both(memory, mask_queries, locations.query.shape[1])
        queries, maps = [], []
        for layer in self.layers:
            query, both = layer(query, memory, groups)
            queries.append(query)
            maps.append(both)
        num_queries = [locations.query.shape[1], self.stuff_query.num_embeddings]
        things, stuff = torch.stack(queries).split(num_queries, dim=2)
        return DeepPredictions(
            thing_logits=class_logits(self.thing_heads, things),
            stuff_logits=class_logits(self.stuff_heads, stuff).squeeze(-1),
            thing_maps=[both[::2] for both in maps],
            stuff_maps=[both[1::2] for both in maps],
            activation=torch.sigmoid,
        )

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        """Turns maps, once resized, into soft masks, here of at most 1."""
        return torch.sigmoid

    @property
    def greatest_mask_value(self) -> float:
        """What no mask exceeds."""
        return 1.0

    def predict_classes(
        self, memory: Memory, locations: Locations, num_layers: int | None = None
    ) -> ClassPredictions:
        """
        Predict the classes at inference; no layer makes masks.

        Args:
            memory: the encoder's tokens.
            locations: the location-aware thing queries.
            num_layers: use only so many of the first layers; None: all.

        Returns:
            The classes of the last used layer.
        """
        memory = memory.finest(self.num_levels)
        query = self._queries(locations)
        num_things, last = locations.query.shape[1], self._last(num_layers)
        for layer in self.layers[:last]:
            query, _ = layer(query, memory, None)
        layer = cast(MaskDecoderLayer, self.layers[last])
        query, projections = layer.refine(query, memory.features, memory.padding_mask)
        return ClassPredictions(
            thing_logits=self.thing_heads[last](query[:, :num_things]),
            stuff_logits=self.stuff_heads[last](query[:, num_things:]).squeeze(-1),
            projections=projections,
            thing_query=None,
        )

    def predict_masks(
        self,
        memory: Memory,
        predictions: ClassPredictions,
        wanted: MaskQueries,
        num_layers: int | None = None,
    ) -> list[Tensor]:
        """
        Make the masks of some queries at inference.

        Args:
            memory: what was given to :meth:`predict_classes`.
            predictions: what it returned.
            wanted: the queries whose masks are wanted.
            num_layers: what was given to it.

        Returns:
            N x (R_things + R_stuff, h, w) maps of the last used layer at the finest level,
            unpadded, for :attr:`activation`.
        """
        memory = memory.finest(self.num_levels)
        num_things = predictions.thing_logits.shape[1]
        pairs = zip(wanted.things, wanted.stuff, strict=True)
        groups = group_queries(memory, [torch.cat([t, num_things + s]) for t, s in pairs])
        layer = cast(MaskDecoderLayer, self.layers[self._last(num_layers)])
        return layer.cross_attn.maps(predictions.projections, memory, groups)

    def _last(self, num_layers: int | None) -> int:
        return (num_layers or self.num_layers) - 1

    def _queries(self, locations: Locations) -> Tensor:
        """(N, Q + T, C) the queries of the first layer."""
        stuff_query = self.stuff_query.weight.expand(len(locations.query), -1, -1)
        return torch.cat([locations.query, stuff_query], dim=1)


class StackOutput(NamedTuple):
    """What a stack of mask-decoder layers gives."""

    queries: list[Tensor]  # layers x (N, Q, C), after each
    maps: list[list[Tensor]]  # (layers + tail) x N x (R, h, w), or of the last of these only; >= 0


class MaskDecoderStack(nn.Module):
    """One of the released decoder's two stacks: layers, and a tail that makes the last masks."""

    def __init__(
        self,
        *,
        dim: int,
        num_layers: int,
        num_heads: int,
        num_levels: int,
        feedforward_dim: int,
        self_attention: bool,
    ) -> None:
        """
        Args:
            dim: channels C.
            num_layers: decoder layers, each with its own mask head.
            num_heads: attention heads M.
            num_levels: feature levels L of the memory.
            feedforward_dim: hidden channels of the feed-forward networks.
            self_attention: queries attend to each other in every layer.
        """
        super().__init__()
        self.layers = nn.ModuleList(
            MaskDecoderLayer(
                dim=dim,
                num_heads=num_heads,
                num_levels=num_levels,
                feedforward_dim=feedforward_dim,
                self_attention=self_attention,
            )
            for _ in range(num_layers)
        )
        self.tail = MaskTail(dim=dim, num_heads=num_heads, num_levels=num_levels)

    def forward(
        self,
        query: Tensor,
        position: Tensor | float,
        memory: Memory,
        mask_queries: Sequence[Tensor],
        *,
        deep_supervision: bool,
        num_layers: int | None = None,
    ) -> StackOutput:
        """
        Args:
            query: (N, Q, C).
            position: (Q, C), added to the queries before every layer: it stays in the residual and
                accumulates (official code). 0 for none.
            memory: the encoder's tokens.
            mask_queries: N x (R,) int64 queries whose masks are wanted.
            deep_supervision: make the masks of every layer, not only the last.
            num_layers: use only so many of the first layers, and the tail if these are all; None:
                all.
        """
        layers = self.layers[:num_layers]
        groups = group_queries(memory, mask_queries)
        with_tail = self.mask_attention(num_layers) is self.tail
        output = StackOutput([], [])
        for i, layer in enumerate(layers, start=1):
            wanted = deep_supervision or (i == len(layers) and not with_tail)
            query, maps = layer(query + position, memory, groups if wanted else None)
            output.queries.append(query)
            if wanted:
                output.maps.append([m.relu() for m in maps])
        if with_tail:
            maps = self.tail(query + position, memory, groups)
            output.maps.append([m.relu() for m in maps])
        return output

    def mask_attention(self, num_layers: int | None) -> AttentionMaps:
        """What makes the last masks: the tail if all layers are used, else the last used one's."""
        layers = self.layers[:num_layers]
        if len(layers) == len(self.layers):
            return self.tail
        return cast(MaskDecoderLayer, layers[-1]).cross_attn


class DecoupledMaskDecoder(nn.Module):
    """
    The mask decoder of the authors' released models.

    Things and stuff have stacks of their own; things have no self-attention and their classes are
    those of the location decoder; masks end in a ReLU, before upsampling.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_stuff_classes: int,
        num_thing_layers: int,
        num_stuff_layers: int,
        num_heads: int,
        num_levels: int,
        feedforward_dim: int,
    ) -> None:
        """
        Args:
            dim: channels C.
            num_stuff_classes: T, also the number of stuff queries.
            num_thing_layers: layers of the stack for things (released: 4).
            num_stuff_layers: layers of the stack for stuff (released: 6), each with a class head.
            num_heads: attention heads M.
            num_levels: the finest levels L of the memory that make keys and masks.
            feedforward_dim: hidden channels of the feed-forward networks.
        """
        super().__init__()
        self.num_layers = max(num_thing_layers, num_stuff_layers)
        self.num_levels = num_levels
        self.stuff_query = nn.Embedding(num_stuff_classes, 2 * dim)  # content, then position
        common = {
            "dim": dim,
            "num_heads": num_heads,
            "num_levels": num_levels,
            "feedforward_dim": feedforward_dim,
        }
        self.things = MaskDecoderStack(num_layers=num_thing_layers, self_attention=False, **common)
        self.stuff = MaskDecoderStack(num_layers=num_stuff_layers, self_attention=True, **common)
        self.stuff_heads = nn.ModuleList(ClassHead(dim, 1) for _ in range(num_stuff_layers))

    def forward(
        self, memory: Memory, locations: Locations, mask_queries: MaskQueries
    ) -> DeepPredictions:
        """As :meth:`JointMaskDecoder.forward`; no layer classifies things."""
        memory = memory.finest(self.num_levels)
        query, position = self._stuff_queries(locations)
        # Thing queries do not see each other, so those without a mask need not go through.
        thing_query, index = _chosen(locations.query, mask_queries.things)
        things = self.things(thing_query, 0.0, memory, index, deep_supervision=True)
        stuff = self.stuff(query, position, memory, mask_queries.stuff, deep_supervision=True)
        return DeepPredictions(
            thing_logits=locations.logits[:0],
            stuff_logits=class_logits(self.stuff_heads, torch.stack(stuff.queries)).squeeze(-1),
            thing_maps=things.maps,
            stuff_maps=stuff.maps,
            activation=as_they_are,
        )

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        """Turns maps, once resized, into soft masks; they have had their ReLU before."""
        return as_they_are

    @property
    def greatest_mask_value(self) -> float:
        """Nothing bounds the masks."""
        return torch.inf

    def predict_classes(
        self, memory: Memory, locations: Locations, num_layers: int | None = None
    ) -> ClassPredictions:
        """
        As :meth:`JointMaskDecoder.predict_classes`; a stack has at most ``num_layers`` layers.

        Only the stuff goes through its layers: those of things say nothing about their classes.
        """
        memory = memory.finest(self.num_levels)
        query, position = self._stuff_queries(locations)
        *earlier, last = cast(Sequence[MaskDecoderLayer], self.stuff.layers[:num_layers])
        for layer in earlier:
            query, _ = layer(query + position, memory, None)
        query, projections = last.refine(
            last.self_attended(query + position), memory.features, memory.padding_mask
        )
        if self.stuff.mask_attention(num_layers) is self.stuff.tail:
            projections = self.stuff.tail.project(query + position, memory.features)
        return ClassPredictions(
            thing_logits=locations.logits[-1],
            stuff_logits=self.stuff_heads[len(earlier)](query).squeeze(-1),
            projections=projections,
            thing_query=locations.query,
        )

    def predict_masks(
        self,
        memory: Memory,
        predictions: ClassPredictions,
        wanted: MaskQueries,
        num_layers: int | None = None,
    ) -> list[Tensor]:
        """As :meth:`JointMaskDecoder.predict_masks`; only wanted things go through their layers."""
        memory = memory.finest(self.num_levels)
        thing_query = cast(Tensor, predictions.thing_query)
        query, index = _chosen(thing_query, wanted.things)
        things = self.things(
            query, 0.0, memory, index, deep_supervision=False, num_layers=num_layers
        )
        stuff = self.stuff.mask_attention(num_layers).maps(
            predictions.projections, memory, group_queries(memory, wanted.stuff)
        )
        maps = zip(things.maps[-1], stuff, strict=True)
        return [torch.cat([t, s.relu()]) for t, s in maps]

    def _stuff_queries(self, locations: Locations) -> tuple[Tensor, Tensor]:
        """Content (N, T, C) and position (T, C) of the stuff queries."""
        query, position = self.stuff_query.weight.chunk(2, dim=-1)
        return query.expand(len(locations.query), -1, -1), position


MaskDecoder = JointMaskDecoder | DecoupledMaskDecoder


def group_queries(
    memory: Memory, mask_queries: Sequence[Tensor], parts: int = 1
) -> list[MaskGroup]:
    """
    Prepare which masks are made, for all layers at once.

    Args:
        memory: of the images.
        mask_queries: N * parts x (R,) int64 indices of queries, the parts of an image in a row.
        parts: whose masks are to come as tensors of their own.

    Returns:
        Groups of images of one size.
    """
    groups = []
    for images in _images_of_one_size(memory):
        places = [image * parts + part for image in images for part in range(parts)]
        counts = [len(mask_queries[place]) for place in places]
        wanted = [
            torch.cat(list(mask_queries[image * parts : (image + 1) * parts])) for image in images
        ]
        index = pad_sequence(wanted, batch_first=True)
        rows = None
        if sum(counts) < index.numel():
            own = [i * index.shape[1] + j for i, row in enumerate(wanted) for j in range(len(row))]
            rows = torch.tensor(own, dtype=torch.int64, device=index.device)
        groups.append(MaskGroup(images, index, rows, places, counts))
    return groups


def _groups_of_both(memory: Memory, wanted: MaskQueries, num_things: int) -> list[MaskGroup]:
    """Of thing and stuff queries that follow each other, in two parts."""
    pairs = zip(wanted.things, wanted.stuff, strict=True)
    parts = [part for things, stuff in pairs for part in (things, num_things + stuff)]
    return group_queries(memory, parts, parts=2)


def _images_of_one_size(memory: Memory) -> list[list[int]]:
    """The images whose maps have one valid size, in groups."""
    groups: dict[tuple[Shape, ...], list[int]] = {}
    for image, shapes in enumerate(memory.valid_shapes):
        groups.setdefault(tuple(shapes), []).append(image)
    return list(groups.values())


def _chosen(query: Tensor, index: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """
    Pick queries (N, Q, C) of every image by N x (R,) indices.

    Returns:
        (N, R', C), filled up to the most of an image, at least 1, so that every layer has a
        gradient; and N x (R,) the places of the picked ones.
    """
    size = max([1, *(len(i) for i in index)])
    filled = torch.stack([F.pad(i, (0, size - len(i))) for i in index])  # with query 0
    chosen = query.gather(1, filled[..., None].expand(-1, -1, query.shape[-1]))
    return chosen, [torch.arange(len(i), device=query.device) for i in index]
