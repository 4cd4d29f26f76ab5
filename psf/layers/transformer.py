"""Parts that every transformer here shares: position encoding, feed-forward network, heads.

Shapes: N images, Q queries, C channels, K classes, H_l x W_l the size of a feature level.
"""

import math

import torch
from torch import Tensor, nn


def sine_position_encoding(
    spatial_shape: tuple[int, int],
    valid_sizes: Tensor,
    dim: int,
    *,
    temperature: float = 10000.0,
) -> Tensor:
    """
    DETR's sine position encoding, normalised by the valid part of each image.

    Unlike DETR's (and the official code's) cumulative sums, positions in the padding continue the
    image's own coordinates instead of dividing zero by epsilon, so they stay finite and smooth.

    Args:
        spatial_shape: (H_l, W_l) of the padded map.
        valid_sizes: (N, 2) float32, (h, w) of the part of the map that is not padding.
        dim: channels C, a multiple of 4; the first half encodes y, the second x.
        temperature: the longest wavelength is 2 pi times this.

    Returns:
        (N, H_l, W_l, C) float32; sine and cosine interleaved.
    """
    if dim % 4:
        raise ValueError(f"the position encoding needs a multiple of 4 channels, got {dim}")
    device = valid_sizes.device
    height, width = spatial_shape
    frequency = temperature ** -(torch.arange(0, dim // 2, 2, device=device) / (dim // 2))

    def encode(size: int, valid_size: Tensor) -> Tensor:
        centre = torch.arange(size, device=device) + 0.5
        angle = 2 * math.pi * centre / (valid_size[:, None] + 1e-6)  # (N, size)
        angle = angle[..., None] * frequency  # (N, size, C / 4)
        return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)  # (N, size, C / 2)

    y = encode(height, valid_sizes[:, 0])[:, :, None].expand(-1, -1, width, -1)
    x = encode(width, valid_sizes[:, 1])[:, None].expand(-1, height, -1, -1)
    return torch.cat([y, x], dim=-1)


def sine_box_encoding(boxes: Tensor, dim: int, *, temperature: float = 10000.0) -> Tensor:
    """
    Sine encoding of the four coordinates of boxes (DAB-DETR, arXiv 2201.12329, section 4.2).

    Args:
        boxes: (..., 4) cxcywh in [0, 1].
        dim: channels of each coordinate, an even number.
        temperature: the longest wavelength is about 2 pi times this.

    Returns:
        (..., 4 * dim).
    """
    frequency = temperature ** -(torch.arange(0, dim, 2, device=boxes.device) / dim)
    angle = 2 * math.pi * boxes[..., None] * frequency  # (..., 4, dim / 2)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-3)


class FeedForward(nn.Sequential):
    """Two linear layers with an activation between and dropout after each."""

    def __init__(
        self, *, dim: int, hidden_dim: int, dropout: float = 0.0, activation: type[nn.Module]
    ) -> None:
        super().__init__(
            nn.Linear(dim, hidden_dim),
            activation(),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, dim),
            nn.Dropout(dropout),
        )
        init_linear_weights(self)


class ClassHead(nn.Linear):
    """A linear layer that gives class logits, with an initial probability of 0.01 (RetinaNet)."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__(dim, num_classes)
        nn.init.xavier_uniform_(self.weight)
        probability = 0.01
        nn.init.constant_(self.bias, -math.log((1 - probability) / probability))


class BoxHead(nn.Sequential):
    """Three linear layers that give four numbers: the change of a reference box (DETR)."""

    def __init__(self, dim: int, *, size_bias: float = 0.0) -> None:
        """
        Args:
            dim: channels C.
            size_bias: initial change of the logits of width and height; the rest starts at 0.
        """
        last = nn.Linear(dim, 4)
        super().__init__(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), last)
        init_linear_weights(self)
        nn.init.zeros_(last.weight)
        last.bias = nn.Parameter(torch.tensor([0.0, 0.0, size_bias, size_bias]))


class BoxPosition(nn.Sequential):
    """The position encoding of queries that are boxes: two layers on sines (DAB-DETR)."""

    def __init__(self, dim: int) -> None:
        super().__init__(nn.Linear(2 * dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.dim = dim
        init_linear_weights(self)

    def forward(self, boxes: Tensor) -> Tensor:
        """(..., 4) cxcywh in [0, 1] to (..., C)."""
        sines = sine_box_encoding(boxes, self.dim // 2)
        encoding: Tensor = super().forward(sines.to(next(self.parameters()).dtype))
        return encoding


def init_linear_weights(module: nn.Module) -> None:
    """Xavier-uniform weights for every linear layer in ``module`` (DETR's initialisation)."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
