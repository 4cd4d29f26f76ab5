"""Post-processing: segment scores, mask-wise merging and its ablation, pixel-wise argmax.

Paper, section 3.7. Masks are resized to the output's size a few at a time and never stored, and all
decisions about segments are made on the device: memory does not grow with the number of segments,
and the host waits for the device once per function, not once per segment.

Shapes: Q thing and T stuff queries, K thing classes, R candidate segments of one image, H x W the
size of the output.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from psf.modeling.mask_head import resize_masks

# A pixel belongs to a segment where its soft mask exceeds this (paper, section 3.7).
MASK_THRESHOLD = 0.5

# Values of full-size masks that are computed together: on a CPU as many as fit into its caches,
# elsewhere enough to fill the device.
CHUNK_ON_CPU = 2**20
CHUNK = 2**26


class Segments(NamedTuple):
    """A panoptic segmentation in the model's own class numbers."""

    id_map: Tensor  # (H, W) int32, 0 is void, 1.. number the segments
    labels: list[int]  # class of segment 1, 2, ...: things 0..K-1, stuff K..K+T-1
    scores: list[float]
    areas: list[int]  # pixels of segment 1, 2, ... in id_map
    candidates: list[int]  # index in [0, R) that became segment 1, 2, ...


class MergingRules(NamedTuple):
    """Thresholds and exponents of the merging."""

    class_exponent: float  # alpha, of the class probability (official code: 1)
    mask_exponent: float  # beta, of the mean mask value (official code: 2)
    score_threshold: float  # t_cnf: segments that score less are dropped
    thing_keep_fraction: float  # t_keep: least fraction of a thing's mask that must be free
    stuff_keep_fraction: float
    area_offset: int  # added to the area that a mask's mean is taken over (official code: 1)


class SoftMasks(NamedTuple):
    """Mask probabilities at the output's size, computed a few at a time and never stored."""

    mask_logits: Tensor  # (R, h, w) at the decoder's resolution
    activation: Callable[[Tensor], Tensor]  # applied after upsampling; gives probabilities >= 0
    size: tuple[int, int]  # (H, W)

    def chunks(self, index: Tensor | None = None) -> Iterator[Tensor]:
        """
        The masks, a few at a time.

        Args:
            index: (R',) int64 those that are wanted, in this order; None: all.

        Yields:
            (r, H, W) soft masks; together R' of them.
        """
        limit = CHUNK_ON_CPU if self.mask_logits.device.type == "cpu" else CHUNK
        number = max(1, limit // max(1, self.size[0] * self.size[1]))
        logits = self.mask_logits if index is None else self.mask_logits[index]
        for part in logits.split(number) if len(logits) else ():
            yield self.activation(resize_masks(part, self.size))

    def foreground(self, index: Tensor) -> Tensor:
        """(R', H, W) bool: the wanted masks (R',), thresholded."""
        masks = [part > MASK_THRESHOLD for part in self.chunks(index)]
        empty = torch.zeros(0, *self.size, dtype=torch.bool, device=self.mask_logits.device)
        return torch.cat([empty, *masks])


def segment_scores(class_scores: Tensor, masks: SoftMasks, rules: MergingRules) -> Tensor:
    """
    Class probability^alpha times the mean mask value over the segment's pixels^beta.

    Args:
        class_scores: (R,) in [0, 1].
        masks: R of them.
        rules: with the exponents and the area's offset.

    Returns:
        (R,) >= 0, and <= 1 if the masks are; 0 for a mask without a pixel above the threshold.
    """
    areas, sums = [class_scores.new_zeros(0, dtype=torch.int64)], [class_scores.new_zeros(0)]
    for part in masks.chunks():
        foreground = part > MASK_THRESHOLD
        areas.append(_areas(foreground))
        sums.append((part * foreground).sum((1, 2)))
    mean = torch.cat(sums) / (torch.cat(areas) + rules.area_offset).clamp(min=1)
    return class_scores**rules.class_exponent * mean**rules.mask_exponent


def merge_mask_wise(
    scores: Tensor, masks: SoftMasks, labels: Tensor, num_thing_classes: int, rules: MergingRules
) -> Segments:
    """
    Mask-wise merging (paper, algorithm 1): segments take free pixels in the order of their scores.

    Args:
        scores: (R,) of :func:`segment_scores`; equal scores keep their order.
        masks: R of them.
        labels: (R,) int64, things below ``num_thing_classes``.
        num_thing_classes: K.
        rules: with the thresholds.
    """
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] >= rules.score_threshold]
    fractions = _keep_fractions(labels[order], num_thing_classes, rules)
    owner, areas = _take_pixels(masks, order, fractions, lambda mask, owner, _: mask & (owner == 0))
    return _segments(owner, areas, order, scores, labels)


