import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from psf.layers import native, transformer
from psf.layers.ms_deform_attn import has_extension
from psf.layers.transformer import (
    FEW_CHANNELS,
    ClassHead,
    attention,
    class_logits,
    has_operator,
    self_attention,
    sine_position_encoding,
    writes_scores,
)


def test_one_cell_by_hand():
    """One cell: the centre lies at half of the image, so the angle is pi and its divisions."""
    encoding = sine_position_encoding((1, 1), [(1, 1)], 8)[0, 0, 0]
    angles = [math.pi, math.pi / 10000 ** (2 / 4)]
    half = [f(a) for a in angles for f in (math.sin, math.cos)]
    torch.testing.assert_close(encoding, torch.tensor(half + half), atol=1e-5, rtol=0)


def test_valid_part_does_not_depend_on_padding():
    alone = sine_position_encoding((3, 5), [(3, 5)], 16)
    padded = sine_position_encoding((8, 7), [(3, 5), (8, 7)], 16)
    torch.testing.assert_close(padded[:1, :3, :5], alone)
    assert padded.isfinite().all()


def test_y_comes_first_then_x():
    encoding = sine_position_encoding((2, 3), [(2, 3)], 8)[0]
    assert torch.equal(encoding[0, 0, 4:], encoding[1, 0, 4:])
    assert torch.equal(encoding[0, 0, :4], encoding[0, 2, :4])
    assert not torch.equal(encoding[0, 0, :4], encoding[1, 0, :4])


def test_channels_must_divide_by_four():
    with pytest.raises(ValueError, match="multiple of 4 channels, got 6"):
        sine_position_encoding((1, 1), [(1, 1)], 6)


@pytest.mark.parametrize("batch_size", [0, 2])
@pytest.mark.parametrize("change", ["nothing", "hook", "module"])
def test_class_logits_are_those_of_the_heads(change, batch_size):
    """Also where a head is no longer what it was built as."""
    torch.manual_seed(0)
    heads = torch.nn.ModuleList(ClassHead(6, 3) for _ in range(2)).double()
    if change == "hook":
        heads[1].register_forward_hook(lambda module, args, output: 2 * output)
    elif change == "module":
        heads[1] = torch.nn.Sequential(heads[1], torch.nn.Tanh())
    queries = torch.randn(2, batch_size, 5, 6, dtype=torch.float64, requires_grad=True)
    inputs = [queries, *heads.parameters()]
    found = class_logits(heads, queries)
    expected = torch.stack([head(query) for head, query in zip(heads, queries, strict=True)])
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    for own, true in zip(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(own, true)


OPERATOR = pytest.param(
    "operator", marks=pytest.mark.skipif(not has_extension(), reason="needs the extension")
)


@pytest.fixture(params=["kernel", "written", OPERATOR])
def way(request, monkeypatch):
    """PyTorch's kernel, scores written out or the extension's operator, whatever the size."""
    limit = 1 << 60 if request.param == "written" else -1
    monkeypatch.setattr(transformer, "FEW_SCORES", {2: limit, 4: limit, 8: limit})
    if request.param != "operator":
        monkeypatch.setattr(transformer, "FEW_CHANNELS", 0)
    return request.param


def heads(num_tokens):
    return torch.randn(2, num_tokens, 3, 4, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("num_queries", [0, 1, 5])
def test_attention_is_its_definition(way, num_queries):
    q, k, v = heads(num_queries), heads(6), heads(6)
    visible = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    assert writes_scores(q, k) == (way == "written")
    assert has_operator(q, 0.0) == (way == "operator")
    scores = torch.einsum("nqmd,nsmd->nmqs", q, k) / 2  # sqrt(4) channels
    weights = scores.masked_fill(~visible[:, None, None], -math.inf).softmax(-1)
    expected = torch.einsum("nmqs,nsmd->nqmd", weights, v).flatten(2)
    found = attention(q, k, v, visible)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(expected)
    grads = [torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (found, expected)]
    torch.testing.assert_close(*grads)


def test_attention_to_no_keys_is_zero(way):
    q, k, v = heads(3), heads(0), heads(0)
    found = attention(q, k, v)
    assert found.shape == (2, 3, 12)
    assert not found.any()
    (grad,) = torch.autograd.grad(found.sum(), q)
    assert not grad.any()


def test_operator_is_for_plain_numbers_of_a_cpu_in_few_channels(monkeypatch):
    monkeypatch.setattr(native, "has_extension", lambda: True)
    q = torch.randn(2, 3, 4, FEW_CHANNELS)
    assert has_operator(q, 0.0)
    assert has_operator(q.double(), 0.0)
    assert not has_operator(q, 0.1)
    assert not has_operator(q.bfloat16(), 0.0)
    assert not has_operator(q.to("meta"), 0.0)
    assert not has_operator(torch.randn(2, 3, 4, FEW_CHANNELS + 1), 0.0)
    with torch.autocast("cpu"):
        assert not has_operator(q, 0.0)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not has_operator(q, 0.0)
    monkeypatch.undo()
    monkeypatch.setattr(native, "has_extension", lambda: False)
    assert not has_operator(q, 0.0)


def test_self_attention_is_the_modules(way):
    module = nn.MultiheadAttention(12, 3, batch_first=True).double()
    nn.init.normal_(module.in_proj_bias)
    nn.init.normal_(module.out_proj.bias)
    query, value = torch.randn(2, 2, 5, 12, dtype=torch.float64, requires_grad=True)
    expected, found = module(query, query, value)[0], self_attention(module, query, value)
    torch.testing.assert_close(found, expected)
    inputs = (query, value, *module.parameters())
    weight = torch.randn_like(expected)
    grads = [torch.autograd.grad((x * weight).sum(), inputs) for x in (found, expected)]
    torch.testing.assert_close(*grads)


def test_self_attention_drops_weights_in_training_only(way, monkeypatch):
    """With the module's probability, in every way; only PyTorch's know dropout."""
    dropped = []

    def note(x, p=0.5, training=True, inplace=False):
        dropped.append(p)
        return x

    kernel = F.scaled_dot_product_attention

    def note_kernel(*args, dropout_p, **others):
        dropped.append(dropout_p)
        return kernel(*args, **others)

    monkeypatch.setattr(F, "dropout", note)
    monkeypatch.setattr(F, "scaled_dot_product_attention", note_kernel)
    module = nn.MultiheadAttention(12, 3, dropout=0.25, batch_first=True)
    query = torch.randn(2, 5, 12)
    for mode in (True, False):
        self_attention(module.train(mode), query, query)
    assert dropped == ([0.25] if way == "operator" else [0.25, 0.0])
