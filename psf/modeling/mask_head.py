"""Mask head: attention logits become mask logits (paper, section 3.4).

Shapes: R queries of one image, S positions, L levels, M heads, D channels per head.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from psf.modeling.encoder import Shape

# Attention logits (heads x queries x positions) that exist at a time: 16 MiB in float32.
CHUNK_SIZE = 1 << 22

# From so many logits on, training computes them again in the backward pass: 1 MiB in float32.
MOST_STORED = 1 << 18


class MaskHead(nn.Module):
    """A linear layer over the heads for each level, and one over the heads of all levels.

    About 200 parameters make the mask, so the attention itself must learn where to look.
    """

    def __init__(self, *, num_heads: int, num_levels: int) -> None:
        """
        Args:
            num_heads: attention heads M.
            num_levels: feature levels L.
        """
        super().__init__()
        self.num_heads = num_heads
        self.level_projs = nn.ModuleList(nn.Linear(num_heads, num_heads) for _ in range(num_levels))
        self.mask_proj = nn.Linear(num_heads * num_levels, 1)

    def forward(
        self, q: Tensor, k: Tensor, spatial_shapes: Sequence[Shape], valid_shapes: Sequence[Shape]
    ) -> Tensor:
        """
        Args:
            q: (M, R, D) projected queries; R may be 0.
            k: (M, S, D) projected positions, levels concatenated from fine to coarse.
            spatial_shapes: L x (H_l, W_l) of the padded maps.
            valid_shapes: L x (h_l, w_l) of the part of each map that is not padding.

        Returns:
            (R, h_0, w_0) mask logits at the finest level, without padding; at least float32.
        """
        keys = _valid_keys(k, spatial_shapes, valid_shapes)
        num_logits = self.num_heads * sum(h * w for h, w in valid_shapes)  # of one query
        run = partial(self._mask_logits, keys=keys, shapes=valid_shapes)
        if torch.is_grad_enabled() and q.shape[1] * num_logits > MOST_STORED:
            # The logits of all heads are hundreds of times larger than queries, keys and masks.
            run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        parts = q.split(max(1, CHUNK_SIZE // max(1, num_logits)), dim=1)
        return torch.cat([run(part) for part in parts])

    def _mask_logits(self, q: Tensor, keys: list[Tensor], shapes: Sequence[Shape]) -> Tensor:
        """
        Args:
            q: (M, R, D).
            keys: L x (M, h_l * w_l, D).
            shapes: L x (h_l, w_l).

        Returns:
            (R, h_0, w_0).
        """
        dtype = torch.promote_types(q.dtype, torch.float32)
        q = q * q.shape[-1] ** -0.5
        masks = self.mask_proj.bias.to(dtype)
        weights = self.mask_proj.weight.view(len(keys), 1, self.num_heads)  # (L, 1, M)
        projs = cast(Iterable[nn.Linear], self.level_projs)
        for key, shape, proj, weight in zip(keys, shapes, projs, weights, strict=True):
            attn_logits = (q @ key.mT).flatten(1)  # (M, R * h_l * w_l)
            heads = torch.addmm(proj.bias[:, None], proj.weight, attn_logits).relu()
            # A linear map commutes with bilinear upsampling. Each level is reduced to one channel
            # before it is upsampled: M times less memory than upsampling the heads.
            mask = (weight @ heads).view(-1, *shape).to(dtype)
            masks = masks + resize_masks(mask, shapes[0])
        return masks


def _valid_keys(
    k: Tensor, spatial_shapes: Sequence[Shape], valid_shapes: Sequence[Shape]
) -> list[Tensor]:
    """(M, S, D) to L x (M, h_l * w_l, D), without the padding."""
    levels = k.split([h * w for h, w in spatial_shapes], dim=1)
    return [
        level
        if valid == shape
        else level.unflatten(1, shape)[:, : valid[0], : valid[1]].flatten(1, 2)
        for level, shape, valid in zip(levels, spatial_shapes, valid_shapes, strict=True)
    ]


def resize_masks(masks: Tensor, size: Sequence[int]) -> Tensor:
    """(R, h, w) to (R, *size), bilinear; R may be 0."""
    # As the channels of one image: on a CPU the gradient takes two thirds of the time that it takes
    # for a batch of images. Only a batch may be empty.
    images = masks[None] if len(masks) else masks[:, None]
    resized = F.interpolate(images, size=list(size), mode="bilinear", align_corners=False)
    return resized.view(len(masks), *resized.shape[-2:])
