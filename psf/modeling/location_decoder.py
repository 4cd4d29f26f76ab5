"""Location decoder: learned thing queries become location-aware queries.

Paper, section 3.3; Deformable DETR's decoder with iterative box refinement. Options that the paper
does not have: queries from the encoder, denoising queries, one-to-many queries.

Shapes: N images, Q thing queries, K thing classes, L levels, S positions, C channels.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from psf.layers.ms_deform_attn import MSDeformAttn
from psf.layers.transformer import BoxHead, BoxPosition, ClassHead, FeedForward
from psf.modeling.denoising import NoisedThings
from psf.modeling.encoder import Memory
from psf.modeling.query_selection import Proposals, QuerySelection

# Boxes are refined from logits within this: coordinates from 1e-5 to 1 - 1e-5 (Deformable DETR).
GREATEST_LOGIT = math.log(1e5)

# The logit of the width and height that points start with: about a tenth of the image.
SIZE_OF_POINTS = -2.0


class BoxPredictions(NamedTuple):
    """What the layers predict for the extra queries of training."""

    pred_logits: Tensor  # (layers, N, extra queries, K)
    pred_boxes: Tensor  # (layers, N, extra queries, 4) cxcywh in [0, 1] of the unpadded image


class LocationPredictions(NamedTuple):
    """Location-aware queries, and the auxiliary predictions of every layer.

    With query selection, the tokens that were selected count as the first layer.
    """

    query: Tensor  # (N, Q, C) location-aware queries
    pred_logits: Tensor  # (layers, N, Q, K) class logits
    pred_boxes: Tensor  # (layers, N, Q, 4) cxcywh in [0, 1] of the unpadded image
    one_to_many: BoxPredictions | None = None
    denoising: BoxPredictions | None = None


class QueryOptions(NamedTuple):
    """Ways of learning faster than the paper's; all off is the paper's decoder."""

    selection: bool = False  # queries start at the encoder's best tokens
    denoising: bool = False  # there may be denoising queries in training
    num_one_to_many: int = 0  # extra queries of training, several for every thing (H-DETR)

    @property
    def are_boxes(self) -> bool:
        """Queries start as boxes, which also are their positions (DAB-DETR), not as points."""
        return self.selection or self.denoising


class LocationDecoderLayer(nn.Module):
    """Self-attention, deformable cross-attention and a feed-forward network (post-norm)."""

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
        self.self_attn = nn.MultiheadAttention(dim, num_heads, dropout=dropout, batch_first=True)
        nn.init.xavier_uniform_(self.self_attn.out_proj.weight)  # the others are so by default
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attn = MSDeformAttn(
            dim=dim, num_levels=num_levels, num_heads=num_heads, num_points=num_points
        )
        self.norm2 = nn.LayerNorm(dim)
        self.ffn = FeedForward(
            dim=dim, hidden_dim=feedforward_dim, dropout=dropout, activation=nn.ReLU
        )
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        query: Tensor,
        position: Tensor,
        reference_points: Tensor,
        memory: Memory,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            query: (N, Q, C).
            position: (N, Q, C), added to queries and self-attention keys.
            reference_points: (N, Q, L, 2) points or (N, Q, L, 4) boxes, in units of the padded
                maps.
            memory: the encoder's tokens.
            hidden: (Q, Q) or (N * heads, Q, Q) bool, True where a query (row) must not see another
                (column); None: all see each other.

        Returns:
            (N, Q, C).
        """
        placed = query + position
        attended, _ = self.self_attn(placed, placed, query, need_weights=False, attn_mask=hidden)
        query = self.norm1(query + self.dropout(attended))
        attended = self.cross_attn(
            query + position,
            reference_points,
            memory.features,
            memory.spatial_shapes,
            memory.padding_mask,
        )
        query = self.norm2(query + self.dropout(attended))
        return self.norm3(query + self.ffn(query))


