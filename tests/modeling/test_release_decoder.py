"""What the released decoder does in its own way; what both decoders share: test_mask_decoder.py."""

import pytest
import torch

from psf.modeling.encoder import Memory
from psf.modeling.location_decoder import LocationPredictions
from psf.modeling.mask_decoder import MatchedQueries
from psf.modeling.release_decoder import DecoupledMaskDecoder

SHAPES = [(8, 6), (4, 3), (2, 2)]
DIM, THINGS, STUFF, THING_LAYERS, STUFF_LAYERS = 16, 3, 2, 3, 4


@pytest.fixture
def decoder() -> DecoupledMaskDecoder:
    return DecoupledMaskDecoder(
        dim=DIM,
        num_stuff_classes=STUFF,
        num_thing_layers=THING_LAYERS,
        num_stuff_layers=STUFF_LAYERS,
        num_heads=4,
        num_levels=len(SHAPES),
        feedforward_dim=24,
    ).eval()


@pytest.fixture
def memory() -> Memory:
    return Memory(torch.randn(1, 64, DIM), None, SHAPES, torch.ones(1, 3, 2))


@pytest.fixture
def locations() -> LocationPredictions:
    return LocationPredictions(torch.randn(1, 5, DIM), torch.randn(2, 1, 5, THINGS), torch.zeros(0))


def test_things_are_classified_by_the_location_decoder(decoder, memory, locations):
    outputs = decoder(memory, locations.query)
    every, _ = decoder.predict_classes(outputs, locations, last_only=False)
    last, _ = decoder.predict_classes(outputs, locations, last_only=True)
    assert len(every) == 0, "the location decoder has its own loss"
    assert torch.equal(last[0], locations.pred_logits[-1])


@pytest.mark.parametrize(
    ("num_layers", "things", "stuff"), [(1, 1, 1), (3, 3 + 1, 3), (4, 3 + 1, 4 + 1), (None, 4, 5)]
)
def test_the_tail_makes_masks_if_all_layers_are_used(
    decoder, memory, locations, num_layers, things, stuff
):
    outputs = decoder(memory, locations.query, num_layers)
    queries = MatchedQueries([torch.arange(5)], [torch.arange(STUFF)])
    thing_masks, stuff_masks = decoder.predict_masks(
        outputs, locations, memory, [SHAPES], queries, last_only=False
    )
    assert (len(thing_masks), len(stuff_masks)) == (things, stuff)
    assert all((masks[0] >= 0).all() for masks in thing_masks + stuff_masks)
    _, stuff_logits = decoder.predict_classes(outputs, locations, last_only=False)
    assert len(stuff_logits) == min(stuff, STUFF_LAYERS), "the tail does not classify"


def test_the_position_of_a_stuff_query_accumulates(decoder, memory):
    """It is added before every layer, and the sum is what the layer refines."""
    stack = decoder.stuff
    query, position = torch.randn(1, STUFF, DIM), torch.randn(STUFF, DIM)
    *_, last, tail = stack(query, position, memory)
    for layer in stack.layers:
        query = layer(query + position, memory).query
    torch.testing.assert_close(last.query, query)
    torch.testing.assert_close(tail.q, stack.tail(query + position, memory).q)


def test_stuff_queries_see_each_other(decoder, memory):
    layer = decoder.stuff.layers[0]
    query = torch.randn(1, STUFF, DIM)
    attended, _ = layer.self_attn(query, query, query)
    seen = layer.norm3(query + attended)
    torch.testing.assert_close(layer(query, memory).q, layer.cross_attn(seen, memory).q)
