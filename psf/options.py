"""Detectron2's options of data, schedule and evaluation: what works here, by name.

Options that no code here obeys are refused, so that a config means what it says.
"""

import logging
from typing import Any

from detectron2.config import CfgNode, get_cfg

logger = logging.getLogger(__name__)


def _keys(prefix: str, names: str) -> list[str]:
    return [f"{prefix}.{name}" for name in names.split()]


_NO_PROPOSALS = "the model finds its objects without proposals"
_NO_KEYPOINTS = "there are no keypoints"
_ADAMW = "the optimizer is AdamW"
_SAMPLER = "DATALOADER.SAMPLER_TRAIN is TrainingSampler, the only sampler here"
_OTHER_MODEL = "it is of another model of Detectron2"

# Options, or groups of them, that must keep Detectron2's values, and why.
_WITHOUT_EFFECT = {
    "TEST.AUG": "there is no test-time augmentation",
    "VIS_PERIOD": "the pictures are drawn after the training",
    "GLOBAL": "nothing reads it",
    "MODEL.MASK_ON": "instance masks come with MODEL.PSF.TEST.INSTANCE_ON",
    "MODEL.ROI_HEADS": f"{_OTHER_MODEL}; classes are counted in the data set",
    "MODEL.SEM_SEG_HEAD": f"{_OTHER_MODEL}; classes are counted in the data set",
    "MODEL.PANOPTIC_FPN": f"{_OTHER_MODEL}; masks are merged by MODEL.PSF.TEST",
    "DATALOADER.SAMPLER_TRAIN": "the others count instance annotations",
    **dict.fromkeys(_keys("DATALOADER", "REPEAT_THRESHOLD REPEAT_SQRT"), _SAMPLER),
    **dict.fromkeys(_keys("SOLVER", "MOMENTUM NESTEROV"), _ADAMW),
    **dict.fromkeys(
        ("TEST.KEYPOINT_OKS_SIGMAS", *_keys("MODEL", "KEYPOINT_ON ROI_KEYPOINT_HEAD")),
        _NO_KEYPOINTS,
    ),
    **dict.fromkeys(
        _keys("MODEL", "ROI_BOX_HEAD ROI_BOX_CASCADE_HEAD ROI_MASK_HEAD RETINANET"), _OTHER_MODEL
    ),
    **dict.fromkeys(
        _keys("MODEL", "LOAD_PROPOSALS PROPOSAL_GENERATOR ANCHOR_GENERATOR RPN"), _NO_PROPOSALS
    ),
    **dict.fromkeys(
        (
            *_keys("DATASETS", "PROPOSAL_FILES_TRAIN PRECOMPUTED_PROPOSAL_TOPK_TRAIN"),
            *_keys("DATASETS", "PROPOSAL_FILES_TEST PRECOMPUTED_PROPOSAL_TOPK_TEST"),
        ),
        _NO_PROPOSALS,
    ),
}

_DECODER, _BACKBONE = "MODEL.PSF.MASK_DECODER.NAME", "MODEL.BACKBONE.NAME"
_BASIC, _RESNET = "build_basic_resnet_backbone", "build_resnet_backbone"
_SWIN, _TIMM = "build_swin_backbone", "build_timm_backbone"
_CLIP, _SCHEDULE = "SOLVER.CLIP_GRADIENTS", "SOLVER.LR_SCHEDULER_NAME"
_TEST = "MODEL.PSF.TEST"

# Options, or groups of them, that some values of another option make useless.
_USELESS: list[tuple[list[str], str, tuple[Any, ...]]] = [
    (_keys("MODEL.PSF.MASK_DECODER", "DEC_LAYERS"), _DECODER, ("decoupled",)),
    (
        [
            *_keys("MODEL.PSF.MASK_DECODER", "THING_LAYERS STUFF_LAYERS MATCHING"),
            f"{_TEST}.THING_PAIRS",
        ],
        _DECODER,
        ("joint",),
    ),
    (_keys(_TEST, "BOUNDARY_PQ SAVE_PREDICTIONS"), f"{_TEST}.PANOPTIC_ON", (False,)),
    (["TEST.DETECTIONS_PER_IMAGE"], f"{_TEST}.INSTANCE_ON", (False,)),
    (["MODEL.SWIN"], _BACKBONE, (_BASIC, _RESNET, _TIMM)),
    (["MODEL.TIMM"], _BACKBONE, (_BASIC, _RESNET, _SWIN)),
    (["MODEL.FPN"], _BACKBONE, (_BASIC, _RESNET, _SWIN, _TIMM)),
    (
        _keys("MODEL.RESNETS", "STEM_OUT_CHANNELS NUM_GROUPS WIDTH_PER_GROUP RES5_DILATION"),
        _BACKBONE,
        (_BASIC, _SWIN, _TIMM),
    ),
    (
        _keys("INPUT", "IMAGE_SIZE MIN_SCALE MAX_SCALE"),
        "INPUT.AUGMENTATION",
        ("multi_scale", "fixed_crop"),
    ),
    (["SOLVER.NUM_DECAYS"], _SCHEDULE, ("WarmupMultiStepLR", "WarmupCosineLR")),
    (["SOLVER.BASE_LR_END"], _SCHEDULE, ("WarmupMultiStepLR",)),
    (_keys(_CLIP, "CLIP_TYPE CLIP_VALUE NORM_TYPE"), f"{_CLIP}.ENABLED", (False,)),
    (["TEST.PRECISE_BN.NUM_ITER"], "TEST.PRECISE_BN.ENABLED", (False,)),
]

