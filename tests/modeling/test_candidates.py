import pytest
import torch

from psf.modeling.candidates import (
    Candidates,
    best_class_of_each_query,
    best_thing_pairs,
    may_matter,
)
from psf.modeling.postprocessing import MergingRules

RULES = MergingRules(
    class_exponent=1,
    mask_exponent=2,
    score_threshold=0.25,
    thing_keep_fraction=0.6,
    stuff_keep_fraction=0.8,
    area_offset=0,
)


@pytest.mark.parametrize("num_queries", [0, 4])
def test_a_data_set_without_things(num_queries):
    """Queries have no class to become a segment of; stuff is numbered after them."""
    found = best_class_of_each_query(torch.zeros(num_queries, 0), torch.tensor([0.5, 0.6]))
    assert found.query.tolist() == [num_queries, num_queries + 1]
    assert found.labels.tolist() == [0, 1]


def test_no_things_and_no_stuff():
    things = torch.zeros(0, 3)
    for found in (
        best_class_of_each_query(things, torch.zeros(0)),
        best_thing_pairs(things, torch.zeros(0), 5),
    ):
        assert found.query.shape == found.labels.shape == found.class_scores.shape == (0,)
        kept = may_matter(found, 1.0, RULES, num_thing_classes=3, num_instances=4)
        assert kept.tolist() == []


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


def candidates(*scores: float) -> Candidates:
    """Things of class 0, 1, 2, ..."""
    index = torch.arange(len(scores))
    return Candidates(index, index, torch.tensor(scores))


def test_scores_that_cannot_reach_the_threshold_do_not_matter():
    """0.25 needs a mask of 1, 0.9 one above 0.53; a mask without a bound may reach anything."""
    found = candidates(0.2, 0.25, 0.9)
    for greatest, kept in (
        (1.0, [False, True, True]),
        (torch.tensor([1.0, 0.9, 0.55]), [False, False, True]),
        (torch.inf, [True, True, True]),
    ):
        matter = may_matter(found, greatest, RULES, num_thing_classes=3, num_instances=0)
        assert matter.tolist() == kept


def test_nothing_is_known_of_a_score_of_zero_and_a_mask_without_a_bound():
    matter = may_matter(candidates(0.0), torch.inf, RULES, num_thing_classes=3, num_instances=0)
    assert matter.tolist() == [True]


def test_the_best_instances_matter_whatever_their_score():
    """The last is stuff, which is no instance."""
    found = candidates(0.01, 0.03, 0.02, 0.04)
    for number, kept in ((0, []), (2, [1, 2]), (10, [0, 1, 2])):
        matter = may_matter(found, 1.0, RULES, num_thing_classes=3, num_instances=number)
        assert matter.nonzero()[:, 0].tolist() == kept
