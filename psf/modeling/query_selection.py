"""Thing queries that start at the encoder's best tokens.

Deformable DETR's two stages (arXiv 2010.04159, section 4.2) with DINO's mixed query selection
(arXiv 2203.03605, section 3.4): places come from the tokens, contents are learned.

Shapes: N images, Q queries, K thing classes, L levels, S positions, C channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from psf.layers.transformer import BoxHead, ClassHead, init_linear_weights
from psf.modeling.encoder import Memory

# A token of the finest level proposes a box of this side, as a fraction of the image; one of the
# next level, of twice this (Deformable DETR).
FINEST_PROPOSAL = 0.05


class Proposals(NamedTuple):
    """The best tokens, with their predictions."""

    logits: Tensor  # (N, Q, K)
    boxes: Tensor  # (N, Q, 4) logits of cxcywh boxes


class QuerySelection(nn.Module):
    """Classifies every token and proposes a box at it; the best become queries."""

    def __init__(self, *, dim: int, num_classes: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim))
        self.class_head = ClassHead(dim, num_classes)
        self.box_head = BoxHead(dim)
        init_linear_weights(self.proj)

    def forward(self, memory: Memory, num_queries: int) -> Proposals:
        """
        Args:
            memory: the encoder's tokens.
            num_queries: Q. If there are fewer tokens, each is chosen several times.

        Returns:
            The tokens with the highest class probability outside the padding, best first.
        """
        tokens = self.proj(memory.features)
        logits = self.class_head(tokens)  # (N, S, K)
        num_classes = logits.shape[-1]
        score = logits.detach().amax(-1) if num_classes else tokens.detach()[..., 0]
        if memory.padding_mask is not None:
            score = score.masked_fill(memory.padding_mask, -torch.inf)
        best = score.topk(min(num_queries, score.shape[1])).indices  # (N, min(Q, S))
        repeats = -(-num_queries // best.shape[1])
        best = best.repeat(1, repeats)[:, :num_queries, None]
        places = token_boxes(memory).gather(1, best.expand(-1, -1, 4))
        tokens = tokens.gather(1, best.expand(-1, -1, tokens.shape[-1]))
        return Proposals(
            logits.gather(1, best.expand(-1, -1, num_classes)),
            self.box_head(tokens).float() + places,
        )


def token_boxes(memory: Memory) -> Tensor:
    """(N, S, 4) logits of a square cxcywh box at the centre of every token."""
    boxes = []
    for level, (height, width) in enumerate(memory.spatial_shapes):
        ratios = memory.valid_ratios[:, level]  # (N, 2)
        device = ratios.device
        x = (torch.arange(width, device=device) + 0.5) / (width * ratios[:, :1])  # (N, W_l)
        y = (torch.arange(height, device=device) + 0.5) / (height * ratios[:, 1:])
        x, y = x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)
        side = torch.full_like(x, min(FINEST_PROPOSAL * 2**level, 0.9))
        boxes.append(torch.stack([x, y, side, side], dim=-1).flatten(1, 2))
    return torch.cat(boxes, dim=1).logit(eps=1e-5)  # tokens of the padding lie outside [0, 1]
