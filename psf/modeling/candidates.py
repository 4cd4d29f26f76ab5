"""Candidate segments at inference: which queries, with which classes, can become segments.

Classes are known before masks, so masks are made only for the queries that can still matter.

Shapes: Q thing and T stuff queries, K thing classes, R candidates of one image.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from psf.modeling.postprocessing import MergingRules

# Relative slack for sums of floats that are compared with a bound.
ROUNDING = 1e-4


class Candidates(NamedTuple):
    """Queries of one image that may become segments, each with a class."""

    query: Tensor  # (R,) int64; the stuff query of class i is Q + i
    labels: Tensor  # (R,) int64 classes: things 0..K-1, stuff K..K+T-1
    class_scores: Tensor  # (R,) in [0, 1]

    def select(self, index: Tensor) -> "Candidates":
        """Those of an index (R',) int64, or of a mask (R,) bool."""
        return Candidates(*(column[index] for column in self))


def best_class_of_each_query(thing_scores: Tensor, stuff_scores: Tensor) -> Candidates:
    """
    The paper's candidates: each query once, with its best class.

    Args:
        thing_scores: (Q, K) in [0, 1].
        stuff_scores: (T,) in [0, 1].

    Returns:
        R = Q + T candidates, things first.
    """
    if thing_scores.shape[1] == 0:  # a data set without things; there is no best class
        return best_thing_pairs(thing_scores, stuff_scores, num_pairs=0)
    best, labels = thing_scores.max(-1)
    things = Candidates(torch.arange(len(best), device=best.device), labels, best)
    return _with_stuff(things, stuff_scores, *thing_scores.shape)


def best_thing_pairs(thing_scores: Tensor, stuff_scores: Tensor, num_pairs: int) -> Candidates:
    """
    The official code's candidates: the best (query, class) pairs, and all stuff.

    Args:
        thing_scores: (Q, K) in [0, 1].
        stuff_scores: (T,) in [0, 1].
        num_pairs: most things; a query may occur several times, with different classes.

    Returns:
        R = min(num_pairs, Q K) + T candidates, things first, by falling score.
    """
    num_classes = thing_scores.shape[1]
    best, pair = thing_scores.flatten().topk(min(num_pairs, thing_scores.numel()))
    things = Candidates(pair // num_classes, pair % num_classes, best)
    return _with_stuff(things, stuff_scores, *thing_scores.shape)


def _with_stuff(
    things: Candidates, stuff_scores: Tensor, num_queries: int, num_classes: int
) -> Candidates:
    """Thing candidates, then every stuff query."""
    stuff = torch.arange(len(stuff_scores), device=stuff_scores.device)
    return Candidates(
        query=torch.cat([things.query, num_queries + stuff]),
        labels=torch.cat([things.labels, num_classes + stuff]),
        class_scores=torch.cat([things.class_scores, stuff_scores]),
    )


def may_matter(
    candidates: Candidates,
    greatest: Tensor | float,
    rules: MergingRules,
    *,
    num_thing_classes: int,
    num_instances: int,
) -> Tensor:
    """
    Which candidates can reach the score threshold, or are among the best instances.

    Args:
        candidates: R of them.
        greatest: (R,) upper bounds of the values of their masks, or one for all.
        rules: with the threshold and the exponents.
        num_thing_classes: K.
        num_instances: keep so many things of the highest class scores in any case.

    Returns:
        (R,) bool.
    """
    greatest = torch.as_tensor(greatest, device=candidates.class_scores.device)
    bound = candidates.class_scores**rules.class_exponent
    bound = bound * (greatest * (1 + ROUNDING)) ** rules.mask_exponent
    keep = ~(bound < rules.score_threshold)  # NaN, of 0 * inf, proves nothing
    things = (candidates.labels < num_thing_classes).nonzero()[:, 0]
    best = candidates.class_scores[things].topk(min(num_instances, len(things)))
    keep[things[best.indices]] = True
    return keep
