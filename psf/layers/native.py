"""What decides whether a part of the model runs as an operator of ``psf._C`` on a CPU."""

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from psf.layers.ms_deform_attn import has_extension


def has_cpu_kernels(*tensors: Tensor) -> bool:
    """
    Whether the extension's operators for training on a CPU take tensors.

    They do where the extension is in use, all tensors are dense ones of a CPU, of float32 or all of
    float64, and nothing is compiled or traced: there, plain PyTorch can be looked into.
    """
    dtype = tensors[0].dtype
    return (
        has_extension()
        and dtype in (torch.float32, torch.float64)
        and all(_is_dense_on_cpu(x) and x.dtype == dtype for x in tensors)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )


def _is_dense_on_cpu(x: Tensor) -> bool:
    # Other subclasses compute in ways of their own, or not at all.
    return x.is_cpu and x.layout == torch.strided and type(x) in (Tensor, nn.Parameter)


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of the module does more, or other things, than ``forward`` of its class."""
    own = module.__dict__  # faster than the attributes, and this runs for every module of a step
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or _has_any_global_hook()
    )
