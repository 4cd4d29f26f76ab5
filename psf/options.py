"""Detectron2's options of data, schedule and evaluation: what works here, by name.

Options that no code here obeys are refused, so that a config means what it says.
"""

import logging
import math
from typing import Any

from detectron2.config import CfgNode, get_cfg

logger = logging.getLogger(__name__)

_NO_PROPOSALS = "the model finds its objects without proposals"
_NO_KEYPOINTS = "there are no keypoints"
_ADAMW = "the optimizer is AdamW"
_SAMPLER = "DATALOADER.SAMPLER_TRAIN is TrainingSampler, the only sampler here"
_OTHER_MODEL = "it is of another model of Detectron2"

# Options, or groups of them, that must keep Detectron2's values, and why.
_WITHOUT_EFFECT = {
    "TEST.AUG": "there is no test-time augmentation",
    "TEST.KEYPOINT_OKS_SIGMAS": _NO_KEYPOINTS,
    "VIS_PERIOD": "the pictures are drawn after the training",
    "GLOBAL": "nothing reads it",
    "MODEL.KEYPOINT_ON": _NO_KEYPOINTS,
    "MODEL.MASK_ON": "instance masks come with MODEL.PSF.TEST.INSTANCE_ON",
    "MODEL.LOAD_PROPOSALS": _NO_PROPOSALS,
    "MODEL.PROPOSAL_GENERATOR": _NO_PROPOSALS,
    "MODEL.ANCHOR_GENERATOR": _NO_PROPOSALS,
    "MODEL.RPN": _NO_PROPOSALS,
    "MODEL.ROI_HEADS": f"{_OTHER_MODEL}; classes are counted in the data set",
    "MODEL.ROI_BOX_HEAD": _OTHER_MODEL,
    "MODEL.ROI_BOX_CASCADE_HEAD": _OTHER_MODEL,
    "MODEL.ROI_MASK_HEAD": _OTHER_MODEL,
    "MODEL.ROI_KEYPOINT_HEAD": _NO_KEYPOINTS,
    "MODEL.SEM_SEG_HEAD": f"{_OTHER_MODEL}; classes are counted in the data set",
    "MODEL.PANOPTIC_FPN": f"{_OTHER_MODEL}; masks are merged by MODEL.PSF.TEST",
    "MODEL.RETINANET": _OTHER_MODEL,
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

_DECODER, _BACKBONE = "MODEL.PSF.MASK_DECODER.NAME", "MODEL.BACKBONE.NAME"
_BASIC, _RESNET = "build_basic_resnet_backbone", "build_resnet_backbone"
_SWIN, _TIMM = "build_swin_backbone", "build_timm_backbone"
_CLIP, _SCHEDULE = "SOLVER.CLIP_GRADIENTS", "SOLVER.LR_SCHEDULER_NAME"

# Options, or groups of them, that some values of another option make useless.
_USELESS: list[tuple[tuple[str, ...], str, tuple[Any, ...]]] = [
    (("MODEL.PSF.MASK_DECODER.DEC_LAYERS",), _DECODER, ("decoupled",)),
    (
        (
            *(f"MODEL.PSF.MASK_DECODER.{k}" for k in ("THING_LAYERS", "STUFF_LAYERS", "MATCHING")),
            "MODEL.PSF.TEST.THING_PAIRS",
        ),
        _DECODER,
        ("joint",),
    ),
    (
        ("MODEL.PSF.TEST.BOUNDARY_PQ", "MODEL.PSF.TEST.SAVE_PREDICTIONS"),
        "MODEL.PSF.TEST.PANOPTIC_ON",
        (False,),
    ),
    (("TEST.DETECTIONS_PER_IMAGE",), "MODEL.PSF.TEST.INSTANCE_ON", (False,)),
    (("MODEL.SWIN",), _BACKBONE, (_BASIC, _RESNET, _TIMM)),
    (("MODEL.TIMM",), _BACKBONE, (_BASIC, _RESNET, _SWIN)),
    (("MODEL.FPN",), _BACKBONE, (_BASIC, _RESNET, _SWIN, _TIMM)),
    (
        tuple(
            f"MODEL.RESNETS.{key}"
            for key in ("STEM_OUT_CHANNELS", "NUM_GROUPS", "WIDTH_PER_GROUP", "RES5_DILATION")
        ),
        _BACKBONE,
        (_BASIC, _SWIN, _TIMM),
    ),
    (
        ("INPUT.IMAGE_SIZE", "INPUT.MIN_SCALE", "INPUT.MAX_SCALE"),
        "INPUT.AUGMENTATION",
        ("multi_scale", "fixed_crop"),
    ),
    (("SOLVER.NUM_DECAYS",), _SCHEDULE, ("WarmupMultiStepLR", "WarmupCosineLR")),
    (("SOLVER.BASE_LR_END",), _SCHEDULE, ("WarmupMultiStepLR",)),
    (
        tuple(f"{_CLIP}.{key}" for key in ("CLIP_TYPE", "CLIP_VALUE", "NORM_TYPE")),
        f"{_CLIP}.ENABLED",
        (False,),
    ),
    (("TEST.PRECISE_BN.NUM_ITER",), "TEST.PRECISE_BN.ENABLED", (False,)),
]

# Values of options that Detectron2 takes as they come.
_CHOICES: dict[str, tuple[Any, ...]] = {
    "MODEL.RESNETS.DEPTH": (18, 34, 50, 101, 152),
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

_POSITIVE = (
    "SOLVER.BASE_LR",
    "SOLVER.GAMMA",
    "SOLVER.MAX_ITER",
    "SOLVER.IMS_PER_BATCH",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.ACCUMULATE_STEPS",
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE",
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE",
    "TEST.DETECTIONS_PER_IMAGE",
    "TEST.PRECISE_BN.NUM_ITER",
    "INPUT.MIN_SCALE",
    *(
        f"MODEL.PSF.{key}"
        for key in (
            *("HIDDEN_DIM", "NHEADS", "NUM_POINTS", "DIM_FEEDFORWARD", "MASK_LOSS_SCALE"),
            *("LOCATION_DECODER.DEC_LAYERS", "MASK_DECODER.DEC_LAYERS"),
            *("MASK_DECODER.THING_LAYERS", "MASK_DECODER.STUFF_LAYERS", "TEST.THING_PAIRS"),
        )
    ),
)
_NOT_NEGATIVE = (
    "SOLVER.BASE_LR_END",
    "SOLVER.WARMUP_FACTOR",
    "SOLVER.WARMUP_ITERS",
    "SOLVER.WEIGHT_DECAY",
    "SOLVER.WEIGHT_DECAY_NORM",
    "SOLVER.REFERENCE_BATCH_SIZE",
    "SOLVER.REFERENCE_WORLD_SIZE",
    "TEST.EVAL_PERIOD",
    "DATALOADER.NUM_WORKERS",
    "INPUT.MIN_SIZE_TEST",
    "MODEL.BACKBONE.FREEZE_AT",
    "SOLVER.BACKBONE_MULTIPLIER",
    "SOLVER.SAMPLING_MULTIPLIER",
    *(
        f"MODEL.PSF.{key}"
        for key in (
            *("ENC_LAYERS", "NUM_OBJECT_QUERIES", "MASK_DECODER.MATCHING.NUM_POINTS"),
            *("CLASS_WEIGHT", "STUFF_CLASS_WEIGHT", "L1_WEIGHT", "GIOU_WEIGHT", "DICE_WEIGHT"),
            *("THINGS_WEIGHT", "STUFF_WEIGHT", "TEST.CLASS_EXPONENT", "TEST.MASK_EXPONENT"),
        )
    ),
)
_FRACTIONS = tuple(
    f"MODEL.PSF.{key}"
    for key in (
        *("DROPOUT", "TEST.SCORE_THRESHOLD"),
        *("TEST.THING_KEEP_FRACTION", "TEST.STUFF_KEEP_FRACTION"),
    )
)
_MOST_SEED = 2**31  # NumPy takes less than 2^32, and each process adds its rank


def check_options(cfg: CfgNode) -> None:
    """
    Check the options of Detectron2 and the numbers of the project's.

    Raises:
        ValueError: one has no effect here, or a value that nothing can be done with.
    """
    defaults = get_cfg()
    for group, reason in _WITHOUT_EFFECT.items():
        for key in changed_keys(cfg, defaults, group):
            expected = get_value(defaults, key)
            raise ValueError(f"{key} has no effect: {reason}. Leave it at {expected!r}")
    for key, known in _CHOICES.items():
        if get_value(cfg, key) not in known:
            choices = ", ".join(map(str, known))
            raise ValueError(f"{key} is {get_value(cfg, key)!r}; known: {choices}")
    _check_numbers(cfg)
    if not 0 <= cfg.SOLVER.EMA_DECAY < 1:
        raise ValueError(
            f"SOLVER.EMA_DECAY is {cfg.SOLVER.EMA_DECAY}; it must be 0 (no average) or between 0 "
            "and 1, such as 0.9998"
        )
    if cfg.SOLVER.EMA_DECAY and cfg.TEST.PRECISE_BN.ENABLED:
        raise ValueError(
            "TEST.PRECISE_BN computes statistics for the weights that are trained, but with "
            "SOLVER.EMA_DECAY their average is evaluated. Turn one of them off"
        )
    _check_lists(cfg)
    _check_crop(cfg)
    if cfg.TEST.EXPECTED_RESULTS:
        _check_expected_results(cfg)


def warn_of_options(cfg: CfgNode, defaults: CfgNode) -> None:
    """
    Log the options that have no effect because of another one.

    Args:
        cfg: to check.
        defaults: with the keys of the project.
    """
    for groups, other, values in _USELESS:
        found = get_value(cfg, other)
        for key in (key for group in groups for key in changed_keys(cfg, defaults, group)):
            if found in values:
                logger.warning("%s has no effect with %s %s", key, other, found)
    if cfg.TEST.EVAL_PERIOD and not cfg.DATASETS.TEST:
        logger.warning("TEST.EVAL_PERIOD has no effect: DATASETS.TEST is empty")


def _check_numbers(cfg: CfgNode) -> None:
    for key in (*_POSITIVE, *_NOT_NEGATIVE):
        value = get_value(cfg, key)
        if not value >= 0 or (value == 0 and key in _POSITIVE):  # NaN is not >= 0
            least = "more than 0" if key in _POSITIVE else "0 or more"
            raise ValueError(f"{key} is {value}; it must be {least}")
    for key in _FRACTIONS:
        if not 0 <= get_value(cfg, key) <= 1:
            raise ValueError(f"{key} is {get_value(cfg, key)}; it must be in 0..1")
    if cfg.INPUT.MIN_SCALE > cfg.INPUT.MAX_SCALE:
        raise ValueError(
            f"INPUT.MIN_SCALE is {cfg.INPUT.MIN_SCALE}; it must not be above INPUT.MAX_SCALE, "
            f"{cfg.INPUT.MAX_SCALE}"
        )
    if cfg.SEED > _MOST_SEED:
        raise ValueError(f"SEED is {cfg.SEED}; it must be at most {_MOST_SEED}")


def _check_lists(cfg: CfgNode) -> None:
    """The options that are several numbers."""
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    sizes = (sizes,) if isinstance(sizes, int) else sizes
    if not sizes or min(sizes) < 1:
        raise ValueError(f"INPUT.MIN_SIZE_TRAIN is {sizes}; it must be one or more sizes in pixels")
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" and len(sizes) != 2:
        raise ValueError(
            f"INPUT.MIN_SIZE_TRAIN is {sizes}; with MIN_SIZE_TRAIN_SAMPLING 'range' it must be the "
            "least and the largest size"
        )
    steps = list(cfg.SOLVER.STEPS)
    if not all(type(step) is int for step in steps) or steps != sorted(set(steps)):
        raise ValueError(f"SOLVER.STEPS is {cfg.SOLVER.STEPS}; it must be rising iterations")
    for key, least in (("PIXEL_MEAN", -math.inf), ("PIXEL_STD", 0)):
        values = cfg.MODEL[key]
        if len(values) != 3 or not min(values) > least:
            positive = " above 0" if least == 0 else ""
            raise ValueError(f"MODEL.{key} is {values}; it must be three numbers{positive}")


def _check_crop(cfg: CfgNode) -> None:
    crop, augmentation = cfg.INPUT.CROP, cfg.INPUT.AUGMENTATION
    if crop.ENABLED and augmentation != "multi_scale":
        raise ValueError(
            f"INPUT.CROP.ENABLED has no effect with INPUT.AUGMENTATION '{augmentation}'. "
            "Set it to False"
        )
    in_pixels = augmentation == "fixed_crop" or crop.TYPE.startswith("absolute")
    if not crop.ENABLED and augmentation != "fixed_crop":
        return
    asks = f"INPUT.AUGMENTATION '{augmentation}'" if not crop.ENABLED else f"TYPE '{crop.TYPE}'"
    fits = len(crop.SIZE) == 2 and (
        min(crop.SIZE) >= 1 if in_pixels else 0 < min(crop.SIZE) <= max(crop.SIZE) <= 1
    )
    if not fits:
        needs = "height and width in pixels" if in_pixels else "two parts of the image, up to 1"
        raise ValueError(f"INPUT.CROP.SIZE is {crop.SIZE}; {asks} needs {needs}")
    if crop.TYPE == "absolute_range" and crop.ENABLED and crop.SIZE[0] > crop.SIZE[1]:
        raise ValueError(f"INPUT.CROP.SIZE is {crop.SIZE}; TYPE 'absolute_range' needs least, most")


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
        is_entry = isinstance(line, (list, tuple)) and len(line) == 4 and tasks.get(line[0])
        if not (is_entry and all(isinstance(value, (int, float)) for value in line[2:])):
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


def get_value(cfg: CfgNode, key: str) -> Any:
    """The value of a key with dots; of a group of keys, its node."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def changed_keys(cfg: CfgNode, defaults: CfgNode, group: str) -> list[str]:
    """The keys of a group, or a single key, whose values are not the defaults."""
    node = get_value(defaults, group)
    keys = (
        [f"{group}.{key}" for key in values_by_key(node)] if isinstance(node, CfgNode) else [group]
    )
    return [key for key in keys if _plain(get_value(cfg, key)) != _plain(get_value(defaults, key))]


def _plain(value: Any) -> Any:
    """Lists for tuples, which YAML does not tell apart."""
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def values_by_key(node: CfgNode, prefix: str = "") -> dict[str, Any]:
    """All values below a node, by their keys with dots."""
    values: dict[str, Any] = {}
    for key, value in node.items():
        is_node = isinstance(value, CfgNode)
        values |= values_by_key(value, f"{prefix}{key}.") if is_node else {prefix + key: value}
    return values
