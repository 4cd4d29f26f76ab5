import pytest
import torch
from torch.nn import functional as F

from psf.modeling.location_decoder import Locations
from psf.modeling.mask_decoder import JointMaskDecoder, MaskAttention
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


def locate(query: torch.Tensor) -> Locations:
    return Locations(query, torch.zeros(0), torch.zeros(0))


def everything(batch_size: int, num_queries: int) -> list[torch.Tensor]:
    return [torch.arange(num_queries)] * batch_size


@pytest.mark.parametrize("num_queries", [0, 1, 5])
def test_output_shapes(attention, num_queries):
    query = torch.randn(2, num_queries, DIM)
    out, masks = attention(query, memory(2), everything(2, num_queries))
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
    masks = attention(query, tokens, everything(1, 5))[1][0]
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
    torch.testing.assert_close(attention(query, tokens, None)[0], expected)


def test_only_the_wanted_masks_are_made(decoder):
    tokens, query = memory(2), torch.randn(2, 5, DIM)
    wanted = [torch.tensor([6, 1]), torch.tensor([], dtype=torch.int64)]
    every = decoder(tokens, locate(query), everything(2, 7), deep_supervision=True)
    some = decoder(tokens, locate(query), wanted, deep_supervision=True)
    for a, b in zip(every, some, strict=True):
        torch.testing.assert_close(b.mask_logits[0], a.mask_logits[0][[6, 1]])
        assert b.mask_logits[1].shape == (0, 8, 6)
        assert torch.equal(a.thing_logits, b.thing_logits)


@pytest.mark.parametrize("num_layers", [1, 2, None])
def test_inference_gives_the_last_used_layer(decoder, num_layers):
    tokens, query = memory(1), torch.randn(1, 5, DIM)
    every = decoder(tokens, locate(query), everything(1, 7), deep_supervision=True)
    (last,) = decoder(
        tokens, locate(query), everything(1, 7), deep_supervision=False, num_layers=num_layers
    )
    expected = every[(num_layers or LAYERS) - 1]
    assert len(every) == LAYERS
    torch.testing.assert_close(last.mask_logits[0], expected.mask_logits[0])
    torch.testing.assert_close(last.thing_logits, expected.thing_logits)
    torch.testing.assert_close(last.stuff_logits, expected.stuff_logits)


def test_earlier_layers_compute_no_masks_at_inference(decoder, monkeypatch):
    calls = []
    make_masks = MaskAttention._masks
    monkeypatch.setattr(
        MaskAttention, "_masks", lambda self, *args: calls.append(self) or make_masks(self, *args)
    )
    decoder(memory(1), locate(torch.randn(1, 5, DIM)), everything(1, 7), deep_supervision=False)
    assert calls == [decoder.layers[-1].cross_attn]


def test_thing_queries_are_a_set(decoder):
    tokens, query, order = memory(2), torch.randn(2, 5, DIM), torch.randperm(5)
    (a,) = decoder(tokens, locate(query), everything(2, 5), deep_supervision=False)
    (b,) = decoder(tokens, locate(query[:, order]), everything(2, 5), deep_supervision=False)
    torch.testing.assert_close(b.thing_logits, a.thing_logits[:, order])
    torch.testing.assert_close(b.mask_logits[1], a.mask_logits[1][order])


def test_padding_changes_nothing(decoder):
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
    (a,) = decoder(own, locate(query[:1]), everything(1, 7), deep_supervision=False)
    (b,) = decoder(together, locate(query), everything(2, 7), deep_supervision=False)
    assert [m.shape for m in b.mask_logits] == [(7, 4, 5), (7, 8, 6)]
    torch.testing.assert_close(b.mask_logits[0], a.mask_logits[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(b.stuff_logits[:1], a.stuff_logits, atol=1e-5, rtol=1e-5)
