"""What ``--resume`` takes from a checkpoint besides the weights: checked before it is loaded."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from psf.data.annotations import LIST, Keys, find_misfit

logger = logging.getLogger(__name__)

_OBJECT = (lambda v: isinstance(v, Mapping), "an object")
_COUNT = (lambda v: type(v) is int and v >= 0, "an integer of at least 0")

_TRAINER: Keys = {"iteration": _COUNT, "_trainer": _OBJECT}
_TRAINER_OPTIONS: Keys = {"hooks": _OBJECT, "images_per_batch": _COUNT}
_OPTIMIZER: Keys = {"param_groups": LIST, "state": _OBJECT}

_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # AdamW's of a parameter


def check_trainer_state(state: Any) -> None:
    """
    Check the state of a trainer, except the optimizer's.

    Raises:
        ValueError: a value is missing, or is nothing to continue from.
    """
    misfit = find_misfit(state, _TRAINER, _TRAINER_OPTIONS)
    misfit = misfit or find_misfit(state["_trainer"], {"iteration": _COUNT})
    if misfit:
        raise ValueError(
            f"the state of the trainer cannot be continued: {misfit}. Write the name of another "
            "checkpoint into last_checkpoint, or start a new run from the weights (MODEL.WEIGHTS)."
        )


def load_optimizer(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """
    Load the moments of a checkpoint; learning rates and decays stay those of the config.

    If the moments are of other parameters, the optimizer starts afresh, and a line says so.

    Args:
        optimizer: newly built AdamW.
        state: its ``state_dict`` in the checkpoint; None: the checkpoint has none that fits.
    """
    misfit = "it is of other classes" if state is None else _misfit(optimizer, state)
    if misfit is not None:
        logger.warning(
            "The optimizer starts afresh, its state in the checkpoint is not of this model: %s",
            misfit,
        )
        return
    saved = [group["params"] for group in state["param_groups"]]
    groups = [{**g, "params": p} for g, p in zip(optimizer.param_groups, saved, strict=True)]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})


def _misfit(optimizer: torch.optim.Optimizer, state: Any) -> str | None:
    """Why a state is not of an optimizer's parameters; None if it is."""
    misfit = find_misfit(state, _OPTIMIZER)
    if misfit:
        return misfit
    groups = [group["params"] for group in optimizer.param_groups]
    saved = [g.get("params") if isinstance(g, Mapping) else None for g in state["param_groups"]]
    numbered = [p for p in saved if isinstance(p, list) and all(type(i) is int for i in p)]
    counts, saved_counts = list(map(len, groups)), list(map(len, numbered))
    if counts != saved_counts or len(numbered) != len(saved):
        return f"groups of {saved_counts} parameters instead of {counts}"
    for params, indices in zip(groups, numbered, strict=True):
        for param, index in zip(params, indices, strict=True):
            misfit = _moments_misfit(state["state"].get(index), param)
            if misfit:
                return f"parameter {index}: {misfit}"
    return None


def _moments_misfit(moments: Any, param: Tensor) -> str | None:
    if moments is None:  # the parameter had no gradient
        return None
    if not isinstance(moments, Mapping) or moments.keys() != _MOMENTS:
        return f"no {', '.join(sorted(_MOMENTS))}"
    for name, value in moments.items():
        shape = [] if name == "step" else list(param.shape)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return f"'{name}' is not a tensor of floating-point numbers"
        if list(value.shape) != shape:
            return f"'{name}' {list(value.shape)} instead of {shape}"
        if value.layout != torch.strided or not value.isfinite().all():
            return f"'{name}' is not finite"
    return None
