"""Criterion: query decoupling and the losses of all layers (paper, sections 3.5 and 3.6).

Things are assigned to thing queries by bipartite matching, stuff to the query of its own class.
Shapes: N images, Q thing queries, K thing classes, T stuff classes, G things and B stuff segments
of one image, H x W its size.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from psf.layers.boxes import box_iou, cxcywh_to_xyxy, generalized_box_iou
from psf.modeling.denoising import NoisedThings
from psf.modeling.location_decoder import LocationPredictions
from psf.modeling.losses import (
    point_loss,
    quality_focal_loss,
    shrink_masks,
    sigmoid_focal_loss,
    upsampled_dice_loss,
)
from psf.modeling.mask_decoder import MaskPredictions, MatchedQueries
from psf.modeling.matcher import (
    MaskMatchingWeights,
    Matching,
    MatchingWeights,
    detection_cost,
    match_boxes,
    match_masks,
)


class Targets(NamedTuple):
    """The ground truth of one image."""

    thing_labels: Tensor  # (G,) int64 in [0, K)
    thing_boxes: Tensor  # (G, 4) cxcywh in [0, 1] of the unpadded image
    thing_masks: Tensor  # (G, H, W) bool
    stuff_labels: Tensor  # (B,) int64 in [0, T), all different
    stuff_masks: Tensor  # (B, H, W) bool
    seed: int | None = None  # of the random numbers of the image: noised boxes, points of masks

    def generator(self) -> torch.Generator:
        """Random numbers that depend on no other image; without a seed, on all draws before."""
        seed = int(torch.randint(2**31, ())) if self.seed is None else self.seed
        return torch.Generator().manual_seed(seed)


class LossWeights(NamedTuple):
    """The weight of each loss; the paper's letters are lambda with these names."""

    class_weight: float  # focal loss of the classes of things
    stuff_class_weight: float  # focal loss of the classes of stuff
    l1_weight: float  # boxes of the location decoder
    giou_weight: float
    mask_weight: float  # Dice loss
    things_weight: float  # all losses of things
    stuff_weight: float  # all losses of stuff
    point_weight: float = 0.0  # binary cross-entropy of masks at points; 0: none


class CriterionOptions(NamedTuple):
    """Ways of learning faster than the paper's; all off is the paper's criterion."""

    quality_scores: bool = False  # class probabilities learn the quality of boxes and masks
    num_points: int = 0  # at which the loss with ``point_weight`` compares a mask
    one_to_many_repeats: int = 1  # queries of one-to-many matching for every thing


