"""Training and evaluation with Detectron2's engine, on CPUs and GPUs."""

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
from detectron2.engine.hooks import EvalHook
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from fvcore.nn.precise_bn import get_bn_modules
from torch import Tensor, nn

from psf.data import ClassNames, PanopticDatasetMapper, register_listed
from psf.evaluation import build_evaluators
from psf.evaluation.charts import drawn_or_warned, write_curves
from psf.evaluation.ground_truth import PanopticSegmentation, load_ground_truth
from psf.evaluation.pictures import Sample, write_contact_sheet
from psf.evaluation.renumbering import Renumbering
from psf.finetuning import ClassCheckpointer
from psf.layers.host_memory import keep_freed_memory
from psf.modeling.build import TRANSFORMER_LAYERS, model_dataset
from psf.options import check_training
from psf.precision import gpu_has_bfloat16, usable_precision
from psf.run_folder import METRICS, cut_metrics
from psf.solver import (
    build_optimizer,
    check_reference_world_size,
    full_model_clip_norm,
    load_optimizer,
    scale_to_batch_size,
)
from psf.stopping import StopHook

logger = logging.getLogger(__name__)

CONTACT_SHEET = "contact_sheet.png"
CURVES = "curves.png"

# Compilations of one function, for all layers that share it (torch's limit is 8). A ResNet has
# eight kinds of blocks, each compiled for fixed and for symbolic sizes.
RECOMPILE_LIMIT = 64


class TrainStep(SimpleTrainer):
    """
    One training iteration: forward, loss check, backward, clipping, optimizer step.

    Unlike Detectron2's AMPTrainer it supports mixed precision on any device (bfloat16, or float16
    with loss scaling on GPUs without it), clips unscaled gradients, and accumulates gradients.
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
        """
        super().__init__(model, data_loader, optimizer)
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
        distributed = isinstance(self.model, nn.parallel.DistributedDataParallel)
        module: Any = self.model.module if distributed else self.model
        num_segments = module.count_segments(data)
        size = len(data) // self.accumulate_steps
        total: dict[str, Tensor] = {}
        for start in range(0, len(data), size):
            last = start + size == len(data)
            # Gradients are averaged over processes once, in the last part.
            sync = contextlib.nullcontext() if last or not distributed else self.model.no_sync()
            with sync:
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
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As Detectron2's, for an optimizer and a precision that may differ."""
        TrainerBase.load_state_dict(self, state_dict)
        load_optimizer(self.optimizer, state_dict.get("optimizer"))
        scaler = state_dict.get("grad_scaler")
        if scaler and self.grad_scaler.is_enabled():
            self.grad_scaler.load_state_dict(scaler)


def compile_layers(model: nn.Module) -> None:
    """
    Compile the layers of a model with torch.compile for training.

    Layers of one kind share their code, and sizes that vary become symbolic, so the number of
    compilations depends on the architecture, not on the images. Matching and losses are not
    compiled, nor are masks, whose number is different in every image.

    Raises:
        RuntimeError: on a CPU without a C++ compiler.
    """
    compiler = os.environ.get("CXX", "g++")
    on_cpu = next(model.parameters()).device.type == "cpu"
    if on_cpu and shutil.which(compiler) is None:
        raise RuntimeError(
            f"SOLVER.COMPILE needs a C++ compiler, but there is no '{compiler}'. Install one, set "
            "the environment variable CXX to it, or set SOLVER.COMPILE to False."
        )
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, RECOMPILE_LIMIT)
    for module in model.modules():
        if isinstance(module, (BottleneckBlock, BasicBlock, *TRANSFORMER_LAYERS)):
            _compile_in_training(module)


def _compile_in_training(module: nn.Module) -> None:
    """Compile ``forward``; evaluation, which would be compiled anew, runs it as it is."""
    plain = module.forward
    compiled = torch.compile(plain)

    def forward(*args: Any) -> Any:
        return compiled(*args) if module.training else plain(*args)

    module.forward = forward


class PicturesHook(HookBase):
    """Draws a contact sheet of predictions and the curves into ``OUTPUT_DIR`` after training."""

    def after_train(self) -> None:
        """Draw if training reached its last iteration."""
        if self.trainer.iter + 1 >= self.trainer.max_iter and comm.is_main_process():
            write_pictures(self.trainer.cfg, self.trainer.model)


