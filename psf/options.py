"""Detectron2's options of data, schedule and evaluation: what works here, by name.

Options that no code here obeys are refused, so that a config means what it says.
"""

import logging
import math
from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode, get_cfg

logger = logging.getLogger(__name__)

_NO_PROPOSALS = "the model finds its objects without proposals"
_NO_KEYPOINTS = "there are no keypoints"
_ADAMW = "the optimizer is AdamW"
_SAMPLER = "DATALOADER.SAMPLER_TRAIN is TrainingSampler, the only sampler here"

# Options that must keep Detectron2's values, and why.
_WITHOUT_EFFECT = {
    "TEST.AUG.ENABLED": "there is no test-time augmentation",
    "TEST.KEYPOINT_OKS_SIGMAS": _NO_KEYPOINTS,
    "VIS_PERIOD": "the pictures are drawn after the training",
    "MODEL.KEYPOINT_ON": _NO_KEYPOINTS,
    "MODEL.MASK_ON": "instance masks come with MODEL.PSF.TEST.INSTANCE_ON",
    "MODEL.LOAD_PROPOSALS": _NO_PROPOSALS,
    "DATASETS.PROPOSAL_FILES_TRAIN": _NO_PROPOSALS,
    "DATASETS.PROPOSAL_FILES_TEST": _NO_PROPOSALS,
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN": _NO_PROPOSALS,
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST": _NO_PROPOSALS,
    "DATALOADER.SAMPLER_TRAIN": "the others count instance annotations",
    "DATALOADER.REPEAT_THRESHOLD": _SAMPLER,
    "DATALOADER.REPEAT_SQRT": _SAMPLER,
    "SOLVER.MOMENTUM": _ADAMW,
    "SOLVER.NESTEROV": _ADAMW,
}

# Values of options that Detectron2 takes as they come.
_CHOICES: dict[str, tuple[Any, ...]] = {
    "INPUT.FORMAT": ("RGB", "BGR"),
    "INPUT.MASK_FORMAT": ("bitmask",),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.CROP.TYPE": ("relative_range", "relative", "absolute", "absolute_range"),
    "SOLVER.LR_SCHEDULER_NAME": (
        "WarmupMultiStepLR",
        "WarmupCosineLR",
        "WarmupStepWithFixedGammaLR",
    ),
    "SOLVER.WARMUP_METHOD": ("linear", "constant"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm", "full_model"),
}

_FRACTION = (lambda v: 0 <= v <= 1, "in 0..1")


def _numbers(count: int, least: float) -> tuple[Callable[[Any], bool], str]:
    """A list of finite numbers that are more than ``least``."""
    return (
        lambda v: (
            len(v) == count and all(type(n) in (int, float) and least < n < math.inf for n in v)
        ),
        f"{count} numbers" + (" of more than 0" if least == 0 else ""),
    )


# What other options must be.
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "SEED": (lambda v: v < 1 << 32, "less than 2^32"),
    "INPUT.MIN_SIZE_TRAIN": (
        lambda v: len(v) > 0 and all(type(size) is int and size >= 0 for size in v),
        "one or more sizes in pixels",
    ),
    "INPUT.CROP.SIZE": _numbers(2, 0),
    "MODEL.PIXEL_MEAN": _numbers(3, -math.inf),
    "MODEL.PIXEL_STD": _numbers(3, 0),
    "MODEL.PSF.TEST.SCORE_THRESHOLD": _FRACTION,
    "MODEL.PSF.TEST.THING_KEEP_FRACTION": _FRACTION,
    "MODEL.PSF.TEST.STUFF_KEEP_FRACTION": _FRACTION,
}

_POSITIVE = (
    "SOLVER.BASE_LR",
    "SOLVER.MAX_ITER",
    "SOLVER.IMS_PER_BATCH",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.ACCUMULATE_STEPS",
    "SOLVER.NUM_DECAYS",
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE",
    "INPUT.IMAGE_SIZE",
    "INPUT.MIN_SCALE",
    "TEST.DETECTIONS_PER_IMAGE",
)
_NOT_NEGATIVE = (
    "SOLVER.WARMUP_ITERS",
    "SOLVER.REFERENCE_BATCH_SIZE",
    "SOLVER.REFERENCE_WORLD_SIZE",
    "SOLVER.WARMUP_FACTOR",
    "SOLVER.GAMMA",
    "SOLVER.WEIGHT_DECAY",
    "SOLVER.WEIGHT_DECAY_NORM",
    "SOLVER.BASE_LR_END",
    "SOLVER.BACKBONE_MULTIPLIER",
    "SOLVER.SAMPLING_MULTIPLIER",
    "INPUT.MIN_SIZE_TEST",
    "TEST.EVAL_PERIOD",
    "DATALOADER.NUM_WORKERS",
)


