"""Post-processing: candidates, their scores, mask-wise merging and its ablation, pixel-wise argmax.

Paper, section 3.7. Shapes: Q thing and T stuff queries, K thing classes, R candidate segments of
one image, H x W the size of the output.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# A pixel belongs to a segment where its soft mask exceeds this (paper, section 3.7).
MASK_THRESHOLD = 0.5


class Segments(NamedTuple):
    """A panoptic segmentation in the model's own class numbers."""

    id_map: Tensor  # (H, W) int32, 0 is void, 1.. number the segments
    labels: list[int]  # class of segment 1, 2, ...: things 0..K-1, stuff K..K+T-1
    scores: list[float]
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


def resize_maps(maps: Tensor, size: Sequence[int]) -> Tensor:
    """(R, h, w) to (R, *size), bilinear; R may be 0."""
    return F.interpolate(maps[:, None], size=list(size), mode="bilinear", align_corners=False)[:, 0]


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


def segment_scores(class_scores: Tensor, masks: Tensor, rules: MergingRules) -> Tensor:
    """
    Class probability^alpha times the mean mask value over the segment's pixels^beta.

    Args:
        class_scores: (R,) in [0, 1].
        masks: (R, H, W) soft masks >= 0.
        rules: with the exponents and the area's offset.

    Returns:
        (R,) >= 0, and <= 1 if the masks are; 0 for a mask without a pixel above the threshold.
    """
    foreground = masks > MASK_THRESHOLD
    area = foreground.sum((1, 2))
    mean = (masks * foreground).sum((1, 2)) / (area + rules.area_offset).clamp(min=1)
    return class_scores**rules.class_exponent * mean**rules.mask_exponent


def merge_mask_wise(
    scores: Tensor, masks: Tensor, labels: Tensor, num_thing_classes: int, rules: MergingRules
) -> Segments:
    """
    Mask-wise merging (paper, algorithm 1): segments take free pixels in the order of their scores.

    Args:
        scores: (R,) of :func:`segment_scores`; equal scores keep their order.
        masks: (R, H, W) soft masks.
        labels: (R,) int64, things below ``num_thing_classes``.
        num_thing_classes: K.
        rules: with the thresholds.
    """
    id_map = torch.zeros(masks.shape[1:], dtype=torch.int32, device=masks.device)
    kept = []
    order = scores.argsort(descending=True, stable=True)
    for candidate in order[scores[order] >= rules.score_threshold].tolist():
        foreground = masks[candidate] > MASK_THRESHOLD
        free = foreground & (id_map == 0)
        is_thing = bool(labels[candidate] < num_thing_classes)
        if not _keeps_enough(foreground, free, is_thing=is_thing, rules=rules):
            continue
        kept.append(candidate)
        id_map[free] = len(kept)
    return _segments(id_map, kept, scores, labels)


def merge_pixel_wise(
    scores: Tensor, masks: Tensor, labels: Tensor, num_thing_classes: int, rules: MergingRules
) -> Segments:
    """
    The baseline of the paper's ablation: every pixel goes to the mask that is highest there.

    Masks are weighted by their scores. Segments below the score threshold take no part; one that
    loses too many of its pixels to others is dropped, and what it won stays void. Arguments as
    :func:`merge_mask_wise`.
    """
    id_map = torch.zeros(masks.shape[1:], dtype=torch.int32, device=masks.device)
    candidates = torch.nonzero(scores >= rules.score_threshold)[:, 0]
    kept: list[int] = []
    if len(candidates) == 0:
        return _segments(id_map, kept, scores, labels)
    chosen = masks[candidates]
    winner = (scores[candidates, None, None] * chosen).argmax(0)
    for i, candidate in enumerate(candidates.tolist()):
        foreground = chosen[i] > MASK_THRESHOLD
        won = foreground & (winner == i)
        is_thing = bool(labels[candidate] < num_thing_classes)
        if not _keeps_enough(foreground, won, is_thing=is_thing, rules=rules):
            continue
        kept.append(candidate)
        id_map[won] = len(kept)
    return _segments(id_map, kept, scores, labels)


def _keeps_enough(mask: Tensor, remaining: Tensor, *, is_thing: bool, rules: MergingRules) -> bool:
    """Whether what remains (H, W) of a mask (H, W) is a segment: not empty, and a fair part."""
    area, remaining_area = torch.stack([mask.sum(), remaining.sum()]).tolist()
    fraction = rules.thing_keep_fraction if is_thing else rules.stuff_keep_fraction
    return bool(remaining_area > 0 and remaining_area >= fraction * area)


def _segments(id_map: Tensor, kept: list[int], scores: Tensor, labels: Tensor) -> Segments:
    return Segments(
        id_map=id_map,
        labels=labels[kept].tolist(),
        scores=scores[kept].tolist(),
        candidates=kept,
    )
