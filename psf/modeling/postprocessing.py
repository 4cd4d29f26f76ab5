"""Post-processing: candidates, their scores, mask-wise merging and its ablation, pixel-wise argmax.

Paper, section 3.7. Masks are brought to the output's size a few at a time and never kept, and what
happens to a segment is decided on the device: memory does not grow with their number, and the host
waits for the device once a function, not once a segment.

Shapes: Q thing and T stuff queries, K thing classes, R candidate segments of one image, H x W the
size of the output.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# A pixel belongs to a segment where its soft mask exceeds this (paper, section 3.7).
MASK_THRESHOLD = 0.5

# Values of full-size masks that are computed together: on a CPU what its caches hold (more is ten
# times slower for each mask: every temporary then comes as new pages from the system), elsewhere
# enough to fill the device.
CHUNK_ON_CPU = 2**20
CHUNK = 2**26


class Segments(NamedTuple):
    """A panoptic segmentation in the model's own class numbers."""

    id_map: Tensor  # (H, W) int32, 0 is void, 1.. number the segments
    labels: list[int]  # class of segment 1, 2, ...: things 0..K-1, stuff K..K+T-1
    scores: list[float]
    areas: list[int]  # pixels of segment 1, 2, ... in id_map
    candidates: list[int]  # index in [0, R) that became segment 1, 2, ...


class Candidates(NamedTuple):
    """Queries of one image that may become segments, each with a class."""

    query: Tensor  # (R,) int64; the stuff query of class i is Q + i
    labels: Tensor  # (R,) int64 classes: things 0..K-1, stuff K..K+T-1
    class_scores: Tensor  # (R,) in [0, 1]


class MergingRules(NamedTuple):
    """Thresholds and exponents of the merging."""

    class_exponent: float  # alpha, of the class probability (official code: 1)
    mask_exponent: float  # beta, of the mean mask value (official code: 2)
    score_threshold: float  # t_cnf: segments that score less are dropped
    thing_keep_fraction: float  # t_keep: least fraction of a thing's mask that must be free
    stuff_keep_fraction: float
    area_offset: int  # added to the area that a mask's mean is taken over (official code: 1)


