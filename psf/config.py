"""Every configuration key of the project, with its source, and the function that loads configs."""

import contextlib
import difflib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg
from detectron2.utils.file_io import PathManager

from psf.options import check_options, values_by_key, warn_of_options

_MOST_VALUES = 100_000  # of a file; a few aliases can stand for more than fits into memory


def load_config(path: str | Path = "", opts: Sequence[Any] = ()) -> CN:
    """
    Make Detectron2's config with this project's keys, then merge a file and KEY VALUE pairs.

    Args:
        path: a file, or the name of a config that comes with the project, such as
            ``coco/panoptic_segformer_R50_24ep.yaml`` (with or without ``configs/`` in front).
            Empty: no file.
        opts: keys and values in turn, as on a command line.

    Raises:
        FileNotFoundError: there is no such config.
        ValueError: a key or a value is wrong; the message says which and in which file.
    """
    cfg = get_cfg()
    add_psf_config(cfg)
    pristine = cfg.clone()
    defaults = values_by_key(cfg)
    sources = ["KEY VALUE pairs"] if opts or not path else []
    if path:
        file = find_config(path)
        sources.insert(0, f"'{file}'")
        with _explain(cfg, sources[0]):
            _check_yaml(str(file))
            cfg.merge_from_file(str(file), allow_unsafe=False)
    with _explain(cfg, "KEY VALUE pairs"):
        cfg.merge_from_list(list(opts))
    with _explain(cfg, " and ".join(sources)):
        for key, value in values_by_key(cfg).items():
            if value is None and defaults.get(key) is not None:
                raise ValueError(f"{key} is null; the default is {defaults[key]!r}")
        check_options(cfg)
    warn_of_options(cfg, pristine)
    cfg.OUTPUT_DIR = os.path.expanduser(cfg.OUTPUT_DIR)
    cfg.MODEL.WEIGHTS = os.path.expanduser(cfg.MODEL.WEIGHTS)
    cfg.DATASETS.REGISTER = [_expand(entry) for entry in cfg.DATASETS.REGISTER]
    return cfg


def user_path(path: str | Path) -> Path:
    """A path that a user wrote; ``~`` is the home folder, also where no shell has expanded it."""
    return Path(path).expanduser()


def _expand(entry: Any) -> Any:
    """The paths of a data set; what is no list of texts is refused where it is registered."""
    if not isinstance(entry, list | tuple):
        return entry
    return [os.path.expanduser(part) if isinstance(part, str) else part for part in entry]


def _check_yaml(path: str, above: tuple[str, ...] = ()) -> None:
    """
    Check a file and those that it names as ``_BASE_``.

    Raises:
        ValueError: a file holds no keys, or is its own base.
        yaml.YAMLError: bad syntax, or a tag such as ``!!python/...``, which could run code.
    """
    if path in above:
        raise ValueError(f"'{path}' is its own _BASE_")
    with PathManager.open(path, "r") as file:
        content = yaml.safe_load(file)
    if sum(1 for _ in itertools.islice(_parts(content), _MOST_VALUES)) == _MOST_VALUES:
        raise ValueError(f"'{path}' holds {_MOST_VALUES} values or more, counting aliases (*)")
    bases = content.get("_BASE_", []) if isinstance(content, dict) else None
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ValueError(f"'{path}' holds no keys, or its _BASE_ is not the path of a file")
    for base in map(os.path.expanduser, bases):
        # As fvcore: a path is relative to the file that names it.
        is_url = base.startswith(("https://", "http://"))
        _check_yaml(base if is_url else os.path.join(os.path.dirname(path), base), (*above, path))


def _parts(value: Any) -> Iterator[Any]:
    """A value of YAML and those in it, as often as they are there."""
    yield value
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _parts(part)


