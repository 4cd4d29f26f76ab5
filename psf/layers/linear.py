"""Linear layers on a CPU, by the library that is faster at them."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Layers with fewer channels spend their time elsewhere.
LEAST_CHANNELS = 64

# For fewer rows, what a convolution needs beside its arithmetic takes longer than it saves.
LEAST_ROWS = 512


class ConvolutionalLinear(nn.Module):
    """
    A linear layer on a CPU that runs as a convolution over one pixel.

    PyTorch gives float32 convolutions to oneDNN but products to MKL, which leaves the AVX-512 of
    processors that are not Intel's unused and takes up to twice as long there, in the backward pass
    as well.
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


def convolutions_pay_in_training() -> bool:
    """Whether that is faster backward, too: where processors have AVX2 alone, it is slower."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def multiply_by_convolutions(model: nn.Module) -> None:
    """Let the large linear layers of a model on a CPU run so; its weights and names stay."""
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
    """Put ``build(module)`` in the place of every module that is meant."""
    for parent, name, module in list(_children(model)):
        if is_meant(module):
            setattr(parent, name, build(module))


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            yield parent, name, child