# Values of options that Detectron2 takes as they come.
_CHOICES: dict[str, tuple[Any, ...]] = {
    "MODEL.RESNETS.DEPTH": (18, 34, 50, 101, 152),
    "INPUT.FORMAT": ("RGB", "BGR"),
    "INPUT.MASK_FORMAT": ("bitmask",),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.CROP.TYPE": ("relative_range", "relative", "absolute", "absolute_range"),
    _SCHEDULE: ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"),
    "SOLVER.WARMUP_METHOD": ("linear", "constant"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm", "full_model"),
}

_POSITIVE = (
    *_keys("SOLVER", "BASE_LR GAMMA MAX_ITER IMS_PER_BATCH CHECKPOINT_PERIOD ACCUMULATE_STEPS"),
    *_keys(_CLIP, "CLIP_VALUE NORM_TYPE"),
    *_keys("TEST", "DETECTIONS_PER_IMAGE PRECISE_BN.NUM_ITER"),
    "INPUT.MIN_SCALE",
    *_keys("MODEL.PSF", "HIDDEN_DIM NHEADS NUM_POINTS DIM_FEEDFORWARD MASK_LOSS_SCALE"),
    *_keys("MODEL.PSF", "LOCATION_DECODER.DEC_LAYERS TEST.THING_PAIRS MASK_POINTS.NUM_POINTS"),
    "MODEL.PSF.LOCATION_DECODER.ONE_TO_MANY.REPEATS",
    *_keys("MODEL.PSF.MASK_DECODER", "DEC_LAYERS THING_LAYERS STUFF_LAYERS"),
)
_NOT_NEGATIVE = (
    *_keys("SOLVER", "BASE_LR_END WARMUP_FACTOR WARMUP_ITERS WEIGHT_DECAY WEIGHT_DECAY_NORM"),
    *_keys("SOLVER", "REFERENCE_BATCH_SIZE REFERENCE_WORLD_SIZE"),
    *_keys("SOLVER", "BACKBONE_MULTIPLIER SAMPLING_MULTIPLIER"),
    *("TEST.EVAL_PERIOD", "DATALOADER.NUM_WORKERS", "INPUT.MIN_SIZE_TEST"),
    "MODEL.BACKBONE.FREEZE_AT",
    *_keys("MODEL.PSF", "ENC_LAYERS NUM_OBJECT_QUERIES MASK_DECODER.MATCHING.NUM_POINTS"),
    *_keys("MODEL.PSF", "CLASS_WEIGHT STUFF_CLASS_WEIGHT L1_WEIGHT GIOU_WEIGHT DICE_WEIGHT"),
    *_keys("MODEL.PSF", "THINGS_WEIGHT STUFF_WEIGHT TEST.CLASS_EXPONENT TEST.MASK_EXPONENT"),
    *_keys(
        "MODEL.PSF.LOCATION_DECODER", "DENOISING.GROUPS DENOISING.BOX_NOISE ONE_TO_MANY.QUERIES"
    ),
    "MODEL.PSF.MASK_POINTS.WEIGHT",
)
_FRACTIONS = (
    *_keys("MODEL.PSF", "DROPOUT LOCATION_DECODER.DENOISING.LABEL_NOISE"),
    *_keys(_TEST, "SCORE_THRESHOLD THING_KEEP_FRACTION STUFF_KEEP_FRACTION"),
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


def _require(cfg: CfgNode, key: str, fits: bool, needed: str) -> None:
    if not fits:
        raise ValueError(f"{key} is {get_value(cfg, key)}; it must be {needed}")


def _check_numbers(cfg: CfgNode) -> None:
    for key in _POSITIVE:  # NaN is neither > 0 nor >= 0
        _require(cfg, key, get_value(cfg, key) > 0, "more than 0")
    for key in _NOT_NEGATIVE:
        _require(cfg, key, get_value(cfg, key) >= 0, "0 or more")
    for key in _FRACTIONS:
        _require(cfg, key, 0 <= get_value(cfg, key) <= 1, "in 0..1")
    least, most = cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE
    _require(cfg, "INPUT.MIN_SCALE", least <= most, f"at most INPUT.MAX_SCALE, {most}")
    _require(cfg, "SEED", cfg.SEED <= _MOST_SEED, f"at most {_MOST_SEED}")
    decay = "0 (no average) or between 0 and 1, such as 0.9998"
    _require(cfg, "SOLVER.EMA_DECAY", 0 <= cfg.SOLVER.EMA_DECAY < 1, decay)


def _check_lists(cfg: CfgNode) -> None:
    """The options that are several numbers."""
    key, sizes = "INPUT.MIN_SIZE_TRAIN", cfg.INPUT.MIN_SIZE_TRAIN
    sizes = (sizes,) if isinstance(sizes, int) else sizes
    _require(cfg, key, bool(sizes) and min(sizes) >= 1, "one or more sizes in pixels")
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range":
        needed = "the least and the largest size with MIN_SIZE_TRAIN_SAMPLING 'range'"
        _require(cfg, key, len(sizes) == 2, needed)
    steps = list(cfg.SOLVER.STEPS)
    rising = all(type(step) is int for step in steps) and steps == sorted(set(steps))
    _require(cfg, "SOLVER.STEPS", rising, "rising iterations")
    mean, std = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
    _require(cfg, "MODEL.PIXEL_MEAN", len(mean) == 3, "three numbers")
    _require(cfg, "MODEL.PIXEL_STD", len(std) == 3 and min(std) > 0, "three numbers above 0")


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
        ValueError: the processes cannot share a batch.
    """
    solver = cfg.SOLVER
    check_options(cfg)
    _require(
        cfg,
        "SOLVER.IMS_PER_BATCH",
        solver.IMS_PER_BATCH % (num_processes * solver.ACCUMULATE_STEPS) == 0,
        f"a multiple of the {num_processes} processes times SOLVER.ACCUMULATE_STEPS, "
        f"{solver.ACCUMULATE_STEPS}",
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
