"""Both mask decoders: what they share, and what each does in its own way."""

import pytest
import torch

from psf.modeling.encoder import Memory
from psf.modeling.location_decoder import LocationPredictions
from psf.modeling.mask_decoder import (
    JointMaskDecoder,
    MaskAttention,
    MaskDecoderLayer,
    MatchedQueries,
)
from psf.modeling.release_decoder import DecoupledMaskDecoder

SHAPES = [(8, 6), (4, 3), (2, 2)]
DIM, HEADS, THINGS, STUFF, LAYERS = 16, 4, 3, 2, 3


def memory(batch_size: int, shapes=SHAPES) -> Memory:
    num_positions = sum(h * w for h, w in shapes)
    ratios = torch.ones(batch_size, len(shapes), 2)
    return Memory(torch.randn(batch_size, num_positions, DIM), None, shapes, ratios)


@pytest.fixture
def joint() -> JointMaskDecoder:
    return JointMaskDecoder(
        dim=DIM,
        num_thing_classes=THINGS,
        num_stuff_classes=STUFF,
        num_layers=LAYERS,
        num_heads=HEADS,
        num_levels=len(SHAPES),
        feedforward_dim=24,
    ).eval()


@pytest.fixture
def decoupled() -> DecoupledMaskDecoder:
    return DecoupledMaskDecoder(
        dim=DIM,
        num_stuff_classes=STUFF,
        num_thing_layers=LAYERS,
        num_stuff_layers=LAYERS + 1,
        num_heads=HEADS,
        num_levels=len(SHAPES),
        feedforward_dim=24,
    ).eval()


@pytest.fixture(params=["joint", "decoupled"])
def decoder(request) -> JointMaskDecoder | DecoupledMaskDecoder:
    return request.getfixturevalue(request.param)


def locate(query: torch.Tensor) -> LocationPredictions:
    return LocationPredictions(query, torch.randn(2, *query.shape[:2], THINGS), torch.zeros(0))


def all_queries(batch_size: int, num_things: int = 5) -> MatchedQueries:
    return MatchedQueries(
        [torch.arange(num_things)] * batch_size, [torch.arange(STUFF)] * batch_size
    )


def predict(decoder, tokens, places, queries=None, *, last_only, num_layers=None, valid=None):
    """Class logits of things and of stuff, then the masks of things and of stuff."""
    batch_size, num_things = places.query.shape[:2]
    outputs = decoder(tokens, places.query, num_layers)
    classes = decoder.predict_classes(outputs, places, last_only=last_only)
    masks = decoder.predict_masks(
        outputs,
        places,
        tokens,
        valid or [tokens.spatial_shapes] * batch_size,
        queries or all_queries(batch_size, num_things),
        last_only=last_only,
    )
    return *classes, *masks


def last_masks(decoder, tokens, places, queries=None, **options):
    """N x (R_things + R_stuff, h, w) of the last layer."""
    *_, things, stuff = predict(decoder, tokens, places, queries, last_only=True, **options)
    assert len(things) == len(stuff) == 1
    return [torch.cat(both) for both in zip(things[0], stuff[0], strict=True)]


