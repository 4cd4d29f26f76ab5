"""Activation checkpointing: layers whose activations are computed again in the backward pass."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from detectron2.modeling import Backbone, ResNet
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recompute(layers: Iterable[nn.Module]) -> None:
    """
    Let each layer store its input only, and run again in the backward pass.

    The second run draws the random numbers of the first (dropout) and uses its autocast state, so
    that losses and gradients stay the same. Layers without trainable parameters are left as they
    are: they store nothing.
    """
    for layer in layers:
        if any(parameter.requires_grad for parameter in layer.parameters()):
            layer.forward = partial(_run, layer.forward)


def backbone_layers(backbone: Backbone) -> list[nn.Module]:
    """
    The residual blocks of one of Detectron2's ResNets.

    Raises:
        ValueError: the backbone is another, which has a key of its own, or counts statistics, which
            a second run would count twice.
    """
    if not isinstance(backbone, ResNet):
        raise ValueError(
            f"MODEL.PSF.CHECKPOINT names the backbone, but {type(backbone).__name__} is not one of "
            "Detectron2's ResNets. Use MODEL.SWIN.USE_CHECKPOINT or MODEL.TIMM.USE_CHECKPOINT."
        )
    if any(isinstance(module, _BatchNorm) for module in backbone.modules()):
        raise ValueError(
            "MODEL.PSF.CHECKPOINT names the backbone, whose batch normalisations would count every "
            "image twice. Set MODEL.RESNETS.NORM to FrozenBN or GN, or leave the backbone out."
        )
    return [block for stage in backbone.stages for block in stage]


def _run(forward: Callable[..., Any], *args: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args)
    return checkpoint(forward, *args, use_reentrant=False)
