"""One iteration of a training: forward, backward, clipping, optimizer step, average of weights."""

import contextlib
import logging
import math
import time
from typing import Any, cast

import torch
from detectron2.engine import SimpleTrainer, TrainerBase
from torch import Tensor, nn

from psf.ema import ModelEma, copy_weights
from psf.precision import gpu_has_bfloat16
from psf.resuming import load_optimizer

logger = logging.getLogger(__name__)


class TrainStep(SimpleTrainer):
    """
    One training iteration: forward, loss check, backward, clipping, optimizer step.

    Unlike Detectron2's AMPTrainer it supports mixed precision on any device (bfloat16, or float16
    with loss scaling on GPUs without it), clips unscaled gradients, accumulates gradients, and can
    average the weights.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Any,
        optimizer: torch.optim.Optimizer,
        *,
        amp: bool,
        clip_norm: float | None,
        norm_type: float = 2.0,
        accumulate_steps: int = 1,
        ema_decay: float = 0.0,
    ) -> None:
        """
        Args:
            model: returns a dict of losses in training.
            data_loader: infinite.
            optimizer: of the model's parameters.
            amp: use mixed precision.
            clip_norm: maximum norm of the whole gradient; None: no clipping.
            norm_type: p of that norm.
            accumulate_steps: number of parts that each batch is split into. If more than one, the
                model must have ``count_segments`` and take its result as ``num_segments``.
            ema_decay: of the average of the weights (:class:`psf.ema.ModelEma`); 0: no average.
        """
        super().__init__(model, data_loader, optimizer)
        is_wrapped = isinstance(model, nn.parallel.DistributedDataParallel)
        self.module = cast(nn.Module, model.module if is_wrapped else model)
        self.ema = ModelEma(self.module, ema_decay) if ema_decay else None
        device_type = next(model.parameters()).device.type
        has_bfloat16 = device_type != "cuda" or gpu_has_bfloat16()
        self.amp_dtype = torch.bfloat16 if has_bfloat16 else torch.float16
        self.amp = amp
        self.device_type = device_type
        self.clip_norm = clip_norm
        self.norm_type = norm_type
        self.accumulate_steps = accumulate_steps
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.grad_scaler = torch.amp.GradScaler(device_type, enabled=amp and not has_bfloat16)

    def run_step(self) -> None:
        """Run one iteration; losses are written to the event storage."""
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        self.optimizer.zero_grad()
        losses = self._backward(data) if self.accumulate_steps == 1 else self._accumulate(data)
        self.after_backward()
        self._write_metrics(losses, data_time)
        self._step()
        if self.ema is not None:
            self.ema.update()

    def _backward(self, data: Any, **options: Any) -> dict[str, Tensor]:
        """Add the gradient of a batch, or of a part of it; returns its losses on the host."""
        with torch.autocast(self.device_type, self.amp_dtype, enabled=self.amp):
            losses: dict[str, Tensor] = self.model(data, **options)
        values = torch.stack(list(losses.values()))
        on_host = dict(zip(losses, values.detach().cpu(), strict=True))  # one transfer
        self._check_finite(on_host)
        self.grad_scaler.scale(values.sum()).backward()
        return on_host

    def _accumulate(self, data: list[Any]) -> dict[str, Tensor]:
        """As :meth:`_backward`, part by part; losses are divided by the whole batch's segments."""
        if len(data) % self.accumulate_steps:
            raise ValueError(
                f"SOLVER.ACCUMULATE_STEPS is {self.accumulate_steps}, but the batch of a process "
                f"has {len(data)} images: SOLVER.IMS_PER_BATCH must be a multiple of "
                "ACCUMULATE_STEPS times the number of processes"
            )
        num_segments = cast(Any, self.module).count_segments(data)
        size = len(data) // self.accumulate_steps
        total: dict[str, Tensor] = {}
        for start in range(0, len(data), size):
            last = start + size == len(data)
            # Gradients are averaged over processes once, in the last part.
            alone = self.model is not self.module and not last
            with self.model.no_sync() if alone else contextlib.nullcontext():
                losses = self._backward(data[start : start + size], num_segments=num_segments)
            total = {name: total.get(name, 0) + loss for name, loss in losses.items()}
        return total

    def _step(self) -> None:
        """Clip the gradient and update the weights."""
        if self.clip_norm is not None:
            self.grad_scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.clip_norm, self.norm_type)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _check_finite(self, losses: dict[str, Tensor]) -> None:
        bad = [f"{name} = {loss}" for name, loss in losses.items() if not math.isfinite(loss)]
        if bad:
            raise FloatingPointError(
                f"The loss is not finite at iteration {self.iter}: {', '.join(bad)}. Resume from "
                "the last checkpoint with --resume, with a lower SOLVER.BASE_LR or with "
                "SOLVER.AMP.ENABLED False."
            )

    def state_dict(self) -> dict[str, Any]:
        """As Detectron2's; with an average, which checkpoints have as the model, the weights."""
        state = {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}
        if self.ema is not None:
            trained = {name: value.detach() for name, value in self.ema.trained.items()}
            state["ema"] = {"updates": self.ema.updates, "trained": trained}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As Detectron2's, for an optimizer and a precision that may differ."""
        TrainerBase.load_state_dict(self, state_dict)
        load_optimizer(self.optimizer, state_dict.get("optimizer"))
        self._load_trained_weights(state_dict.get("ema"))
        scaler = state_dict.get("grad_scaler")
        if scaler and self.grad_scaler.is_enabled():
            self.grad_scaler.load_state_dict(scaler)

    def _load_trained_weights(self, saved: dict[str, Any] | None) -> None:
        """Make the model's weights, as loaded, the average, and load those that were trained."""
        shapes = {name: value.shape for name, value in self.module.state_dict().items()}
        trained: dict[str, Tensor] = saved["trained"] if saved is not None else {}
        if any(value.shape != shapes.get(name) for name, value in trained.items()):
            saved, trained = None, {}  # a part of the model starts from random values
        if self.ema is not None:
            self.ema.restart(saved["updates"] if saved is not None else 0)
        copy_weights(trained, self.module)
