"""From a config to the parts of the model; with the meta-architecture's ``from_config``, the only
code of ``psf.modeling`` that reads ``cfg``."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, ResNet, build_backbone
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from psf.data.class_map import ClassMap
from psf.data.coco_panoptic import register_listed
from psf.modeling.candidates import Candidates, best_class_of_each_query, best_thing_pairs
from psf.modeling.criterion import CriterionOptions, LossWeights, SetCriterion
from psf.modeling.denoising import DenoisingOptions
from psf.modeling.encoder import EncoderLayer, InputProjection, TransformerEncoder
from psf.modeling.location_decoder import LocationDecoder, LocationDecoderLayer, QueryOptions
from psf.modeling.mask_decoder import JointMaskDecoder, MaskDecoderLayer
from psf.modeling.matcher import MaskMatchingWeights, MatchingWeights
from psf.modeling.postprocessing import MERGING, MergingRules, Segments
from psf.modeling.recomputation import recompute
from psf.modeling.release_decoder import DecoupledMaskDecoder
from psf.modeling.runtime import Runtime
from psf.precision import require_device, usable_precision

MOST_LEVELS = 4  # the coarsest of stride 64

MaskDecoder = JointMaskDecoder | DecoupledMaskDecoder

TRANSFORMER_LAYERS = (EncoderLayer, LocationDecoderLayer, MaskDecoderLayer)


class InferenceOptions(NamedTuple):
    """The outputs at inference, and how they are made."""

    panoptic_on: bool
    instance_on: bool
    semantic_on: bool
    mask_decoder_layers: int | None  # None: all
    find_candidates: Callable[[Tensor, Tensor], Candidates]  # of thing and stuff scores
    merge: Callable[..., Segments]
    rules: MergingRules
    max_instances: int  # most instances returned for an image


def model_dataset(cfg: CfgNode) -> str:
    """The data set that numbers the model's classes: the first for training, else for testing."""
    names: tuple[str, ...] = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    if not names:
        raise ValueError("DATASETS.TRAIN and DATASETS.TEST are empty. Name a data set.")
    return names[0]


def build_parts(cfg: CfgNode) -> dict[str, Any]:
    """The arguments of :class:`~.panoptic_segformer.PanopticSegFormer`."""
    require_device(cfg.MODEL.DEVICE)
    register_listed(cfg.DATASETS.REGISTER)
    dataset_name = model_dataset(cfg)
    metadata = MetadataCatalog.get(dataset_name)
    class_map = ClassMap.from_metadata(metadata)
    psf = _with_class_counts(cfg.MODEL.PSF, class_map, dataset_name)
    backbone = _build_backbone(cfg)
    shapes = backbone.output_shape()
    transformer: dict[str, Any] = {
        "dim": psf.HIDDEN_DIM,
        "num_heads": psf.NHEADS,
        "feedforward_dim": psf.DIM_FEEDFORWARD,
    }
    deformable: dict[str, Any] = {
        "num_levels": psf.NUM_FEATURE_LEVELS,
        "num_points": psf.NUM_POINTS,
        "dropout": psf.DROPOUT,
    }
    in_channels = [shapes[name].channels for name in psf.IN_FEATURES]
    input_proj = InputProjection(in_channels, psf.HIDDEN_DIM, psf.NUM_FEATURE_LEVELS)
    encoder = TransformerEncoder(num_layers=psf.ENC_LAYERS, **transformer, **deformable)
    location_decoder = LocationDecoder(
        num_classes=psf.NUM_THING_CLASSES,
        num_queries=psf.NUM_OBJECT_QUERIES,
        num_layers=psf.LOCATION_DECODER.DEC_LAYERS,
        options=QueryOptions(
            selection=psf.LOCATION_DECODER.QUERY_SELECTION,
            denoising=psf.LOCATION_DECODER.DENOISING.GROUPS > 0,
            num_one_to_many=psf.LOCATION_DECODER.ONE_TO_MANY.QUERIES,
        ),
        **transformer,
        **deformable,
    )
    parts: dict[str, Any] = {
        "backbone": backbone,
        "input_proj": input_proj,
        "encoder": encoder,
        "location_decoder": location_decoder,
        "mask_decoder": _build_mask_decoder(psf, transformer),
    }
    _recompute_parts(psf.CHECKPOINT, parts)
    return {
        **parts,
        "criterion": _build_criterion(psf, parts["mask_decoder"]),
        "denoising": _denoising_options(psf.LOCATION_DECODER.DENOISING),
        "class_map": class_map,
        "in_features": psf.IN_FEATURES,
        "pixel_mean": cfg.MODEL.PIXEL_MEAN,
        "pixel_std": cfg.MODEL.PIXEL_STD,
        "runtime": Runtime(
            precision=usable_precision(
                psf.TEST.PRECISION, cfg.MODEL.DEVICE, "MODEL.PSF.TEST.PRECISION"
            ),
            compile=psf.TEST.COMPILE,
            pad_to=psf.TEST.PAD_TO,
        ),
        "inference_options": _inference_options(cfg, parts["mask_decoder"]),
    }


