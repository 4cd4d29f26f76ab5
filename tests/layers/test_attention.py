"""The extension's attention of few channels a head, against its definition in float64."""

import math

import pytest
import torch
from torch import Tensor

from psf.layers.ms_deform_attn import has_extension

pytestmark = pytest.mark.skipif(not has_extension(), reason="needs the extension")

# N, Q, S, M, D: within a block of scores (32 queries, 128 keys), over several, over the queries of
# a task (128); channels and keys that fill vectors and that do not; remainders of 4 rows.
SIZES = [
    (1, 1, 1, 1, 1),
    (2, 33, 60, 3, 12),
    (2, 70, 336, 2, 12),
    (1, 5, 257, 2, 5),
    (1, 131, 128, 2, 32),
    (2, 258, 129, 1, 3),
]


def definition(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """A query that sees no key gives 0."""
    scores = torch.einsum("nqmd,nsmd->nmqs", q, k) / math.sqrt(q.shape[-1])
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None, None], -math.inf)
        blind = ~visible.any(1)[:, None, None, None]
        scores = scores.masked_fill(blind, 0.0)
        weights = scores.softmax(-1).masked_fill(blind, 0.0)
    else:
        weights = scores.softmax(-1)
    return torch.einsum("nmqs,nsmd->nqmd", weights, v).flatten(2)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    return torch.ops.psf.attention.default(q, k, v, visible)[0]


def inputs(size, dtype=torch.float64):
    images, queries, keys, heads, channels = size
    return [
        torch.randn(images, tokens, heads, channels, dtype=dtype, requires_grad=True)
        for tokens in (queries, keys, keys)
    ]


def results(attend, tensors, visible, grad):
    """Output and gradients, in float64."""
    output = attend(*tensors, visible)
    grads = torch.autograd.grad(output, tensors, grad.to(output))
    return [x.double() for x in (output, *grads)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_is_its_definition(size, dtype, masked):
    tensors = inputs(size, dtype)
    visible = None
    if masked:
        visible = torch.rand(size[0], size[2]) < 0.5
        visible[0, -1] = True
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    grad = torch.randn(size[0], size[1], size[3] * size[4], dtype=torch.float64)
    found = results(attend, tensors, visible, grad)
    expected = results(definition, doubles, visible, grad)
    error = 1e-12 if dtype == torch.float64 else 5e-6  # sums of up to 336 products
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=error * max(1.0, y.abs().max().item()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_scores_do_not_overflow(dtype):
    """Also where the maximum grows from one block of keys to the next, and where weights vanish."""
    q, k, v = (x.detach() for x in inputs((1, 4, 300, 1, 2), dtype))
    k *= torch.linspace(1, 300, 300, dtype=dtype)[None, :, None, None]
    found, expected = attend(q, k, v), definition(q.double(), k.double(), v.double(), None)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_gradcheck():
    visible = torch.tensor([[True, False, True, True], [False, True, False, False]])
    tensors = inputs((2, 3, 4, 2, 3))
    assert torch.autograd.gradcheck(lambda *x: attend(*x, visible), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_query_that_sees_no_key_gives_zero(dtype):
    """As in scaled_dot_product_attention; other images attend as ever."""
    tensors = inputs((2, 3, 140, 2, 4), dtype)
    visible = torch.ones(2, 140, dtype=torch.bool)
    visible[0] = False
    output, *grads = results(attend, tensors, visible, torch.ones(2, 3, 8))
    assert not output[0].any()
    assert output[1].all()
    for grad in grads:
        assert not grad[0].any()
        assert grad[1].any()


@pytest.mark.parametrize("hurt", range(3))
def test_nan_stays(hurt):
    tensors = [x.detach() for x in inputs((1, 3, 40, 1, 4), torch.float32)]
    tensors[hurt][0, 1, 0, 2] = math.nan
    nan = attend(*tensors).isnan()[0]
    assert nan[1].any()
    assert nan[0].any() == (hurt > 0)


@pytest.mark.parametrize("empty", range(5))
def test_empty(empty):
    """Whatever of N, Q, S, M and D is 0."""
    size = [2, 3, 4, 2, 5]
    size[empty] = 0
    tensors = inputs(size, torch.float32)
    output = attend(*tensors, torch.ones(size[0], size[2], dtype=torch.bool))
    assert output.shape == (size[0], size[1], size[3] * size[4])
    assert not output.any()
    grads = torch.autograd.grad(output.sum(), tensors)
    assert [x.shape for x in grads] == [x.shape for x in tensors]
    assert not any(x.any() for x in grads)


def test_views():
    """Slices of one projection, heads first in memory, channels apart, a mask with gaps."""
    qk = torch.randn(2, 5, 2, 3, 4).requires_grad_()
    q, k = qk.unbind(2)
    v = torch.randn(2, 3, 4, 5).requires_grad_()
    heads_first = torch.randn(2, 3, 5, 4).requires_grad_().transpose(1, 2)
    visible = (torch.rand(2, 10) < 0.5).index_fill(1, torch.tensor([2]), True)[:, ::2]
    grad = torch.randn(12).expand(2, 5, 12)
    for value in (v.permute(0, 3, 1, 2), heads_first):
        found = results(attend, [q, k, value], visible, grad)
        copies = [x.detach().double().requires_grad_() for x in (q, k, value)]
        for x, y in zip(found, results(definition, copies, visible, grad), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_threads_do_not_matter():
    tensors = inputs((1, 300, 200, 3, 12), torch.float32)
    grad = torch.randn(1, 300, 36)
    threads = torch.get_num_threads()
    found = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        found.append(results(attend, tensors, None, grad))
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v, m: (q[0], k, v, m), r"q must be \(N, Q, M, D\)"),
        (lambda q, k, v, m: (q, k[:, 1:], v, m), r"k and v \(N, S, M, D\)"),
        (lambda q, k, v, m: (q[..., 1:], k, v, m), r"q must be \(N, Q, M, D\)"),
        (lambda q, k, v, m: (q, k, v.double(), m), "must be Float as q is, got Double"),
        (lambda q, k, v, m: (q, k, v, m[:, 1:]), r"visible must be \(N, S\) = \(2, 4\) bool"),
        (lambda q, k, v, m: (q, k, v, m.float()), r"visible must be .* bool"),
    ],
)
def test_errors(change, message):
    mask = torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(RuntimeError, match=message):
        attend(*change(*inputs((2, 3, 4, 2, 5), torch.float32), mask))