def merge_pixel_wise(
    scores: Tensor, masks: SoftMasks, labels: Tensor, num_thing_classes: int, rules: MergingRules
) -> Segments:
    """
    The baseline of the paper's ablation: every pixel goes to the mask with the largest value there.

    Masks are weighted by their scores. Segments below the score threshold take no part; a segment
    that loses too many of its pixels to others is dropped, and its pixels stay void. Arguments as
    :func:`merge_mask_wise`.
    """
    candidates = torch.nonzero(scores >= rules.score_threshold)[:, 0]
    fractions = _keep_fractions(labels[candidates], num_thing_classes, rules)
    winner = torch.zeros(masks.size, dtype=torch.int32, device=scores.device)  # 1.. of candidates
    highest = scores.new_full(masks.size, -1.0)
    weights = scores[candidates]
    number = 0
    for part in masks.chunks(candidates):
        for mask in part:
            value = weights[number] * mask
            number += 1
            winner = torch.where(value > highest, number, winner)
            highest = torch.maximum(highest, value)
    owner, areas = _take_pixels(
        masks, candidates, fractions, lambda mask, _, number: mask & (winner == number)
    )
    return _segments(owner, areas, candidates, scores, labels)


MERGING = {"mask_wise": merge_mask_wise, "pixel_wise": merge_pixel_wise}


def _take_pixels(
    masks: SoftMasks,
    order: Tensor,
    fractions: Tensor,
    claim: Callable[[Tensor, Tensor, int], Tensor],
) -> tuple[Tensor, Tensor]:
    """
    Let segments take pixels one after the other, each if it keeps enough of its mask.

    Args:
        masks: R of them.
        order: (R',) int64 in [0, R).
        fractions: (R',) of :func:`_keep_fractions`.
        claim: from a mask (H, W) bool, the owners so far and the segment's number, the pixels
            (H, W) bool that it may have.

    Returns:
        (H, W) int32, 0 or the number 1..R' of the segment that owns the pixel; and (R',) int64
        areas, 0 for the segments that are dropped.
    """
    owner = torch.zeros(masks.size, dtype=torch.int32, device=order.device)
    areas = [order.new_zeros(0)]
    number = 0
    for part in masks.chunks(order):
        foreground = part > MASK_THRESHOLD
        for mask, area in zip(foreground, _areas(foreground), strict=True):
            fraction = fractions[number]
            number += 1
            claimed = claim(mask, owner, number)
            remaining = _areas(claimed[None])
            kept = (remaining > 0) & (remaining >= fraction * area)  # (1,)
            # A condition on the host would wait for the device.
            owner = torch.where(claimed & kept, number, owner)
            areas.append(remaining * kept)
    return owner, torch.cat(areas)


def _areas(masks: Tensor) -> Tensor:
    """(R,) int64 pixels of masks (R, H, W) bool."""
    # Summed as int32, which no image overflows: the kernel for int64 is several times slower.
    return masks.sum((1, 2), dtype=torch.int32).long()


def _keep_fractions(labels: Tensor, num_thing_classes: int, rules: MergingRules) -> Tensor:
    """(R,) float64 the least fraction of each mask that must be left."""
    # In double precision: 0.6 of 5 pixels are 3.
    things = torch.full_like(labels, rules.thing_keep_fraction, dtype=torch.float64)
    return torch.where(labels < num_thing_classes, things, rules.stuff_keep_fraction)


def _segments(
    owner: Tensor, areas: Tensor, candidates: Tensor, scores: Tensor, labels: Tensor
) -> Segments:
    """
    Number the kept segments; the only function here that brings them to the host, all at once.

    Args:
        owner: (H, W) of :func:`_take_pixels`.
        areas: (R',) likewise.
        candidates: (R',) int64 in [0, R), the order in which they took their pixels.
        scores: (R,).
        labels: (R,) int64.
    """
    columns = [areas, labels[candidates], candidates, scores[candidates]]
    table = torch.stack([column.double() for column in columns], dim=1)  # exact for all of them
    number = F.pad((areas > 0).cumsum(0), (1, 0)).int()
    rows = [row for row in table.tolist() if row[0] > 0]
    return Segments(
        id_map=number[owner],
        labels=[int(label) for _, label, _, _ in rows],
        scores=[score for *_, score in rows],
        areas=[int(area) for area, *_ in rows],
        candidates=[int(candidate) for _, _, candidate, _ in rows],
    )