def _build_backbone(cfg: CfgNode) -> Backbone:
    """Detectron2's; raises ValueError unless it has the maps that the model takes."""
    name, psf = cfg.MODEL.BACKBONE.NAME, cfg.MODEL.PSF
    if name not in BACKBONE_REGISTRY:
        known = sorted(key for key, _ in BACKBONE_REGISTRY)
        raise ValueError(f"MODEL.BACKBONE.NAME is '{name}'; known: {known}")
    backbone = build_backbone(cfg)
    shapes = backbone.output_shape()
    missing = [key for key in psf.IN_FEATURES if key not in shapes]
    if missing:
        raise ValueError(
            f"MODEL.PSF.IN_FEATURES has {missing}, but the backbone '{name}' returns "
            f"{list(shapes)}. Name maps of the backbone (MODEL.RESNETS.OUT_FEATURES)"
        )
    strides = [shapes[key].stride for key in psf.IN_FEATURES]
    if not strides or strides != sorted(strides):
        raise ValueError(
            f"MODEL.PSF.IN_FEATURES is {psf.IN_FEATURES} of strides {strides}; it must name maps "
            "from fine to coarse"
        )
    if not len(strides) <= psf.NUM_FEATURE_LEVELS <= MOST_LEVELS:
        raise ValueError(
            f"MODEL.PSF.NUM_FEATURE_LEVELS is {psf.NUM_FEATURE_LEVELS}; it must be in "
            f"{len(strides)}..{MOST_LEVELS}, as MODEL.PSF.IN_FEATURES has {len(strides)}"
        )
    if psf.TEST.PAD_TO and strides != [8 * 2**level for level in range(len(strides))]:
        raise ValueError(
            f"MODEL.PSF.TEST.PAD_TO needs maps of strides 8, 16, 32, but {psf.IN_FEATURES} have "
            f"{strides}. Set it to 0, or MODEL.RESNETS.RES5_DILATION to 1"
        )
    return backbone


def _build_mask_decoder(psf: CfgNode, transformer: dict[str, Any]) -> MaskDecoder:
    decoder = psf.MASK_DECODER
    common = {
        **transformer,
        "num_stuff_classes": psf.NUM_STUFF_CLASSES,
        "num_levels": len(psf.IN_FEATURES),
    }
    if decoder.NAME == "joint":
        return JointMaskDecoder(
            num_thing_classes=psf.NUM_THING_CLASSES, num_layers=decoder.DEC_LAYERS, **common
        )
    if decoder.NAME == "decoupled":
        return DecoupledMaskDecoder(
            num_thing_layers=decoder.THING_LAYERS, num_stuff_layers=decoder.STUFF_LAYERS, **common
        )
    raise ValueError(
        f"MODEL.PSF.MASK_DECODER.NAME is '{decoder.NAME}'; known: ['decoupled', 'joint']"
    )


def _build_criterion(psf: CfgNode, mask_decoder: MaskDecoder) -> SetCriterion:
    mask_matching = None
    if psf.MASK_POINTS.WEIGHT and isinstance(mask_decoder, DecoupledMaskDecoder):
        raise ValueError(
            f"MODEL.PSF.MASK_POINTS.WEIGHT is {psf.MASK_POINTS.WEIGHT}, but the masks of "
            "MODEL.PSF.MASK_DECODER.NAME 'decoupled' are no probabilities. Set the weight to 0, or "
            "use 'joint'."
        )
    if isinstance(mask_decoder, DecoupledMaskDecoder):
        matching = psf.MASK_DECODER.MATCHING
        mask_matching = MaskMatchingWeights(
            MatchingWeights(matching.CLASS_WEIGHT, matching.L1_WEIGHT, matching.GIOU_WEIGHT),
            matching.DICE_WEIGHT,
            matching.NUM_POINTS,
        )
    return SetCriterion(
        matching_weights=MatchingWeights(psf.CLASS_WEIGHT, psf.L1_WEIGHT, psf.GIOU_WEIGHT),
        mask_matching=mask_matching,
        loss_weights=LossWeights(
            class_weight=psf.CLASS_WEIGHT,
            stuff_class_weight=psf.STUFF_CLASS_WEIGHT,
            l1_weight=psf.L1_WEIGHT,
            giou_weight=psf.GIOU_WEIGHT,
            mask_weight=psf.DICE_WEIGHT,
            things_weight=psf.THINGS_WEIGHT,
            stuff_weight=psf.STUFF_WEIGHT,
            point_weight=psf.MASK_POINTS.WEIGHT,
        ),
        mask_loss_scale=psf.MASK_LOSS_SCALE,
        mask_activation=mask_decoder.mask_activation,
        options=CriterionOptions(
            quality_scores=psf.QUALITY_SCORES,
            num_points=psf.MASK_POINTS.NUM_POINTS,
            one_to_many_repeats=psf.LOCATION_DECODER.ONE_TO_MANY.REPEATS,
        ),
    )


