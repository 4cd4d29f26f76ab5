"""AdamW whose step on a CPU is little more than torch's kernel."""

from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Steps(NamedTuple):
    """How often the parameters of a group were changed."""

    views: tuple[Tensor, ...]  # () each, the ``step`` in the parameters' states
    together: Tensor  # (parameters,), which they are views of


class _Call(NamedTuple):
    """The step of one group of parameters."""

    group: dict[str, Any]
    tensors: list[list[Tensor]]  # the lists of torch._fused_adamw_
    steps: Tensor  # of all parameters


class PackedAdamW(torch.optim.AdamW):
    """
    torch's AdamW: its kernel, its states and its checkpoints, with hundreds of operations less.

    torch's fused step on a CPU adds 1 to the ``step`` of every parameter on its own and sorts all
    tensors by device and type. With hundreds of small parameters that takes half as long as the
    kernel. Here the ``step`` of all parameters of a group are views of one tensor, which takes one
    addition, and a group whose tensors are of one type goes to the kernel as it is. What else there
    is (other devices, parameters without a gradient, a closure, options) is left to torch.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._packed: dict[int, _Steps] = {}  # by the position of the group

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._packed = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """As torch's."""
        calls = None if closure is not None else self._calls()
        if calls is None:
            return super().step(closure)
        for group, tensors, steps in calls:
            steps += 1
            beta1, beta2 = group["betas"]
            torch._fused_adamw_(
                *tensors,
                amsgrad=False,
                lr=group["lr"],
                beta1=float(beta1),
                beta2=float(beta2),
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=group["maximize"],
                grad_scale=getattr(self, "grad_scale", None),
            )
        return None

    def _calls(self) -> list[_Call] | None:
        """What the kernel is to be called with; None: torch has to see to it."""
        # Where a loss scaler found an infinity, the kernel does nothing and no step counts.
        if getattr(self, "found_inf", None) is not None or torch.compiler.is_compiling():
            return None
        calls = []
        for i, group in enumerate(self.param_groups):
            states = self._states(group)
            if states is None:
                return None
            steps = self._pack_steps(i, states)
            tensors = [
                group["params"],
                [parameter.grad for parameter in group["params"]],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],  # of amsgrad
                list(steps.views),
            ]
            calls.append(_Call(group, tensors, steps.together))
        return calls

    def _states(self, group: dict[str, Any]) -> list[dict[str, Any]] | None:
        """Of every parameter of a group; None if the kernel can't take the group as it is."""
        parameters = group["params"]
        if not (group["fused"] and parameters) or group["amsgrad"] or group["differentiable"]:
            return None
        dtype = parameters[0].dtype
        for parameter in parameters:
            gradient = parameter.grad
            if gradient is None or not gradient.is_cpu or gradient.is_sparse:
                return None
            if gradient.dtype != dtype:
                return None
        states = [self.state[parameter] for parameter in parameters]
        return states if all(states) else None  # torch makes those of the first step

    def _pack_steps(self, position: int, states: list[dict[str, Any]]) -> _Steps:
        """The ``step`` in the states of a group, after making them views of one tensor."""
        steps = [state["step"] for state in states]
        packed = self._packed.get(position)
        if packed and len(steps) == len(packed.views) and all(map(is_, steps, packed.views)):
            return packed
        # New ones: of a first step, of a checkpoint, or of a group that has grown.
        together = torch.stack(steps)
        packed = self._packed[position] = _Steps(together.unbind(), together)
        for state, step in zip(states, packed.views, strict=True):
            state["step"] = step
        return packed
