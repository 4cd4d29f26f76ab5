"""The meta-architecture: Panoptic SegFormer (arXiv 2109.03814) between Detectron2's interfaces.

Shapes: N images, L levels, C channels, K thing and T stuff classes, Q thing queries, R candidate
segments of one image.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, ResNet, build_backbone
from detectron2.structures import BitMasks, Boxes, ImageList, Instances
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from psf.data.class_map import ClassMap
from psf.data.coco_panoptic import register_listed
from psf.layers.boxes import masks_to_boxes, xyxy_to_cxcywh
from psf.modeling.criterion import Criterion, LossWeights, Targets, mask_queries, normaliser
from psf.modeling.location_decoder import LocationDecoder
from psf.modeling.mask_decoder import (
    ClassPredictions,
    DecoupledMaskDecoder,
    JointMaskDecoder,
    MaskDecoder,
    MaskDecoderLayer,
    MaskQueries,
)
from psf.modeling.matcher import MaskMatchingWeights, MatchingWeights
from psf.modeling.pixel_encoder import InputProjection, Memory, PixelEncoder, Shape
from psf.modeling.postprocessing import (
    Candidates,
    MergingRules,
    Segments,
    SoftMasks,
    best_class_of_each_query,
    best_thing_pairs,
    merge_mask_wise,
    merge_pixel_wise,
    resize_maps,
    segment_scores,
)
from psf.modeling.recomputation import recompute

logger = logging.getLogger(__name__)

# Images with a shorter side are padded to it, twice the coarsest stride: with a single cell,
# normalisations such as GroupNorm may have a single value to normalise, which PyTorch refuses.
LEAST_SIDE = 64

# Of the finest feature level, and of the coarsest that a config can have (NUM_FEATURE_LEVELS 4).
FINEST_STRIDE, COARSEST_STRIDE = 8, 64

# Relative slack for sums of floats that are compared with a bound.
ROUNDING = 1e-4

MERGING = {"mask_wise": merge_mask_wise, "pixel_wise": merge_pixel_wise}


CandidateRule = Callable[[Tensor, Tensor], Candidates]  # of thing and stuff scores


class InferenceOptions(NamedTuple):
    """What is computed at inference, and how."""

    panoptic_on: bool
    instance_on: bool
    semantic_on: bool
    mask_decoder_layers: int | None  # None: all
    find_candidates: CandidateRule
    merging: str  # a key of MERGING
    rules: MergingRules
    max_instances: int  # most instances returned for an image
    precision: torch.dtype  # of the network's products; float32: no autocast
    compile: bool  # what lies between feature maps and masks
    pad_to: int  # image sizes, in pixels, are treated as the next multiple; 0: as they are


class ImagePrediction(NamedTuple):
    """What the network predicts for one image, with the masks that may matter."""

    thing_scores: Tensor  # (Q, K) in [0, 1]
    stuff_scores: Tensor  # (T,) in [0, 1]
    candidates: Candidates
    queries: Tensor  # (R',) int64 rising, those with a map; the stuff query of class i is Q + i
    maps: Tensor  # (R', h, w) at the finest level, unpadded
    activation: Callable[[Tensor], Tensor]  # turns maps, once resized, into soft masks >= 0


class ScoredMasks(NamedTuple):
    """The candidates of one image with masks of the output's size."""

    labels: Tensor  # (R,) int64 classes: things 0..K-1, stuff K..K+T-1
    masks: SoftMasks  # R of them
    scores: Tensor  # (R,) >= 0 segment scores


