"""Transformer blocks: a sublayer, its residual and its layer normalisation (post-norm).

Each is defined by the modules it is made of. In training on a CPU it runs as one operator of
``psf._C``, forward and backward: small models spend more time on the dozen calls of a block than on
its arithmetic. Modules that are not what they are here (with hooks, of a subclass, without a bias,
with dropout at work) run themselves, as they do under autocast, on other devices and when traced or
compiled.

Shapes: N images, Q queries, S positions, C channels, L levels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from psf.layers.linear import ConvolutionalLinear
from psf.layers.ms_deform_attn import MSDeformAttn
from psf.layers.native import has_cpu_kernels, is_hooked
from psf.layers.transformer import FEW_CHANNELS, FeedForward, self_attention


def runs_as_one(x: Tensor, norm: nn.LayerNorm, layers: Sequence[nn.Module]) -> bool:
    """
    Whether a block runs as one operator.

    Args:
        x: (N, Q, C), its queries.
        norm: its normalisation.
        layers: its other modules, linear layers and dropouts among them.
    """
    return (
        torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and _is_plain(norm)
        and has_cpu_kernels(x, norm.weight)
        and norm.normalized_shape == (x.shape[-1],)
        and all(map(_is_plain, layers))
    )


# The modules that blocks are made of, and the parameters that none of them may lack.
_PLAIN: dict[type[nn.Module], tuple[str, ...]] = {
    nn.LayerNorm: ("weight", "bias"),
    nn.Linear: ("weight", "bias"),
    nn.modules.linear.NonDynamicallyQuantizableLinear: ("weight", "bias"),
    ConvolutionalLinear: ("weight", "bias"),
    nn.MultiheadAttention: ("in_proj_weight", "in_proj_bias"),
    **dict.fromkeys((nn.ReLU, nn.GELU, nn.Dropout, MSDeformAttn, FeedForward), ()),
}


def _is_plain(module: nn.Module) -> bool:
    """Whether the module does what blocks take it to do, and nothing else."""
    names = _PLAIN.get(type(module))
    if names is None or is_hooked(module):
        return False
    if names:
        parameters = module._parameters
        for name in names:
            if parameters.get(name) is None:
                return False
    elif isinstance(module, nn.Dropout):
        return module.p == 0 or not module.training
    elif isinstance(module, nn.GELU):
        return module.approximate == "none"
    if isinstance(module, nn.MultiheadAttention):
        return module.bias_k is None and not module.add_zero_attn
    return True


def feed_forward_block(x: Tensor, ffn: FeedForward, norm: nn.LayerNorm) -> Tensor:
    """``norm(x + ffn(x))`` for x (N, Q, C)."""
    if not runs_as_one(x, norm, [ffn, *ffn.children()]):
        return norm(x + ffn(x))
    first, activation, _, second, _ = ffn
    return torch.ops.psf.feed_forward_block.default(
        x,
        first.weight,
        first.bias,
        second.weight,
        second.bias,
        norm.weight,
        norm.bias,
        norm.eps,
        type(activation) is nn.GELU,
        type(first) is ConvolutionalLinear,
    )


def self_attention_block(
    query: Tensor,
    position: Tensor | None,
    module: nn.MultiheadAttention,
    dropout: nn.Dropout | None,
    norm: nn.LayerNorm,
) -> Tensor:
    """
    Attention of queries to themselves.

    Args:
        query: (N, Q, C), also the values.
        position: (N, Q, C), added to queries and keys; None: nothing is.
        module: batch first.
        dropout: of what was attended; None: there is none.
        norm: of the sum with the query.

    Returns:
        (N, Q, C).
    """
    layers = [module, *module.children(), *([] if dropout is None else [dropout])]
    own_dropout = module.dropout > 0 and module.training
    few_channels = module.head_dim <= FEW_CHANNELS
    if own_dropout or not few_channels or not runs_as_one(query, norm, layers):
        attended = _attended(module, query if position is None else query + position, query)
        return norm(query + (attended if dropout is None else dropout(attended)))
    return torch.ops.psf.self_attention_block.default(
        query,
        position,
        module.in_proj_weight,
        module.in_proj_bias,
        module.out_proj.weight,
        module.out_proj.bias,
        norm.weight,
        norm.bias,
        norm.eps,
        module.num_heads,
    )


def _attended(module: nn.MultiheadAttention, query: Tensor, value: Tensor) -> Tensor:
    """Attention of queries to themselves, in few calls unless the module is to be called itself."""
    if _is_plain(module):
        return self_attention(module, query, value)
    return module(query, query, value, need_weights=False)[0]


def deformable_attention_block(
    query: Tensor,
    position: Tensor,
    reference_points: Tensor,
    features: Tensor,
    spatial_shapes: list[tuple[int, int]],
    padding_mask: Tensor | None,
    module: MSDeformAttn,
    dropout: nn.Dropout,
    norm: nn.LayerNorm,
) -> Tensor:
    """
    Deformable attention of queries to features.

    Args:
        query: (N, Q, C).
        position: (N or 1, Q, C), added to the queries.
        reference_points: (N, Q, L, 2) or (N, Q, L, 4), see :class:`MSDeformAttn`.
        features: (N, S, C), levels concatenated.
        spatial_shapes: (H_l, W_l) of each level.
        padding_mask: (N, S) bool, True on padding, where the value counts as 0.
        module: the attention.
        dropout: of what was attended.
        norm: of the sum with the query.

    Returns:
        (N, Q, C).
    """
    layers = [module, *module.children(), dropout]
    if features.dtype != query.dtype or not runs_as_one(query, norm, layers):
        attended = module(
            query + position, reference_points, features, spatial_shapes, padding_mask
        )
        return norm(query + dropout(attended))
    return torch.ops.psf.deformable_attention_block.default(
        query,
        position,
        reference_points,
        features,
        [side for shape in spatial_shapes for side in shape],
        padding_mask,
        module.sampling_offsets.weight,
        module.sampling_offsets.bias,
        module.attention_weights.weight,
        module.attention_weights.bias,
        module.value_proj.weight,
        module.value_proj.bias,
        module.output_proj.weight,
        module.output_proj.bias,
        norm.weight,
        norm.bias,
        norm.eps,
        module.num_heads,
        type(module.value_proj) is ConvolutionalLinear,
    )
