"""Counts of operations for tools that look into models: PyTorch's flop counter and fvcore's.

A multiplication with its addition counts 1 in fvcore (Detectron2's ``analyze_model.py``) and 2 in
PyTorch's ``FlopCounterMode``. Shapes: N images, Q queries, M heads, L levels, P points, D channels.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from fvcore.nn.jit_handles import get_shape
from torch.utils.flop_counter import register_flop_formula

from psf.layers.ms_deform_attn import has_extension

Shape = Sequence[int]


def deformable_macs(value: Shape, weights: Shape) -> int:
    """Of a value (N, S, M, D) and weights (N, Q, M, L, P): a bilinear sample has four cells."""
    return 4 * math.prod(weights) * value[-1]


def _forward(value: Shape, _: Any, *places: Shape, **__: Any) -> int:
    return 2 * deformable_macs(value, places[-1])


def _backward(_: Shape, value: Shape, __: Any, *rest: Any, **___: Any) -> int:
    """The sums for the value, and as many for the places and weights."""
    *places, wanted, _ = rest
    return 2 * (int(wanted[0]) + int(any(wanted[1:]))) * deformable_macs(value, places[-1])


def _count_deformable(inputs: list[Any], outputs: list[Any]) -> int:
    del outputs
    return deformable_macs(get_shape(inputs[0]), get_shape(inputs[-1]))


def _count_attention(inputs: list[Any], outputs: list[Any]) -> int:
    """Of queries (..., Q, D) and keys (..., S, D): the logits, and the sums of values."""
    del outputs
    query, key = get_shape(inputs[0]), get_shape(inputs[1])
    return 2 * math.prod(query) * key[-2]


# fvcore has no function that registers for all models, and Detectron2's tool passes no handles.
_handles: dict[str, Callable[..., Any]] = importlib.import_module(
    "fvcore.nn.flop_count"  # the package has a function of this name
)._DEFAULT_SUPPORTED_OPS
_handles.setdefault("aten::scaled_dot_product_attention", _count_attention)

if has_extension():
    _ops = torch.ops.psf
    register_flop_formula([_ops.ms_deform_attn, _ops.ms_deform_attn_fused])(_forward)
    _gradients = [_ops.ms_deform_attn_backward, _ops.ms_deform_attn_fused_backward]
    register_flop_formula(_gradients)(_backward)
    for _name in ("psf::ms_deform_attn", "psf::ms_deform_attn_fused"):
        _handles[_name] = _count_deformable