@META_ARCH_REGISTRY.register()
class PanopticSegFormer(nn.Module):
    """Backbone, transformer encoder, location decoder, mask decoder, mask-wise merging."""

    pixel_mean: Tensor  # (3, 1, 1)
    pixel_std: Tensor  # (3, 1, 1)

    @configurable
    def __init__(  # noqa: PLR0913  one argument a part of the model
        self,
        *,
        backbone: Backbone,
        input_proj: InputProjection,
        pixel_encoder: PixelEncoder,
        location_decoder: LocationDecoder,
        mask_decoder: MaskDecoder,
        criterion: Criterion,
        class_map: ClassMap,
        in_features: list[str],
        pixel_mean: list[float],
        pixel_std: list[float],
        inference_options: InferenceOptions,
    ) -> None:
        """
        Args:
            backbone: gives the maps named by ``in_features``.
            input_proj: of those maps to C channels.
            pixel_encoder: the transformer encoder.
            location_decoder: thing queries.
            mask_decoder: thing and stuff masks.
            criterion: targets and losses.
            class_map: the data set's contiguous ids of the model's classes.
            in_features: names of the backbone's maps, fine to coarse.
            pixel_mean: of each channel, in the image's units (0..255).
            pixel_std: likewise.
            inference_options: outputs, layers, merging.
        """
        super().__init__()
        self.backbone = backbone
        self.input_proj = input_proj
        self.pixel_encoder = pixel_encoder
        self.location_decoder = location_decoder
        self.mask_decoder = mask_decoder
        self.criterion = criterion
        self.class_map = class_map
        self.in_features = in_features
        self.inference_options = inference_options
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Build the arguments of ``__init__``; the only place here that knows ``cfg``."""
        register_listed(cfg.DATASETS.REGISTER)
        dataset_name = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)[0]
        class_map = ClassMap.from_metadata(MetadataCatalog.get(dataset_name))
        psf = _with_class_counts(cfg.MODEL.PSF, class_map, dataset_name)
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        common = {
            "dim": psf.HIDDEN_DIM,
            "num_heads": psf.NHEADS,
            "feedforward_dim": psf.DIM_FEEDFORWARD,
        }
        deformable = {
            "num_levels": psf.NUM_FEATURE_LEVELS,
            "num_points": psf.NUM_POINTS,
            "dropout": psf.DROPOUT,
        }
        input_proj = InputProjection(
            [shapes[name].channels for name in psf.IN_FEATURES],
            psf.HIDDEN_DIM,
            psf.NUM_FEATURE_LEVELS,
        )
        pixel_encoder = PixelEncoder(num_layers=psf.ENC_LAYERS, **common, **deformable)
        location_decoder = LocationDecoder(
            num_classes=psf.NUM_THING_CLASSES,
            num_queries=psf.NUM_OBJECT_QUERIES,
            num_layers=psf.LOCATION_DECODER.DEC_LAYERS,
            **common,
            **deformable,
        )
        design = _mask_design(psf, common)
        _recompute_parts(psf.CHECKPOINT, backbone, pixel_encoder, location_decoder, design.decoder)
        return {
            "backbone": backbone,
            "input_proj": input_proj,
            "pixel_encoder": pixel_encoder,
            "location_decoder": location_decoder,
            "mask_decoder": design.decoder,
            "criterion": Criterion(
                matching_weights=MatchingWeights(psf.CLASS_WEIGHT, psf.L1_WEIGHT, psf.GIOU_WEIGHT),
                mask_matching=design.mask_matching,
                loss_weights=LossWeights(
                    class_weight=psf.CLASS_WEIGHT,
                    stuff_class_weight=psf.STUFF_CLASS_WEIGHT,
                    l1_weight=psf.L1_WEIGHT,
                    giou_weight=psf.GIOU_WEIGHT,
                    mask_weight=psf.DICE_WEIGHT,
                    things_weight=psf.THINGS_WEIGHT,
                    stuff_weight=psf.STUFF_WEIGHT,
                ),
                mask_loss_scale=psf.MASK_LOSS_SCALE,
            ),
            "class_map": class_map,
            "in_features": psf.IN_FEATURES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "inference_options": _inference_options(cfg, design),
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(
        self, batched_inputs: list[dict[str, Any]], num_segments: Tensor | None = None
    ) -> Any:
        """
        Args:
            batched_inputs: one dict an image: ``image`` (3, h, w) of pixel values 0..255 in
                ``INPUT.FORMAT``; in training ``instances`` with ``gt_classes`` (things 0..K-1,
                stuff K..K+T-1), ``gt_boxes`` and ``gt_masks``; at inference optionally ``height``
                and ``width``, the size of the output. Sizes may differ.
            num_segments: () what the losses in training are divided by, for a part of a batch:
                :meth:`count_segments` of the whole. None: that of ``batched_inputs``.

        Returns:
            In training the dict of weighted losses. At inference one dict an image, by Detectron2's
            contract: ``panoptic_seg`` ((height, width) int32 ids, segments_info), ``instances``,
            ``sem_seg`` (classes, height, width) as ``MODEL.PSF.TEST`` asks.
        """
        images = self.preprocess_images(batched_inputs)
        if not self.training:
            sizes = [_output_size(*pair) for pair in zip(batched_inputs, images, strict=True)]
            with self._precision():
                maps, valid_shapes = self.extract_maps(images)
                maps = pad_maps(maps, self.inference_options.pad_to)
                predictions = self.predict_masks(*self.predict_classes(maps, valid_shapes))
            return [self.postprocess(*pair) for pair in zip(predictions, sizes, strict=True)]

        maps, valid_shapes = self.extract_maps(images)
        memory = self.pixel_encoder(maps, valid_shapes)
        locations = self.location_decoder(memory)
        targets = self.prepare_targets(batched_inputs)
        assignments = self.criterion.assign(locations, targets)
        wanted = mask_queries(assignments[-1], targets)
        predictions = self.mask_decoder(memory, locations, wanted)
        return self.criterion(locations, predictions, targets, assignments, num_segments)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast as the options ask; where they ask for float32, what the caller has set up."""
        dtype = self.inference_options.precision
        if dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype)

    def count_segments(self, batched_inputs: list[dict[str, Any]]) -> Tensor:
        """() what the losses of a batch are divided by: its segments, averaged over processes."""
        num_thing_classes = len(self.class_map.thing_ids)
        num_queries = self.location_decoder.query_embed.num_embeddings
        num_things = num_stuff = 0
        for x in batched_inputs:
            labels = x["instances"].gt_classes
            things = int((labels < num_thing_classes).sum())
            num_things += min(num_queries, things)  # as many as get a query
            num_stuff += len(labels) - things
        return normaliser(num_things, num_stuff, self.device)

    def preprocess_images(self, batched_inputs: list[dict[str, Any]]) -> list[Tensor]:
        """Normalised images, N x (3, h, w), on the model's device."""
        images = [x["image"].to(self.device, non_blocking=True) for x in batched_inputs]
        # Converted on their own: a CPU subtracts floats from bytes one by one.
        return [
            image.to(torch.promote_types(image.dtype, self.pixel_mean.dtype))
            .sub(self.pixel_mean)
            .div_(self.pixel_std)
            for image in images
        ]

    def extract_maps(self, images: list[Tensor]) -> tuple[list[Tensor], list[list[Shape]]]:
        """
        Backbone and input projection, then one batch of maps padded to a common size.

        Convolutions and normalisations would carry padding into an image's features, so images of
        one size go through them together and those of another apart: the features of an image do
        not depend on its batch.

        Args:
            images: N x (3, h, w) normalised.

        Returns:
            L x (N, C, H_l, W_l) maps, and N x L x (h, w) the part of each that is not padding.
        """
        groups: dict[Shape, list[int]] = {}
        for i, image in enumerate(images):
            groups.setdefault((image.shape[-2], image.shape[-1]), []).append(i)
        maps: list[list[Tensor]] = [[] for _ in images]  # N x L x (C, h_l, w_l)
        valid_shapes: list[list[Shape]] = [[] for _ in images]
        for size, members in groups.items():
            batch = _pad_to_least_size(_batch([images[i] for i in members], self.backbone))
            levels = self._levels(batch)
            valid = [_valid_shape(size, batch.shape[-2:], level.shape[-2:]) for level in levels]
            if len(groups) == 1:
                return levels, [valid] * len(images)
            for row, i in enumerate(members):
                maps[i] = [level[row] for level in levels]
                valid_shapes[i] = valid
        padded = [ImageList.from_tensors(list(level)).tensor for level in zip(*maps, strict=True)]
        return padded, valid_shapes

    def _levels(self, batch: Tensor) -> list[Tensor]:
        """Backbone and input projection: (N, 3, H, W) to L x (N, C, H_l, W_l)."""
        features = self.backbone(batch)
        return self.input_proj([features[name] for name in self.in_features])

    def predict_classes(
        self, maps: list[Tensor], valid_shapes: list[list[Shape]]
    ) -> tuple[Memory, ClassPredictions]:
        """
        Everything between feature maps and masks, at inference.

        Args:
            maps: L x (N, C, H_l, W_l) padded on the right and at the bottom.
            valid_shapes: N x L x (h, w) the part of each that is not padding.
        """
        spatial_shapes = [(m.shape[-2], m.shape[-1]) for m in maps]
        padded = any(image != spatial_shapes for image in valid_shapes)
        sizes = torch.tensor(valid_shapes, dtype=torch.float32)
        core = self._compiled_core if self.inference_options.compile else self._core
        features, padding_mask, classes = core(maps, sizes.to(maps[0].device), padded)
        return Memory(features, padding_mask, spatial_shapes, valid_shapes), classes

    def _core(
        self, maps: list[Tensor], valid_shapes: Tensor, padded: bool
    ) -> tuple[Tensor, Tensor | None, ClassPredictions]:
        """What is compiled: of sizes it sees only those of tensors, so programs serve many."""
        memory = self.pixel_encoder(maps, [], valid_shapes_tensor=valid_shapes, padded=padded)
        locations = self.location_decoder(memory)
        classes = self.mask_decoder.predict_classes(
            memory, locations, self.inference_options.mask_decoder_layers
        )
        return memory.features, memory.padding_mask, classes

    @functools.cached_property
    def _compiled_core(self) -> Callable[..., tuple[Tensor, Tensor | None, ClassPredictions]]:
        # A CUDA graph is recorded for every size, which pays where sizes are few.
        graphs = self.device.type == "cuda" and self.inference_options.pad_to > 0
        mode = "reduce-overhead" if graphs else None
        return torch.compile(self._core, fullgraph=True, mode=mode)

    def prepare_targets(self, batched_inputs: list[dict[str, Any]]) -> list[Targets]:
        """Detectron2's ground truth to the core's, things and stuff apart."""
        return [_targets(x["instances"].to(self.device), self.class_map) for x in batched_inputs]

    def predict_masks(self, memory: Memory, classes: ClassPredictions) -> list[ImagePrediction]:
        """The masks of the queries that can become part of an output, for N images."""
        thing_scores = classes.thing_logits.float().sigmoid()  # (N, Q, K)
        stuff_scores = classes.stuff_logits.float().sigmoid()  # (N, T)
        num_things, num_stuff = thing_scores.shape[1], stuff_scores.shape[1]
        candidates = [
            self._candidates(things, stuff)
            for things, stuff in zip(thing_scores, stuff_scores, strict=True)
        ]
        everything = torch.arange(num_things + num_stuff, device=thing_scores.device)
        if self.inference_options.semantic_on:
            queries = [everything] * len(candidates)
        else:
            queries = [image.query.unique() for image in candidates]
        wanted = MaskQueries(
            things=[image[image < num_things] for image in queries],
            stuff=[image[image >= num_things] - num_things for image in queries],
        )
        maps = self.mask_decoder.predict_masks(
            memory, classes, wanted, self.inference_options.mask_decoder_layers
        )
        return [
            ImagePrediction(*image[:-1], image[-1].float(), self.mask_decoder.activation)
            for image in zip(thing_scores, stuff_scores, candidates, queries, maps, strict=True)
        ]

    def _candidates(self, thing_scores: Tensor, stuff_scores: Tensor) -> Candidates:
        """Those that may reach the score threshold, and the best things if these are wanted."""
        options = self.inference_options
        if not (options.panoptic_on or options.instance_on):
            return Candidates(
                *(x[:0] for x in best_class_of_each_query(thing_scores, stuff_scores))
            )
        found = options.find_candidates(thing_scores, stuff_scores)
        highest = torch.full_like(found.class_scores, self.mask_decoder.greatest_mask_value)
        keep = self._may_matter(found, highest)
        return Candidates(*(column[keep] for column in found))

    def _may_matter(self, candidates: Candidates, highest: Tensor) -> Tensor:
        """
        Which candidates (R,) can become part of an output.

        Args:
            candidates: R of them.
            highest: (R,) what no value of their masks exceeds.
        """
        options = self.inference_options
        bound = candidates.class_scores**options.rules.class_exponent
        bound = bound * (highest * (1 + ROUNDING)) ** options.rules.mask_exponent
        keep = ~(bound < options.rules.score_threshold)  # NaN, of 0 * inf, says nothing
        if options.instance_on:
            is_thing = candidates.labels < len(self.class_map.thing_ids)
            best = candidates.class_scores[is_thing]
            keep[best.topk(min(options.max_instances, len(best))).indices] = True
        return keep

    def postprocess(self, prediction: ImagePrediction, size: Shape) -> dict[str, Any]:
        """
        The outputs for one image.

        Args:
            prediction: from :meth:`predict_masks`.
            size: (height, width) of the output.
        """
        options = self.inference_options
        output: dict[str, Any] = {}
        if options.panoptic_on or options.instance_on:
            scored = self._score(prediction, size)
        if options.panoptic_on:
            segments = MERGING[options.merging](
                scored.scores,
                scored.masks,
                scored.labels,
                len(self.class_map.thing_ids),
                options.rules,
            )
            output["panoptic_seg"] = (segments.id_map, self._segments_info(segments))
        if options.instance_on:
            output["instances"] = self._instances(scored, size)
        if options.semantic_on:
            masks = prediction.activation(prediction.maps)
            output["sem_seg"] = self._semantic(
                prediction.thing_scores, prediction.stuff_scores, masks, size
            )
        return output

    def _score(self, prediction: ImagePrediction, size: Shape) -> ScoredMasks:
        """The candidates that matter still when their masks are known."""
        candidates = prediction.candidates
        rows = torch.searchsorted(prediction.queries, candidates.query)
        # Resizing averages, so no pixel is above the map's highest, nor is the mean over a segment:
        # what is too low even with that needs no mask of full size.
        highest = prediction.activation(prediction.maps.amax((1, 2)))[rows]
        keep = self._may_matter(candidates, highest)
        masks = SoftMasks(prediction.maps[rows[keep]], prediction.activation, size)
        return ScoredMasks(
            labels=candidates.labels[keep],
            masks=masks,
            scores=segment_scores(
                candidates.class_scores[keep], masks, self.inference_options.rules
            ),
        )

    def _segments_info(self, segments: Segments) -> list[dict[str, Any]]:
        """Detectron2's description of each segment, with the data set's contiguous ids."""
        infos = []
        columns = zip(segments.labels, segments.scores, segments.areas, strict=True)
        for i, (label, score, area) in enumerate(columns, 1):
            category_id, is_thing = self.class_map.to_contiguous(label)
            infos.append(
                {
                    "id": i,
                    "isthing": is_thing,
                    "category_id": category_id,
                    "score": score,
                    "area": area,
                }
            )
        return infos

    def _instances(self, candidates: ScoredMasks, size: Shape) -> Instances:
        """The best things by segment score, not merged; masks may overlap."""
        things = (candidates.labels < len(self.class_map.thing_ids)).nonzero()[:, 0]
        best = candidates.scores[things].topk(
            min(self.inference_options.max_instances, len(things))
        )
        things = things[best.indices]
        thing_ids = torch.tensor(self.class_map.thing_ids, device=things.device)
        instances = Instances(size)
        instances.pred_masks = candidates.masks.foreground(things)
        instances.pred_boxes = Boxes(masks_to_boxes(instances.pred_masks))
        instances.scores = best.values
        instances.pred_classes = thing_ids[candidates.labels[things]]
        return instances

    def _semantic(
        self, thing_scores: Tensor, stuff_scores: Tensor, masks: Tensor, size: Shape
    ) -> Tensor:
        """(K + T, H, W) sums of class probability times mask, in the order of contiguous ids."""
        num_queries = len(thing_scores)
        things = torch.einsum("qk,qhw->khw", thing_scores, masks[:num_queries])
        stuff = stuff_scores[:, None, None] * masks[num_queries:]
        by_class = torch.cat([things, stuff])
        contiguous = torch.tensor([*self.class_map.thing_ids, *self.class_map.stuff_ids])
        return resize_maps(by_class[contiguous.argsort().to(by_class.device)], size)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """
        As ``nn.Module``'s; what Detectron2's checkpointer calls with ``strict=False``.

        Raises:
            ValueError: some but not all weights outside the backbone are there: the checkpoint is
                of another architecture or other classes. A backbone alone (ImageNet weights) is
                fine, since training then starts from it.
        """
        own = self.state_dict()
        heads = {name for name in own if not name.startswith("backbone.")}
        missing = sorted(heads - state_dict.keys())
        unexpected = sorted(
            name
            for name in state_dict.keys() - own.keys()
            if not name.startswith(("backbone.", "pixel_"))
        )
        only_backbone = len(missing) == len(heads) and any(name in own for name in state_dict)
        if not strict and missing and not only_backbone:
            raise ValueError(
                "The checkpoint is not of this architecture. Missing or of another shape: "
                f"{', '.join(missing)}. Not in the model: {', '.join(unexpected) or 'none'}. Use "
                "the config that the checkpoint was trained with, or correct MODEL.WEIGHTS. To "
                "train on other classes than those of the file, let MODEL.PSF.WEIGHTS_DATASET name "
                "a data set that has them."
            )
        return super().load_state_dict(state_dict, strict, assign)


