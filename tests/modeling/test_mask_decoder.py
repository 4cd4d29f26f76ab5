import pytest
import torch
from torch.nn import functional as F

from psf.layers import blocks
from psf.layers.ms_deform_attn import has_extension
from psf.modeling import mask_decoder
from psf.modeling.location_decoder import Locations
from psf.modeling.mask_decoder import (
    AttentionMaps,
    DecoupledMaskDecoder,
    JointMaskDecoder,
    MaskAttention,
    MaskDecoderLayer,
    MaskQueries,
    group_queries,
)
from psf.modeling.pixel_encoder import Memory

SHAPES = [(8, 6), (4, 3), (2, 2)]
DIM, HEADS, THINGS, STUFF, LAYERS = 16, 4, 3, 2, 3


def memory(batch_size: int, shapes=SHAPES) -> Memory:
    num_positions = sum(h * w for h, w in shapes)
    return Memory(torch.randn(batch_size, num_positions, DIM), None, shapes, [shapes] * batch_size)


@pytest.fixture
def attention() -> MaskAttention:
    torch.manual_seed(0)
    return MaskAttention(dim=DIM, num_heads=HEADS, num_levels=len(SHAPES)).eval()


@pytest.fixture
def decoder() -> JointMaskDecoder:
    torch.manual_seed(0)
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
    torch.manual_seed(0)
    return DecoupledMaskDecoder(
        dim=DIM,
        num_stuff_classes=STUFF,
        num_thing_layers=LAYERS,
        num_stuff_layers=LAYERS + 1,
        num_heads=HEADS,
        num_levels=len(SHAPES),
        feedforward_dim=24,
    ).eval()


@pytest.fixture(params=["decoder", "decoupled"])
def any_decoder(request) -> JointMaskDecoder | DecoupledMaskDecoder:
    return request.getfixturevalue(request.param)


def locate(query: torch.Tensor) -> Locations:
    return Locations(query, torch.randn(2, *query.shape[:2], THINGS), torch.zeros(0))


def all_masks(batch_size: int) -> MaskQueries:
    return MaskQueries([torch.arange(5)] * batch_size, [torch.arange(STUFF)] * batch_size)


def predict(decoder, tokens, places, num_layers=None):
    """Class predictions, and N x (Q + T, h, w) maps of all queries."""
    classes = decoder.predict_classes(tokens, places, num_layers)
    batch_size, num_queries = places.query.shape[:2]
    wanted = MaskQueries(
        [torch.arange(num_queries)] * batch_size, [torch.arange(STUFF)] * batch_size
    )
    return classes, decoder.predict_masks(tokens, classes, wanted, num_layers)


def attend(attention, query, tokens):
    """Attended queries (N, Q, C), and N x (Q, h, w) maps of all of them."""
    attended, projections = attention(query, tokens.features, tokens.padding_mask)
    wanted = [torch.arange(query.shape[1])] * len(query)
    return attended, attention.maps(projections, tokens, group_queries(tokens, wanted))


