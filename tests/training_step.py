"""One step of the trainer, and a batch with images of several sizes and all numbers of segments."""

from typing import Any

import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from random_input import make_input
from torch import Tensor, nn

from psf.train_step import TrainStep


def odd_batch() -> list[dict[str, Any]]:
    """Four images with 3, 0, 9 (more things than queries) and 1 segments of the tiny model."""
    classes = [[0, 1, 3], [], [0, 1, 2, 0, 1, 2, 0, 1, 2], [4]]
    sizes = [(64, 96), (96, 64), (64, 96), (80, 80)]
    shapes = zip(sizes, classes, strict=True)
    return [{**make_input(*size, c, seed=i), "seed": i} for i, (size, c) in enumerate(shapes)]


def build_exact_model(cfg: Any) -> nn.Module:
    """A model whose gradients can be compared: single precision rounds too much for that."""
    torch.manual_seed(0)
    model: nn.Module = build_model(cfg).double().train()
    for name, parameter in model.named_parameters():
        # Offsets start as whole pixels, where the slope of bilinear sampling jumps.
        if "sampling_offsets.bias" in name:
            parameter.data += 0.1 + 0.3 * torch.rand_like(parameter)
    return model


def take_step(
    model: nn.Module,
    data: list[Any],
    optimizer: torch.optim.Optimizer | None = None,
    *,
    amp: bool = False,
    clip_norm: float | None = None,
    accumulate_steps: int = 1,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """
    Run a :class:`TrainStep` on a batch, by default with an optimizer that changes nothing.

    Returns:
        The gradients and the losses by name.
    """
    step = TrainStep(
        model,
        [data],
        optimizer or torch.optim.SGD(model.parameters(), lr=0.0),
        amp=amp,
        clip_norm=clip_norm,
        accumulate_steps=accumulate_steps,
    )
    step.iter = 3
    with EventStorage() as storage:
        step.run_step()
    losses = {name: value for name, (value, _) in storage.latest().items() if "loss_" in name}
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return gradients, losses