def find_config(path: str | Path) -> Path:
    """
    Find a file, or a config that comes with the project.

    Raises:
        FileNotFoundError: it is neither.
    """
    path = user_path(path)
    if path.is_file():
        return path
    installed = Path(__file__).parent / "configs"
    folder = installed if installed.is_dir() else installed.parent.parent / "configs"
    parts = path.parts[1:] if path.parts[:1] == ("configs",) else path.parts
    if folder.joinpath(*parts).is_file():
        return folder.joinpath(*parts)
    raise FileNotFoundError(
        f"There is no config '{path}': neither that file nor '{folder.joinpath(*parts)}' exists"
    )


# What wrong files and values raise, besides errors of YAML.
_CAUSES = (
    *(AssertionError, AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError),
)


@contextlib.contextmanager
def _explain(cfg: CN, source: str) -> Iterator[None]:
    """Turn what yacs and YAML raise into one line that names the source of the error."""
    try:
        yield
    except _CAUSES as error:
        message = " ".join(str(error).strip("'\"").split())
        hint = ""
        if message.startswith("Non-existent"):
            close = difflib.get_close_matches(message.rpartition(": ")[2], values_by_key(cfg), n=1)
            hint = f". Did you mean {close[0]}?" if close else ""
        raise ValueError(f"Config error in {source}: {message}{hint}") from error
    except yaml.YAMLError as error:
        message = " ".join(str(error).split())
        if isinstance(error, yaml.constructor.ConstructorError):
            message += ". Tags could run code: write the value itself"
        raise ValueError(f"Config error in {source}: {message}") from error


def add_psf_config(cfg: CN) -> None:
    """Add the keys of Panoptic SegFormer, with the paper's values, to a Detectron2 config."""
    _add_model(cfg)
    _add_mask_decoder(cfg)
    _add_losses(cfg)
    _add_test(cfg)
    _add_data(cfg)
    _add_backbones(cfg)
    _add_solver(cfg)


def _add_model(cfg: CN) -> None:
    # Unlike Detectron2's default, "cuda" only where there is a GPU.
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    cfg.MODEL.META_ARCHITECTURE = "PanopticSegFormer"

    cfg.MODEL.PSF = CN()
    # Feature maps C3, C4, C5 of the backbone, fine to coarse (paper, section 3.1).
    cfg.MODEL.PSF.IN_FEATURES = ["res3", "res4", "res5"]
    # Feature levels: those of IN_FEATURES (paper), then coarser ones by convolutions of stride 2,
    # which the mask decoder does not use (Deformable DETR's key; official code: 4).
    cfg.MODEL.PSF.NUM_FEATURE_LEVELS = 3
    # Numbers of thing and stuff classes; 0: those of the data set. Other numbers must equal them.
    cfg.MODEL.PSF.NUM_THING_CLASSES = 0
    cfg.MODEL.PSF.NUM_STUFF_CLASSES = 0
    # For a checkpoint that does not name its classes: a data set with these classes. In training,
    # weights of classes with the same name are kept, others start from random values
    # (psf/finetuning.py).
    cfg.MODEL.PSF.WEIGHTS_DATASET = ""
    # Train from a checkpoint that lacks some weights; these start from random values.
    cfg.MODEL.PSF.ALLOW_PARTIAL_WEIGHTS = False
    # Channels of tokens and queries (paper, section 3.2).
    cfg.MODEL.PSF.HIDDEN_DIM = 256
    # Attention heads, and sampling points per head and level (Deformable DETR, section 5).
    cfg.MODEL.PSF.NHEADS = 8
    cfg.MODEL.PSF.NUM_POINTS = 4
    # Hidden channels of the feed-forward networks (official code).
    cfg.MODEL.PSF.DIM_FEEDFORWARD = 1024
    # Dropout of encoder and location decoder; the mask decoder has none (official code).
    cfg.MODEL.PSF.DROPOUT = 0.1
    # Layers of the transformer encoder (paper, section 4.2).
    cfg.MODEL.PSF.ENC_LAYERS = 6
    # Thing queries: at most this many things are found in an image (paper, section 3.3).
    cfg.MODEL.PSF.NUM_OBJECT_QUERIES = 300

    cfg.MODEL.PSF.LOCATION_DECODER = CN()
    cfg.MODEL.PSF.LOCATION_DECODER.DEC_LAYERS = 6  # paper, section 4.2
    # Ways of learning faster that the paper does not have; all are off by default.
    # Queries start at the encoder's best tokens (Deformable DETR's two stages, DINO's mixed query
    # selection).
    cfg.MODEL.PSF.LOCATION_DECODER.QUERY_SELECTION = False
    # Denoising queries (DN-DETR): every thing occurs in so many GROUPS; 0: none. LABEL_NOISE is the
    # probability of a random label, BOX_NOISE the largest shift of an edge in halves of the box's
    # side. CONTRASTIVE adds as many queries with more noise, to be rejected (DINO).
    cfg.MODEL.PSF.LOCATION_DECODER.DENOISING = CN()
    cfg.MODEL.PSF.LOCATION_DECODER.DENOISING.GROUPS = 0
    cfg.MODEL.PSF.LOCATION_DECODER.DENOISING.LABEL_NOISE = 0.25
    cfg.MODEL.PSF.LOCATION_DECODER.DENOISING.BOX_NOISE = 1.0
    cfg.MODEL.PSF.LOCATION_DECODER.DENOISING.CONTRASTIVE = True
    # Extra queries in training, REPEATS of them for every thing (H-DETR: 1500 and 6). 0: none.
    cfg.MODEL.PSF.LOCATION_DECODER.ONE_TO_MANY = CN()
    cfg.MODEL.PSF.LOCATION_DECODER.ONE_TO_MANY.QUERIES = 0
    cfg.MODEL.PSF.LOCATION_DECODER.ONE_TO_MANY.REPEATS = 6

    # Activation checkpointing of "backbone" (Detectron2's ResNets), "encoder", "location_decoder",
    # "mask_decoder": same losses and gradients, less memory, more time.
    cfg.MODEL.PSF.CHECKPOINT = []


