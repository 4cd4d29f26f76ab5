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
from psf.modeling.mask_head import MaskHead
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


def test_inference_makes_masks_of_one_layer_only(decoder, monkeypatch):
    calls = []
    forward = MaskHead.forward
    monkeypatch.setattr(
        MaskHead, "forward", lambda self, *args: calls.append(self) or forward(self, *args)
    )
    last_masks(decoder, memory(1), locate(torch.randn(1, 5, DIM)))
    if isinstance(decoder, JointMaskDecoder):
        assert set(calls) == {decoder.layers[-1].cross_attn.mask_head}
    else:
        assert set(calls) == {decoder.things.tail.mask_head, decoder.stuff.tail.mask_head}


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


def test_the_order_of_heads_does_not_matter(joint):
    """If the mask head's weights are permuted with them."""
    tokens, places = memory(1), locate(torch.randn(1, 5, DIM))
    before = last_masks(joint, tokens, places)
    order = torch.randperm(HEADS)
    channels = (order[:, None] * (DIM // HEADS) + torch.arange(DIM // HEADS)).flatten()
    with torch.no_grad():
        for layer in joint.layers:
            attention = layer.cross_attn
            for proj in (attention.q_proj, attention.k_proj, attention.v_proj):
                proj.weight.copy_(proj.weight[channels])
                proj.bias.copy_(proj.bias[channels])
            attention.out_proj.weight.copy_(attention.out_proj.weight[:, channels])
            for proj in attention.mask_head.level_projs:
                proj.weight.copy_(proj.weight[:, order])
    torch.testing.assert_close(last_masks(joint, tokens, places), before)