class SoftMasks(NamedTuple):
    """Masks of the output's size, which exist only while they are looked at."""

    maps: Tensor  # (R, h, w) at the decoder's resolution
    activation: Callable[[Tensor], Tensor]  # turns maps, once resized, into soft masks >= 0
    size: tuple[int, int]  # (H, W)

    def chunks(self, index: Tensor | None = None) -> Iterator[Tensor]:
        """
        The masks, a few at a time.

        Args:
            index: (R',) int64 those that are wanted, in this order; None: all.

        Yields:
            (r, H, W) soft masks; together R' of them.
        """
        limit = CHUNK_ON_CPU if self.maps.device.type == "cpu" else CHUNK
        number = max(1, limit // max(1, self.size[0] * self.size[1]))
        maps = self.maps if index is None else self.maps[index]
        for part in maps.split(number) if len(maps) else ():
            yield self.activation(resize_maps(part, self.size))

    def foreground(self, index: Tensor) -> Tensor:
        """(R', H, W) bool: the wanted masks (R',), thresholded."""
        masks = [part > MASK_THRESHOLD for part in self.chunks(index)]
        empty = torch.zeros(0, *self.size, dtype=torch.bool, device=self.maps.device)
        return torch.cat([empty, *masks])


def resize_maps(maps: Tensor, size: Sequence[int]) -> Tensor:
    """(R, h, w) to (R, *size), bilinear; R may be 0."""
    return F.interpolate(maps[:, None], size=list(size), mode="bilinear", align_corners=False)[:, 0]


def as_they_are(maps: Tensor) -> Tensor:
    """The activation of maps that have had theirs."""
    return maps


def best_class_of_each_query(thing_scores: Tensor, stuff_scores: Tensor) -> Candidates:
    """
    The paper's candidates: each query once.

    Args:
        thing_scores: (Q, K) in [0, 1].
        stuff_scores: (T,) in [0, 1].

    Returns:
        R = Q + T candidates, things first.
    """
    best, labels = thing_scores.max(-1)
    return _with_stuff(
        torch.arange(len(best), device=best.device), labels, best, stuff_scores, thing_scores.shape
    )


def best_thing_pairs(thing_scores: Tensor, stuff_scores: Tensor, num_pairs: int) -> Candidates:
    """
    The official code's candidates: the best (query, class) pairs, and all stuff.

    Args:
        thing_scores: (Q, K) in [0, 1].
        stuff_scores: (T,) in [0, 1].
        num_pairs: most things; a query may come several times, with different classes.

    Returns:
        R = min(num_pairs, Q K) + T candidates, things first, by falling score.
    """
    num_classes = thing_scores.shape[1]
    best, pair = thing_scores.flatten().topk(min(num_pairs, thing_scores.numel()))
    return _with_stuff(
        pair // num_classes, pair % num_classes, best, stuff_scores, thing_scores.shape
    )


def _with_stuff(
    query: Tensor, labels: Tensor, scores: Tensor, stuff_scores: Tensor, shape: Sequence[int]
) -> Candidates:
    """Thing candidates, then every stuff query; ``shape`` is (Q, K)."""
    num_queries, num_classes = shape
    stuff = torch.arange(len(stuff_scores), device=scores.device)
    return Candidates(
        query=torch.cat([query, num_queries + stuff]),
        labels=torch.cat([labels, num_classes + stuff]),
        class_scores=torch.cat([scores, stuff_scores]),
    )


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
    taken = _take_pixels(masks, order, fractions, lambda mask, owner, _: mask & (owner == 0))
    return _segments(taken, order, scores, labels)


def merge_pixel_wise(
    scores: Tensor, masks: SoftMasks, labels: Tensor, num_thing_classes: int, rules: MergingRules
) -> Segments:
    """
    The baseline of the paper's ablation: every pixel goes to the mask that is highest there.

    Masks are weighted by their scores. Segments below the score threshold take no part; one that
    loses too many of its pixels to others is dropped, and what it won stays void. Arguments as
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
    taken = _take_pixels(
        masks, candidates, fractions, lambda mask, _, number: mask & (winner == number)
    )
    return _segments(taken, candidates, scores, labels)


class _Taken(NamedTuple):
    """Which of R' segments have been kept, and their pixels."""

    owner: Tensor  # (H, W) int32, 0 or the number 1..R' of the segment that has the pixel
    kept: list[Tensor]  # R' bools
    areas: list[Tensor]  # R' numbers of pixels, of what each segment asked for


def _take_pixels(
    masks: SoftMasks,
    order: Tensor,
    fractions: Tensor,
    claim: Callable[[Tensor, Tensor, int], Tensor],
) -> _Taken:
    """
    Let segments take pixels one after the other, each if it keeps enough of its mask.

    Args:
        masks: R of them.
        order: (R',) int64 in [0, R).
        fractions: (R',) of :func:`_keep_fractions`.
        claim: from a mask (H, W) bool, the owners so far and the segment's number, the pixels
            (H, W) bool that it may have.
    """
    owner = torch.zeros(masks.size, dtype=torch.int32, device=order.device)
    kept: list[Tensor] = []
    areas: list[Tensor] = []
    for part in masks.chunks(order):
        foreground = part > MASK_THRESHOLD
        for mask, area in zip(foreground, _areas(foreground), strict=True):
            claimed = claim(mask, owner, len(kept) + 1)
            areas.append(_areas(claimed[None])[0])
            kept.append(_keeps_enough(area, areas[-1], fractions[len(kept)]))
            # A condition of the host would wait for the device.
            owner = torch.where(claimed & kept[-1], len(kept), owner)
    return _Taken(owner, kept, areas)


def _areas(masks: Tensor) -> Tensor:
    """(R,) int64 pixels of masks (R, H, W) bool."""
    # Summed as int32, which no image overflows: the kernel for int64 is several times slower.
    return masks.sum((1, 2), dtype=torch.int32).long()


def _keep_fractions(labels: Tensor, num_thing_classes: int, rules: MergingRules) -> Tensor:
    """(R,) float64 the least fraction of each mask that must be left."""
    fractions = [rules.thing_keep_fraction, rules.stuff_keep_fraction]
    # As a number of the host, in double precision: 0.6 of 5 pixels are 3.
    things, stuff = (torch.full_like(labels, f, dtype=torch.float64) for f in fractions)
    return torch.where(labels < num_thing_classes, things, stuff)


def _keeps_enough(area: Tensor, remaining: Tensor, fraction: Tensor) -> Tensor:
    """Whether what remains of a mask's area is a segment: not empty, and a fair part; a bool."""
    return (remaining > 0) & (remaining >= fraction * area)


def _segments(taken: _Taken, candidates: Tensor, scores: Tensor, labels: Tensor) -> Segments:
    """
    Number the kept segments; the only function here that brings them to the host, all at once.

    Args:
        taken: of :func:`_take_pixels`.
        candidates: (R',) int64 in [0, R), the order that they took their pixels in.
        scores: (R,).
        labels: (R,) int64.
    """
    if not taken.kept:
        return Segments(id_map=taken.owner, labels=[], scores=[], areas=[], candidates=[])
    columns = [torch.stack(taken.kept), torch.stack(taken.areas), candidates]
    columns += [scores[candidates], labels[candidates]]
    table = torch.stack([column.double() for column in columns], dim=1)  # exact for all of them
    number = F.pad(columns[0].cumsum(0), (1, 0)).int()
    rows = [row for row in table.tolist() if row[0]]
    return Segments(
        id_map=number[taken.owner],
        labels=[int(label) for *_, label in rows],
        scores=[score for *_, score, _ in rows],
        areas=[int(area) for _, area, *_ in rows],
        candidates=[int(candidate) for _, _, candidate, *_ in rows],
    )