def _add_mask_decoder(cfg: CN) -> None:
    cfg.MODEL.PSF.MASK_DECODER = CN()
    # "joint": thing and stuff queries go through the same layers (paper). "decoupled": separate
    # stacks, ReLU masks, thing classes from the location decoder (official code).
    cfg.MODEL.PSF.MASK_DECODER.NAME = "joint"
    cfg.MODEL.PSF.MASK_DECODER.DEC_LAYERS = 6  # of "joint" (paper, section 4.2)
    # The two stacks of "decoupled" (official code).
    cfg.MODEL.PSF.MASK_DECODER.THING_LAYERS = 4
    cfg.MODEL.PSF.MASK_DECODER.STUFF_LAYERS = 6
    # Costs of the second matching of "decoupled", which also compares masks (official code: class
    # weight 2, doubled when the head is built).
    cfg.MODEL.PSF.MASK_DECODER.MATCHING = CN()
    cfg.MODEL.PSF.MASK_DECODER.MATCHING.CLASS_WEIGHT = 4.0
    cfg.MODEL.PSF.MASK_DECODER.MATCHING.L1_WEIGHT = 5.0
    cfg.MODEL.PSF.MASK_DECODER.MATCHING.GIOU_WEIGHT = 2.0
    cfg.MODEL.PSF.MASK_DECODER.MATCHING.DICE_WEIGHT = 2.0
    # Random points at which that matching compares masks (Mask2Former, section 3.3: 12544); 0: all
    # pixels.
    cfg.MODEL.PSF.MASK_DECODER.MATCHING.NUM_POINTS = 0


