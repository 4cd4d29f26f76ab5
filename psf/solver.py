"""AdamW with the learning-rate groups of Deformable DETR and the paper."""

import logging
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import nn

logger = logging.getLogger(__name__)

# Layers that predict sampling locations (Deformable DETR, section A.4; official code).
SAMPLING_LAYERS = ("sampling_offsets", "reference_points")


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """
    Build AdamW from ``cfg.SOLVER``.

    The learning rate is ``BASE_LR``, times ``BACKBONE_MULTIPLIER`` in the backbone and
    ``SAMPLING_MULTIPLIER`` in the layers that predict sampling locations. Weight decay is
    ``WEIGHT_DECAY``, or ``WEIGHT_DECAY_NORM`` and ``WEIGHT_DECAY_BIAS`` where they apply.
    """

    def lr_factor(name: str) -> float:
        factor: float = 1.0
        if name.startswith("backbone."):
            factor *= cfg.SOLVER.BACKBONE_MULTIPLIER
        if any(part in SAMPLING_LAYERS for part in name.split(".")):
            factor *= cfg.SOLVER.SAMPLING_MULTIPLIER
        return factor

    params: list[dict[str, Any]] = get_default_optimizer_params(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay=cfg.SOLVER.WEIGHT_DECAY,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
        bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
        weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        lr_factor_func=lr_factor,
    )
    optimizer = torch.optim.AdamW(params, lr=cfg.SOLVER.BASE_LR, fused=True)
    if full_model_clip_norm(cfg) is not None:
        return optimizer  # the trainer clips
    return maybe_add_gradient_clipping(cfg, optimizer)


def full_model_clip_norm(cfg: CfgNode) -> float | None:
    """The maximum norm of the whole gradient; None if ``CLIP_TYPE`` is not ``full_model``."""
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if not clip.ENABLED or clip.CLIP_TYPE != "full_model":
        return None
    return float(clip.CLIP_VALUE)


def check_reference_world_size(cfg: CfgNode) -> None:
    """
    Check that ``SOLVER.REFERENCE_WORLD_SIZE`` divides the batch size.

    Detectron2's ``DefaultTrainer.auto_scale_workers`` asserts it without a message.

    Raises:
        ValueError: it does not.
    """
    batch_size, world_size = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE
    if world_size and batch_size % world_size:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {batch_size}, which is not a multiple of "
            f"SOLVER.REFERENCE_WORLD_SIZE, {world_size}: the number of processes that batch and "
            "schedule are written for. Set SOLVER.REFERENCE_WORLD_SIZE to 0 to use both unscaled."
        )


def scale_to_batch_size(cfg: CfgNode) -> CfgNode:
    """
    Scale learning rate and schedule from ``SOLVER.REFERENCE_BATCH_SIZE`` to ``IMS_PER_BATCH``.

    For a batch k times as large, the learning rate is multiplied by k (linear scaling rule, arXiv
    1706.02677), numbers of iterations are divided by k, so the number of epochs stays the same, and
    the decay of the average is its k-th power (arXiv 2307.13813).

    Returns:
        The scaled config, whose reference is its batch size; ``cfg`` itself if nothing changes.
    """
    reference, batch_size = cfg.SOLVER.REFERENCE_BATCH_SIZE, cfg.SOLVER.IMS_PER_BATCH
    if reference in (0, batch_size):
        return cfg
    if cfg.SOLVER.REFERENCE_WORLD_SIZE:
        raise ValueError(
            f"SOLVER.REFERENCE_BATCH_SIZE is {reference} and SOLVER.REFERENCE_WORLD_SIZE is "
            f"{cfg.SOLVER.REFERENCE_WORLD_SIZE}: both scale the schedule. Set one of them to 0."
        )
    scaled = cfg.clone()
    scaled.defrost()
    solver, factor = scaled.SOLVER, batch_size / reference
    solver.REFERENCE_BATCH_SIZE = batch_size
    solver.BASE_LR = cfg.SOLVER.BASE_LR * factor
    solver.EMA_DECAY = cfg.SOLVER.EMA_DECAY**factor
    for key in ("MAX_ITER", "WARMUP_ITERS", "CHECKPOINT_PERIOD"):
        solver[key] = _scaled(cfg.SOLVER[key], factor)
    solver.STEPS = tuple(round(step / factor) for step in cfg.SOLVER.STEPS)
    scaled.TEST.EVAL_PERIOD = _scaled(cfg.TEST.EVAL_PERIOD, factor)
    scaled.freeze()
    logger.info(
        "Schedule scaled from batch size %d to %d: learning rate %g, %d iterations, steps at %s",
        reference,
        batch_size,
        solver.BASE_LR,
        solver.MAX_ITER,
        solver.STEPS,
    )
    return scaled


def _scaled(iterations: int, factor: float) -> int:
    """Divide; what is not 0 stays at least 1."""
    return max(1, round(iterations / factor)) if iterations else 0
