"""The meta-architecture: Panoptic SegFormer (arXiv 2109.03814) between Detectron2's interfaces.

Shapes: N images, L levels, C channels, K thing and T stuff classes, Q thing queries, R candidate
segments of one image.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone
from detectron2.structures import BitMasks, Boxes, ImageList, Instances
from torch import Tensor, nn
from torch.nn import functional as F

from psf.data.class_map import ClassMap
from psf.layers.boxes import masks_to_boxes, xyxy_to_cxcywh
from psf.modeling.build import InferenceOptions, MaskDecoder, build_parts
from psf.modeling.candidates import Candidates, may_matter
from psf.modeling.criterion import SetCriterion, Targets, matched_queries, normaliser
from psf.modeling.denoising import DenoisingOptions, NoisedThings, noise_things
from psf.modeling.encoder import InputProjection, Memory, Shape, TransformerEncoder
from psf.modeling.location_decoder import LocationDecoder, LocationPredictions
from psf.modeling.mask_decoder import LayerOutput, MaskPredictions, MatchedQueries
from psf.modeling.mask_head import resize_masks
from psf.modeling.postprocessing import Segments, SoftMasks, segment_scores
from psf.modeling.runtime import Runtime, valid_sizes

logger = logging.getLogger(__name__)

# Images with a shorter side are padded to it, twice the coarsest stride: with a single cell,
# normalisations such as GroupNorm may have a single value to normalise, which PyTorch refuses.
LEAST_SIDE = 64

# Entries that follow from the architecture, or count batches.
_DERIVED = re.compile(r"\.(num_batches_tracked|relative_position_index)$")
# All of a backbone but the norms of Swin's maps and the layers of feature pyramids, which are new.
_IN_IMAGENET_MODELS = re.compile(r"backbone\.(?!(norm\d|fpn_|top_block|simfp_))")


@META_ARCH_REGISTRY.register()
class PanopticSegFormer(nn.Module):
    """Backbone, transformer encoder, location decoder, mask decoder, mask-wise merging."""

    pixel_mean: Tensor  # (3, 1, 1)
    pixel_std: Tensor  # (3, 1, 1)
    allow_partial_weights = False  # the trainer sets it to MODEL.PSF.ALLOW_PARTIAL_WEIGHTS

    @configurable
    def __init__(  # noqa: PLR0913  one argument per part of the model
        self,
        *,
        backbone: Backbone,
        input_proj: InputProjection,
        encoder: TransformerEncoder,
        location_decoder: LocationDecoder,
        mask_decoder: MaskDecoder,
        criterion: SetCriterion,
        class_map: ClassMap,
        in_features: list[str],
        pixel_mean: list[float],
        pixel_std: list[float],
        inference_options: InferenceOptions,
        runtime: Runtime,
        denoising: DenoisingOptions | None = None,
    ) -> None:
        """
        Args:
            backbone: gives the maps named by ``in_features``.
            input_proj: of those maps to C channels.
            encoder: the transformer encoder.
            location_decoder: thing queries.
            mask_decoder: thing and stuff masks.
            criterion: matching and losses.
            class_map: the data set's contiguous ids of the model's classes.
            in_features: names of the backbone's maps, fine to coarse.
            pixel_mean: of each channel, in the image's units (0..255).
            pixel_std: likewise.
            inference_options: outputs, layers, merging.
            runtime: precision and compilation at inference.
            denoising: how things become denoising queries in training; None: there are none.
        """
        super().__init__()
        self.backbone = backbone
        self.input_proj = input_proj
        self.encoder = encoder
        self.location_decoder = location_decoder
        self.mask_decoder = mask_decoder
        self.criterion = criterion
        self.class_map = class_map
        self.in_features = in_features
        self.inference_options = inference_options
        self.runtime = runtime
        self.denoising = denoising
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The arguments of ``__init__``."""
        return build_parts(cfg)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(
        self, batched_inputs: list[dict[str, Any]], num_segments: Tensor | None = None
    ) -> Any:
        """
        Args:
            batched_inputs: one dict per image: ``image`` (3, h, w) of pixel values 0..255 in
                ``INPUT.FORMAT``; in training ``instances`` with ``gt_classes`` (things 0..K-1,
                stuff K..K+T-1), ``gt_boxes`` and ``gt_masks``, and optionally ``seed``, the int
                that denoising and sampled points draw from; at inference optionally ``height``
                and ``width``, the size of the output. Sizes may differ.
            num_segments: () the divisor of the losses in training, for a part of a batch:
                :meth:`count_segments` of the whole. None: that of ``batched_inputs``.

        Returns:
            In training the dict of weighted losses. At inference one dict per image, by
            Detectron2's contract: ``panoptic_seg`` ((height, width) int32 ids, segments_info),
            ``instances``, ``sem_seg`` (classes, height, width) as ``MODEL.PSF.TEST`` asks.
        """
        images = self.preprocess_images(batched_inputs)
        if not self.training:
            return self._predict(images, batched_inputs)
        feature_maps, valid_shapes = self.extract_features(images)
        targets = self.prepare_targets(batched_inputs)
        noised = self._noise(targets)
        memory, locations, outputs = self.transformer(
            feature_maps, *valid_sizes(feature_maps, valid_shapes), noised
        )
        matchings = self.criterion.match(locations, targets)
        queries = matched_queries(matchings[-1], targets)
        classes = self.mask_decoder.predict_classes(outputs, locations, last_only=False)
        masks = self.mask_decoder.predict_masks(
            outputs, locations, memory, valid_shapes, queries, last_only=False
        )
        predictions = MaskPredictions(*classes, *masks)
        return self.criterion(locations, predictions, targets, matchings, num_segments, noised)

    def _noise(self, targets: list[Targets]) -> NoisedThings | None:
        if self.denoising is None:
            return None
        return noise_things(
            [target.thing_labels for target in targets],
            [target.thing_boxes for target in targets],
            len(self.class_map.thing_ids),
            self.denoising,
            [target.generator() for target in targets],
        )

    def transformer(
        self,
        feature_maps: Sequence[Tensor],
        sizes: Tensor,
        padded: bool,
        noised: NoisedThings | None = None,
    ) -> tuple[Memory, LocationPredictions, list[LayerOutput]]:
        """
        Encoder, location decoder, and the layers of the mask decoder.

        Args:
            feature_maps: L x (N, C, H_l, W_l), padded on the right and at the bottom.
            sizes: (N, L, 2) float32, (h, w) of the part of each map that is not padding.
            padded: whether there is any padding.
            noised: denoising queries, in training only.
        """
        memory = self.encoder(feature_maps, sizes, padded=padded)
        locations = self.location_decoder(memory, noised)
        num_layers = None if self.training else self.inference_options.mask_decoder_layers
        return memory, locations, self.mask_decoder(memory, locations.query, num_layers)

    def preprocess_images(self, batched_inputs: list[dict[str, Any]]) -> list[Tensor]:
        """Normalised images, N x (3, h, w), on the model's device."""
        images = [x["image"].to(self.device, non_blocking=True) for x in batched_inputs]
        # Converted first: on a CPU, subtracting floats from bytes is not vectorised.
        return [
            image.to(torch.promote_types(image.dtype, self.pixel_mean.dtype))
            .sub(self.pixel_mean)
            .div_(self.pixel_std)
            for image in images
        ]

    def extract_features(self, images: list[Tensor]) -> tuple[list[Tensor], list[list[Shape]]]:
        """
        Backbone and input projection, then one batch of maps padded to a common size.

        Convolutions and normalisations would carry padding into an image's features, so images of
        one size go through them together and those of another size apart: the features of an image
        do not depend on its batch.

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
            features = self.backbone(batch)
            levels = self.input_proj([features[name] for name in self.in_features])
            valid = [_valid_shape(size, batch.shape[-2:], level.shape[-2:]) for level in levels]
            if len(groups) == 1:
                return levels, [valid] * len(images)
            for row, i in enumerate(members):
                maps[i] = [level[row] for level in levels]
                valid_shapes[i] = valid
        padded = [ImageList.from_tensors(list(level)).tensor for level in zip(*maps, strict=True)]
        return padded, valid_shapes

    def prepare_targets(self, batched_inputs: list[dict[str, Any]]) -> list[Targets]:
        """Detectron2's ground truth to the core's, things and stuff apart."""
        return [
            _targets(x["instances"].to(self.device), self.class_map)._replace(seed=x.get("seed"))
            for x in batched_inputs
        ]

    def count_segments(self, batched_inputs: list[dict[str, Any]]) -> Tensor:
        """() the divisor of the losses of a batch: its segments, averaged over processes."""
        num_queries = self.location_decoder.num_queries
        num_things = num_stuff = 0
        for x in batched_inputs:
            labels = x["instances"].gt_classes
            things = int((labels < len(self.class_map.thing_ids)).sum())
            num_things += min(num_queries, things)  # the others get no query
            num_stuff += len(labels) - things
        return normaliser(num_things, num_stuff, self.device)

    def _predict(
        self, images: list[Tensor], batched_inputs: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Inference: classes first, then masks of the queries that can still matter."""
        with self.runtime.autocast(self.device):
            feature_maps, valid_shapes = self.extract_features(images)
            memory, locations, outputs = self.runtime.run(
                self.transformer, feature_maps, valid_shapes
            )
            things, stuff = self.mask_decoder.predict_classes(outputs, locations, last_only=True)
            thing_scores = things[0].float().sigmoid()  # (N, Q, K)
            stuff_scores = stuff[0].float().sigmoid()  # (N, T)
            candidates = list(map(self._candidates, thing_scores, stuff_scores))
            num_things, num_stuff = thing_scores.shape[1], stuff_scores.shape[1]
            queries = [image.query.unique() for image in candidates]
            if self.inference_options.semantic_on:
                queries = [torch.arange(num_things + num_stuff, device=self.device)] * len(images)
            wanted = MatchedQueries(
                things=[index[index < num_things] for index in queries],
                stuff=[index[index >= num_things] - num_things for index in queries],
            )
            thing_masks, stuff_masks = self.mask_decoder.predict_masks(
                outputs, locations, memory, valid_shapes, wanted, last_only=True
            )
        results = []
        for i, masks in enumerate(zip(thing_masks[-1], stuff_masks[-1], strict=True)):
            mask_logits = torch.cat(masks).float()  # (R', h, w)
            size = _output_size(batched_inputs[i], images[i])
            rows = torch.searchsorted(queries[i], candidates[i].query)
            result = self.postprocess(candidates[i], mask_logits[rows], size)
            if self.inference_options.semantic_on:
                result["sem_seg"] = self.semantic_scores(
                    thing_scores[i], stuff_scores[i], mask_logits, size
                )
            results.append(result)
        return results

    def _candidates(self, thing_scores: Tensor, stuff_scores: Tensor) -> Candidates:
        """Those that can reach the score threshold, and the best things if these are wanted."""
        options = self.inference_options
        candidates = options.find_candidates(thing_scores, stuff_scores)
        if not (options.panoptic_on or options.instance_on):
            return candidates.select(torch.arange(0, device=self.device))
        greatest = self.mask_decoder.greatest_mask_value
        return candidates.select(self._may_matter(candidates, greatest))

    def _may_matter(self, candidates: Candidates, greatest: Tensor | float) -> Tensor:
        """(R,) bool of :func:`~.candidates.may_matter`, for the outputs that are on."""
        options = self.inference_options
        return may_matter(
            candidates,
            greatest,
            options.rules,
            num_thing_classes=len(self.class_map.thing_ids),
            num_instances=options.max_instances if options.instance_on else 0,
        )

    def postprocess(
        self, candidates: Candidates, mask_logits: Tensor, size: Shape
    ) -> dict[str, Any]:
        """
        Scores, merging, and Detectron2's form of the results of one image.

        Args:
            candidates: R of them.
            mask_logits: (R, h, w) at the finest level, without padding.
            size: (height, width) of the output.
        """
        options, activation = self.inference_options, self.mask_decoder.mask_activation
        # Resizing averages, so no pixel exceeds the largest value of the mask, nor does the mean
        # over a segment: a candidate that is too low even with that needs no mask of full size.
        keep = self._may_matter(candidates, activation(mask_logits.amax((1, 2))))
        candidates = candidates.select(keep)
        masks = SoftMasks(mask_logits[keep], activation, size)
        output: dict[str, Any] = {}
        if options.panoptic_on or options.instance_on:
            scores = segment_scores(candidates.class_scores, masks, options.rules)
        if options.panoptic_on:
            num_thing_classes = len(self.class_map.thing_ids)
            segments = options.merge(
                scores, masks, candidates.labels, num_thing_classes, options.rules
            )
            output["panoptic_seg"] = (segments.id_map, self._segments_info(segments))
        if options.instance_on:
            output["instances"] = self._instances(candidates.labels, scores, masks)
        return output

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

    def _instances(self, labels: Tensor, scores: Tensor, masks: SoftMasks) -> Instances:
        """The best things by segment score, not merged; masks may overlap."""
        things = (labels < len(self.class_map.thing_ids)).nonzero()[:, 0]
        best = scores[things].topk(min(self.inference_options.max_instances, len(things)))
        things = things[best.indices]
        thing_ids = torch.tensor(self.class_map.thing_ids, device=things.device)
        instances = Instances(masks.size)
        instances.pred_masks = masks.foreground(things)
        instances.pred_boxes = Boxes(masks_to_boxes(instances.pred_masks))
        instances.scores = best.values
        instances.pred_classes = thing_ids[labels[things]]
        return instances

    def semantic_scores(
        self, thing_scores: Tensor, stuff_scores: Tensor, mask_logits: Tensor, size: Shape
    ) -> Tensor:
        """
        Sums of class probability times mask probability.

        Args:
            thing_scores: (Q, K) in [0, 1].
            stuff_scores: (T,) in [0, 1].
            mask_logits: (Q + T, h, w).
            size: (height, width) of the output.

        Returns:
            (K + T, height, width), in the order of contiguous ids.
        """
        masks = self.mask_decoder.mask_activation(mask_logits)
        things = torch.einsum("qk,qhw->khw", thing_scores, masks[: len(thing_scores)])
        stuff = stuff_scores[:, None, None] * masks[len(thing_scores) :]
        by_class = torch.cat([things, stuff])
        contiguous = torch.tensor([*self.class_map.thing_ids, *self.class_map.stuff_ids])
        return resize_masks(by_class[contiguous.argsort().to(by_class.device)], size)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """
        As ``nn.Module``'s; what Detectron2's checkpointer calls with ``strict=False``.

        Raises:
            ValueError: some weights are missing, and ``allow_partial_weights`` is not set: the
                checkpoint is of another architecture or other classes. In training a backbone alone
                (ImageNet weights) is fine.
        """
        result = super().load_state_dict(state_dict, strict, assign)
        missing = [name for name in result.missing_keys if not _DERIVED.search(name)]
        heads = [name for name in self.state_dict() if not name.startswith("backbone.")]
        if self.training and set(heads) <= set(missing) and len(missing) < len(self.state_dict()):
            missing = [name for name in missing if _IN_IMAGENET_MODELS.match(name)]
        if missing and self.allow_partial_weights:
            logger.warning(
                "Not in the checkpoint or of another shape, so these start from random values: %s",
                ", ".join(missing),
            )
        elif missing:
            own = ("backbone.", "pixel_")
            unexpected = [name for name in result.unexpected_keys if not name.startswith(own)]
            more = f" and {len(missing) - 20} more" if len(missing) > 20 else ""
            raise ValueError(
                "The checkpoint is not of this architecture. Missing or of another shape: "
                f"{', '.join(missing[:20])}{more}. Not in the model: "
                f"{', '.join(unexpected) or 'none'}. Use the config that the checkpoint was "
                "trained with, or correct MODEL.WEIGHTS. To train on other classes than those of "
                "the file, let MODEL.PSF.WEIGHTS_DATASET name a data set that has them. To train "
                "what is missing from random values, set MODEL.PSF.ALLOW_PARTIAL_WEIGHTS True."
            )
        return result


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