class Trainer(DefaultTrainer):
    """Detectron2's trainer with this project's data loaders, optimizer, step and evaluators."""

    def __init__(self, cfg: CfgNode) -> None:
        """As ``DefaultTrainer``, with :class:`TrainStep`, also for several CPU processes."""
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        check_reference_world_size(cfg)
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        cfg = scale_to_batch_size(cfg)
        check_training(cfg, comm.get_world_size())
        self.check_test_sets(cfg)
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
        amp = cfg.SOLVER.AMP.ENABLED
        if amp and on_cpu:  # a GPU without bfloat16 computes in float16
            amp = usable_precision("bfloat16", "cpu", "SOLVER.AMP.ENABLED") != "float32"
        self._trainer = TrainStep(
            model,
            data_loader,
            optimizer,
            amp=amp,
            clip_norm=full_model_clip_norm(cfg),
            norm_type=cfg.SOLVER.CLIP_GRADIENTS.NORM_TYPE,
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
        """Detectron2's, signals before the evaluation, and the pictures, which show the last."""
        if self.cfg.TEST.PRECISE_BN.ENABLED and not get_bn_modules(self.model):
            logger.warning("TEST.PRECISE_BN.ENABLED has no effect: no normalization has statistics")
        hooks: list[HookBase] = [hook for hook in super().build_hooks() if hook is not None]
        evaluation = next(i for i, hook in enumerate(hooks) if isinstance(hook, EvalHook))
        hooks.insert(evaluation, StopHook(self.checkpointer))
        return [*hooks, PicturesHook()]

    def resume_or_load(self, resume: bool = True) -> None:
        """As Detectron2's; ``metrics.json`` keeps the iterations that are not trained again."""
        self.iter = -1  # before the first; a checkpoint of a training has its last
        super().resume_or_load(resume)
        resumed = resume and self.checkpointer.has_checkpoint()
        if resumed and self.start_iter == 0:
            logger.warning("The checkpoint holds weights alone: the training starts with these")
        if resumed and self.start_iter >= self.max_iter:
            logger.warning(
                "Nothing is trained: the checkpoint has %d iterations, SOLVER.MAX_ITER is %d. "
                "Raise it to train further.",
                self.start_iter,
                self.max_iter,
            )
        if comm.is_main_process():
            cut_metrics(self.cfg.OUTPUT_DIR, self.start_iter if self.start_iter else -1)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "images_per_batch": self.cfg.SOLVER.IMS_PER_BATCH}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Continue a run with the learning rate and the schedule of the config.

        Raises:
            ValueError: its batches have another number of images, so its iterations count
                differently.
        """
        ours = self.cfg.SOLVER.IMS_PER_BATCH
        theirs = state_dict.get("images_per_batch", ours)
        if theirs != ours:
            raise ValueError(
                f"--resume: the run has batches of {theirs} images, and now they have {ours} "
                "(SOLVER.IMS_PER_BATCH; with SOLVER.REFERENCE_WORLD_SIZE, times the processes). "
                f"Iterations would not count the same. Resume it with {theirs}, or start a new run "
                "from its weights (MODEL.WEIGHTS) in another OUTPUT_DIR."
            )
        super().load_state_dict(state_dict)
        before, groups = max(self.scheduler.base_lrs), self.optimizer.param_groups
        self.scheduler.base_lrs = [group["initial_lr"] for group in groups]
        now = max(self.scheduler.base_lrs)
        if not math.isclose(now, before):
            logger.warning("The learning rate is the config's, %g; it was %g", now, before)
        if self.scheduler.last_epoch <= self.max_iter:
            for group, rate in zip(groups, self.scheduler.get_lr(), strict=True):
                group["lr"] = rate

    @property
    def last_results(self) -> OrderedDict[str, Any] | None:
        """Results of the last evaluation, if there was one."""
        return getattr(self, "_last_eval_results", None)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Detectron2's, which may start from a part of the weights if the config allows it."""
        model: nn.Module = super().build_model(cfg)
        if not hasattr(model, "allow_partial_weights"):
            name = cfg.MODEL.META_ARCHITECTURE
            raise ValueError(f"MODEL.META_ARCHITECTURE is '{name}', not PanopticSegFormer")
        model.allow_partial_weights = cfg.MODEL.PSF.ALLOW_PARTIAL_WEIGHTS
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW with parameter groups (:func:`psf.solver.build_optimizer`)."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Training images with their panoptic ground truth."""
        mapper = PanopticDatasetMapper(cfg, True)
        dicts = [record for name in cfg.DATASETS.TRAIN for record in _records(name)]
        if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
            dicts = _with_annotations(dicts)
        return build_detection_train_loader(cfg, mapper=mapper, dataset=dicts)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Test images without ground truth."""
        mapper = PanopticDatasetMapper(cfg, False)
        with _hint_at_data_root():
            return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def check_test_sets(cls, cfg: CfgNode) -> None:
        """
        Read the test sets and build their evaluators, so that what they lack is known at once.

        Raises:
            ValueError: an evaluator refuses a data set, or it has images without annotations.
        """
        register_listed(cfg.DATASETS.REGISTER)
        for name in cfg.DATASETS.TEST:
            dicts = _records(name)
            with _hint_at_data_root():
                cls.build_evaluator(cfg, name)
            bare = [d["file_name"] for d in dicts if not d.get("pan_seg_file_name")]
            if bare and not cfg.MODEL.PSF.TEST.SAVE_PREDICTIONS:
                raise ValueError(
                    f"DATASETS.TEST: {len(bare)} of the {len(dicts)} images of '{name}' have no "
                    f"annotations to evaluate, such as '{bare[0]}'. Leave it out, or set "
                    "MODEL.PSF.TEST.SAVE_PREDICTIONS True to write predictions alone."
                )

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str
    ) -> DatasetEvaluator | DatasetEvaluators:
        """Evaluators of the outputs that the config enables."""
        test = cfg.MODEL.PSF.TEST
        return build_evaluators(
            dataset_name,
            panoptic=test.PANOPTIC_ON,
            instances=test.INSTANCE_ON,
            sem_seg=test.SEMANTIC_ON,
            output_dir=str(Path(cfg.OUTPUT_DIR) / "inference" / dataset_name),
            boundary_pq=test.BOUNDARY_PQ,
            save_predictions=test.SAVE_PREDICTIONS,
            model_dataset=model_dataset(cfg),
        )


def _class_names(dataset_name: str) -> ClassNames | None:
    return ClassNames.from_metadata(MetadataCatalog.get(dataset_name)) if dataset_name else None


def _records(name: str) -> list[dict[str, Any]]:
    """The images of a data set; there are some, or it is an error."""
    if name not in DatasetCatalog.list():
        raise ValueError(
            f"There is no data set '{name}'. Register it (DATASETS.REGISTER), or correct "
            "DATASETS.TRAIN and DATASETS.TEST."
        )
    with _hint_at_data_root():
        records: list[dict[str, Any]] = DatasetCatalog.get(name)
    if not records:
        raise ValueError(f"Data set '{name}' is empty: it has no images with annotations")
    return records


def _with_annotations(dicts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The images with a segment that is not a crowd; Detectron2's filter reads another format."""
    kept = [d for d in dicts if any(not s.get("iscrowd", 0) for s in d["segments_info"])]
    if not kept:
        raise ValueError(
            "No training image has annotations besides crowds. Correct DATASETS.TRAIN, or set "
            "DATALOADER.FILTER_EMPTY_ANNOTATIONS to False."
        )
    logger.info(
        "%d of %d images without annotations are left out", len(dicts) - len(kept), len(dicts)
    )
    return kept


