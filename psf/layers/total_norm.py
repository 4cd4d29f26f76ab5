"""The norm of all gradients of a model."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from psf.layers.ms_deform_attn import has_extension


@torch.no_grad()
def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """
    The 2-norm of tensors as if they were one, without a gradient of its own.

    On a CPU by one operator of the extension instead of several a tensor, which adds in double
    precision and gives the same bits for any number of threads; otherwise by torch.

    Args:
        gradients: of any shapes, also none.

    Returns:
        (), of their type.
    """
    if has_extension() and _are_alike_on_cpu(gradients):
        return torch.ops.psf.total_norm.default(gradients)
    return nn.utils.get_total_norm(gradients, foreach=True)


def _are_alike_on_cpu(tensors: Sequence[Tensor]) -> bool:
    """Whether there are any, all dense and of one type that the extension takes."""
    if not tensors or tensors[0].dtype not in (torch.float32, torch.float64):
        return False
    dtype = tensors[0].dtype
    return all(x.is_cpu and x.layout == torch.strided and x.dtype == dtype for x in tensors)