def _add_losses(cfg: CN) -> None:
    # Losses: focal, L1, GIoU as Deformable DETR; Dice as the official code.
    cfg.MODEL.PSF.CLASS_WEIGHT = 2.0
    cfg.MODEL.PSF.STUFF_CLASS_WEIGHT = 2.0  # official code: 4
    cfg.MODEL.PSF.L1_WEIGHT = 5.0
    cfg.MODEL.PSF.GIOU_WEIGHT = 2.0
    cfg.MODEL.PSF.DICE_WEIGHT = 2.0
    # Masks are upsampled by this factor before the Dice loss (official code: 2, to stride 4).
    cfg.MODEL.PSF.MASK_LOSS_SCALE = 2
    # Class scores learn the quality of the box or mask (generalised focal loss, IoU or Dice).
    cfg.MODEL.PSF.QUALITY_SCORES = False
    # Weight of binary cross-entropy of masks at random points beside the Dice loss, and the number
    # of points (Mask2Former, section 3.3: 5 and 12544). "joint" only.
    cfg.MODEL.PSF.MASK_POINTS = CN()
    cfg.MODEL.PSF.MASK_POINTS.WEIGHT = 0.0
    cfg.MODEL.PSF.MASK_POINTS.NUM_POINTS = 12544
    # lambda_things and lambda_stuff (paper, equation 1), besides the weighting by counts.
    cfg.MODEL.PSF.THINGS_WEIGHT = 1.0
    cfg.MODEL.PSF.STUFF_WEIGHT = 1.0


def _add_test(cfg: CN) -> None:
    cfg.MODEL.PSF.TEST = CN()
    # Outputs.
    cfg.MODEL.PSF.TEST.PANOPTIC_ON = True
    cfg.MODEL.PSF.TEST.INSTANCE_ON = False
    cfg.MODEL.PSF.TEST.SEMANTIC_ON = False
    # Also evaluate Boundary PQ (Boundary IoU, arXiv 2103.16562).
    cfg.MODEL.PSF.TEST.BOUNDARY_PQ = False
    # Also write predictions.json and PNGs, in the format of COCO's server.
    cfg.MODEL.PSF.TEST.SAVE_PREDICTIONS = False
    # Mask-decoder layers used at inference; 0: all. Two are nearly as good (paper, table 6).
    cfg.MODEL.PSF.TEST.MASK_DECODER_LAYERS = 0
    # Autocast to "bfloat16" or "float16" (GPU); "float32": none.
    cfg.MODEL.PSF.TEST.PRECISION = "float32"
    # Compile the transformer, from feature maps to queries (torch.compile).
    cfg.MODEL.PSF.TEST.COMPILE = False
    # Pad feature maps as if image sides were multiples of this many pixels (64, 128, ...), so that
    # the compiled transformer sees few sizes; on a GPU it then runs as CUDA graphs. 0: no padding.
    cfg.MODEL.PSF.TEST.PAD_TO = 0
    # Best (query, class) pairs of things that "decoupled" considers (official code).
    cfg.MODEL.PSF.TEST.THING_PAIRS = 100
    # "mask_wise" (paper, algorithm 1) or "pixel_wise", its ablation.
    cfg.MODEL.PSF.TEST.MERGING = "mask_wise"
    # Exponents of class probability and mean mask value in a segment's score (official code).
    cfg.MODEL.PSF.TEST.CLASS_EXPONENT = 1.0
    cfg.MODEL.PSF.TEST.MASK_EXPONENT = 2.0
    # Minimum score of a segment (t_cnf; official code: 0.25 for ResNet, 0.3 for PVTv2 and Swin).
    cfg.MODEL.PSF.TEST.SCORE_THRESHOLD = 0.25
    # Minimum fraction of a mask that no better segment covers (t_keep; official code: overlaps up
    # to 0.4 and 0.2).
    cfg.MODEL.PSF.TEST.THING_KEEP_FRACTION = 0.6
    cfg.MODEL.PSF.TEST.STUFF_KEEP_FRACTION = 0.8