def test_attention_is_ordinary_attention():
    attention = MaskAttention(dim=DIM, num_heads=HEADS, num_levels=len(SHAPES))
    tokens, query = memory(2), torch.randn(2, 5, DIM)
    visible = torch.ones(2, tokens.features.shape[1], dtype=torch.bool)
    visible[1, 10:] = False
    q, k, v = (
        proj(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for proj, x in (
            (attention.q_proj, query),
            (attention.k_proj, tokens.features),
            (attention.v_proj, tokens.features),
        )
    )
    logits = q @ k.transpose(-2, -1) / (DIM // HEADS) ** 0.5
    for mask, tokens_seen in ((None, tokens), (visible, tokens._replace(padding_mask=~visible))):
        seen = logits if mask is None else logits.masked_fill(~mask[:, None, None], -torch.inf)
        expected = attention.out_proj((seen.softmax(-1) @ v).transpose(1, 2).flatten(2))
        found = attention(query, tokens_seen)
        torch.testing.assert_close(found.query, expected)
        torch.testing.assert_close(found.q @ found.k.transpose(-2, -1), q @ k.transpose(-2, -1))


@pytest.mark.parametrize("num_queries", [1, 5])
def test_shapes(decoder, num_queries):
    places = locate(torch.randn(2, num_queries, DIM))
    masks = last_masks(decoder, memory(2), places)
    assert [m.shape for m in masks] == [(num_queries + STUFF, 8, 6)] * 2


def test_a_layer_is_post_norm():
    layer = MaskDecoderLayer(dim=DIM, num_heads=HEADS, num_levels=3, feedforward_dim=24)
    query, tokens = torch.randn(2, 5, DIM), memory(2)
    attended = layer.norm1(query + layer.cross_attn(query, tokens).query)
    expected = layer.norm2(attended + layer.ffn(attended))
    torch.testing.assert_close(layer(query, tokens).query, expected)


def test_masks_of_wanted_queries_are_those_of_all(decoder):
    tokens, places = memory(2), locate(torch.randn(2, 5, DIM))
    none = torch.tensor([], dtype=torch.int64)
    wanted = MatchedQueries(things=[torch.tensor([3, 1]), none], stuff=[torch.tensor([1]), none])
    *_, things, stuff = predict(decoder, tokens, places, last_only=False)
    *_, some_things, some_stuff = predict(decoder, tokens, places, wanted, last_only=False)
    for every, some in zip(things, some_things, strict=True):
        torch.testing.assert_close(some[0], every[0][[3, 1]])
        assert some[1].shape == (0, 8, 6)
    for every, some in zip(stuff, some_stuff, strict=True):
        torch.testing.assert_close(some[0], every[0][[1]])
        assert some[1].shape == (0, 8, 6)


@pytest.mark.parametrize("num_layers", [1, 2, None])
def test_inference_gives_the_last_used_layer(decoder, num_layers):
    tokens, places = memory(1), locate(torch.randn(1, 5, DIM))
    _, stuff_logits, things, stuff = predict(decoder, tokens, places, last_only=False)
    _, last_logits, *_ = predict(decoder, tokens, places, last_only=True, num_layers=num_layers)
    (masks,) = last_masks(decoder, tokens, places, num_layers=num_layers)
    index = (num_layers or 0) - 1
    torch.testing.assert_close(masks, torch.cat([things[index][0], stuff[index][0]]))
    torch.testing.assert_close(last_logits[0], stuff_logits[index])


def test_masks_stay_below_their_bound(decoder):
    masks = last_masks(decoder, memory(2), locate(10 * torch.randn(2, 5, DIM)))
    values = decoder.mask_activation(1000 * torch.stack(masks))
    assert values.max() <= decoder.greatest_mask_value
    assert values.min() >= 0
    bounded = isinstance(decoder, JointMaskDecoder)
    assert (values.max() <= 1) == bounded, "a mask of the released decoder has no bound"


def test_every_layer_of_the_joint_decoder_classifies_things(joint):
    places = locate(torch.randn(1, 5, DIM))
    tokens = memory(1)
    thing_logits, _, things, _ = predict(joint, tokens, places, last_only=False)
    assert len(thing_logits) == len(things) == LAYERS
    last, *_ = predict(joint, tokens, places, last_only=True)
    torch.testing.assert_close(last[0], thing_logits[-1])


def test_coarser_levels_than_a_decoders_are_left_out(decoder):
    tokens, places = memory(1, [*SHAPES, (1, 1)]), locate(torch.randn(1, 5, DIM))
    expected = last_masks(decoder, tokens.finest(len(SHAPES)), places)
    torch.testing.assert_close(last_masks(decoder, tokens, places), expected)


def test_thing_queries_are_a_set(decoder):
    tokens, query, order = memory(2), torch.randn(2, 5, DIM), torch.randperm(5)
    a = last_masks(decoder, tokens, locate(query))
    b = last_masks(decoder, tokens, locate(query[:, order]))
    torch.testing.assert_close(b[1][:5], a[1][order])
    torch.testing.assert_close(b[1][5:], a[1][5:])


def test_padding_changes_nothing(decoder):
    small = [(4, 5), (2, 3), (1, 2)]
    own = memory(1, small)
    padded = torch.randn(2, 64, DIM)
    mask = torch.zeros(2, 64, dtype=torch.bool)
    start = own_start = 0
    for (height, width), (h, w) in zip(SHAPES, small, strict=True):
        index = torch.arange(start, start + height * width).view(height, width)
        padded[0, index[:h, :w].flatten()] = own.features[0, own_start : own_start + h * w]
        mask[0, index.flatten()] = True
        mask[0, index[:h, :w].flatten()] = False
        start, own_start = start + height * width, own_start + h * w
    together = Memory(padded, mask, SHAPES, torch.ones(2, 3, 2))
    query = torch.randn(2, 5, DIM)
    (alone,) = last_masks(decoder, own, locate(query[:1]))
    masks = last_masks(decoder, together, locate(query), valid=[small, SHAPES])
    assert [m.shape for m in masks] == [(7, 4, 5), (7, 8, 6)]
    torch.testing.assert_close(masks[0], alone, atol=1e-5, rtol=1e-5)


def test_every_parameter_has_a_gradient_without_any_query(decoder):
    """Else distributed training would wait for it."""
    none = MatchedQueries([torch.arange(0)], [torch.arange(0)])
    places = locate(torch.randn(1, 5, DIM))
    outputs = predict(decoder, memory(1), places, none, last_only=False)
    thing_logits, stuff_logits, things, stuff = outputs
    loss = thing_logits.sum() + stuff_logits.sum()
    (loss + sum(masks[0].sum() for masks in things + stuff)).backward()
    without = [name for name, p in decoder.named_parameters() if p.grad is None]
    assert without == []


def test_the_decoupled_decoder_leaves_things_to_the_location_decoder(decoupled):
    tokens, places = memory(1), locate(torch.randn(1, 5, DIM))
    every, *_ = predict(decoupled, tokens, places, last_only=False)
    last, *_ = predict(decoupled, tokens, places, last_only=True)
    assert len(every) == 0, "the location decoder has its own loss"
    assert torch.equal(last[0], places.pred_logits[-1])


@pytest.mark.parametrize(
    ("num_layers", "things", "stuff"), [(1, 1, 1), (3, 3 + 1, 3), (4, 3 + 1, 4 + 1), (None, 4, 5)]
)
def test_the_tail_makes_masks_if_all_layers_are_used(decoupled, num_layers, things, stuff):
    places = locate(torch.randn(1, 5, DIM))
    _, stuff_logits, thing_masks, stuff_masks = predict(
        decoupled, memory(1), places, last_only=False, num_layers=num_layers
    )
    assert (len(thing_masks), len(stuff_masks)) == (things, stuff)
    assert all((masks[0] >= 0).all() for masks in thing_masks + stuff_masks)
    assert len(stuff_logits) == min(stuff, LAYERS + 1), "the tail does not classify"


def test_the_position_of_a_stuff_query_accumulates(decoupled):
    """It is added before every layer, and the sum is what the layer refines."""
    stack = decoupled.stuff
    tokens = memory(1)
    query, position = torch.randn(1, STUFF, DIM), torch.randn(STUFF, DIM)
    *_, last, tail = stack(query, position, tokens)
    for layer in stack.layers:
        query = layer(query + position, tokens).query
    torch.testing.assert_close(last.query, query)
    torch.testing.assert_close(tail.q, stack.tail(query + position, tokens).q)


def test_stuff_queries_see_each_other(decoupled):
    layer = decoupled.stuff.layers[0]
    tokens, query = memory(1), torch.randn(1, STUFF, DIM)
    attended, _ = layer.self_attn(query, query, query)
    seen = layer.norm3(query + attended)
    torch.testing.assert_close(layer(query, tokens).q, layer.cross_attn(seen, tokens).q)
