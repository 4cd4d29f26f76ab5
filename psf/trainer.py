"""Training and evaluation with Detectron2's engine, on a CPU as on GPUs."""

import contextlib
import logging
import math
import os
import shutil
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.engine import DefaultTrainer, HookBase, SimpleTrainer, TrainerBase, create_ddp_model
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import Tensor, nn

from psf.data import ClassNames, PanopticDatasetMapper
from psf.evaluation import build_evaluators
from psf.evaluation.pictures import (
    PanopticSegmentation,
    Sample,
    load_ground_truth,
    write_contact_sheet,
    write_curves,
)
from psf.finetuning import ClassCheckpointer
from psf.layers.host_memory import keep_freed_memory
from psf.modeling.build import TRANSFORMER_LAYERS
from psf.solver import (
    build_optimizer,
    check_reference_world_size,
    full_model_clip_norm,
    scale_to_batch_size,
)

logger = logging.getLogger(__name__)

CONTACT_SHEET = "contact_sheet.png"
CURVES = "curves.png"

# Of one function, for all that differs between the layers that share it: the blocks of a ResNet
# alone are of eight kinds, each for fixed and for changing sizes; torch's own limit is eight.
MOST_TRANSLATIONS = 64


class TrainStep(SimpleTrainer):
    """
    One training iteration: forward, loss check, backward, clipping, optimizer step.

    Detectron2's AMPTrainer needs CUDA and clips scaled gradients; this step runs mixed precision on
    any device, in bfloat16 where the device has it (no loss scaling needed) and float16 elsewhere.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Any,
        optimizer: torch.optim.Optimizer,
        *,
        amp: bool,
        clip_norm: float | None,
        accumulate_steps: int = 1,
    ) -> None:
        """
        Args:
            model: returns a dict of losses in training.
            data_loader: endless.
            optimizer: of the model's parameters.
            amp: use mixed precision.
            clip_norm: largest norm of the whole gradient; None: no clipping.
            accumulate_steps: parts that every batch is cut into. With more than one the model
                (inside ``DistributedDataParallel``, too) has ``count_segments`` and takes its
                result.
        """
        super().__init__(model, data_loader, optimizer)
        device_type = next(model.parameters()).device.type
        has_bfloat16 = device_type != "cuda" or torch.cuda.is_bf16_supported()
        self.amp_dtype = torch.bfloat16 if has_bfloat16 else torch.float16
        self.amp = amp
        self.device_type = device_type
        self.clip_norm = clip_norm
        self.accumulate_steps = accumulate_steps
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.grad_scaler = torch.amp.GradScaler(device_type, enabled=amp and not has_bfloat16)

    def run_step(self) -> None:
        """Run one iteration; its losses go to the event storage."""
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        self.optimizer.zero_grad()
        losses = self._backward(data) if self.accumulate_steps == 1 else self._accumulate(data)
        self.after_backward()
        self._write_metrics(losses, data_time)
        self._step()

    def _backward(self, data: Any, **options: Any) -> dict[str, Tensor]:
        """Add the gradient of a batch, or a part of one, and return its losses on the host."""
        with torch.autocast(self.device_type, self.amp_dtype, enabled=self.amp):
            losses: dict[str, Tensor] = self.model(data, **options)
        values = torch.stack(list(losses.values()))
        on_host = dict(zip(losses, values.detach().cpu(), strict=True))  # the only transfer
        self._check_finite(on_host)
        self.grad_scaler.scale(values.sum()).backward()
        return on_host

    def _accumulate(self, data: list[Any]) -> dict[str, Tensor]:
        """As :meth:`_backward`, in parts: the sums are divided by the segments of the batch."""
        if len(data) % self.accumulate_steps:
            raise ValueError(
                f"SOLVER.ACCUMULATE_STEPS is {self.accumulate_steps}, but the batch of a process "
                f"has {len(data)} images (SOLVER.IMS_PER_BATCH over the processes): make it a "
                "multiple"
            )
        distributed = isinstance(self.model, nn.parallel.DistributedDataParallel)
        module: Any = self.model.module if distributed else self.model
        num_segments = module.count_segments(data)
        size = len(data) // self.accumulate_steps
        total: dict[str, Tensor] = {}
        for start in range(0, len(data), size):
            last = start + size == len(data)
            # Gradients are averaged over processes once, with the last part.
            waits = contextlib.nullcontext() if last or not distributed else self.model.no_sync()
            with waits:
                losses = self._backward(data[start : start + size], num_segments=num_segments)
            total = {name: total.get(name, 0) + loss for name, loss in losses.items()}
        return total

    def _step(self) -> None:
        """Clip the gradient and update the weights."""
        if self.clip_norm is not None:
            self.grad_scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _check_finite(self, losses: dict[str, Tensor]) -> None:
        bad = [f"{name} = {loss}" for name, loss in losses.items() if not math.isfinite(loss)]
        if bad:
            raise FloatingPointError(
                f"The loss is not finite at iteration {self.iter}: {', '.join(bad)}. The last "
                "checkpoint is untouched: continue from it with --resume, after lowering "
                "SOLVER.BASE_LR or switching SOLVER.AMP.ENABLED off."
            )

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def compile_layers(model: nn.Module) -> None:
    """
    Let torch.compile translate the layers of a model when they first run in training.

    Layers of one kind share their code, and sizes that change become variables of it: the number
    of translations depends on the architecture, not on images. What surrounds the layers stays as
    it is (matching, losses, evaluation), and so do masks, whose number is different in every image
    and which are made in parts to bound the memory.

    Raises:
        RuntimeError: on a CPU without a C++ compiler.
    """
    compiler = os.environ.get("CXX", "g++")
    on_cpu = next(model.parameters()).device.type == "cpu"
    if on_cpu and shutil.which(compiler) is None:
        raise RuntimeError(
            f"SOLVER.COMPILE needs a C++ compiler, but there is no '{compiler}'. Install one, let "
            "the environment variable CXX name it, or set SOLVER.COMPILE to False."
        )
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, MOST_TRANSLATIONS)
    kinds = (BottleneckBlock, BasicBlock, *TRANSFORMER_LAYERS)
    for module in model.modules():
        if isinstance(module, kinds):
            _compile_in_training(module)


def _compile_in_training(module: nn.Module) -> None:
    """Evaluation would need translations of its own, for little time spent there."""
    plain = module.forward
    compiled = torch.compile(plain)

    def choose(*args: Any) -> Any:
        return compiled(*args) if module.training else plain(*args)

    module.forward = choose


class PicturesHook(HookBase):
    """After training: a contact sheet of predictions and the curves, in ``OUTPUT_DIR``."""

    def after_train(self) -> None:
        """Draw, if training came to its end."""
        if self.trainer.iter + 1 >= self.trainer.max_iter and comm.is_main_process():
            write_pictures(self.trainer.cfg, self.trainer.model)


class Trainer(DefaultTrainer):
    """Detectron2's trainer with this project's loaders, solver, step, evaluators and pictures."""

    def __init__(self, cfg: CfgNode) -> None:
        """As ``DefaultTrainer``, but also for several CPU processes and with :class:`TrainStep`."""
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        check_reference_world_size(cfg)
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        cfg = scale_to_batch_size(cfg)
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        if cfg.SOLVER.COMPILE:
            compile_layers(model)
        data_loader = self.build_train_loader(cfg)
        on_cpu = torch.device(cfg.MODEL.DEVICE).type == "cpu"
        if on_cpu:
            keep_freed_memory()
        model = create_ddp_model(
            model,
            broadcast_buffers=False,
            device_ids=None if on_cpu else [torch.cuda.current_device()],
        )
        self._trainer = TrainStep(
            model,
            data_loader,
            optimizer,
            amp=cfg.SOLVER.AMP.ENABLED,
            clip_norm=full_model_clip_norm(cfg),
            accumulate_steps=cfg.SOLVER.ACCUMULATE_STEPS,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = ClassCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            class_names=_class_names(cfg.DATASETS.TRAIN[0]),
            weights_class_names=_class_names(cfg.MODEL.PSF.WEIGHTS_DATASET),
            trainer=weakref.proxy(self),
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's hooks, then the pictures: they need the last evaluation in metrics.json."""
        return [*super().build_hooks(), PicturesHook()]

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW with this project's parameter groups."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Training images with their panoptic ground truth."""
        mapper = PanopticDatasetMapper(cfg, True)
        with _hint_at_data_root():
            return build_detection_train_loader(cfg, mapper=mapper)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Test images without ground truth, one at a time."""
        mapper = PanopticDatasetMapper(cfg, False)
        with _hint_at_data_root():
            return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str
    ) -> DatasetEvaluator | DatasetEvaluators:
        """Evaluators of the outputs that the config switches on."""
        test = cfg.MODEL.PSF.TEST
        return build_evaluators(
            dataset_name,
            panoptic=test.PANOPTIC_ON,
            instances=test.INSTANCE_ON,
            sem_seg=test.SEMANTIC_ON,
            output_dir=str(Path(cfg.OUTPUT_DIR) / "inference" / dataset_name),
            boundary_pq=test.BOUNDARY_PQ,
            save_predictions=test.SAVE_PREDICTIONS,
        )


def _class_names(dataset_name: str) -> ClassNames | None:
    return ClassNames.from_metadata(MetadataCatalog.get(dataset_name)) if dataset_name else None


@contextlib.contextmanager
def _hint_at_data_root() -> Iterator[None]:
    """Detectron2's own data sets name the missing file, but not what decides where it is sought."""
    try:
        yield
    except FileNotFoundError as error:
        variable = "DETECTRON2_DATASETS"
        if variable in str(error):
            raise
        root = os.environ.get(variable, "datasets")
        raise FileNotFoundError(
            f"{error}. Data sets are sought under '{root}': put the data there, or set the "
            f"environment variable {variable} to the folder that holds it."
        ) from error