def _add_data(cfg: CN) -> None:
    # Data sets to register: lists [name, images, PNGs, JSON], optionally with the instances JSON.
    cfg.DATASETS.REGISTER = []

    # Masks are always bitmasks.
    cfg.INPUT.MASK_FORMAT = "bitmask"
    # Augmentation in training: "multi_scale" (DETR, with its crop if INPUT.CROP.ENABLED),
    # "large_scale_jitter" (Ghiasi et al., 2021) or "fixed_crop" (to INPUT.CROP.SIZE).
    cfg.INPUT.AUGMENTATION = "multi_scale"
    # Large-scale jitter: side of the square and range of scales (Mask2Former's keys and values).
    cfg.INPUT.IMAGE_SIZE = 1024
    cfg.INPUT.MIN_SCALE = 0.1
    cfg.INPUT.MAX_SCALE = 2.0
    # SSD's photometric distortion (Mask2Former's key).
    cfg.INPUT.COLOR_AUG_SSD = False
    # The library that resizes images and targets: "pillow" (as Detectron2) or "opencv" (as the
    # official code, whose weights were trained on its pixels).
    cfg.INPUT.RESIZE_LIBRARY = "pillow"


def _add_backbones(cfg: CN) -> None:
    # Swin (MODEL.BACKBONE.NAME: build_swin_backbone), Mask2Former's keys, with the values of Swin-T
    # (Swin paper, section 3.3). DROP_PATH_RATE is that of the last block.
    cfg.MODEL.SWIN = CN()
    cfg.MODEL.SWIN.EMBED_DIM = 96
    cfg.MODEL.SWIN.DEPTHS = [2, 2, 6, 2]
    cfg.MODEL.SWIN.NUM_HEADS = [3, 6, 12, 24]
    cfg.MODEL.SWIN.WINDOW_SIZE = 7
    cfg.MODEL.SWIN.DROP_PATH_RATE = 0.3  # official code
    # Activation checkpointing.
    cfg.MODEL.SWIN.USE_CHECKPOINT = False

    # Any timm network with maps of strides 8, 16, 32 (MODEL.BACKBONE.NAME: build_timm_backbone).
    cfg.MODEL.TIMM = CN()
    cfg.MODEL.TIMM.NAME = "pvt_v2_b2"
    # Download timm's weights if MODEL.WEIGHTS is empty.
    cfg.MODEL.TIMM.PRETRAINED = False
    cfg.MODEL.TIMM.DROP_PATH_RATE = 0.1  # of the last block (official code, for PVTv2)
    cfg.MODEL.TIMM.USE_CHECKPOINT = False
    # Keep statistics and weights of batch normalization, as Detectron2's FrozenBN does.
    cfg.MODEL.TIMM.FREEZE_BATCH_NORM = True


def _add_solver(cfg: CN) -> None:
    # AdamW is the only optimizer. Detectron2's other SOLVER keys keep their meaning, and
    # CLIP_GRADIENTS.CLIP_TYPE also takes Mask2Former's "full_model".
    # Factors of the learning rate for the backbone, and for the layers that predict sampling
    # locations (Deformable DETR, section A.4).
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1
    cfg.SOLVER.SAMPLING_MULTIPLIER = 0.1
    # The batch size that learning rate and schedule are written for. If IMS_PER_BATCH is k times as
    # large, the learning rate is multiplied by k and iterations and steps are divided by k. 0: no
    # scaling. Unlike Detectron2's REFERENCE_WORLD_SIZE it does not change the batch size.
    cfg.SOLVER.REFERENCE_BATCH_SIZE = 0
    # Gradient accumulation: split each batch of IMS_PER_BATCH images into this many parts.
    cfg.SOLVER.ACCUMULATE_STEPS = 1
    # Average the weights over the iterations (exponential moving average, as RT-DETR does), for
    # evaluation and checkpoints; 0: no average. 0.9998 averages over about 5000 iterations. The
    # decay grows to this value as in TensorFlow: min(EMA_DECAY, (1 + i) / (10 + i)). Scaled with
    # REFERENCE_BATCH_SIZE.
    cfg.SOLVER.EMA_DECAY = 0.0
    # Compile the layers with torch.compile in training (docs/training_performance.md). Needs a C++
    # compiler on a CPU, Triton on a GPU.
    cfg.SOLVER.COMPILE = False
