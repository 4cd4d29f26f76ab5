"""Pieces that every transformer here shares: position encoding, feed-forward network, box head.

Shapes: N images, C channels, H_l x W_l the size of a feature level.
"""

import math
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from psf.layers.native import has_cpu_kernels, is_hooked

# Channels a head up to which the operator of the extension was measured to be faster on a CPU.
FEW_CHANNELS = 32

# Attention scores (over images, heads, queries and keys) up to which a CPU is faster with them
# written out than with the kernel that never does. Forward and backward of 4 images, 8 heads and 65
# queries: with 65 keys in float32 0.4 ms instead of 0.65, with 336 in bfloat16 0.9 instead of 3.3.
FEW_SCORES = {4: 1 << 18, 2: 1 << 20}  # by bytes of a number


def sine_position_encoding(
    spatial_shape: tuple[int, int],
    valid_shapes: Sequence[tuple[int, int]] | Tensor,
    dim: int,
    *,
    temperature: float = 10000.0,
    device: torch.device | None = None,
) -> Tensor:
    """
    DETR's sine position encoding, normalised by the valid part of each image.

    Unlike DETR's (and the official code's) cumulative sums, positions in the padding continue the
    image's own coordinates instead of dividing zero by epsilon, so they stay finite and smooth.

    Args:
        spatial_shape: (H_l, W_l) of the padded map.
        valid_shapes: (h, w) of the part of the map that is not padding, one pair an image;
            or (N, 2).
        dim: channels C, a multiple of 4; the first half encodes y, the second x.
        temperature: the longest wavelength is 2 pi times this.
        device: where to compute.

    Returns:
        (N, H_l, W_l, C) float32; sine and cosine interleaved.
    """
    if dim % 4:
        raise ValueError(f"the position encoding needs a multiple of 4 channels, got {dim}")
    height, width = spatial_shape
    valid = torch.as_tensor(valid_shapes, dtype=torch.float32, device=device).reshape(-1, 2)
    frequency = temperature ** -(torch.arange(0, dim // 2, 2, device=device) / (dim // 2))

    def encode(size: int, valid_size: Tensor) -> Tensor:
        centre = torch.arange(size, device=device) + 0.5
        angle = 2 * math.pi * centre / (valid_size[:, None] + 1e-6)  # (N, size)
        angle = angle[..., None] * frequency  # (N, size, C / 4)
        return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)  # (N, size, C / 2)

    y = encode(height, valid[:, 0])[:, :, None].expand(-1, -1, width, -1)
    x = encode(width, valid[:, 1])[:, None].expand(-1, height, -1, -1)
    return torch.cat([y, x], dim=-1)


def has_operator(q: Tensor, dropout: float) -> bool:
    """Whether attention of (N, Q, M, D) is left to the operator of the extension: in training."""
    plain = torch.is_autocast_enabled("cpu") or not torch.is_grad_enabled()  # as fast forward alone
    return not plain and dropout == 0 and q.shape[-1] <= FEW_CHANNELS and has_cpu_kernels(q)


def writes_scores(q: Tensor, k: Tensor) -> bool:
    """Whether attention of (N, Q, M, D) to (N, S, M, D) is faster with its scores written out."""
    size = 2 if torch.is_autocast_enabled("cpu") else q.element_size()
    num_scores = q.shape[:3].numel() * k.shape[1]
    return q.device.type == "cpu" and num_scores <= FEW_SCORES.get(size, 0)


def attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """
    Scaled dot-product attention, in the way that suits its size.

    Args:
        q: (N, Q, M, D).
        k: (N, S, M, D).
        v: (N, S, M, D).
        visible: (N, S) bool, False where nothing attends to; None: everything is seen.
        dropout: probability that a query does not attend to a key.

    Returns:
        (N, Q, M * D).
    """
    if has_operator(q, dropout):
        return torch.ops.psf.attention.default(q, k, v, visible)[0]
    return plain_attention(q, k, v, visible, dropout)


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, dropout: float
) -> Tensor:
    """The same as :func:`attention`, in PyTorch."""
    few = writes_scores(q, k)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (N, M, Q or S, D)
    mask = None if visible is None else visible[:, None, None]
    if not few:
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return attended.transpose(1, 2).flatten(2)
    # Matrix products over images and heads as one batch, which costs far fewer calls.
    queries, keys, values = (x.flatten(0, 1) for x in (q, k, v))
    scores = torch.baddbmm(
        queries.new_zeros(()), queries, keys.mT, beta=0, alpha=q.shape[-1] ** -0.5
    )
    if mask is not None:
        scores = scores.unflatten(0, q.shape[:2]).masked_fill(~mask, -math.inf).flatten(0, 1)
    weights = scores.softmax(-1).to(values.dtype)  # under autocast the softmax is float32
    attended = torch.bmm(F.dropout(weights, dropout), values).view(q.shape)
    return attended.transpose(1, 2).flatten(2)


