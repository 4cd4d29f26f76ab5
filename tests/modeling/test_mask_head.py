import pytest
import torch

from psf.modeling import mask_head
from psf.modeling.mask_head import HeadWeights, Levels, mask_maps, mask_maps_reference

HEADS, CHANNELS = 3, 5
PADDED = ((5, 6), (3, 3), (2, 2))
WHOLE = Levels(PADDED, PADDED)
PART = Levels(PADDED, ((4, 5), (2, 3), (1, 2)))
FIVE_LOGITS = 5  # of which every query of every level here has more


def arguments(num_queries=4, n=2, dtype=torch.float64):
    """Queries and keys as projections give them, and weights; all with gradients."""
    torch.manual_seed(0)
    size = sum(h * w for h, w in PADDED)
    q, k = (
        torch.randn(n, count, HEADS * CHANNELS, dtype=dtype)
        .unflatten(-1, (HEADS, CHANNELS))
        .transpose(1, 2)
        .requires_grad_()
        for count in (num_queries, size)
    )
    shapes = ((3, HEADS, HEADS), (3, HEADS), (3, HEADS), (1,))
    weights = HeadWeights(*(torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes))
    return q, k, weights


def outputs_and_gradients(function, q, k, levels, weights):
    maps = function(q, k, levels, weights)
    torch.manual_seed(1)
    grad = torch.randn(maps.shape, dtype=torch.float64).to(maps.dtype)
    return maps, torch.autograd.grad(maps, (q, k, *weights), grad)


@pytest.mark.parametrize("chunk", [mask_head.CHUNK_SIZE, FIVE_LOGITS])
@pytest.mark.parametrize("levels", [WHOLE, PART])
@pytest.mark.parametrize(("num_queries", "n"), [(0, 2), (1, 1), (4, 2)])
def test_equals_its_definition(monkeypatch, num_queries, n, levels, chunk):
    monkeypatch.setattr(mask_head, "CHUNK_SIZE", chunk)
    q, k, weights = arguments(num_queries, n)
    maps, grads = outputs_and_gradients(mask_maps, q, k, levels, weights)
    expected, expected_grads = outputs_and_gradients(mask_maps_reference, q, k, levels, weights)
    assert maps.shape == (n, num_queries, *levels.valid[0])
    torch.testing.assert_close(maps, expected)
    for found, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("chunk", [mask_head.CHUNK_SIZE, FIVE_LOGITS])
def test_derivatives_are_those_of_the_output(monkeypatch, chunk):
    monkeypatch.setattr(mask_head, "CHUNK_SIZE", chunk)
    q, k, weights = arguments(2)
    assert torch.autograd.gradcheck(
        lambda q, k, *w: mask_maps(q, k, PART, HeadWeights(*w)), (q, k, *weights)
    )


def test_second_derivative_is_refused():
    q, k, weights = arguments()
    loss = mask_maps(q, k, WHOLE, weights).square().sum()
    (grad,) = torch.autograd.grad(loss, q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_single_precision_is_as_accurate_as_the_definition():
    q, k, weights = arguments(dtype=torch.float32)
    exact = [x.detach().double().requires_grad_() for x in (q, k, *weights)]
    _, expected = outputs_and_gradients(
        mask_maps_reference, *exact[:2], PART, HeadWeights(*exact[2:])
    )
    errors = []
    for function in (mask_maps, mask_maps_reference):
        _, grads = outputs_and_gradients(function, q, k, PART, weights)
        errors.append(
            [(g.double() - e).norm() / e.norm() for g, e in zip(grads, expected, strict=True)]
        )
    assert all(ours <= 2 * plain + 1e-7 for ours, plain in zip(*errors, strict=True))


def test_half_precision_queries_give_single_precision_maps():
    """Weights stay float32 and get float32 gradients, as under autocast."""
    q, k, weights = arguments(dtype=torch.float32)
    halves = [x.detach().bfloat16().requires_grad_() for x in (q, k)]
    maps, grads = outputs_and_gradients(mask_maps, *halves, PART, weights)
    exact, exact_grads = outputs_and_gradients(mask_maps, q, k, PART, weights)
    assert maps.dtype == torch.float32
    assert [g.dtype for g in grads] == [torch.bfloat16] * 2 + [torch.float32] * 4
    torch.testing.assert_close(maps, exact, atol=0.1 * exact.std().item(), rtol=0)
    for found, wanted in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(
            found.float(), wanted, atol=0.1 * wanted.abs().max().item(), rtol=0
        )


def test_nothing_but_inputs_is_saved():
    q, k, weights = arguments()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        mask_maps(q, k, WHOLE, weights)
    # Queries twice, once scaled; parameters of a few numbers; no map of any size.
    assert sum(x.numel() for x in saved) <= 2 * q.numel() + k.numel() + 100


def test_chunks_bound_what_exists_at_a_time(monkeypatch):
    monkeypatch.setattr(mask_head, "CHUNK_SIZE", 2 * 2 * HEADS * 30)  # two queries' finest logits
    sizes = []
    make_logits = mask_head._logits
    monkeypatch.setattr(
        mask_head, "_logits", lambda q, k: sizes.append(q.shape[2]) or make_logits(q, k)
    )
    q, k, weights = arguments(5)
    mask_maps(q, k, WHOLE, weights)
    assert sizes == [2] * 6 + [1] * 3
