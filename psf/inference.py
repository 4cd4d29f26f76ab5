"""Optimize a model for inference: same results up to rounding, less time and memory.

Precision, number of layers and compilation are options of the model itself (``MODEL.PSF.TEST``).
"""

from typing import cast

import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn

from psf.layers.linear import is_linear, multiply_by_convolutions, replace
from psf.layers.transformer import FeedForward
from psf.modeling.panoptic_segformer import PanopticSegFormer
from psf.precision import usable_precision

# Hidden values of a feed-forward network that are computed at once on a CPU: 8 MB of float32 fit
# into its caches, and the C library reuses blocks of this size.
HIDDEN_VALUES = 2**21

# Mask-decoder layers of the fast preset: two are nearly as good as six (paper, table 6).
FAST_LAYERS = 2


def fast_preset(cfg: CfgNode) -> CfgNode:
    """Copy a config and set bfloat16, at most two mask-decoder layers, and compilation."""
    fast = cfg.clone()
    fast.defrost()
    test, decoder = fast.MODEL.PSF.TEST, fast.MODEL.PSF.MASK_DECODER
    layers = {
        "joint": decoder.DEC_LAYERS,
        "decoupled": max(decoder.THING_LAYERS, decoder.STUFF_LAYERS),
    }[decoder.NAME]
    test.MASK_DECODER_LAYERS = min(FAST_LAYERS, test.MASK_DECODER_LAYERS or layers, layers)
    test.PRECISION = usable_precision("bfloat16", cfg.MODEL.DEVICE, "The fast preset")
    test.COMPILE = True
    return fast


@torch.no_grad()
def optimize_for_inference(model: PanopticSegFormer) -> PanopticSegFormer:
    """
    Optimize a model in place, on the device that it will run on. It cannot be trained afterwards.

    Folds frozen batch normalization into convolutions, uses the channels-last memory format, and
    stores weights of convolutions and linear layers in the model's inference precision. On a CPU,
    feed-forward networks compute a part of their tokens at a time, and float32 linear layers run as
    convolutions.

    Returns:
        The model, in evaluation mode.
    """
    model.eval()
    fold_frozen_batch_norms(model.backbone)
    precision = model.runtime.precision
    if precision != torch.float32:
        for module in model.modules():
            if is_linear(module) or isinstance(module, nn.Conv2d):
                module.to(precision)
    if model.device.type == "cpu":
        replace(model, lambda m: isinstance(m, FeedForward), ChunkedFeedForward)
        if precision == torch.float32:
            multiply_by_convolutions(model)
    return model.to(memory_format=torch.channels_last)


def fold_frozen_batch_norms(backbone: nn.Module) -> None:
    """Fold the frozen batch normalization of Detectron2's layers into their convolutions."""
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


class ChunkedFeedForward(nn.Module):
    """A feed-forward network that computes a part of its tokens at a time."""

    def __init__(self, feed_forward: FeedForward) -> None:
        super().__init__()
        self.layers = nn.Sequential(*feed_forward)
        self.rows = max(1, HIDDEN_VALUES // cast(nn.Linear, feed_forward[0]).out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(N, S, C) to (N, S, C)."""
        # The compiler fuses the layers itself, and the number of parts would be a constant to it.
        if torch.compiler.is_compiling() or x.numel() // x.shape[-1] <= self.rows:
            return self.layers(x)
        parts = x.flatten(0, -2).split(self.rows)
        return torch.cat([self.layers(part) for part in parts]).view(x.shape)
