"""Linear layers for inference on a CPU."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Smaller layers take too little time to matter.
LEAST_CHANNELS = 64

# With fewer rows, the overhead of a convolution exceeds its gain.
LEAST_ROWS = 512


class ConvolutionalLinear(nn.Module):
    """
    A linear layer on a CPU that runs as a convolution over one pixel.

    PyTorch computes float32 convolutions with oneDNN but matrix products with MKL, which does not
    use AVX-512 on processors of other makers than Intel and takes up to twice as long there.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C')."""
        if not self._pays(x):
            return F.linear(x, self.weight, self.bias)
        pixels = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)  # (1, C, 1, rows)
        out = F.conv2d(pixels, self.weight[:, :, None, None], self.bias)
        return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)

    def _pays(self, x: Tensor) -> bool:
        if torch.compiler.is_compiling():  # not to depend on the number of rows
            return x.numel() > 0
        # Products in half precision are oneDNN's in any case.
        half = x.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
        return not half and x.numel() >= LEAST_ROWS * x.shape[-1]


def multiply_by_convolutions(model: nn.Module) -> None:
    """Replace the large linear layers of a model on a CPU; names and values of weights stay."""
    if torch.backends.mkldnn.is_available():
        replace(model, is_linear, ConvolutionalLinear)


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer and nothing else, large enough to matter."""
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        return False
    return min(module.in_features, module.out_features) >= LEAST_CHANNELS


def replace(
    model: nn.Module, is_meant: Callable[[nn.Module], bool], build: Callable[..., nn.Module]
) -> None:
    """Replace every module for which ``is_meant`` holds by ``build(module)``."""
    for parent, name, module in list(_children(model)):
        if is_meant(module):
            setattr(parent, name, build(module))


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            yield parent, name, child
