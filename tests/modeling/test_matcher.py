import itertools

import pytest
import torch
from torch.nn import functional as F

from psf.layers.ms_deform_attn import has_extension
from psf.modeling.losses import FOCAL_ALPHA, dice_cost
from psf.modeling.matcher import (
    MaskMatchingWeights,
    MaskPairs,
    MatchingWeights,
    _at_random_points,
    detection_cost,
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
    ((assignment,),) = match_things(
        logits[None, None], boxes[None, None], [torch.tensor([0, 1])], [boxes[[2, 0]]], WEIGHTS
    )
    assert assignment.query.tolist() == [0, 2]
    assert assignment.segment.tolist() == [1, 0]


def test_every_layer_and_image_is_matched_on_its_own():
    """Images have 3, 0 and 7 things, more than there are queries; the result is that of each."""
    counts = [3, 0, 7]
    logits, boxes = torch.randn(2, 3, 6, 4), torch.rand(2, 3, 6, 4)
    labels = [torch.randint(0, 4, (count,)) for count in counts]
    gt_boxes = [torch.rand(count, 4) for count in counts]
    together = match_things(logits, boxes, labels, gt_boxes, WEIGHTS)
    for layer in range(2):
        for i, count in enumerate(counts):
            cost = detection_cost(
                logits[layer, i], boxes[layer, i], labels[i], gt_boxes[i], WEIGHTS
            )
            alone = match(cost)
            assert len(alone.query) == min(6, count)
            assert torch.equal(alone.query, together[layer][i].query)
            assert torch.equal(alone.segment, together[layer][i].segment)


needs_extension = pytest.mark.skipif(not has_extension(), reason="needs the extension")


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("counts", [[3, 0, 7], [0, 0, 0], []])
def test_the_operators_costs_are_those_of_the_function(counts, dtype):
    """Whatever the number of threads; logits also where exponentials overflow."""
    torch.manual_seed(0)
    logits = torch.randn(2, len(counts), 70, 4, dtype=dtype) * 50
    boxes = torch.rand(2, len(counts), 70, 4, dtype=dtype)
    labels = [torch.randint(0, 4, (count,)) for count in counts]
    gt_boxes = [torch.rand(count, 4, dtype=dtype) for count in counts]
    costs = things_cost(logits, boxes, labels, gt_boxes)
    assert costs.shape == (2, len(counts), 70 * max([0, *counts]))
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert torch.equal(things_cost(logits, boxes, labels, gt_boxes), costs)
    finally:
        torch.set_num_threads(threads)
    for i, count in enumerate(counts):
        expected = detection_cost(
            logits[:, i].float(), boxes[:, i], labels[i], gt_boxes[i].float(), WEIGHTS
        )
        own = costs[:, i, : 70 * count].view(2, 70, count)
        torch.testing.assert_close(own, expected.to(dtype), rtol=1e-5, atol=1e-5)


def things_cost(logits, boxes, labels, gt_boxes):
    return torch.ops.psf.things_cost.default(logits, boxes, labels, gt_boxes, *WEIGHTS, FOCAL_ALPHA)


@needs_extension
def test_the_operator_of_costs_names_what_does_not_fit():
    logits, boxes = torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 4)
    for label in (-1, 2):
        with pytest.raises(IndexError, match=f"label {label} of 2 classes"):
            things_cost(logits, boxes, [torch.tensor([label])], [torch.zeros(1, 4)])
    with pytest.raises(RuntimeError, match="things of 1 images, got labels of 2"):
        things_cost(logits, boxes, [torch.zeros(0)] * 2, [torch.zeros(0, 4)])
    with pytest.raises(RuntimeError, match=r"labels must be \(G,\) int64"):
        things_cost(logits, boxes, [torch.zeros(1)], [torch.zeros(1, 4)])
    with pytest.raises(RuntimeError, match="all must be Float as the first is, got Double"):
        things_cost(logits, boxes, [torch.tensor([0])], [torch.zeros(1, 4, dtype=torch.float64)])


def test_costs_of_a_batch_are_those_of_its_images():
    logits, boxes = torch.randn(2, 3, 6, 4), torch.rand(2, 3, 6, 4)
    labels, gt_boxes = torch.randint(0, 4, (3, 5)), torch.rand(3, 5, 4)
    together = detection_cost(logits, boxes, labels, gt_boxes, WEIGHTS)
    for i in range(3):
        alone = detection_cost(logits[:, i], boxes[:, i], labels[i], gt_boxes[i], WEIGHTS)
        torch.testing.assert_close(together[:, i], alone)


MASK_WEIGHTS = MaskMatchingWeights(MatchingWeights(4, 5, 2), dice_weight=2)


def halves() -> torch.Tensor:
    """Two masks, of the upper and the lower half."""
    masks = torch.zeros(2, 4, 4)
    masks[0, :2], masks[1, 2:] = 1, 1
    return masks


def pairs(masks: torch.Tensor, gt_masks: torch.Tensor) -> MaskPairs:
    """Predictions that differ in nothing but their masks."""
    boxes = torch.full((len(masks), 4), 0.5)
    logits, labels = torch.zeros(len(masks), 3), torch.ones(len(masks), dtype=torch.int64)
    return MaskPairs(logits, boxes, masks, labels, boxes, gt_masks)


@pytest.mark.parametrize("num_points", [0, 50])
def test_masks_decide_between_equal_boxes_and_classes(num_points):
    weights = MASK_WEIGHTS._replace(num_points=num_points)
    orders = [[0, 1], [1, 0]]
    images = [pairs(halves()[order], halves()) for order in orders]
    found = match_masks(images, weights)
    assert [assignment.segment.tolist() for assignment in found] == orders


def test_images_of_different_numbers_are_matched_by_masks_as_alone():
    torch.manual_seed(0)
    images = [pairs(torch.rand(n, 5, 6), torch.rand(n, 5, 6)) for n in (4, 0, 1, 7)]
    together = match_masks(images, MASK_WEIGHTS)
    for image, found in zip(images, together, strict=True):
        (alone,) = match_masks([image], MASK_WEIGHTS)
        assert torch.equal(alone.segment, found.segment)
        cost = MASK_WEIGHTS.dice_weight * dice_cost(image.masks, image.gt_masks)
        assert torch.equal(match(cost).segment, found.segment)


def test_points_estimate_the_mask_cost():
    """With random points everywhere the Dice cost of smooth masks is met within a few percent."""
    torch.manual_seed(0)
    low = torch.rand(6, 1, 4, 4)
    masks = F.interpolate(low, size=(32, 32), mode="bilinear")[:, 0]
    seen = _at_random_points(masks, masks.flip(0), 4000)
    assert seen[0].shape == (6, 4000, 1)
    exact = dice_cost(masks, masks.flip(0))
    torch.testing.assert_close(dice_cost(*seen), exact, atol=0.02, rtol=0)


def test_no_masks():
    nothing = torch.zeros(0, 4, 4)
    (found,) = match_masks([pairs(nothing, nothing)], MASK_WEIGHTS)
    assert found.query.tolist() == found.segment.tolist() == []
