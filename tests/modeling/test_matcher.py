import itertools

import pytest
import torch
from torch.nn import functional as F

from psf.modeling.losses import dice_cost
from psf.modeling.matcher import (
    MaskMatchingWeights,
    MatchingWeights,
    detection_cost,
    match,
    match_boxes,
    match_masks,
)

WEIGHTS = MatchingWeights(class_weight=2, l1_weight=5, giou_weight=2)
MASK_WEIGHTS = MaskMatchingWeights(MatchingWeights(4, 5, 2), dice_weight=2)


@pytest.mark.parametrize(("num_queries", "num_segments"), [(0, 0), (4, 0), (0, 3)])
def test_nothing_to_match(num_queries, num_segments):
    matching = match(torch.zeros(num_queries, num_segments))
    assert matching.query.shape == matching.target.shape == (0,)
    assert matching.query.dtype == matching.target.dtype == torch.int64


@pytest.mark.parametrize(("num_queries", "num_segments"), [(5, 3), (4, 4), (3, 5)])
def test_least_cost_by_brute_force(num_queries, num_segments):
    cost = torch.randn(num_queries, num_segments, dtype=torch.float64)
    query, target = match(cost)
    size = min(num_queries, num_segments)
    assert len(query) == len(set(query.tolist())) == len(set(target.tolist())) == size
    assert query.tolist() == sorted(query.tolist())
    best = min(
        cost[list(q), list(g)].sum()
        for q in itertools.permutations(range(num_queries), size)
        for g in itertools.combinations(range(num_segments), size)
    )
    torch.testing.assert_close(cost[query, target].sum(), best)


def test_diverged_predictions_still_get_a_matching():
    cost = torch.tensor([[float("nan"), float("inf")], [1.0, 0.0], [0.0, 1.0]])
    query, target = match(cost)
    assert list(zip(query.tolist(), target.tolist(), strict=True)) == [(1, 1), (2, 0)]


def test_things_are_matched_by_class_and_place():
    """Query 0 has the right box and class of thing 1, query 2 those of thing 0, query 1 nothing."""
    boxes = torch.tensor([[0.7, 0.7, 0.2, 0.2], [0.5, 0.5, 1.0, 1.0], [0.2, 0.2, 0.1, 0.1]])
    logits = torch.tensor([[-4.0, 4.0], [-4.0, -4.0], [4.0, -4.0]])
    ((matching,),) = match_boxes(
        logits[None, None], boxes[None, None], [torch.tensor([0, 1])], [boxes[[2, 0]]], WEIGHTS
    )
    assert matching.query.tolist() == [0, 2]
    assert matching.target.tolist() == [1, 0]


def test_every_layer_and_image_is_matched_on_its_own():
    """Images have 3, 0 and 7 things, more than there are queries; the result is that of each."""
    counts = [3, 0, 7]
    logits, boxes = torch.randn(2, 3, 6, 4), torch.rand(2, 3, 6, 4)
    labels = [torch.randint(0, 4, (count,)) for count in counts]
    gt_boxes = [torch.rand(count, 4) for count in counts]
    together = match_boxes(logits, boxes, labels, gt_boxes, WEIGHTS)
    for layer in range(2):
        for i, count in enumerate(counts):
            cost = detection_cost(
                logits[layer, i], boxes[layer, i], labels[i], gt_boxes[i], WEIGHTS
            )
            alone = match(cost)
            assert len(alone.query) == min(6, count)
            assert torch.equal(alone.query, together[layer][i].query)
            assert torch.equal(alone.target, together[layer][i].target)


def test_costs_of_a_batch_are_those_of_its_images():
    logits, boxes = torch.randn(2, 3, 6, 4), torch.rand(2, 3, 6, 4)
    labels, gt_boxes = torch.randint(0, 4, (3, 5)), torch.rand(3, 5, 4)
    together = detection_cost(logits, boxes, labels, gt_boxes, WEIGHTS)
    for i in range(3):
        alone = detection_cost(logits[:, i], boxes[:, i], labels[i], gt_boxes[i], WEIGHTS)
        torch.testing.assert_close(together[:, i], alone)


@pytest.mark.parametrize("num_points", [0, 50])
@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_masks_decide_between_equal_boxes_and_classes(num_points, order):
    """The upper and the lower half of an image."""
    halves = torch.zeros(2, 4, 4)
    halves[0, :2], halves[1, 2:] = 1, 1
    weights = MASK_WEIGHTS._replace(num_points=num_points)
    found = match_masks(halves[order], halves, torch.zeros(2, 2), weights)
    assert found.target.tolist() == order


def test_points_find_the_matching_of_whole_masks():
    """Smooth masks in another order, with a little noise."""
    masks = F.interpolate(torch.rand(6, 1, 4, 4), size=(32, 32), mode="bilinear")[:, 0]
    order = torch.randperm(6)
    noisy = masks[order] + 0.05 * torch.rand(6, 32, 32)
    weights = MASK_WEIGHTS._replace(num_points=500)
    assert torch.equal(match_masks(noisy, masks, torch.zeros(6, 6), weights).target, order)


def test_masks_and_boxes_count_together():
    """Of two things as good in their masks, the one at the right place is taken."""
    masks = torch.rand(3, 5, 6)
    cost = torch.rand(3, 2)
    found = match_masks(masks, masks[:1].expand(2, -1, -1), cost, MASK_WEIGHTS)
    total = cost + 2 * dice_cost(masks, masks[:1].expand(2, -1, -1))
    assert torch.equal(found.query, match(total).query)
    assert torch.equal(found.target, match(total).target)


def test_no_masks():
    nothing = torch.zeros(0, 4, 4)
    found = match_masks(nothing, nothing, torch.zeros(0, 0), MASK_WEIGHTS)
    assert found.query.tolist() == found.target.tolist() == []
