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
    if gradients and has_extension():
        return torch.ops.psf.total_norm.default(gradients)
    return nn.utils.get_total_norm(gradients, foreach=True)
