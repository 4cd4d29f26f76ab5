import pytest
import torch

from psf.modeling.encoder import Memory
from psf.modeling.query_selection import QuerySelection, token_boxes

SHAPES = [(4, 6), (2, 3)]


def memory(valid_ratios=None) -> Memory:
    features = torch.randn(2, 24 + 6, 32)
    ratios = torch.ones(2, 2, 2) if valid_ratios is None else valid_ratios
    return Memory(features, None, SHAPES, ratios)


def test_tokens_propose_boxes_at_their_centres():
    boxes = token_boxes(memory()).sigmoid()
    torch.testing.assert_close(boxes[0, 0], torch.tensor([1 / 12, 1 / 8, 0.05, 0.05]))
    torch.testing.assert_close(boxes[1, 8], torch.tensor([5 / 12, 3 / 8, 0.05, 0.05]))
    torch.testing.assert_close(boxes[0, -1], torch.tensor([5 / 6, 3 / 4, 0.1, 0.1]))


def test_places_are_those_of_the_unpadded_image():
    """With half of the width padding, the third of six columns is the last inside."""
    ratios = torch.ones(2, 2, 2)
    ratios[1, :, 0] = 0.5
    boxes = token_boxes(memory(ratios)).sigmoid()
    torch.testing.assert_close(boxes[1, 2, :2], torch.tensor([5 / 6, 1 / 8]))
    assert boxes[1, 3:6, 0].gt(0.9999).all()


@pytest.mark.parametrize("num_queries", [5, 30, 70])
def test_the_most_probable_tokens_are_chosen(num_queries):
    torch.manual_seed(0)
    selection, tokens = QuerySelection(dim=32, num_classes=3), memory()
    mask = torch.zeros(2, 30, dtype=torch.bool)
    mask[1, :25] = True
    proposals = selection(tokens._replace(padding_mask=mask), num_queries)
    logits = selection.class_head(selection.proj(tokens.features))
    assert proposals.logits.shape == (2, num_queries, 3)
    assert proposals.boxes.shape == (2, num_queries, 4)
    expected = logits[0].amax(-1).sort(descending=True).values
    expected = expected.repeat(3)[:num_queries]  # with fewer tokens than queries
    torch.testing.assert_close(proposals.logits[0].amax(-1), expected)
    inside = min(5, num_queries)
    expected = logits[1, 25:].amax(-1).sort(descending=True).values[:inside]
    torch.testing.assert_close(proposals.logits[1, :inside].amax(-1), expected)
    assert proposals.logits.isfinite().all()
