"""The obvious way to merge: every mask at full size at once, and a decision of the host a segment.

What ``psf.modeling.postprocessing`` has to reproduce.
"""

import torch
from torch import Tensor

from psf.modeling.postprocessing import MASK_THRESHOLD, MergingRules


def plain_scores(class_scores: Tensor, masks: Tensor, rules: MergingRules) -> Tensor:
    """Scores (R,) of masks (R, H, W)."""
    foreground = masks > MASK_THRESHOLD
    area = foreground.sum((1, 2))
    mean = (masks * foreground).sum((1, 2)) / (area + rules.area_offset).clamp(min=1)
    return class_scores**rules.class_exponent * mean**rules.mask_exponent


def plain_mask_wise(
    scores: Tensor, masks: Tensor, labels: Tensor, num_thing_classes: int, rules: MergingRules
) -> tuple[Tensor, list[int]]:
    """The map (H, W) of segments, and which masks (R, H, W) they are."""
    id_map = torch.zeros(masks.shape[1:], dtype=torch.int32)
    kept = []
    for candidate in scores.argsort(descending=True, stable=True).tolist():
        if scores[candidate] < rules.score_threshold:
            continue
        mask = masks[candidate] > MASK_THRESHOLD
        free = mask & (id_map == 0)
        if _keeps_enough(mask, free, labels[candidate] < num_thing_classes, rules):
            kept.append(candidate)
            id_map[free] = len(kept)
    return id_map, kept


def plain_pixel_wise(
    scores: Tensor, masks: Tensor, labels: Tensor, num_thing_classes: int, rules: MergingRules
) -> tuple[Tensor, list[int]]:
    """As above, where the highest weighted mask wins a pixel."""
    id_map = torch.zeros(masks.shape[1:], dtype=torch.int32)
    kept: list[int] = []
    candidates = torch.nonzero(scores >= rules.score_threshold)[:, 0].tolist()
    if not candidates:
        return id_map, kept
    winner = (scores[candidates, None, None] * masks[candidates]).argmax(0)
    for i, candidate in enumerate(candidates):
        mask = masks[candidate] > MASK_THRESHOLD
        won = mask & (winner == i)
        if _keeps_enough(mask, won, labels[candidate] < num_thing_classes, rules):
            kept.append(candidate)
            id_map[won] = len(kept)
    return id_map, kept


def _keeps_enough(mask: Tensor, rest: Tensor, is_thing: Tensor, rules: MergingRules) -> bool:
    fraction = rules.thing_keep_fraction if is_thing else rules.stuff_keep_fraction
    area, remaining = int(mask.sum()), int(rest.sum())
    return remaining > 0 and remaining >= fraction * area