def _denoising_options(denoising: CfgNode) -> DenoisingOptions | None:
    if not denoising.GROUPS:
        return None
    return DenoisingOptions(
        num_groups=denoising.GROUPS,
        label_noise=denoising.LABEL_NOISE,
        box_noise=denoising.BOX_NOISE,
        contrastive=denoising.CONTRASTIVE,
    )


def _inference_options(cfg: CfgNode, mask_decoder: MaskDecoder) -> InferenceOptions:
    test = cfg.MODEL.PSF.TEST
    if test.MERGING not in MERGING:
        raise ValueError(f"MODEL.PSF.TEST.MERGING is '{test.MERGING}'; known: {sorted(MERGING)}")
    layers = mask_decoder.num_layers
    if not 0 <= test.MASK_DECODER_LAYERS <= layers:
        raise ValueError(
            f"MODEL.PSF.TEST.MASK_DECODER_LAYERS is {test.MASK_DECODER_LAYERS}, but the mask "
            f"decoder has {layers} layers; use 1 to {layers}, or 0 for all"
        )
    released = isinstance(mask_decoder, DecoupledMaskDecoder)
    find_pairs = partial(best_thing_pairs, num_pairs=test.THING_PAIRS)
    return InferenceOptions(
        panoptic_on=test.PANOPTIC_ON,
        instance_on=test.INSTANCE_ON,
        semantic_on=test.SEMANTIC_ON,
        mask_decoder_layers=test.MASK_DECODER_LAYERS or None,
        find_candidates=find_pairs if released else best_class_of_each_query,
        merge=MERGING[test.MERGING],
        rules=MergingRules(
            class_exponent=test.CLASS_EXPONENT,
            mask_exponent=test.MASK_EXPONENT,
            score_threshold=test.SCORE_THRESHOLD,
            thing_keep_fraction=test.THING_KEEP_FRACTION,
            stuff_keep_fraction=test.STUFF_KEEP_FRACTION,
            area_offset=1 if released else 0,
        ),
        max_instances=cfg.TEST.DETECTIONS_PER_IMAGE,
    )


def _with_class_counts(psf: CfgNode, class_map: ClassMap, dataset_name: str) -> CfgNode:
    """A copy with the data set's numbers of classes."""
    configured = (psf.NUM_THING_CLASSES, psf.NUM_STUFF_CLASSES)
    actual = (len(class_map.thing_ids), len(class_map.stuff_ids))
    if any(c not in (0, a) for c, a in zip(configured, actual, strict=True)):
        raise ValueError(
            f"The config says {configured[0]} thing and {configured[1]} stuff classes "
            f"(MODEL.PSF.NUM_THING_CLASSES, MODEL.PSF.NUM_STUFF_CLASSES), but data set "
            f"'{dataset_name}' has {actual[0]} and {actual[1]}. Set both to 0, "
            "which takes the data set's numbers."
        )
    filled = psf.clone()
    filled.defrost()
    filled.NUM_THING_CLASSES, filled.NUM_STUFF_CLASSES = actual
    return filled


def _recompute_parts(names: list[str], parts: dict[str, nn.Module]) -> None:
    """Turn on activation checkpointing for the parts in ``MODEL.PSF.CHECKPOINT``."""
    known = ["backbone", "encoder", "location_decoder", "mask_decoder"]
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"MODEL.PSF.CHECKPOINT has {unknown}; known parts: {known}")
    for name in names:
        if name == "backbone":
            recompute(_residual_blocks(parts[name]))
        else:
            recompute(m for m in parts[name].modules() if isinstance(m, TRANSFORMER_LAYERS))


def _residual_blocks(backbone: Backbone) -> list[nn.Module]:
    """
    The residual blocks of one of Detectron2's ResNets.

    Raises:
        ValueError: the backbone is another, which has a key of its own, or updates statistics,
            which a second run would update twice.
    """
    if not isinstance(backbone, ResNet):
        raise ValueError(
            f"MODEL.PSF.CHECKPOINT names the backbone, but {type(backbone).__name__} is not one of "
            "Detectron2's ResNets. Use MODEL.SWIN.USE_CHECKPOINT or MODEL.TIMM.USE_CHECKPOINT."
        )
    if any(isinstance(module, _BatchNorm) for module in backbone.modules()):
        raise ValueError(
            "MODEL.PSF.CHECKPOINT names the backbone, whose batch normalisations would count every "
            "image twice. Set MODEL.RESNETS.NORM to FrozenBN or GN, or leave the backbone out."
        )
    return [block for stage in backbone.stages for block in stage]