@contextlib.contextmanager
def _hint_at_data_root() -> Iterator[None]:
    """Name the variable that decides where Detectron2's data sets are searched for."""
    try:
        yield
    except FileNotFoundError as error:
        variable = "DETECTRON2_DATASETS"
        if variable in str(error):
            raise
        root = os.environ.get(variable, "datasets")
        raise FileNotFoundError(
            f"{error}. Data sets are searched for under '{root}': put the data there, or set the "
            f"environment variable {variable} to its folder."
        ) from error


def write_pictures(cfg: CfgNode, model: nn.Module) -> None:
    """
    Draw a contact sheet of predictions and the training curves into ``OUTPUT_DIR``.

    The sheet needs a test data set and ``PANOPTIC_ON``, the curves need a ``metrics.json``.
    """
    output_dir = Path(cfg.OUTPUT_DIR)
    if cfg.DATASETS.TEST and cfg.MODEL.PSF.TEST.PANOPTIC_ON:
        dataset_name = cfg.DATASETS.TEST[0]
        path = output_dir / CONTACT_SHEET
        with drawn_or_warned(path):
            samples = _predict_samples(cfg, model, DatasetCatalog.get(dataset_name))
            write_contact_sheet(samples, MetadataCatalog.get(dataset_name), path)
    if (output_dir / METRICS).is_file():
        with drawn_or_warned(output_dir / CURVES):
            write_curves(output_dir / METRICS, output_dir / CURVES)


@torch.no_grad()
def _predict_samples(
    cfg: CfgNode, model: nn.Module, dicts: list[dict[str, Any]], num_images: int = 6
) -> list[Sample]:
    """Predict images that are evenly spaced over a data set; the model keeps its mode."""
    chosen = dicts[:: max(1, len(dicts) // num_images)][:num_images]
    renumbering = Renumbering.between(model_dataset(cfg), cfg.DATASETS.TEST[0])
    mapper = PanopticDatasetMapper(cfg, False)
    was_training = model.training
    model.eval()
    samples = [
        Sample(
            dataset_dict=record,
            ground_truth=load_ground_truth(record),
            prediction=PanopticSegmentation(
                *renumbering(model([mapper(record)])[0])["panoptic_seg"]
            ),
        )
        for record in chosen
    ]
    model.train(was_training)
    return samples


def summary(results: OrderedDict[str, Any]) -> str | None:
    """One line with PQ, PQ_th and PQ_st of an evaluation; None if PQ was not evaluated."""
    panoptic = results.get("panoptic_seg")
    if panoptic is None:
        return None
    return " ".join(f"{key} {panoptic[key]:.2f}" for key in ("PQ", "PQ_th", "PQ_st"))