def _recompute_parts(
    names: list[str],
    backbone: Backbone,
    pixel_encoder: PixelEncoder,
    location_decoder: LocationDecoder,
    mask_decoder: MaskDecoder,
) -> None:
    parts: dict[str, Callable[[], list[nn.Module]]] = {
        "backbone": lambda: _backbone_layers(backbone),
        "pixel_encoder": lambda: list(pixel_encoder.layers),
        "location_decoder": lambda: list(location_decoder.layers),
        "mask_decoder": lambda: [
            layer for layer in mask_decoder.modules() if isinstance(layer, MaskDecoderLayer)
        ],
    }
    unknown = sorted(set(names) - parts.keys())
    if unknown:
        raise ValueError(f"MODEL.PSF.CHECKPOINT has {unknown}; known parts: {sorted(parts)}")
    for name in names:
        recompute(parts[name]())


def _backbone_layers(backbone: Backbone) -> list[nn.Module]:
    """
    The residual blocks of one of Detectron2's ResNets.

    Raises:
        ValueError: the backbone is another, which has a key of its own, or counts statistics, which
            a second run would count twice.
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


class MaskDesign(NamedTuple):
    """A mask decoder, and how its masks are matched in training and scored at inference."""

    decoder: MaskDecoder
    mask_matching: MaskMatchingWeights | None
    find_candidates: CandidateRule
    area_offset: int


def _mask_design(psf: CfgNode, common: dict[str, Any]) -> MaskDesign:
    if psf.MASK_DECODER.NAME not in MASK_DESIGNS:
        raise ValueError(
            f"MODEL.PSF.MASK_DECODER.NAME is '{psf.MASK_DECODER.NAME}'; known: "
            f"{sorted(MASK_DESIGNS)}"
        )
    common = {
        **common,
        "num_stuff_classes": psf.NUM_STUFF_CLASSES,
        "num_levels": len(psf.IN_FEATURES),
    }
    return MASK_DESIGNS[psf.MASK_DECODER.NAME](psf, common)


def _joint_design(psf: CfgNode, common: dict[str, Any]) -> MaskDesign:
    """The paper's."""
    return MaskDesign(
        decoder=JointMaskDecoder(
            num_thing_classes=psf.NUM_THING_CLASSES,
            num_layers=psf.MASK_DECODER.DEC_LAYERS,
            **common,
        ),
        mask_matching=None,
        find_candidates=best_class_of_each_query,
        area_offset=0,
    )