class SetCriterion:
    """Matches predictions to targets and computes the weighted losses; has no parameters."""

    def __init__(
        self,
        *,
        matching_weights: MatchingWeights,
        mask_matching: MaskMatchingWeights | None,
        loss_weights: LossWeights,
        mask_loss_scale: int,
        mask_activation: Callable[[Tensor], Tensor],
        options: CriterionOptions = CriterionOptions(),  # noqa: B008  it is immutable
    ) -> None:
        """
        Args:
            matching_weights: of the matching cost.
            mask_matching: match the queries that have masks again, by masks too, with these
                weights. None: the matching of the last location-decoder layer holds for masks.
            loss_weights: of the losses.
            mask_loss_scale: the Dice loss is taken at this multiple of the resolution of the
                predicted masks.
            mask_activation: applied to mask logits after upsampling; gives mask probabilities.
            options: beyond the paper.
        """
        self.matching_weights = matching_weights
        self.mask_matching = mask_matching
        self.loss_weights = loss_weights
        self.mask_loss_scale = mask_loss_scale
        self.mask_activation = mask_activation
        self.options = options
        self.class_loss = quality_focal_loss if options.quality_scores else sigmoid_focal_loss

    def match(
        self, locations: LocationPredictions, targets: Sequence[Targets]
    ) -> list[list[Matching]]:
        """
        Match things to the thing queries of every layer of the location decoder.

        Returns:
            layers x N matchings. Those of the last layer also say which queries get masks.
        """
        return match_boxes(
            locations.pred_logits,
            locations.pred_boxes,
            [target.thing_labels for target in targets],
            [target.thing_boxes for target in targets],
            self.matching_weights,
        )

    def __call__(
        self,
        locations: LocationPredictions,
        predictions: MaskPredictions,
        targets: Sequence[Targets],
        matchings: Sequence[Sequence[Matching]],
        num_segments: Tensor | None = None,
        noised: NoisedThings | None = None,
    ) -> dict[str, Tensor]:
        """
        Args:
            locations: of the location decoder.
            predictions: of the mask decoder, with the masks of :func:`matched_queries`.
            targets: one per image.
            matchings: of :meth:`match`.
            noised: the denoising queries, if there are any.
            num_segments: () the :func:`normaliser` of a larger batch that the images are part of;
                None: of these images.

        Returns:
            Weighted losses, summing to the training loss. ``loss_<what>`` is the last layer's,
            ``loss_<what>_<i>`` that of layer i (DETR's names); ``loss_<what>_one_to_many`` and
            ``loss_<what>_denoising`` those of the extra queries. Every sum is divided by the number
            of segments in the batch (things + stuff, at least 1 each), averaged over processes:
            the official code's normalisers times its dynamic weights of things and stuff.
        """
        last = matchings[-1]
        sums = {
            **self._location_losses(*locations[1:3], targets, matchings),
            **self._extra_losses(locations, targets, noised),
            **self._segment_losses(locations, predictions, targets, last),
        }
        if num_segments is None:
            num_segments = normaliser(
                sum(len(matching.query) for matching in last),
                sum(len(target.stuff_labels) for target in targets),
                locations.pred_logits.device,
            )
        return {
            key if layer == len(values) - 1 else f"{key}_{layer}": value
            for key, values in sums.items()
            for layer, value in enumerate((values / num_segments).unbind())
        }

    def _location_losses(
        self,
        pred_logits: Tensor,
        pred_boxes: Tensor,
        targets: Sequence[Targets],
        matchings: Sequence[Sequence[Matching]],
        valid: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """
        Detection losses of Deformable DETR.

        Args:
            pred_logits: (layers, N, Q, K).
            pred_boxes: (layers, N, Q, 4).
            targets: one per image.
            matchings: layers x N.
            valid: (N, Q) bool, False where a query has no loss; None: all have.

        Returns:
            (layers,) of each loss: sums, not yet normalised.
        """
        focal, distance, overlap = [], [], []
        for logits, boxes, matching in zip(pred_logits, pred_boxes, matchings, strict=True):
            pred = torch.cat([b[m.query] for b, m in zip(boxes, matching, strict=True)]).float()
            gt = [t.thing_boxes[m.target] for t, m in zip(targets, matching, strict=True)]
            corners = cxcywh_to_xyxy(pred), cxcywh_to_xyxy(torch.cat(gt))
            quality = box_iou(*corners).detach() if self.options.quality_scores else None
            classes = _classes(logits.float(), targets, matching, quality)
            loss = self.class_loss(logits.float(), classes)
            focal.append(loss.sum() if valid is None else loss[valid].sum())
            distance.append((pred - torch.cat(gt)).abs().sum())
            overlap.append((1 - generalized_box_iou(*corners)).sum())
        weights = self.loss_weights
        scale = weights.things_weight
        return {
            "loss_class": scale * weights.class_weight * torch.stack(focal),
            "loss_bbox": scale * weights.l1_weight * torch.stack(distance),
            "loss_giou": scale * weights.giou_weight * torch.stack(overlap),
        }

    def _extra_losses(
        self,
        locations: LocationPredictions,
        targets: Sequence[Targets],
        noised: NoisedThings | None,
    ) -> dict[str, Tensor]:
        """Of the queries of one-to-many matching and of denoising: means over their repeats."""
        losses: dict[str, Tensor] = {}
        if locations.one_to_many is not None:
            times = self.options.one_to_many_repeats
            repeated = [
                target._replace(
                    thing_labels=target.thing_labels.repeat(times),
                    thing_boxes=target.thing_boxes.repeat(times, 1),
                )
                for target in targets
            ]
            matchings = match_boxes(
                *locations.one_to_many,
                [target.thing_labels for target in repeated],
                [target.thing_boxes for target in repeated],
                self.matching_weights,
            )
            sums = self._location_losses(*locations.one_to_many, repeated, matchings)
            losses |= {f"{name}_one_to_many": value / times for name, value in sums.items()}
        if locations.denoising is not None and noised is not None:
            matching = [Matching(q := (row >= 0).nonzero()[:, 0], row[q]) for row in noised.target]
            same = [matching] * len(locations.denoising.pred_logits)
            sums = self._location_losses(*locations.denoising, targets, same, noised.valid)
            losses |= {f"{name}_denoising": v / noised.num_groups for name, v in sums.items()}
        return losses

    def _segment_losses(
        self,
        locations: LocationPredictions,
        predictions: MaskPredictions,
        targets: Sequence[Targets],
        matching: Sequence[Matching],
    ) -> dict[str, Tensor]:
        """Of every layer of the mask decoder, (layers,): as above."""
        if self.mask_matching is not None:
            matching = self.match_again(locations, predictions, targets, matching)
        things = [t.thing_masks[m.target] for t, m in zip(targets, matching, strict=True)]
        stuff = [target.stuff_masks for target in targets]
        thing_dice = self._dice_losses(predictions.thing_masks, things)
        stuff_dice = self._dice_losses(predictions.stuff_masks, stuff)
        weights = self.loss_weights
        losses = {
            **self._class_losses(predictions, targets, matching, thing_dice, stuff_dice),
            "loss_thing_mask": weights.things_weight * weights.mask_weight * _sum(thing_dice),
            "loss_stuff_mask": weights.stuff_weight * weights.mask_weight * _sum(stuff_dice),
        }
        if weights.point_weight:
            things_sum = self._point_losses(predictions.thing_masks, things, targets)
            stuff_sum = self._point_losses(predictions.stuff_masks, stuff, targets)
            losses |= {
                "loss_thing_point": weights.things_weight * weights.point_weight * things_sum,
                "loss_stuff_point": weights.stuff_weight * weights.point_weight * stuff_sum,
            }
        return losses

    def _class_losses(
        self,
        predictions: MaskPredictions,
        targets: Sequence[Targets],
        matching: Sequence[Matching],
        thing_dice: Sequence[Tensor],
        stuff_dice: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """As above; the Dice losses, N x (layers, R), are the quality that scores learn."""
        weights = self.loss_weights
        losses: dict[str, Tensor] = {}
        use_quality = self.options.quality_scores
        if len(predictions.thing_logits):
            logits = predictions.thing_logits.float()
            if use_quality:
                quality = 1 - torch.cat(list(thing_dice), dim=1).detach()  # (layers, all R)
                layers = [
                    _classes(x, targets, matching, q) for x, q in zip(logits, quality, strict=True)
                ]
                classes = torch.stack(layers)
            else:
                classes = _classes(logits[0], targets, matching).expand_as(logits)
            focal = self.class_loss(logits, classes).sum((1, 2, 3))
            losses["loss_thing_class"] = weights.things_weight * weights.class_weight * focal
        if len(predictions.stuff_logits):
            logits = predictions.stuff_logits.float()
            present = torch.zeros_like(logits)  # (layers, N, T)
            for i, target in enumerate(targets):
                # The released decoder makes one more set of masks than it classifies.
                dice = stuff_dice[i][: len(logits)].detach()
                present[:, i, target.stuff_labels] = 1 - dice if use_quality else 1
            # Unlike the official code: also for images without things.
            focal = self.class_loss(logits, present).sum((1, 2))
            losses["loss_stuff_class"] = weights.stuff_weight * weights.stuff_class_weight * focal
        return losses

    def match_again(
        self,
        locations: LocationPredictions,
        predictions: MaskPredictions,
        targets: Sequence[Targets],
        matching: Sequence[Matching],
    ) -> list[Matching]:
        """The released models' second matching, which permutes the masks of matched queries."""
        assert self.mask_matching is not None
        again = []
        for i, (target, (query, segment)) in enumerate(zip(targets, matching, strict=True)):
            pred_masks = self.mask_activation(predictions.thing_masks[-1][i].detach())
            cost = detection_cost(
                locations.pred_logits[-1, i, query].detach(),
                locations.pred_boxes[-1, i, query].detach(),
                target.thing_labels[segment],
                target.thing_boxes[segment],
                self.mask_matching.detection,
            )
            gt_masks = shrink_masks(target.thing_masks[segment], pred_masks.shape[-2:])
            order = match_masks(pred_masks, gt_masks, cost, self.mask_matching).target
            again.append(Matching(query, segment[order]))
        return again

    def _dice_losses(
        self, mask_logits: Sequence[Sequence[Tensor]], masks: Sequence[Tensor]
    ) -> list[Tensor]:
        """
        Args:
            mask_logits: layers x N x (R, h, w).
            masks: N x (R, H, W) bool, the targets.

        Returns:
            N x (layers, R).
        """
        losses = []
        for image, mask in enumerate(masks):
            logits = torch.stack([layer[image] for layer in mask_logits]).float()
            size = [self.mask_loss_scale * side for side in logits.shape[-2:]]
            target = shrink_masks(mask, size)  # (R, scale h, scale w)
            losses.append(upsampled_dice_loss(logits, target, self.mask_activation))
        return losses

    def _point_losses(
        self,
        mask_logits: Sequence[Sequence[Tensor]],
        masks: Sequence[Tensor],
        targets: Sequence[Targets],
    ) -> Tensor:
        """(layers,): as above, at the points that the seeds of the images give."""
        losses = []
        for image, (mask, target) in enumerate(zip(masks, targets, strict=True)):
            logits = torch.stack([layer[image] for layer in mask_logits]).float()
            losses.append(
                point_loss(logits, mask, self.options.num_points, target.generator()).sum(1)
            )
        return torch.stack(losses).sum(0)


def _sum(losses: Sequence[Tensor]) -> Tensor:
    """N x (layers, R) to (layers,)."""
    return torch.stack([image.sum(1) for image in losses]).sum(0)


def _classes(
    logits: Tensor,
    targets: Sequence[Targets],
    matching: Sequence[Matching],
    quality: Tensor | None = None,
) -> Tensor:
    """
    (N, Q, K) in [0, 1], like the logits (N, Q, K).

    For the classes of matched queries it is 1, or their quality (all R of them,).
    """
    classes = torch.zeros_like(logits)
    start = 0
    for image, target, (query, segment) in zip(classes, targets, matching, strict=True):
        end = start + len(query)
        image[query, target.thing_labels[segment]] = 1 if quality is None else quality[start:end]
        start = end
    return classes


def matched_queries(matching: Sequence[Matching], targets: Sequence[Targets]) -> MatchedQueries:
    """
    The queries that have a mask target: matched things, and the stuff that is present.

    Args:
        matching: of the last layer, one per image.
        targets: one per image.
    """
    return MatchedQueries(
        things=[pairs.query for pairs in matching],
        stuff=[target.stuff_labels for target in targets],
    )


def normaliser(num_things: int, num_stuff: int, device: torch.device) -> Tensor:
    """
    The divisor of the sums of losses.

    Args:
        num_things: matched things of this process.
        num_stuff: stuff segments of this process.
        device: of the result.

    Returns:
        (): the segments of all processes, at least 1 of each kind, divided by the processes.
    """
    counts = torch.tensor([num_things, num_stuff], dtype=torch.float32, device=device)
    if not (dist.is_available() and dist.is_initialized()):
        return counts.clamp(min=1).sum()
    dist.all_reduce(counts)
    # Unlike the official code: clamped before averaging, so that processes with few segments
    # together give the loss that one process would.
    return counts.clamp(min=1).sum() / dist.get_world_size()