class LocationDecoder(nn.Module):
    """Refines learned queries with the places and sizes of the things they will segment."""

    def __init__(  # noqa: PLR0913  the sizes of a transformer
        self,
        *,
        dim: int,
        num_classes: int,
        num_queries: int,
        num_layers: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        feedforward_dim: int,
        dropout: float,
        options: QueryOptions = QueryOptions(),  # noqa: B008  it is immutable
    ) -> None:
        """
        Args:
            dim: channels C.
            num_classes: thing classes K.
            num_queries: thing queries Q (paper: 300).
            num_layers: decoder layers (paper: 6), each with its own class and box head.
            num_heads: attention heads.
            num_levels: feature levels L.
            num_points: sampling points per head and level.
            feedforward_dim: hidden channels of the feed-forward networks.
            dropout: probability, after attention and in the feed-forward networks.
            options: of the queries.
        """
        super().__init__()
        self.num_queries = num_queries
        self.num_heads = num_heads
        self.options = options
        total = num_queries + options.num_one_to_many
        if options.are_boxes:
            self.query_embed = nn.Embedding(total, dim)  # content
            self.box_position = BoxPosition(dim)
        else:
            self.query_embed = nn.Embedding(total, 2 * dim)  # position, then content
            self.reference_points = nn.Linear(dim, 2)
        self.layers = nn.ModuleList(
            LocationDecoderLayer(
                dim=dim,
                num_heads=num_heads,
                num_levels=num_levels,
                num_points=num_points,
                feedforward_dim=feedforward_dim,
                dropout=dropout,
            )
            for _ in range(num_layers)
        )
        self.class_heads = nn.ModuleList(ClassHead(dim, num_classes) for _ in range(num_layers))
        size_bias = 0.0 if options.are_boxes else SIZE_OF_POINTS
        self.box_heads = nn.ModuleList(
            BoxHead(dim, size_bias=size_bias if layer == 0 else 0.0) for layer in range(num_layers)
        )
        self._add_starts(dim, num_classes, total)

    def _add_starts(self, dim: int, num_classes: int, total: int) -> None:
        """What gives the queries their first points or boxes, and denoising queries contents."""
        if self.options.selection:
            self.selection = QuerySelection(dim=dim, num_classes=num_classes)
        elif self.options.are_boxes:
            places = torch.rand(total, 2).logit(eps=0.05)
            self.anchors = nn.Parameter(F.pad(places, (0, 2), value=SIZE_OF_POINTS))
        else:
            nn.init.xavier_uniform_(self.reference_points.weight)
            nn.init.zeros_(self.reference_points.bias)
        if self.options.denoising:
            self.label_embed = nn.Embedding(max(1, num_classes), dim)
            nn.init.zeros_(self.label_embed.weight)  # wrong labels are no noise before they count

    def forward(self, memory: Memory, noised: NoisedThings | None = None) -> LocationPredictions:
        """
        Args:
            memory: the encoder's tokens.
            noised: denoising queries, in training only.

        Returns:
            Queries after the last layer, classes and boxes after each.
        """
        query, reference, selected = self._start(memory)
        num_learned = query.shape[1]
        if not self.options.are_boxes:
            position, query = query.chunk(2, dim=-1)
        if noised is not None:
            query = torch.cat([query, self.label_embed(noised.labels)], dim=1)
            reference = torch.cat([reference, noised.boxes.logit(eps=1e-5)], dim=1)
        hidden = self._hidden(num_learned, noised)
        ratios = memory.valid_ratios[:, None]  # (N, 1, L, 2)
        logits, boxes = [], []
        for layer, class_head, box_head in zip(
            self.layers, self.class_heads, self.box_heads, strict=True
        ):
            if self.options.are_boxes:
                position = self.box_position(reference.sigmoid())
            scale = ratios.repeat(1, 1, 1, reference.shape[-1] // 2)
            query = layer(query, position, reference.sigmoid()[:, :, None] * scale, memory, hidden)
            anchor = reference.clamp(-GREATEST_LOGIT, GREATEST_LOGIT)
            if anchor.shape[-1] == 2:  # a point has no size yet
                anchor = F.pad(anchor, (0, 2))
            box = box_head(query).float() + anchor  # (N, Q, 4) logits
            logits.append(class_head(query))
            boxes.append(box)
            reference = box.detach()
        sizes = [self.num_queries, num_learned - self.num_queries, query.shape[1] - num_learned]
        pred_logits = torch.stack(logits).split(sizes, dim=2)
        pred_boxes = torch.stack(boxes).sigmoid().split(sizes, dim=2)
        own, one_to_many, denoising = map(BoxPredictions, pred_logits, pred_boxes)
        if selected is not None:
            own = BoxPredictions(
                torch.cat([selected.logits[None], own.pred_logits]),
                torch.cat([selected.boxes.sigmoid()[None], own.pred_boxes]),
            )
        return LocationPredictions(
            query[:, : self.num_queries],
            *own,
            one_to_many=one_to_many if sizes[1] else None,
            denoising=denoising if noised is not None else None,
        )

    def _start(self, memory: Memory) -> tuple[Tensor, Tensor, Proposals | None]:
        """
        The learned queries, in training with those of one-to-many matching.

        Returns:
            (N, Q, C), or (N, Q, 2 C) with positions in front; logits of the first points (N, Q, 2)
            or boxes (N, Q, 4); and the selected tokens.
        """
        number = self.query_embed.num_embeddings if self.training else self.num_queries
        query = self.query_embed.weight[:number].expand(len(memory.features), -1, -1)
        if not self.options.are_boxes:
            points: Tensor = self.reference_points(query.chunk(2, dim=-1)[0]).float()
            return query, points, None
        if not self.options.selection:
            return query, self.anchors[:number].float().expand(len(query), -1, -1), None
        # One-to-many queries start at the best tokens again: the others do not depend on them.
        extra = number - self.num_queries
        selected = self.selection(memory, max(self.num_queries, extra))
        boxes = selected.boxes.detach()
        reference = torch.cat([boxes[:, : self.num_queries], boxes[:, :extra]], dim=1)
        return query, reference, Proposals(*(x[:, : self.num_queries] for x in selected))

    def _hidden(self, num_learned: int, noised: NoisedThings | None) -> Tensor | None:
        """
        Which queries must not see which: those of another kind or another denoising group.

        Denoising queries see the thing queries. All see themselves: no row is hidden wholly.
        """
        if noised is None and num_learned == self.num_queries:
            return None
        device = self.query_embed.weight.device
        kind = (torch.arange(num_learned, device=device) >= self.num_queries).long()
        if noised is None:
            return kind[:, None] != kind
        number = noised.labels.shape[1]
        group = torch.arange(number, device=device) // max(1, number // noised.num_groups)
        kind = torch.cat([kind, 2 + group])
        hidden = kind[:, None] != kind
        hidden[num_learned:, : self.num_queries] = False
        filling = F.pad(~noised.valid, (num_learned, 0))  # (N, Q)
        hidden = (hidden | filling[:, None]) & ~torch.eye(
            len(kind), dtype=torch.bool, device=device
        )
        return hidden.repeat_interleave(self.num_heads, dim=0)