def self_attention(module: nn.MultiheadAttention, query: Tensor, value: Tensor) -> Tensor:
    """
    Attention of queries to themselves: what the module computes, in fewer calls.

    Args:
        module: batch first.
        query: (N, Q, C), queries and keys.
        value: (N, Q, C).

    Returns:
        (N, Q, C).
    """
    dim = module.embed_dim
    weight_qk, weight_v = module.in_proj_weight.split([2 * dim, dim])
    bias_qk, bias_v = module.in_proj_bias.split([2 * dim, dim])
    heads = (module.num_heads, -1)
    qk = F.linear(query, weight_qk, bias_qk).unflatten(-1, (2, *heads))  # (N, Q, 2, M, D)
    v = F.linear(value, weight_v, bias_v).unflatten(-1, heads)  # (N, Q, M, D)
    q, k = qk.unbind(2)
    dropout = module.dropout if module.training else 0.0
    attended = attention(q, k, v, dropout=dropout)
    return F.linear(attended, module.out_proj.weight, module.out_proj.bias)


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
    """A linear layer that gives class logits, all improbable at first (RetinaNet)."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__(dim, num_classes)
        nn.init.xavier_uniform_(self.weight)
        probability = 0.01
        nn.init.constant_(self.bias, -math.log((1 - probability) / probability))


def class_logits(heads: Iterable[nn.Module], queries: Tensor) -> Tensor:
    """
    Logits of several layers, each by its own head.

    Args:
        heads: layers x modules, as a rule :class:`ClassHead`, of C channels to K classes.
        queries: (layers, N, Q, C).

    Returns:
        (layers, N, Q, K).
    """
    layers = list(heads)
    if not torch.is_grad_enabled() or not all(map(_is_plain_head, layers)):
        pairs = zip(layers, queries.unbind(), strict=True)
        return torch.stack([head(query) for head, query in pairs])
    # In training one product of all layers: with small models its calls are what takes time.
    plain = cast(Sequence[ClassHead], layers)
    weight = torch.stack([head.weight for head in plain])  # (layers, K, C)
    bias = torch.stack([head.bias for head in plain])
    rows = queries.flatten(1, 2)  # (layers, N * Q, C)
    return torch.baddbmm(bias[:, None], rows, weight.mT).unflatten(1, queries.shape[1:3])


def _is_plain_head(head: nn.Module) -> bool:
    return type(head) is ClassHead and not is_hooked(head)


class BoxHead(nn.Sequential):
    """Three linear layers that give four numbers: the change of a reference box (DETR)."""

    def __init__(self, dim: int, *, size_bias: float = 0.0) -> None:
        """
        Args:
            dim: channels C.
            size_bias: what is first added to the logits of width and height; the rest starts at 0.
        """
        last = nn.Linear(dim, 4)
        super().__init__(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), last)
        init_linear_weights(self)
        nn.init.zeros_(last.weight)
        last.bias = nn.Parameter(torch.tensor([0.0, 0.0, size_bias, size_bias]))

    def forward(self, x: Tensor) -> Tensor:
        """(N, Q, C) to (N, Q, 4), as rows: no layer has to reshape them."""
        out: Tensor = super().forward(x.flatten(0, 1))
        return out.unflatten(0, x.shape[:2])


def init_linear_weights(module: nn.Module) -> None:
    """Xavier-uniform weights for every linear layer in ``module`` (DETR's initialisation)."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
