"""Exponential moving average of a model's weights."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


def ema_decay(updates: int, decay: float) -> float:
    """
    The share of the average that an update keeps.

    The warm-up is that of TensorFlow's ``ExponentialMovingAverage`` with ``num_updates``: the
    average is over about the last ninth of the iterations, until that is longer than what ``decay``
    averages over. A short schedule thus forgets its initial weights.
    """
    return min(decay, (1 + updates) / (10 + updates))


class ModelEma:
    """
    Average over the iterations of all floating-point entries of a model's state dict.

    The model is trained as without it. Entries that do not change are averaged exactly.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """
        Args:
            model: trained in place; on its device, and not wrapped.
            decay: after the warm-up (:func:`ema_decay`); 0.999 averages over about 1000 iterations.
        """
        self.model = model
        self.decay = decay
        state = model.state_dict(keep_vars=True)
        self.trained = {name: own for name, own in state.items() if own.is_floating_point()}
        self.restart()

    @torch.no_grad()
    def restart(self, updates: int = 0) -> None:
        """Start the average from the present weights, as if after some updates."""
        self.average = {name: own.detach().clone() for name, own in self.trained.items()}
        self.updates = updates

    @torch.no_grad()
    def update(self) -> None:
        """Add the present weights; to be called after each step of the optimizer."""
        weight = 1 - ema_decay(self.updates, self.decay)
        torch._foreach_lerp_(list(self.average.values()), list(self.trained.values()), weight)
        self.updates += 1

    def state_dict(self) -> dict[str, Tensor]:
        """The model's state dict with the averages."""
        return {**self.model.state_dict(), **self.average}

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the averages; afterwards it has its own weights again."""
        trained = {name: own.detach().clone() for name, own in self.trained.items()}
        copy_weights(self.average, self.model)
        try:
            yield
        finally:
            copy_weights(trained, self.model)


@torch.no_grad()
def copy_weights(weights: Mapping[str, Tensor], model: nn.Module) -> None:
    """Copy some entries of a state dict into a model, in place."""
    state = model.state_dict()
    for name, value in weights.items():
        state[name].copy_(value)