@pytest.mark.parametrize("small", [SHAPES, [(6, 4), (3, 2), (1, 1)]])
def test_parts_of_images_come_in_order(attention, small):
    """Images of one or two sizes, with different numbers of queries in their parts."""
    tokens = memory(3)
    tokens = Memory(tokens.features, None, SHAPES, [SHAPES, small, SHAPES])
    query = torch.randn(3, 5, DIM)
    projections = attention.project(query, tokens.features)
    every = attend(attention, query, tokens)[1]
    parts = [torch.tensor(part, dtype=torch.int64) for part in ([1], [4, 0], [], [3], [2], [])]
    found = attention.maps(projections, tokens, group_queries(tokens, parts, parts=2))
    assert len(found) == len(parts)
    for i, (own, part) in enumerate(zip(found, parts, strict=True)):
        torch.testing.assert_close(own, every[i // 2][part])


@pytest.mark.parametrize("num_queries", [0, 1, 5])
def test_output_shapes(attention, num_queries):
    query = torch.randn(2, num_queries, DIM)
    out, masks = attend(attention, query, memory(2))
    assert out.shape == (2, num_queries, DIM)
    assert [m.shape for m in masks] == [(num_queries, 8, 6)] * 2


def test_masks_equal_the_papers_order_of_operations(attention):
    """Upsample every head, concatenate, then project: what the fused code must reproduce."""
    tokens, query = memory(1), torch.randn(1, 5, DIM)
    q, k = (
        p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)[0]
        for p, x in ((attention.q_proj, query), (attention.k_proj, tokens.features))
    )
    logits = q @ k.transpose(-2, -1) / (DIM // HEADS) ** 0.5  # (M, 5, S)
    maps = []
    for level, projection, (h, w) in zip(
        logits.split([h * w for h, w in SHAPES], dim=2), attention.level_projs, SHAPES, strict=True
    ):
        heads = projection(level.permute(1, 2, 0)).relu().transpose(1, 2).reshape(5, HEADS, h, w)
        maps.append(F.interpolate(heads, size=SHAPES[0], mode="bilinear"))
    fused = attention.mask_proj(torch.cat(maps, 1).permute(0, 2, 3, 1))[..., 0]
    masks = attend(attention, query, tokens)[1][0]
    torch.testing.assert_close(masks, fused)


def test_attention_is_ordinary_attention(attention):
    tokens, query = memory(2), torch.randn(2, 5, DIM)
    q, k, v = (
        p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for p, x in (
            (attention.q_proj, query),
            (attention.k_proj, tokens.features),
            (attention.v_proj, tokens.features),
        )
    )
    weights = (q @ k.transpose(-2, -1) / (DIM // HEADS) ** 0.5).softmax(-1)
    expected = attention.out_proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attend(attention, query, tokens)[0], expected)


def test_only_the_wanted_masks_are_made(any_decoder):
    tokens, places = memory(2), locate(torch.randn(2, 5, DIM))
    none = torch.tensor([], dtype=torch.int64)
    wanted = MaskQueries(things=[torch.tensor([3, 1]), none], stuff=[torch.tensor([1]), none])
    every = any_decoder(tokens, places, all_masks(2))
    some = any_decoder(tokens, places, wanted)
    for a, b in zip(every.thing_maps, some.thing_maps, strict=True):
        torch.testing.assert_close(b[0], a[0][[3, 1]])
        assert b[1].shape == (0, 8, 6)
    for a, b in zip(every.stuff_maps, some.stuff_maps, strict=True):
        torch.testing.assert_close(b[0], a[0][[1]])
        assert b[1].shape == (0, 8, 6)
    for a, b in zip(every.stuff_logits, some.stuff_logits, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("num_layers", [1, 2, None])
def test_inference_gives_the_last_used_layer(any_decoder, num_layers):
    tokens, places = memory(1), locate(torch.randn(1, 5, DIM))
    every = any_decoder(tokens, places, all_masks(1))
    last, maps = predict(any_decoder, tokens, places, num_layers)
    index = (num_layers or 0) - 1
    expected = torch.cat([every.thing_maps[index][0], every.stuff_maps[index][0]])
    torch.testing.assert_close(maps[0], expected)
    torch.testing.assert_close(last.stuff_logits, every.stuff_logits[index])
    assert any_decoder.activation is every.activation


@pytest.mark.parametrize("num_layers", [1, None])
def test_inference_makes_only_the_wanted_masks(any_decoder, num_layers):
    tokens, places = memory(2), locate(torch.randn(2, 5, DIM))
    classes, every = predict(any_decoder, tokens, places, num_layers)
    none = torch.tensor([], dtype=torch.int64)
    wanted = MaskQueries(things=[torch.tensor([1, 4]), none], stuff=[torch.tensor([1]), none])
    some = any_decoder.predict_masks(tokens, classes, wanted, num_layers)
    torch.testing.assert_close(some[0], every[0][[1, 4, 6]])
    assert some[1].shape == (0, 8, 6)


def test_masks_stay_below_their_bound(any_decoder):
    _, maps = predict(any_decoder, memory(2), locate(10 * torch.randn(2, 5, DIM)))
    values = any_decoder.activation(1000 * torch.stack(maps))
    assert values.max() <= any_decoder.greatest_mask_value
    assert values.min() >= 0
    bounded = isinstance(any_decoder, JointMaskDecoder)
    assert (values.max() <= 1) == bounded, "a mask of the released decoder has no bound"


def test_every_layer_of_the_joint_decoder_classifies_things(decoder):
    tokens, places = memory(1), locate(torch.randn(1, 5, DIM))
    every = decoder(tokens, places, all_masks(1))
    assert len(every.thing_logits) == len(every.thing_maps) == LAYERS
    last = decoder.predict_classes(tokens, places)
    torch.testing.assert_close(last.thing_logits, every.thing_logits[-1])


def test_things_of_the_decoupled_decoder_are_classified_by_the_location_decoder(decoupled):
    tokens, places = memory(1), locate(torch.randn(1, 5, DIM))
    assert len(decoupled(tokens, places, all_masks(1)).thing_logits) == 0
    last = decoupled.predict_classes(tokens, places)
    assert torch.equal(last.thing_logits, places.logits[-1])


def test_the_tails_masks_come_after_those_of_all_layers(decoupled):
    every = decoupled(memory(1), locate(torch.randn(1, 5, DIM)), all_masks(1))
    assert len(every.thing_maps) == LAYERS + 1
    assert (len(every.stuff_maps), len(every.stuff_logits)) == (LAYERS + 2, LAYERS + 1)
    assert all((m[0] >= 0).all() for m in every.thing_maps + every.stuff_maps)


def test_the_position_of_a_stuff_query_accumulates(decoupled):
    """It is added before every layer, and the sum is what the layer refines."""
    tokens, stack = memory(1), decoupled.stuff
    query, position = torch.randn(1, STUFF, DIM), torch.randn(STUFF, DIM)
    wanted = [torch.arange(STUFF)]
    output = stack(query, position, tokens, wanted, deep_supervision=False)
    by_hand = query
    for layer in stack.layers:
        by_hand, _ = layer(by_hand + position, tokens, None)
    torch.testing.assert_close(output.queries[-1], by_hand)
    (tail,) = stack.tail(by_hand + position, tokens, group_queries(tokens, wanted))
    torch.testing.assert_close(output.maps[-1][0], tail.relu())


def test_coarser_levels_than_a_decoders_are_left_out(any_decoder):
    tokens, places = memory(1, [*SHAPES, (1, 1)]), locate(torch.randn(1, 5, DIM))
    _, expected = predict(any_decoder, tokens.finest(len(SHAPES)), places)
    torch.testing.assert_close(predict(any_decoder, tokens, places)[1], expected)


def test_earlier_layers_compute_no_masks_at_inference(any_decoder, monkeypatch):
    calls = []
    make_maps = AttentionMaps.maps
    monkeypatch.setattr(
        AttentionMaps, "maps", lambda self, *args: calls.append(self) or make_maps(self, *args)
    )
    predict(any_decoder, memory(1), locate(torch.randn(1, 5, DIM)))
    if isinstance(any_decoder, JointMaskDecoder):
        assert calls == [any_decoder.layers[-1].cross_attn]
    else:
        assert calls == [any_decoder.things.tail, any_decoder.stuff.tail]


@pytest.mark.parametrize("num_layers", [1, None])
def test_no_attention_projects_its_keys_twice_at_inference(any_decoder, monkeypatch, num_layers):
    """The masks of the last used layer are made of what its attention has projected."""
    calls = []
    project = AttentionMaps.project
    monkeypatch.setattr(
        AttentionMaps, "project", lambda self, *args: calls.append(self) or project(self, *args)
    )
    with torch.no_grad():
        predict(any_decoder, memory(1), locate(torch.randn(1, 5, DIM)), num_layers)
    assert len(calls) == len(set(calls)) > 0


def test_thing_queries_are_a_set(any_decoder):
    tokens, query, order = memory(2), torch.randn(2, 5, DIM), torch.randperm(5)
    _, a = predict(any_decoder, tokens, locate(query))
    _, b = predict(any_decoder, tokens, locate(query[:, order]))
    torch.testing.assert_close(b[1][:5], a[1][order])
    torch.testing.assert_close(b[1][5:], a[1][5:])


def test_padding_changes_nothing(any_decoder):
    small = [(4, 5), (2, 3), (1, 2)]
    own = memory(1, small)
    shapes = [(8, 6), (4, 3), (2, 2)]
    padded = torch.randn(2, 64, DIM)
    mask = torch.zeros(2, 64, dtype=torch.bool)
    start = own_start = 0
    for (height, width), (h, w) in zip(shapes, small, strict=True):
        index = torch.arange(start, start + height * width).view(height, width)
        padded[0, index[:h, :w].flatten()] = own.features[0, own_start : own_start + h * w]
        mask[0, index.flatten()] = True
        mask[0, index[:h, :w].flatten()] = False
        start, own_start = start + height * width, own_start + h * w
    together = Memory(padded, mask, shapes, [small, shapes])
    query = torch.randn(2, 5, DIM)
    a, a_maps = predict(any_decoder, own, locate(query[:1]))
    b, b_maps = predict(any_decoder, together, locate(query))
    assert [m.shape for m in b_maps] == [(7, 4, 5), (7, 8, 6)]
    torch.testing.assert_close(b_maps[0], a_maps[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(b.stuff_logits[:1], a.stuff_logits, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not has_extension(), reason="needs the extension")
@pytest.mark.parametrize("used", ["queries", "masks", "both"])
@pytest.mark.parametrize("self_attention", [False, True])
def test_layer_in_training_is_its_modules(self_attention, used, monkeypatch):
    """As operators of the extension: values, and gradients of queries, memory and parameters."""
    layer = MaskDecoderLayer(
        dim=DIM,
        num_heads=HEADS,
        num_levels=len(SHAPES),
        feedforward_dim=24,
        self_attention=self_attention,
    ).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    tokens = memory(2)
    features = tokens.features.double().requires_grad_()
    padding_mask = torch.zeros(features.shape[:2], dtype=torch.bool)
    padding_mask[1, 5:20] = True
    tokens = tokens._replace(features=features, padding_mask=padding_mask)
    query = torch.randn(2, 7, DIM, dtype=torch.float64, requires_grad=True)
    groups = group_queries(tokens, [torch.tensor([0, 3, 6]), torch.tensor([2])])

    def run():
        refined, maps = layer(query, tokens, groups)
        outputs = {"queries": [refined], "masks": maps, "both": [refined, *maps]}[used]
        grads = [torch.linspace(-1, 2, x.numel()).view(x.shape).double() for x in outputs]
        leaves = [query, features, *layer.parameters()]
        return [
            *outputs,
            *torch.autograd.grad(outputs, leaves, grads, allow_unused=True, materialize_grads=True),
        ]

    operator, calls = torch.ops.psf.cross_attention_block.default, []

    def spy(*args):
        calls.append(args)
        return operator(*args)

    monkeypatch.setattr(torch.ops.psf.cross_attention_block, "default", spy)
    found = run()
    assert len(calls) == 1
    for module in (blocks, mask_decoder):
        monkeypatch.setattr(module, "runs_as_one", lambda *_: False)
    for x, y in zip(found, run(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12 * max(1.0, y.abs().max().item()))
    assert len(calls) == 1


def test_layer_with_another_attention_runs_it():
    class Silent(MaskAttention):
        def forward(self, query, features, padding_mask):
            attended = super().forward(query, features, padding_mask)
            return attended._replace(query=torch.zeros_like(query))

    layer = MaskDecoderLayer(dim=DIM, num_heads=HEADS, num_levels=3, feedforward_dim=24)
    layer.cross_attn = Silent(dim=DIM, num_heads=HEADS, num_levels=3)
    query, tokens = torch.randn(2, 5, DIM), memory(2)
    refined, _ = layer(query, tokens, None)
    expected = layer.norm1(query)
    torch.testing.assert_close(refined, layer.norm2(expected + layer.ffn(expected)))
