import pytest
import torch

from psf.modeling.postprocessing import (
    MergingRules,
    best_class_of_each_query,
    best_thing_pairs,
    merge_mask_wise,
    merge_pixel_wise,
    segment_scores,
)

RULES = MergingRules(
    class_exponent=1,
    mask_exponent=2,
    score_threshold=0.25,
    thing_keep_fraction=0.6,
    stuff_keep_fraction=0.8,
    area_offset=0,
)
MERGERS = [merge_mask_wise, merge_pixel_wise]


def rows(*spans: tuple[int, int], width: int = 10) -> torch.Tensor:
    """Masks of one row: 0.9 in [start, stop), 0.1 elsewhere."""
    masks = torch.full((len(spans), 1, width), 0.1)
    for mask, (start, stop) in zip(masks, spans, strict=True):
        mask[0, start:stop] = 0.9
    return masks


@pytest.mark.parametrize("merge", MERGERS)
def test_no_candidates(merge):
    none = torch.zeros(0)
    segments = merge(none, torch.zeros(0, 3, 4), none.long(), 2, RULES)
    assert segments.id_map.tolist() == [[0] * 4] * 3
    assert segments.id_map.dtype == torch.int32
    assert segments.labels == segments.scores == segments.candidates == []


def test_scores_by_hand():
    """p = 0.8; pixels above 0.5 are 0.6 and 1.0, mean 0.8: 0.8 * 0.8^2. A mask below 0.5 gets 0."""
    masks = torch.tensor([[[0.6, 1.0, 0.5, 0.2]], [[0.5, 0.1, 0.0, 0.3]]])
    scores = segment_scores(torch.tensor([0.8, 0.9]), masks, RULES)
    torch.testing.assert_close(scores, torch.tensor([0.8 * 0.64, 0.0]))


def test_larger_exponents_lower_a_factor():
    masks, probability = torch.full((1, 2, 2), 0.7), torch.tensor([0.6])
    for key in ("class_exponent", "mask_exponent"):
        larger = RULES._replace(**{key: 3})
        score = segment_scores(probability, masks, RULES)
        assert segment_scores(probability, masks, larger) < score


@pytest.mark.parametrize("merge", MERGERS)
def test_better_segments_take_their_pixels_first(merge):
    """The thing covers pixels 0..5, the stuff 4..9, of which 4 of 6 are left: dropped."""
    scores, labels = torch.tensor([0.9, 0.5]), torch.tensor([0, 2])
    segments = merge(scores, rows((0, 6), (4, 10)), labels, 2, RULES)
    assert segments.id_map.tolist() == [[1] * 6 + [0] * 4]
    assert (segments.labels, segments.candidates) == ([0], [0])
    kept = merge(scores, rows((0, 6), (4, 10)), torch.tensor([0, 1]), 2, RULES)
    assert kept.id_map.tolist() == [[1] * 6 + [2] * 4], "a thing may lose 40 % of its mask"


@pytest.mark.parametrize("merge", MERGERS)
def test_low_scores_are_dropped(merge):
    segments = merge(
        torch.tensor([0.24, 0.25]), rows((0, 5), (5, 10)), torch.tensor([0, 1]), 2, RULES
    )
    assert segments.id_map.tolist() == [[0] * 5 + [1] * 5]
    assert segments.labels == [1]
    assert segments.scores == [0.25]


def test_order_of_candidates_does_not_matter():
    torch.manual_seed(0)
    masks, scores = torch.rand(8, 6, 7), torch.rand(8)
    labels, order = torch.randint(0, 4, (8,)), torch.randperm(8)
    one = merge_mask_wise(scores, masks, labels, 2, RULES)
    other = merge_mask_wise(scores[order], masks[order], labels[order], 2, RULES)
    assert torch.equal(one.id_map, other.id_map)
    assert one.labels == other.labels


def test_merging_its_own_result_changes_nothing():
    torch.manual_seed(0)
    masks, scores, labels = torch.rand(8, 6, 7), torch.rand(8) + 0.3, torch.randint(0, 4, (8,))
    rules = RULES._replace(thing_keep_fraction=0.1, stuff_keep_fraction=0.1)
    first = merge_mask_wise(scores, masks, labels, 2, rules)
    assert first.labels
    binary = torch.stack([first.id_map == i for i in range(1, len(first.labels) + 1)]).float()
    again = merge_mask_wise(
        torch.tensor(first.scores), binary, torch.tensor(first.labels), 2, rules
    )
    assert torch.equal(first.id_map, again.id_map)


def test_pixel_wise_gives_a_pixel_to_the_highest_mask():
    """Both claim pixel 1: mask-wise merging gives it to the better score, argmax does not."""
    masks = torch.tensor([[[0.9, 0.55, 0.0, 0.0]], [[0.0, 0.95, 0.95, 0.95]]])
    scores, labels = torch.tensor([0.6, 0.5]), torch.tensor([0, 1])
    rules = RULES._replace(thing_keep_fraction=0.5)
    assert merge_mask_wise(scores, masks, labels, 2, rules).id_map.tolist() == [[1, 1, 2, 2]]
    assert merge_pixel_wise(scores, masks, labels, 2, rules).id_map.tolist() == [[1, 2, 2, 2]]


def test_each_query_has_its_best_class():
    things = torch.tensor([[0.1, 0.9, 0.2], [0.3, 0.2, 0.1]])
    found = best_class_of_each_query(things, torch.tensor([0.5, 0.6]))
    assert found.query.tolist() == [0, 1, 2, 3]
    assert found.labels.tolist() == [1, 0, 3, 4]
    torch.testing.assert_close(found.class_scores, torch.tensor([0.9, 0.3, 0.5, 0.6]))


@pytest.mark.parametrize("num_pairs", [3, 100])
def test_a_query_may_come_with_several_classes(num_pairs):
    things = torch.tensor([[0.1, 0.9, 0.8], [0.3, 0.2, 0.0]])
    found = best_thing_pairs(things, torch.tensor([0.5]), num_pairs)
    number = min(num_pairs, 6)
    assert found.query[:3].tolist() == [0, 0, 1]
    assert found.labels[:3].tolist() == [1, 2, 0]
    assert (found.query[number:].tolist(), found.labels[number:].tolist()) == ([2], [3])
    assert len(found.class_scores) == number + 1


def test_the_released_codes_mean_of_a_mask():
    """Two pixels of 0.9: (0.9 + 0.9) / (2 + 1) = 0.6, squared, times 0.5."""
    masks = torch.tensor([[[0.9, 0.9, 0.1]]])
    rules = RULES._replace(area_offset=1)
    score = segment_scores(torch.tensor([0.5]), masks, rules)
    torch.testing.assert_close(score, torch.tensor([0.5 * 0.36]))
