import itertools

import pytest
import torch

from psf.modeling.matcher import (
    MaskMatchingWeights,
    MatchingWeights,
    match,
    match_masks,
    match_things,
)

WEIGHTS = MatchingWeights(class_weight=2, l1_weight=5, giou_weight=2)


@pytest.mark.parametrize(("num_queries", "num_segments"), [(0, 0), (4, 0), (0, 3)])
def test_nothing_to_match(num_queries, num_segments):
    assignment = match(torch.zeros(num_queries, num_segments))
    assert assignment.query.shape == assignment.segment.shape == (0,)
    assert assignment.query.dtype == torch.int64


@pytest.mark.parametrize(("num_queries", "num_segments"), [(5, 3), (4, 4), (3, 5)])
def test_least_cost_by_brute_force(num_queries, num_segments):
    cost = torch.randn(num_queries, num_segments, dtype=torch.float64)
    query, segment = match(cost)
    size = min(num_queries, num_segments)
    assert len(query) == len(set(query.tolist())) == len(set(segment.tolist())) == size
    assert query.tolist() == sorted(query.tolist())
    best = min(
        cost[list(q), list(g)].sum()
        for q in itertools.permutations(range(num_queries), size)
        for g in itertools.combinations(range(num_segments), size)
    )
    torch.testing.assert_close(cost[query, segment].sum(), best)


def test_diverged_predictions_still_get_an_assignment():
    cost = torch.tensor([[float("nan"), float("inf")], [1.0, 0.0], [0.0, 1.0]])
    query, segment = match(cost)
    assert list(zip(query.tolist(), segment.tolist(), strict=True)) == [(1, 1), (2, 0)]


def test_things_are_matched_by_class_and_place():
    """Query 0 has the right box and class of thing 1, query 2 those of thing 0, query 1 nothing."""
    boxes = torch.tensor([[0.7, 0.7, 0.2, 0.2], [0.5, 0.5, 1.0, 1.0], [0.2, 0.2, 0.1, 0.1]])
    logits = torch.tensor([[-4.0, 4.0], [-4.0, -4.0], [4.0, -4.0]])
    (assignment,) = match_things(
        logits[None], boxes[None], torch.tensor([0, 1]), boxes[[2, 0]], WEIGHTS
    )
    assert assignment.query.tolist() == [0, 2]
    assert assignment.segment.tolist() == [1, 0]


def test_every_layer_is_matched_on_its_own():
    logits, boxes = torch.randn(3, 6, 2), torch.rand(3, 6, 4)
    labels, gt_boxes = torch.tensor([0, 1, 1]), torch.rand(3, 4)
    together = match_things(logits, boxes, labels, gt_boxes, WEIGHTS)
    for layer in range(3):
        (alone,) = match_things(
            logits[layer : layer + 1], boxes[layer : layer + 1], labels, gt_boxes, WEIGHTS
        )
        assert torch.equal(alone.query, together[layer].query)
        assert torch.equal(alone.segment, together[layer].segment)


MASK_WEIGHTS = MaskMatchingWeights(MatchingWeights(4, 5, 2), dice_weight=2)


def test_masks_decide_between_equal_boxes_and_classes():
    logits, boxes = torch.zeros(2, 3), torch.tensor([[0.5, 0.5, 0.4, 0.4]] * 2)
    gt_masks = torch.zeros(2, 4, 4)
    gt_masks[0, :2], gt_masks[1, 2:] = 1, 1
    labels = torch.tensor([1, 1])
    for order in ([0, 1], [1, 0]):
        found = match_masks(logits, boxes, gt_masks[order], labels, boxes, gt_masks, MASK_WEIGHTS)
        assert found.segment.tolist() == order


def test_no_masks():
    found = match_masks(
        torch.zeros(0, 3),
        torch.zeros(0, 4),
        torch.zeros(0, 4, 4),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(0, 4),
        torch.zeros(0, 4, 4),
        MASK_WEIGHTS,
    )
    assert found.query.tolist() == found.segment.tolist() == []
