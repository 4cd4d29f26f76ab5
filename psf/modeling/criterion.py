"""Criterion: query decoupling and the losses of all layers (paper, sections 3.5 and 3.6).

Things are assigned to thing queries by bipartite matching, stuff to the query of its own class.
Shapes: N images, Q thing queries, K thing classes, T stuff classes, G things and B stuff segments
of one image, H x W its size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from psf.layers.boxes import cxcywh_to_xyxy, generalized_box_iou
from psf.modeling.location_decoder import Locations
from psf.modeling.losses import dice_loss, sigmoid_focal_loss
from psf.modeling.mask_decoder import MaskPredictions
from psf.modeling.matcher import Assignment, MatchingWeights, match_things
from psf.modeling.postprocessing import resize_maps


class Targets(NamedTuple):
    """The ground truth of one image."""

    thing_labels: Tensor  # (G,) int64 in [0, K)
    thing_boxes: Tensor  # (G, 4) cxcywh in [0, 1] of the unpadded image
    thing_masks: Tensor  # (G, H, W) bool
    stuff_labels: Tensor  # (B,) int64 in [0, T), all different
    stuff_masks: Tensor  # (B, H, W) bool


class LossWeights(NamedTuple):
    """The weight of each loss; the paper's letters are lambda with these names."""

    class_weight: float  # focal loss of the classes, everywhere
    l1_weight: float  # boxes of the location decoder
    giou_weight: float
    mask_weight: float  # Dice loss
    things_weight: float  # all losses of things
    stuff_weight: float  # all losses of stuff