def write_pictures(cfg: CfgNode, model: nn.Module) -> None:
    """
    Draw into ``OUTPUT_DIR``: a contact sheet of predictions, and the curves of the training.

    Without a test data set, or with ``PANOPTIC_ON`` off, there is no sheet; without a
    ``metrics.json`` there are no curves. The model keeps its mode.
    """
    output_dir = Path(cfg.OUTPUT_DIR)
    if cfg.DATASETS.TEST and cfg.MODEL.PSF.TEST.PANOPTIC_ON:
        dataset_name = cfg.DATASETS.TEST[0]
        samples = _predict_samples(cfg, model, DatasetCatalog.get(dataset_name))
        write_contact_sheet(samples, MetadataCatalog.get(dataset_name), output_dir / CONTACT_SHEET)
    if (output_dir / "metrics.json").is_file():
        write_curves(output_dir / "metrics.json", output_dir / CURVES)


@torch.no_grad()
def _predict_samples(
    cfg: CfgNode, model: nn.Module, dicts: list[dict[str, Any]], num_images: int = 6
) -> list[Sample]:
    """Predictions for images evenly spaced over a data set."""
    chosen = dicts[:: max(1, len(dicts) // num_images)][:num_images]
    mapper = PanopticDatasetMapper(cfg, False)
    was_training = model.training
    model.eval()
    samples = [
        Sample(
            dataset_dict=record,
            ground_truth=load_ground_truth(record),
            prediction=PanopticSegmentation(*model([mapper(record)])[0]["panoptic_seg"]),
        )
        for record in chosen
    ]
    model.train(was_training)
    return samples


def summary(results: OrderedDict[str, Any]) -> str | None:
    """The line ``PQ .. PQ_th .. PQ_st ..`` of an evaluation; None where PQ was not evaluated."""
    panoptic = results.get("panoptic_seg")
    if panoptic is None:
        return None
    return " ".join(f"{key} {panoptic[key]:.2f}" for key in ("PQ", "PQ_th", "PQ_st"))
