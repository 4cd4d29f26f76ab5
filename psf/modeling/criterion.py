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

from psf.layers.boxes import compare_boxes
from psf.modeling.location_decoder import Locations
from psf.modeling.losses import shrink_masks, sigmoid_focal_loss, upsampled_dice_loss
from psf.modeling.mask_decoder import DeepPredictions, MaskQueries
from psf.modeling.matcher import (
    Assignment,
    MaskMatchingWeights,
    MaskPairs,
    MatchingWeights,
    match_masks,
    match_things,
)


class Targets(NamedTuple):
    """The ground truth of one image."""

    thing_labels: Tensor  # (G,) int64 in [0, K)
    thing_boxes: Tensor  # (G, 4) cxcywh in [0, 1] of the unpadded image
    thing_masks: Tensor  # (G, H, W) bool
    stuff_labels: Tensor  # (B,) int64 in [0, T), all different
    stuff_masks: Tensor  # (B, H, W) bool


class LossWeights(NamedTuple):
    """The weight of each loss; the paper's letters are lambda with these names."""

    class_weight: float  # focal loss of the classes of things
    stuff_class_weight: float  # focal loss of the classes of stuff
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
        mask_matching: MaskMatchingWeights | None,
        loss_weights: LossWeights,
        mask_loss_scale: int,
    ) -> None:
        """
        Args:
            matching_weights: of the matching cost.
            mask_matching: the thing queries that have masks are matched again, comparing masks,
                with these weights. None: the last layer's matching holds for masks.
            loss_weights: of the losses.
            mask_loss_scale: the Dice loss is taken at so many times the resolution of the
                predicted masks.
        """
        self.matching_weights = matching_weights
        self.mask_matching = mask_matching
        self.loss_weights = loss_weights
        self.mask_loss_scale = mask_loss_scale

    def assign(self, locations: Locations, targets: Sequence[Targets]) -> list[list[Assignment]]:
        """
        Match things to the thing queries of every layer of the location decoder.

        Returns:
            layers x N assignments. The mask decoder computes masks for the queries of the last
            layer's only.
        """
        return match_things(
            locations.logits,
            locations.boxes,
            [target.thing_labels for target in targets],
            [target.thing_boxes for target in targets],
            self.matching_weights,
        )

    def __call__(
        self,
        locations: Locations,
        predictions: DeepPredictions,
        targets: Sequence[Targets],
        assignments: list[list[Assignment]],
        num_segments: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """
        Args:
            locations: of the location decoder.
            predictions: of the mask decoder, with the masks of :func:`mask_queries`.
            targets: one an image.
            assignments: of :meth:`assign`.
            num_segments: () the :func:`normaliser` of a larger batch that the images are a part of;
                None: of these images.

        Returns:
            Weighted losses, summing to the training loss. ``loss_<what>`` is the last layer's,
            ``loss_<what>_<i>`` that of layer i (DETR's names). Every sum is divided by the number
            of segments in the batch (things + stuff, at least 1 each), averaged over processes:
            the official code's normalisers times its dynamic weights of things and stuff.
        """
        matched = assignments[-1]
        pairs = _pairs_of_layers(assignments, targets)
        classes = torch.zeros_like(locations.logits.float())
        classes.flatten(0, 1)[pairs.row, pairs.query, pairs.label] = 1
        sums = {
            **self._location_losses(locations, pairs, classes),
            **self._class_losses(predictions, targets, classes[-1]),
            **self._mask_losses(locations, predictions, targets, matched),
        }
        if num_segments is None:
            num_segments = normaliser(
                sum(len(assignment.query) for assignment in matched),
                sum(len(target.stuff_labels) for target in targets),
                locations.logits.device,
            )
        names = [
            key if layer == len(values) - 1 else f"{key}_{layer}"
            for key, values in sums.items()
            for layer in range(len(values))
        ]
        losses = torch.cat(list(sums.values())) / num_segments
        return dict(zip(names, losses.unbind(), strict=True))

    def _location_losses(
        self, locations: Locations, pairs: "_Pairs", classes: Tensor
    ) -> dict[str, Tensor]:
        """
        Detection losses of Deformable DETR, (layers,): sums, not yet normalised.

        Args:
            locations: of the location decoder.
            pairs: of all its layers, as many in each.
            classes: (layers, N, Q, K) in {0, 1}, 1 for the classes of the pairs.
        """
        weights = self.loss_weights
        boxes = locations.boxes.flatten(0, 1)[pairs.row, pairs.query].float()
        distance, giou = compare_boxes(boxes, pairs.box)  # (layers * n,)
        distance, giou = (x.view(len(classes), -1) for x in (distance, giou))
        focal = sigmoid_focal_loss(locations.logits.float(), classes).sum((1, 2, 3))  # (layers,)
        scale = weights.things_weight
        return {
            "loss_class": scale * weights.class_weight * focal,
            "loss_bbox": scale * weights.l1_weight * distance.sum(1),
            "loss_giou": scale * weights.giou_weight * (1 - giou).sum(1),
        }

    def _class_losses(
        self,
        predictions: DeepPredictions,
        targets: Sequence[Targets],
        thing_classes: Tensor,
    ) -> dict[str, Tensor]:
        """
        Of every layer of the mask decoder that classifies, (layers,): as above.

        Args:
            predictions: of the mask decoder.
            targets: one an image.
            thing_classes: (N, Q, K) in {0, 1}, 1 for the classes of matched queries.
        """
        weights = self.loss_weights
        losses: dict[str, Tensor] = {}
        if len(predictions.thing_logits):
            logits = predictions.thing_logits.float()
            focal = sigmoid_focal_loss(logits, thing_classes).sum((1, 2, 3))
            losses["loss_thing_class"] = weights.things_weight * weights.class_weight * focal
        if len(predictions.stuff_logits):
            logits = predictions.stuff_logits.float()
            classes = torch.zeros_like(logits[0])
            present = [target.stuff_labels for target in targets]
            classes[_image_of_each(present), torch.cat(present)] = 1
            # Unlike the official code: also for images without things.
            focal = sigmoid_focal_loss(logits, classes).sum((1, 2))
            losses["loss_stuff_class"] = weights.stuff_weight * weights.stuff_class_weight * focal
        return losses

    def _mask_losses(
        self,
        locations: Locations,
        predictions: DeepPredictions,
        targets: Sequence[Targets],
        assignments: Sequence[Assignment],
    ) -> dict[str, Tensor]:
        """Of every layer of the mask decoder that makes masks, (layers,): as above."""
        segments = self._mask_segments(locations, predictions, targets, assignments)
        weights = self.loss_weights
        things = [
            target.thing_masks[index] for target, index in zip(targets, segments, strict=True)
        ]
        stuff = [target.stuff_masks for target in targets]
        thing_dice, stuff_dice = (
            _dice_losses(maps, predictions.activation, masks, self.mask_loss_scale)
            for maps, masks in ((predictions.thing_maps, things), (predictions.stuff_maps, stuff))
        )
        return {
            "loss_thing_mask": weights.things_weight * weights.mask_weight * thing_dice,
            "loss_stuff_mask": weights.stuff_weight * weights.mask_weight * stuff_dice,
        }

    def _mask_segments(
        self,
        locations: Locations,
        predictions: DeepPredictions,
        targets: Sequence[Targets],
        assignments: Sequence[Assignment],
    ) -> list[Tensor]:
        """N x (R_things,) int64: the thing whose mask each matched query should predict."""
        if self.mask_matching is None:
            return [assignment.segment for assignment in assignments]
        images = []
        for i, (target, (query, segment)) in enumerate(zip(targets, assignments, strict=True)):
            masks = predictions.activation(predictions.thing_maps[-1][i])
            images.append(
                MaskPairs(
                    logits=locations.logits[-1, i, query],
                    boxes=locations.boxes[-1, i, query],
                    masks=masks,
                    labels=target.thing_labels[segment],
                    gt_boxes=target.thing_boxes[segment],
                    gt_masks=shrink_masks(target.thing_masks[segment], masks.shape[-2:]),
                )
            )
        again = match_masks(images, self.mask_matching)
        return [
            first.segment[second.segment] for first, second in zip(assignments, again, strict=True)
        ]


class _Pairs(NamedTuple):
    """Matched pairs of all layers and images, layers first."""

    row: Tensor  # (n,) int64, layer * N + image
    query: Tensor  # (n,) int64
    label: Tensor  # (n,) int64 in [0, K)
    box: Tensor  # (n, 4) cxcywh of the ground truth


def _pairs_of_layers(layers: Sequence[Sequence[Assignment]], targets: Sequence[Targets]) -> _Pairs:
    flat = [assignment for layer in layers for assignment in layer]
    counts = [len(target.thing_labels) for target in targets]
    # Things of all images follow each other.
    starts = [sum(counts[:i]) for i in range(len(counts))] * len(layers)
    places = [
        (row, start)
        for row, (assignment, start) in enumerate(zip(flat, starts, strict=True))
        for _ in range(len(assignment.query))
    ]
    query, segment = (torch.cat(index) for index in zip(*flat, strict=True))
    place = torch.tensor(places, dtype=torch.int64, device=query.device).view(-1, 2)
    row, start = place.unbind(1)
    thing = segment + start
    return _Pairs(
        row=row,
        query=query,
        label=torch.cat([target.thing_labels for target in targets])[thing],
        box=torch.cat([target.thing_boxes for target in targets])[thing],
    )


def _image_of_each(items: Sequence[Tensor]) -> Tensor:
    """The place in the list of every element of N x (n,) tensors, (sum n,) int64."""
    index = [i for i, item in enumerate(items) for _ in range(len(item))]
    return torch.tensor(index, dtype=torch.int64, device=items[0].device)


def _dice_losses(
    maps: list[list[Tensor]],
    activation: Callable[[Tensor], Tensor],
    masks: Sequence[Tensor],
    scale: int,
) -> Tensor:
    """
    Args:
        maps: layers x N x (R, h, w).
        activation: of the resized maps.
        masks: N x (R, H, W) bool, the targets.
        scale: the loss is taken at so many times the resolution of the maps.

    Returns:
        (layers,), the sum of each.
    """
    groups: dict[tuple[torch.Size, torch.Size], list[int]] = {}
    for image, (own, mask) in enumerate(zip(maps[-1], masks, strict=True)):
        groups.setdefault((own.shape[-2:], mask.shape[-2:]), []).append(image)
    losses = []
    for (size, _), images in groups.items():  # all layers and all images of one size at once
        target = shrink_masks(
            torch.cat([masks[i] for i in images]), [scale * side for side in size]
        )  # (R, scale h, scale w), R of all these images
        own = torch.cat([layer[i] for layer in maps for i in images]).float()
        own = own.unflatten(0, (len(maps), len(target)))
        # Maps are upsampled, then activated: the slope of logits places edges within a cell.
        losses.append(upsampled_dice_loss(own, target, activation).sum(1))
    return torch.stack(losses).sum(0)


def mask_queries(assignments: Sequence[Assignment], targets: Sequence[Targets]) -> MaskQueries:
    """
    The queries that have a mask target: matched things, and the stuff that is present.

    Args:
        assignments: of the last layer, one an image.
        targets: one an image.
    """
    return MaskQueries(
        things=[assignment.query for assignment in assignments],
        stuff=[target.stuff_labels for target in targets],
    )


def normaliser(num_things: int, num_stuff: int, device: torch.device) -> Tensor:
    """
    What the sums of losses are divided by.

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