class Criterion:
    """Turns predictions and targets into the weighted losses; holds no parameters."""

    def __init__(
        self,
        *,
        matching_weights: MatchingWeights,
        loss_weights: LossWeights,
        mask_loss_scale: int,
    ) -> None:
        """
        Args:
            matching_weights: of the matching cost.
            loss_weights: of the losses.
            mask_loss_scale: the Dice loss is taken at so many times the resolution of the
                predicted masks.
        """
        self.matching_weights = matching_weights
        self.loss_weights = loss_weights
        self.mask_loss_scale = mask_loss_scale

    def assign(self, locations: Locations, targets: Sequence[Targets]) -> list[list[Assignment]]:
        """
        Match things to the thing queries of every layer of the location decoder.

        Returns:
            layers x N assignments. Those of the last layer also hold for the mask decoder, so that
            it computes masks for matched queries only.
        """
        images = [
            match_things(
                locations.logits[:, i],
                locations.boxes[:, i],
                target.thing_labels,
                target.thing_boxes,
                self.matching_weights,
            )
            for i, target in enumerate(targets)
        ]
        return [list(layer) for layer in zip(*images, strict=True)]

    def __call__(
        self,
        locations: Locations,
        predictions: Sequence[MaskPredictions],
        targets: Sequence[Targets],
        assignments: list[list[Assignment]],
    ) -> dict[str, Tensor]:
        """
        Args:
            locations: of the location decoder.
            predictions: of every layer of the mask decoder; mask logits are those of
                :func:`mask_queries`.
            targets: one an image.
            assignments: of :meth:`assign`.

        Returns:
            Weighted losses, summing to the training loss. ``loss_<what>`` is the last layer's,
            ``loss_<what>_<i>`` that of layer i (DETR's names). Every sum is divided by the number
            of segments in the batch (things + stuff, at least 1 each), averaged over processes:
            the official code's normalisers times its dynamic weights of things and stuff.
        """
        num_segments = _num_segments(assignments[-1], targets)
        location_losses = self._location_losses(locations, targets, assignments)
        losses = {
            _name(key, layer, len(values)): value / num_segments
            for key, values in location_losses.items()
            for layer, value in enumerate(values)
        }
        mask_targets = [
            self._mask_targets(target, assignment, logits.shape[-2:])
            for target, assignment, logits in zip(
                targets, assignments[-1], predictions[0].mask_logits, strict=True
            )
        ]
        for layer, prediction in enumerate(predictions):
            values = self._mask_losses(prediction, targets, assignments[-1], mask_targets)
            for key, value in values.items():
                losses[_name(key, layer, len(predictions))] = value / num_segments
        return losses

    def _location_losses(
        self,
        locations: Locations,
        targets: Sequence[Targets],
        assignments: list[list[Assignment]],
    ) -> dict[str, Tensor]:
        """Detection losses of Deformable DETR, each (layers,): sums, not yet normalised."""
        weights = self.loss_weights
        logits = locations.logits.float()
        class_targets = torch.zeros_like(logits)
        matched, gt_boxes = [], []
        for layer, layer_assignments in enumerate(assignments):
            for image, (target, assignment) in enumerate(
                zip(targets, layer_assignments, strict=True)
            ):
                labels = target.thing_labels[assignment.segment]
                class_targets[layer, image, assignment.query, labels] = 1
                matched.append(locations.boxes[layer, image, assignment.query])
                gt_boxes.append(target.thing_boxes[assignment.segment])
        boxes = torch.cat(matched).float().unflatten(0, (len(assignments), -1))  # (layers, n, 4)
        expected = torch.cat(gt_boxes).unflatten(0, (len(assignments), -1))
        giou = generalized_box_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(expected))
        scale = weights.things_weight
        return {
            "loss_class": scale
            * weights.class_weight
            * sigmoid_focal_loss(logits, class_targets).sum((1, 2, 3)),
            "loss_bbox": scale * weights.l1_weight * (boxes - expected).abs().sum((1, 2)),
            "loss_giou": scale * weights.giou_weight * (1 - giou).sum(1),
        }

    def _mask_losses(
        self,
        prediction: MaskPredictions,
        targets: Sequence[Targets],
        assignments: list[Assignment],
        mask_targets: list[Tensor],
    ) -> dict[str, Tensor]:
        """Losses of one layer of the mask decoder: sums, not yet normalised."""
        weights = self.loss_weights
        thing_logits = prediction.thing_logits.float()
        stuff_logits = prediction.stuff_logits.float()
        thing_classes = torch.zeros_like(thing_logits)
        stuff_classes = torch.zeros_like(stuff_logits)
        thing_dice, stuff_dice = [], []
        for image, (target, assignment) in enumerate(zip(targets, assignments, strict=True)):
            labels = target.thing_labels[assignment.segment]
            thing_classes[image, assignment.query, labels] = 1
            stuff_classes[image, target.stuff_labels] = 1
            # Logits are upsampled, not masks: their slope places the edge within a cell.
            logits = resize_maps(
                prediction.mask_logits[image].float(), mask_targets[image].shape[-2:]
            )
            dice = dice_loss(logits.sigmoid(), mask_targets[image])
            num_things = len(assignment.query)
            thing_dice.append(dice[:num_things])
            stuff_dice.append(dice[num_things:])
        things, stuff = weights.things_weight, weights.stuff_weight
        return {
            "loss_thing_class": things
            * weights.class_weight
            * sigmoid_focal_loss(thing_logits, thing_classes).sum(),
            "loss_stuff_class": stuff
            * weights.class_weight
            * sigmoid_focal_loss(stuff_logits, stuff_classes).sum(),
            "loss_thing_mask": things * weights.mask_weight * torch.cat(thing_dice).sum(),
            "loss_stuff_mask": stuff * weights.mask_weight * torch.cat(stuff_dice).sum(),
        }

    def _mask_targets(
        self, target: Targets, assignment: Assignment, shape: Sequence[int]
    ) -> Tensor:
        """
        The masks that the queries of :func:`mask_queries` should predict.

        Returns:
            (R, scale * h, scale * w) in [0, 1], for predictions of ``shape`` (h, w).
        """
        masks = torch.cat([target.thing_masks[assignment.segment], target.stuff_masks])
        return resize_maps(masks.float(), [self.mask_loss_scale * side for side in shape])


def mask_queries(
    assignments: Sequence[Assignment], targets: Sequence[Targets], num_things: int
) -> list[Tensor]:
    """
    The queries that have a mask target: matched things, then the stuff that is present.

    Args:
        assignments: of the last layer, one an image.
        targets: one an image.
        num_things: thing queries Q; the stuff query of class i is Q + i.

    Returns:
        N x (R,) int64.
    """
    return [
        torch.cat([assignment.query, num_things + target.stuff_labels])
        for assignment, target in zip(assignments, targets, strict=True)
    ]


def _name(key: str, layer: int, num_layers: int) -> str:
    return key if layer == num_layers - 1 else f"{key}_{layer}"


def _num_segments(assignments: Sequence[Assignment], targets: Sequence[Targets]) -> Tensor:
    """Things and stuff segments of all processes, at least 1 each, divided by the processes."""
    counts = torch.tensor(
        [
            sum(len(assignment.query) for assignment in assignments),
            sum(len(target.stuff_labels) for target in targets),
        ],
        dtype=torch.float32,
        device=targets[0].thing_labels.device,
    )
    if not (dist.is_available() and dist.is_initialized()):
        return counts.clamp(min=1).sum()
    dist.all_reduce(counts)
    # Unlike the official code: clamped before averaging, so that processes with few segments
    # together give the loss that one process would.
    return counts.clamp(min=1).sum() / dist.get_world_size()
