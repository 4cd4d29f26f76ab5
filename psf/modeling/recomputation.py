"""Activation checkpointing: layers whose activations are computed again in the backward pass."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
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


def _run(forward: Callable[..., Any], *args: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args)
    return checkpoint(forward, *args, use_reentrant=False)
