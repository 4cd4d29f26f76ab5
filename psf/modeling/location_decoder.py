"""Location decoder: learned thing queries become location-aware queries.

Paper, section 3.3; Deformable DETR's decoder with iterative box refinement. Shapes: N images,
Q thing queries, K thing classes, L levels, S positions, C channels.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from psf.layers.ms_deform_attn import MSDeformAttn
from psf.layers.transformer import BoxHead, ClassHead, FeedForward
from psf.modeling.encoder import Memory

# Boxes are refined from logits within this: coordinates from 1e-5 to 1 - 1e-5 (Deformable DETR).
GREATEST_LOGIT = math.log(1e5)


class LocationPredictions(NamedTuple):
    """Location-aware queries, and the auxiliary predictions of every layer."""

    query: Tensor  # (N, Q, C) location-aware queries
    pred_logits: Tensor  # (layers, N, Q, K) class logits
    pred_boxes: Tensor  # (layers, N, Q, 4) cxcywh in [0, 1] of the unpadded image


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
        self, query: Tensor, position: Tensor, reference_points: Tensor, memory: Memory
    ) -> Tensor:
        """
        Args:
            query: (N, Q, C).
            position: (N, Q, C), added to queries and self-attention keys.
            reference_points: (N, Q, L, 2) points or (N, Q, L, 4) boxes, in units of the padded
                maps.
            memory: the encoder's tokens.

        Returns:
            (N, Q, C).
        """
        placed = query + position
        attended, _ = self.self_attn(placed, placed, query, need_weights=False)
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

    def __init__(
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
        """
        super().__init__()
        self.query_embed = nn.Embedding(num_queries, 2 * dim)  # position, then content
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
        # The first reference is a point: start from boxes of about a tenth of the image.
        self.box_heads = nn.ModuleList(
            BoxHead(dim, size_bias=-2.0 if layer == 0 else 0.0) for layer in range(num_layers)
        )
        nn.init.xavier_uniform_(self.reference_points.weight)
        nn.init.zeros_(self.reference_points.bias)

    def forward(self, memory: Memory) -> LocationPredictions:
        """
        Args:
            memory: the encoder's tokens.

        Returns:
            Queries after the last layer, classes and boxes after each.
        """
        batch_size = len(memory.features)
        position, query = self.query_embed.weight.expand(batch_size, -1, -1).chunk(2, dim=-1)
        reference = self.reference_points(position).float()  # (N, Q, 2) logits of points
        ratios = memory.valid_ratios[:, None]  # (N, 1, L, 2)
        logits, boxes = [], []
        for layer, class_head, box_head in zip(
            self.layers, self.class_heads, self.box_heads, strict=True
        ):
            scale = ratios.repeat(1, 1, 1, reference.shape[-1] // 2)
            query = layer(query, position, reference.sigmoid()[:, :, None] * scale, memory)
            anchor = reference.clamp(-GREATEST_LOGIT, GREATEST_LOGIT)
            if anchor.shape[-1] == 2:  # a point has no size yet
                anchor = F.pad(anchor, (0, 2))
            box = box_head(query).float() + anchor  # (N, Q, 4) logits
            logits.append(class_head(query))
            boxes.append(box)
            reference = box.detach()
        return LocationPredictions(query, torch.stack(logits), torch.stack(boxes).sigmoid())