def check_options(cfg: CfgNode) -> None:
    """
    Check the options of Detectron2.

    Raises:
        ValueError: one has no effect here, or a value that nothing can be done with.
    """
    defaults = get_cfg()
    for key, reason in _WITHOUT_EFFECT.items():
        expected = _get(defaults, key)
        if _get(cfg, key) != expected:
            raise ValueError(f"{key} has no effect: {reason}. Leave it at {expected!r}")
    _check_values(cfg)
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" and len(cfg.INPUT.MIN_SIZE_TRAIN) != 2:
        raise ValueError(
            f"INPUT.MIN_SIZE_TRAIN is {cfg.INPUT.MIN_SIZE_TRAIN}; with MIN_SIZE_TRAIN_SAMPLING "
            "'range' it must be the smallest and the largest size"
        )
    if cfg.INPUT.CROP.ENABLED and cfg.INPUT.AUGMENTATION != "multi_scale":
        raise ValueError(
            f"INPUT.CROP.ENABLED has no effect with INPUT.AUGMENTATION '{cfg.INPUT.AUGMENTATION}'. "
            "Set it to False"
        )
    if cfg.INPUT.AUGMENTATION == "fixed_crop" and min(cfg.INPUT.CROP.SIZE) < 1:
        raise ValueError(
            f"INPUT.CROP.SIZE is {cfg.INPUT.CROP.SIZE}; INPUT.AUGMENTATION 'fixed_crop' needs "
            "height and width in pixels"
        )
    if cfg.TEST.EXPECTED_RESULTS:
        _check_expected_results(cfg)


def _check_values(cfg: CfgNode) -> None:
    """Check values by themselves, and pairs of which one is the greater."""
    for key, known in _CHOICES.items():
        if _get(cfg, key) not in known:
            raise ValueError(f"{key} is {_get(cfg, key)!r}; known: {', '.join(known)}")
    for key in (*_POSITIVE, *_NOT_NEGATIVE):
        value = _get(cfg, key)
        if not (value > 0 if key in _POSITIVE else value >= 0):  # as NaN
            least = "more than 0" if key in _POSITIVE else "0 or more"
            raise ValueError(f"{key} is {value}; it must be {least}")
    for key, (fits, expected) in _VALUES.items():
        if not fits(_get(cfg, key)):
            raise ValueError(f"{key} is {_get(cfg, key)!r}; it must be {expected}")
    for low, high in (
        ("INPUT.MIN_SCALE", "INPUT.MAX_SCALE"),
        ("SOLVER.BASE_LR_END", "SOLVER.BASE_LR"),
    ):
        if _get(cfg, low) > _get(cfg, high):
            raise ValueError(
                f"{low} is {_get(cfg, low)}; it must be {high}, {_get(cfg, high)}, or less"
            )


def _check_expected_results(cfg: CfgNode) -> None:
    test = cfg.MODEL.PSF.TEST
    tasks = {
        "panoptic_seg": test.PANOPTIC_ON,
        "boundary_panoptic_seg": test.PANOPTIC_ON and test.BOUNDARY_PQ,
        "bbox": test.INSTANCE_ON,
        "segm": test.INSTANCE_ON,
        "sem_seg": test.SEMANTIC_ON,
    }
    for line in cfg.TEST.EXPECTED_RESULTS:
        is_four = isinstance(line, (list, tuple)) and len(line) == 4
        if not (is_four and tasks.get(line[0]) and _numbers(2, -math.inf)[0](line[2:])):
            raise ValueError(
                f"TEST.EXPECTED_RESULTS has {line!r}; each entry is [task, metric, value, "
                "tolerance], such as ['panoptic_seg', 'PQ', 70.0, 0.5], of a task that "
                f"MODEL.PSF.TEST turns on: {', '.join(t for t, on in tasks.items() if on)}"
            )
    if len(cfg.DATASETS.TEST) != 1:
        raise ValueError(
            f"TEST.EXPECTED_RESULTS is of one data set, but DATASETS.TEST is {cfg.DATASETS.TEST}"
        )


def check_training(cfg: CfgNode, num_processes: int) -> None:
    """
    Check what only a training needs, after its schedule is scaled.

    Raises:
        ValueError: there is no data set, or the processes cannot share a batch.
    """
    solver = cfg.SOLVER
    check_options(cfg)
    if not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN is empty: name the data sets to train on")
    if solver.IMS_PER_BATCH % (num_processes * solver.ACCUMULATE_STEPS):
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {solver.IMS_PER_BATCH}; it must be a multiple of the "
            f"{num_processes} processes times SOLVER.ACCUMULATE_STEPS, {solver.ACCUMULATE_STEPS}"
        )
    if solver.WARMUP_ITERS >= solver.MAX_ITER:
        logger.warning(
            "SOLVER.WARMUP_ITERS is %d of %d iterations (SOLVER.MAX_ITER): the learning rate never "
            "reaches SOLVER.BASE_LR. Set it to a tenth or less.",
            solver.WARMUP_ITERS,
            solver.MAX_ITER,
        )


def _get(cfg: CfgNode, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg
