"""The mask decoder of the authors' released models (``MODEL.PSF.MASK_DECODER.NAME decoupled``).

It differs from the paper's (``mask_decoder.py``): things and stuff have layers of their own, things
have no self-attention and take their classes from the location decoder, a tail makes the last
masks, and masks end in a ReLU before upsampling.

Shapes: as in ``mask_decoder.py``.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from psf.layers.transformer import ClassHead, init_linear_weights
from psf.modeling.encoder import Memory, Shape
from psf.modeling.location_decoder import LocationPredictions
from psf.modeling.mask_decoder import (
    LayerOutput,
    MaskDecoderLayer,
    MatchedQueries,
    mask_logits,
    split_heads,
)
from psf.modeling.mask_head import MaskHead


class MaskTail(nn.Module):
    """The projections and the mask head of an attention, without its values."""

    def __init__(self, *, dim: int, num_heads: int, num_levels: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.mask_head = MaskHead(num_heads=num_heads, num_levels=num_levels)
        init_linear_weights(self)

    def forward(self, query: Tensor, memory: Memory) -> LayerOutput:
        """Queries (N, Q, C), returned as they are, and the projections."""
        num_heads = self.mask_head.num_heads
        q = split_heads(self.q_proj(query), num_heads)
        return LayerOutput(query, q, split_heads(self.k_proj(memory.features), num_heads))


class MaskDecoderStack(nn.Module):
    """One of the two stacks of the released decoder: layers, then a tail that makes masks only."""

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

    @property
    def mask_heads(self) -> list[MaskHead]:
        """Those of the layers, then the tail's."""
        attentions = [cast(MaskDecoderLayer, layer).cross_attn for layer in self.layers]
        return [attention.mask_head for attention in attentions] + [self.tail.mask_head]

    def forward(
        self,
        query: Tensor,
        position: Tensor | float,
        memory: Memory,
        num_layers: int | None = None,
    ) -> list[LayerOutput]:
        """
        Args:
            query: (N, Q, C).
            position: (Q, C), added to the queries before every layer: it stays in the residual and
                accumulates (official code). 0 for none.
            memory: the encoder's tokens.
            num_layers: use the first ``num_layers`` layers; None: all.

        Returns:
            The output of every used layer, then the tail's if all layers are used.
        """
        outputs = []
        layers = self.layers[:num_layers]
        for layer in layers:
            outputs.append(layer(query + position, memory))
            query = outputs[-1].query
        if len(layers) == len(self.layers):
            outputs.append(self.tail(query + position, memory))
        return outputs


class DecoupledMaskDecoder(nn.Module):
    """
    The released decoder; the methods are those of :class:`~.mask_decoder.JointMaskDecoder`.

    Its mask logits have had their ReLU: upsampled, they are the masks, and have no upper bound.
    """

    mask_activation: Callable[[Tensor], Tensor] = staticmethod(torch.positive)  # the identity
    greatest_mask_value = torch.inf

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
        self, memory: Memory, query: Tensor, num_layers: int | None = None
    ) -> list[LayerOutput]:
        """The outputs for stuff queries; things wait until the ones that get a mask are known."""
        content, position = self.stuff_query.weight.chunk(2, dim=-1)
        content = content.expand(len(query), -1, -1)
        return self.stuff(content, position, memory.finest(self.num_levels), num_layers)

    def predict_classes(
        self, outputs: Sequence[LayerOutput], locations: LocationPredictions, *, last_only: bool
    ) -> tuple[Tensor, Tensor]:
        """
        Classes of things are the location decoder's.

        The location decoder has its own loss, so without ``last_only`` there are none of things.
        """
        things = locations.pred_logits[-1:] if last_only else locations.pred_logits[:0]
        layers = list(zip(outputs, self.stuff_heads, strict=False))[-1 if last_only else 0 :]
        stuff = [head(output.query).squeeze(-1) for output, head in layers]
        return things, torch.stack(stuff)

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
        """Thing queries do not see each other: only those that get a mask go through the layers."""
        memory = memory.finest(self.num_levels)
        query, index = _choose(locations.query, queries.things)
        things = self.things(query, 0.0, memory, num_layers=len(outputs))
        make = partial(mask_logits, memory=memory, valid_shapes=valid_shapes, last_only=last_only)
        thing_masks = make(things, self.things.mask_heads, index=index)
        stuff_masks = make(outputs, self.stuff.mask_heads, index=queries.stuff)
        return _relu(thing_masks), _relu(stuff_masks)


def _relu(masks: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[image.relu() for image in layer] for layer in masks]


def _choose(query: Tensor, index: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """
    Pick queries (N, Q, C) of every image by N x (R,) indices.

    Returns:
        (N, R', C), filled up to the largest R, at least 1, so that every layer has a gradient; and
        N x (R,) the places of the picked ones.
    """
    size = max([1, *(len(i) for i in index)])
    filled = torch.stack([F.pad(i, (0, size - len(i))) for i in index])  # with query 0
    chosen = query.gather(1, filled[..., None].expand(-1, -1, query.shape[-1]))
    return chosen, [torch.arange(len(i), device=query.device) for i in index]