def _decoupled_design(psf: CfgNode, common: dict[str, Any]) -> MaskDesign:
    """The authors' released one."""
    matching = psf.MASK_DECODER.MATCHING
    return MaskDesign(
        decoder=DecoupledMaskDecoder(
            num_thing_layers=psf.MASK_DECODER.THING_LAYERS,
            num_stuff_layers=psf.MASK_DECODER.STUFF_LAYERS,
            **common,
        ),
        mask_matching=MaskMatchingWeights(
            MatchingWeights(matching.CLASS_WEIGHT, matching.L1_WEIGHT, matching.GIOU_WEIGHT),
            matching.DICE_WEIGHT,
            matching.NUM_POINTS,
        ),
        find_candidates=partial(best_thing_pairs, num_pairs=psf.TEST.THING_PAIRS),
        area_offset=1,
    )


MASK_DESIGNS = {"joint": _joint_design, "decoupled": _decoupled_design}


PRECISIONS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def _inference_options(cfg: CfgNode, design: MaskDesign) -> InferenceOptions:
    test = cfg.MODEL.PSF.TEST
    layers = design.decoder.num_layers
    if test.MERGING not in MERGING:
        raise ValueError(f"MODEL.PSF.TEST.MERGING is '{test.MERGING}'; known: {sorted(MERGING)}")
    if test.PRECISION not in PRECISIONS:
        raise ValueError(
            f"MODEL.PSF.TEST.PRECISION is '{test.PRECISION}'; known: {sorted(PRECISIONS)}"
        )
    if test.PAD_TO < 0 or test.PAD_TO % COARSEST_STRIDE:
        raise ValueError(
            f"MODEL.PSF.TEST.PAD_TO is {test.PAD_TO}; use a multiple of {COARSEST_STRIDE}, or 0"
        )
    if not 0 <= test.MASK_DECODER_LAYERS <= layers:
        raise ValueError(
            f"MODEL.PSF.TEST.MASK_DECODER_LAYERS is {test.MASK_DECODER_LAYERS}, but the mask "
            f"decoder has {layers} layers; use 1 to {layers}, or 0 for all"
        )
    return InferenceOptions(
        panoptic_on=test.PANOPTIC_ON,
        instance_on=test.INSTANCE_ON,
        semantic_on=test.SEMANTIC_ON,
        mask_decoder_layers=test.MASK_DECODER_LAYERS or None,
        find_candidates=design.find_candidates,
        merging=test.MERGING,
        rules=MergingRules(
            class_exponent=test.CLASS_EXPONENT,
            mask_exponent=test.MASK_EXPONENT,
            score_threshold=test.SCORE_THRESHOLD,
            thing_keep_fraction=test.THING_KEEP_FRACTION,
            stuff_keep_fraction=test.STUFF_KEEP_FRACTION,
            area_offset=design.area_offset,
        ),
        max_instances=cfg.TEST.DETECTIONS_PER_IMAGE,
        precision=PRECISIONS[test.PRECISION],
        compile=test.COMPILE,
        pad_to=test.PAD_TO,
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


def pad_maps(maps: list[Tensor], pad_to: int) -> list[Tensor]:
    """
    Pad feature maps as if they were of an image whose sides are multiples of ``pad_to``.

    Only the maps: what an image's own convolutions and normalisations saw does not change, and
    the padding is masked, so the predictions differ by rounding alone.

    Args:
        maps: L x (N, C, H_l, W_l) of strides 8, 16, ...
        pad_to: pixels, a multiple of all strides; 0: leave them.
    """
    if pad_to == 0:
        return maps
    padded = []
    height, width = (-(-side * FINEST_STRIDE // pad_to) * pad_to for side in maps[0].shape[-2:])
    for level, image_map in enumerate(maps):
        stride = FINEST_STRIDE * 2**level
        h, w = image_map.shape[-2:]
        padded.append(F.pad(image_map, (0, width // stride - w, 0, height // stride - h)))
    return padded


def _batch(images: list[Tensor], backbone: Backbone) -> Tensor:
    """Images of one size, N x (3, h, w) to (N, 3, H, W), padded as the backbone asks."""
    sides, constraints = images[0].shape[-2:], backbone.padding_constraints
    divisor = backbone.size_divisibility
    if not constraints and all(divisor <= 1 or side % divisor == 0 for side in sides):
        return torch.stack(images)  # one operation instead of several an image
    padded: Tensor = ImageList.from_tensors(images, divisor, padding_constraints=constraints).tensor
    return padded


def _pad_to_least_size(batch: Tensor) -> Tensor:
    height, width = batch.shape[-2:]
    if min(height, width) >= LEAST_SIDE:
        return batch
    return F.pad(batch, (0, max(0, LEAST_SIDE - width), 0, max(0, LEAST_SIDE - height)))


def _valid_shape(size: Shape, padded: torch.Size, level: torch.Size) -> Shape:
    """Cells of a map that begin inside the image: nearest-neighbour scaling of its padding mask."""
    return (-(-size[0] * level[0] // padded[0]), -(-size[1] * level[1] // padded[1]))


def _targets(instances: Instances, class_map: ClassMap) -> Targets:
    num_thing_classes = len(class_map.thing_ids)
    labels = instances.gt_classes
    masks = instances.gt_masks
    masks = masks.tensor if isinstance(masks, BitMasks) else masks
    is_thing = labels < num_thing_classes
    height, width = instances.image_size
    scale = torch.tensor([width, height, width, height], device=labels.device)
    boxes = instances.gt_boxes.tensor[is_thing] / scale
    return Targets(
        thing_labels=labels[is_thing],
        thing_boxes=xyxy_to_cxcywh(boxes),
        thing_masks=masks[is_thing],
        stuff_labels=labels[~is_thing] - num_thing_classes,
        stuff_masks=masks[~is_thing],
    )


def _output_size(inputs: dict[str, Any], image: Tensor) -> Shape:
    return inputs.get("height", image.shape[-2]), inputs.get("width", image.shape[-1])
