"""Training and evaluation with Detectron2's engine, on CPUs and GPUs."""

import contextlib
import logging
import math
import os
import shutil
import weakref
from collections import OrderedDict
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
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, create_ddp_model
from detectron2.engine.hooks import EvalHook
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from psf.console import ProgressHook
from psf.data import ClassNames, PanopticDatasetMapper, register_listed
from psf.ema import ModelEma
from psf.evaluation import build_evaluators
from psf.evaluation.charts import drawn_or_warned, write_curves
from psf.evaluation.ground_truth import PanopticSegmentation, load_ground_truth
from psf.evaluation.pictures import Sample, write_contact_sheet
from psf.evaluation.renumbering import Renumbering
from psf.finetuning import ClassCheckpointer
from psf.layers.host_memory import keep_freed_memory
from psf.modeling.build import TRANSFORMER_LAYERS, model_dataset
from psf.options import check_training
from psf.precision import usable_precision
from psf.resuming import check_trainer_state
from psf.run_folder import METRICS, cut_metrics
from psf.solver import (
    build_optimizer,
    check_reference_world_size,
    full_model_clip_norm,
    scale_to_batch_size,
)
from psf.stopping import StopHook
from psf.train_step import TrainStep

logger = logging.getLogger(__name__)

CONTACT_SHEET = "contact_sheet.png"
CURVES = "curves.png"

# Compilations of one function, for all layers that share it (torch's limit is 8). A ResNet has
# eight kinds of blocks, each compiled for fixed and for symbolic sizes.
RECOMPILE_LIMIT = 64


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
            with self.trainer.evaluated_weights():
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
            ema_decay=cfg.SOLVER.EMA_DECAY,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = ClassCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            class_names=_class_names(cfg.DATASETS.TRAIN[0]),
            weights_class_names=_class_names(cfg.MODEL.PSF.WEIGHTS_DATASET),
            ema=self.ema,
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
        hooks[evaluation] = EvalHook(self.cfg.TEST.EVAL_PERIOD, self.evaluate)
        if comm.is_main_process():
            hooks.insert(evaluation + 1, ProgressHook())
        hooks.insert(evaluation, StopHook(self.checkpointer))
        return [*hooks, PicturesHook()]

    def evaluate(self) -> OrderedDict[str, Any]:
        """Evaluate the model, or the average of its weights if there is one."""
        with self.evaluated_weights():
            self._last_eval_results: OrderedDict[str, Any] = self.test(self.cfg, self.model)
        return self._last_eval_results

    def evaluated_weights(self) -> contextlib.AbstractContextManager[None]:
        """Give the model the weights to evaluate: the average, if there is one."""
        return contextlib.nullcontext() if self.ema is None else self.ema.applied()

    @property
    def ema(self) -> ModelEma | None:
        """The average of the model's weights (``SOLVER.EMA_DECAY``)."""
        return self._trainer.ema

    def resume_or_load(self, resume: bool = True) -> None:
        """As Detectron2's; ``metrics.json`` keeps the iterations that are not trained again."""
        self.iter = -1  # before the first; a checkpoint of a training has its last
        super().resume_or_load(resume)
        if self.start_iter == 0 and self.ema is not None:
            self.ema.restart()  # from the weights that were loaded
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
            ValueError: it cannot be continued, or its batches have another number of images, so
                its iterations count differently.
        """
        check_trainer_state(state_dict)
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
