"""A model made ready to predict: the same results up to rounding, in less time and memory.

What ``MODEL.PSF.TEST`` asks for in addition (precision, layers, compilation) is the model's own;
here its weights are put into the form that is fastest to compute with. It cannot be trained
afterwards.
"""

from collections.abc import Callable, Iterator
from typing import cast

import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from psf.layers.transformer import FeedForward
from psf.modeling.panoptic_segformer import PanopticSegFormer

# Layers with fewer channels spend their time elsewhere.
LEAST_CHANNELS = 64

# Hidden values of a feed-forward network that are computed together on a CPU: 8 MB of float32 stay
# in its caches, and the C library keeps such blocks instead of fetching new pages for every layer.
HIDDEN_VALUES = 2**21

# The fast preset: two layers are nearly as good as all (paper, table 6).
FAST_LAYERS = 2


def fast_preset(cfg: CfgNode) -> CfgNode:
    """A copy with bfloat16, at most two mask-decoder layers, and compilation."""
    fast = cfg.clone()
    fast.defrost()
    test, decoder = fast.MODEL.PSF.TEST, fast.MODEL.PSF.MASK_DECODER
    layers = {
        "joint": decoder.DEC_LAYERS,
        "decoupled": max(decoder.THING_LAYERS, decoder.STUFF_LAYERS),
    }[decoder.NAME]
    test.MASK_DECODER_LAYERS = min(FAST_LAYERS, test.MASK_DECODER_LAYERS or layers, layers)
    test.PRECISION = "bfloat16"
    test.COMPILE = True
    return fast


@torch.no_grad()
def optimize_for_inference(model: PanopticSegFormer) -> PanopticSegFormer:
    """
    Change a model in place, on the device where it will predict.

    Frozen batch normalisations become part of their convolutions; convolutions take channels last;
    with a lower precision the weights of products are stored in it; on a CPU feed-forward networks
    go through their hidden layer in parts, and linear layers in float32 run as convolutions.

    Returns:
        The model, in evaluation mode.
    """
    model.eval()
    fold_frozen_batch_norms(model.backbone)
    precision = model.inference_options.precision
    if precision != torch.float32:
        for module in model.modules():
            if _is_linear(module) or isinstance(module, nn.Conv2d):
                module.to(precision)
    if model.device.type == "cpu":
        _replace(model, lambda m: isinstance(m, FeedForward), ChunkedFeedForward)
        if precision == torch.float32 and torch.backends.mkldnn.is_available():
            _replace(model, _is_linear, ConvolutionalLinear)
    return model.to(memory_format=torch.channels_last)


def fold_frozen_batch_norms(backbone: nn.Module) -> None:
    """Scale the weights of convolutions instead of their results (Detectron2's layers)."""
    for module in backbone.modules():
        if not (isinstance(module, Conv2d) and isinstance(module.norm, FrozenBatchNorm2d)):
            continue
        norm = module.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - norm.running_mean * scale
        if module.bias is not None:
            shift = shift + module.bias * scale
        module.weight = nn.Parameter(module.weight * scale[:, None, None, None], False)
        module.bias = nn.Parameter(shift, False)
        module.norm = None


class ConvolutionalLinear(nn.Module):
    """
    A linear layer on a CPU that runs as a convolution over one pixel.

    PyTorch gives float32 convolutions to oneDNN but products to MKL, which leaves the AVX-512 of
    processors that are not Intel's unused and takes twice as long there.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C')."""
        if x.numel() == 0:
            return F.linear(x, self.weight, self.bias)
        pixels = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)  # (1, C, 1, rows)
        out = F.conv2d(pixels, self.weight[:, :, None, None], self.bias)
        return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


class ChunkedFeedForward(nn.Module):
    """A feed-forward network that computes a part of its tokens at a time."""

    def __init__(self, feed_forward: FeedForward) -> None:
        super().__init__()
        self.layers = nn.Sequential(*feed_forward)
        self.rows = max(1, HIDDEN_VALUES // cast(nn.Linear, feed_forward[0]).out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(N, S, C) to (N, S, C)."""
        # A compiled program fuses the layers itself, and is not to depend on the number of parts.
        if torch.compiler.is_compiling() or x.numel() // x.shape[-1] <= self.rows:
            return self.layers(x)
        parts = x.flatten(0, -2).split(self.rows)
        return torch.cat([self.layers(part) for part in parts]).view(x.shape)


def _is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer and nothing else, large enough to matter."""
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        return False
    return min(module.in_features, module.out_features) >= LEAST_CHANNELS


def _replace(
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
