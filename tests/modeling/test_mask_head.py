import os
import subprocess
import sys

import pytest
import torch

from psf.layers.ms_deform_attn import has_extension
from psf.layers.native import has_cpu_kernels
from psf.modeling import mask_head
from psf.modeling.mask_head import HeadWeights, Levels, mask_maps, mask_maps_reference

HEADS, CHANNELS = 3, 5
PADDED = ((5, 6), (3, 3), (2, 2))
WHOLE = Levels(PADDED, PADDED)
PART = Levels(PADDED, ((4, 5), (2, 3), (1, 2)))
FIVE_LOGITS = 5  # of which every query of every level here has more


needs_extension = pytest.mark.skipif(not has_extension(), reason="psf._C is not in use")


@pytest.fixture(params=["plain", pytest.param("native", marks=needs_extension)])
def way(request, monkeypatch):
    """Of computing it: plain PyTorch, or the kernels, which are taken where they can be."""
    if request.param == "plain":
        monkeypatch.setattr(mask_head, "has_cpu_kernels", lambda *_: False)
    return request.param


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.setattr(mask_head, "has_cpu_kernels", lambda *_: False)


def arguments(
    num_queries=4, n=2, dtype=torch.float64, padded=PADDED, heads=HEADS, channels=CHANNELS
):
    """Queries and keys as projections give them, and weights; all with gradients."""
    torch.manual_seed(0)
    size = sum(h * w for h, w in padded)
    q, k = (
        torch.randn(n, count, heads * channels, dtype=dtype)
        .unflatten(-1, (heads, channels))
        .transpose(1, 2)
        .requires_grad_()
        for count in (num_queries, size)
    )
    count = len(padded)
    shapes = ((count, heads, heads), (count, heads), (count, heads), (1,))
    weights = HeadWeights(*(torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes))
    return q, k, weights


def outputs_and_gradients(function, q, k, levels, weights):
    maps = function(q, k, levels, weights)
    torch.manual_seed(1)
    grad = torch.randn(maps.shape, dtype=torch.float64).to(maps.dtype)
    return maps, torch.autograd.grad(maps, (q, k, *weights), grad)


def assert_equals_its_definition(q, k, levels, weights):
    maps, grads = outputs_and_gradients(mask_maps, q, k, levels, weights)
    expected, expected_grads = outputs_and_gradients(mask_maps_reference, q, k, levels, weights)
    assert maps.shape == (len(q), q.shape[2], *levels.valid[0])
    torch.testing.assert_close(maps, expected)
    for found, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("levels", [WHOLE, PART])
@pytest.mark.parametrize(("num_queries", "n"), [(0, 2), (1, 1), (4, 2)])
def test_equals_its_definition(way, num_queries, n, levels):
    q, k, weights = arguments(num_queries, n)
    assert_equals_its_definition(q, k, levels, weights)


@pytest.mark.parametrize("levels", [WHOLE, PART])
def test_queries_in_chunks_equal_the_definition(monkeypatch, plain, levels):
    monkeypatch.setattr(mask_head, "CHUNK_SIZE", FIVE_LOGITS)
    q, k, weights = arguments()
    assert_equals_its_definition(q, k, levels, weights)


# Around every size of block in the kernels: of queries, of heads, of channels.
BLOCKS = [(1, 1, 1), (6, 2, 3), (7, 7, 4), (12, 8, 16), (13, 6, 17), (25, 9, 12), (38, 13, 32)]


@needs_extension
@pytest.mark.parametrize(("num_queries", "heads", "channels"), BLOCKS)
def test_kernels_of_every_block_equal_the_definition(num_queries, heads, channels):
    padded = ((17, 23), (9, 12), (5, 6), (3, 3))  # tasks of one tile, of several, of a part of one
    valid = ((16, 19), (8, 10), (4, 5), (2, 3))
    q, k, weights = arguments(num_queries, 2, torch.float64, padded, heads, channels)
    for levels in (Levels(padded, padded), Levels(padded, valid)):
        assert_equals_its_definition(q, k, levels, weights)


@needs_extension
def test_kernels_take_any_number_of_levels_and_any_sizes():
    """One level; and ones that are larger than the first, or as large."""
    for padded in (((5, 7),), ((5, 7), (5, 7), (9, 4), (1, 1), (11, 20))):
        q, k, weights = arguments(padded=padded)
        assert_equals_its_definition(q, k, Levels(padded, padded), weights)


@needs_extension
@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_kernels_of_other_instruction_sets(capability):
    """A process of its own, since a process chooses once."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__]
    tests = "every_block or any_sizes or single_precision"
    environment = {**os.environ, "PSF_CPU_CAPABILITY": capability}
    run = subprocess.run(
        [*command, "-k", tests], env=environment, capture_output=True, text=True, check=False
    )
    if "this machine runs" in run.stdout:
        pytest.skip(f"this processor has no {capability}")
    assert run.returncode == 0, run.stdout


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_give_the_same_bits_on_any_number_of_threads(dtype):
    padded = ((40, 43), (20, 22), (10, 11))
    q, k, weights = arguments(14, 1, dtype, padded, 4, 6)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            maps, grads = outputs_and_gradients(mask_maps, q, k, Levels(padded, padded), weights)
            results.append([maps.detach(), *grads])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_extension
def test_kernels_take_tensors_of_any_layout():
    q, k, weights = arguments()
    maps, grads = outputs_and_gradients(mask_maps, q, k, PART, weights)

    def strided(x):
        """The same numbers, every other one in memory, dimensions reversed."""
        order = tuple(reversed(range(x.dim())))
        wide = x.detach().permute(order).repeat_interleave(2, 0)
        return wide[::2].permute(order).requires_grad_()

    others = [strided(x) for x in (q, k, *weights)]
    assert not others[1].is_contiguous()
    assert others[1].stride(-1) != 1
    other_maps = mask_maps(*others[:2], PART, HeadWeights(*others[2:]))
    assert torch.equal(maps, other_maps)
    torch.manual_seed(1)
    grad = torch.randn(maps.shape, dtype=torch.float64)
    other_grads = torch.autograd.grad(other_maps, others, strided(grad).detach())
    assert all(torch.equal(a, b) for a, b in zip(grads, other_grads, strict=True))


@needs_extension
def test_kernels_take_no_images():
    q, k, weights = arguments(n=0)
    maps, grads = outputs_and_gradients(mask_maps, q, k, WHOLE, weights)
    assert maps.shape == (0, 4, *PADDED[0])
    assert [g.shape for g in grads] == [x.shape for x in (q, k, *weights)]
    assert not any(g.any() for g in grads)


@needs_extension
def test_gradient_of_keys_has_their_layout():
    """So that the projection that made them gets a dense gradient, without a copy."""
    q, k, weights = arguments()
    for levels in (WHOLE, PART):
        grads = outputs_and_gradients(mask_maps, q, k, levels, weights)[1]
        assert grads[1].stride() == k.stride()


@needs_extension
def test_not_a_number_spreads_to_maps_and_gradients():
    q, k, weights = arguments()
    q.data[0, 0, 1, 0] = torch.nan
    maps, grads = outputs_and_gradients(mask_maps, q, k, WHOLE, weights)
    assert maps[0, 1].isnan().all()
    assert maps[0, 0].isfinite().all()
    assert grads[4].isnan().all()


@needs_extension
def test_kernels_run_only_for_what_they_are_made_for():
    q, k, weights = arguments()
    assert has_cpu_kernels(q, k, *weights)
    assert not has_cpu_kernels(q.bfloat16(), k.bfloat16())
    assert not has_cpu_kernels(q, k, *weights._replace(bias=weights.bias.float()))
    assert not has_cpu_kernels(q.to("meta"), k.to("meta"))


@needs_extension
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 4, 6)}, "q must be"),
        ({"q": torch.zeros(2, 3, 5)}, "q must be"),
        ({"k": torch.zeros(2, 3, 42, 5)}, "S = 43"),
        ({"k": torch.zeros(2, 3, 43, 5).double()}, "must be Float"),
        ({"padded": [5, 6, 3, 3, 2]}, "pairs of height and width"),
        ({"padded": [], "valid": []}, "pairs of height and width"),
        ({"valid": [5, 6, 3, 3, 2, 0]}, "from 1 to the padded ones"),
        ({"valid": [5, 6, 3, 4, 2, 2]}, "from 1 to the padded ones"),
        ({"projection": torch.zeros(3, 3, 2)}, "projection, bias and weight must be"),
        ({"bias": torch.zeros(3, 2)}, "projection, bias and weight must be"),
        ({"weight": torch.zeros(9)}, "projection, bias and weight must be"),
        ({"mask_bias": torch.zeros(2)}, "mask_bias must be one number"),
        ({"mask_bias": torch.zeros(1).double()}, "mask_bias must be one number"),
        ({"grad": torch.zeros(2, 4, 5, 5)}, "gradient must be as the maps"),
        ({"grad": torch.zeros(2, 4, 5, 6).double()}, "gradient must be as the maps"),
    ],
)
def test_operators_refuse_wrong_arguments(change, message):
    q, k, weights = arguments(dtype=torch.float32)
    sizes = [x for shape in PADDED for x in shape]
    given = {"q": q.detach(), "k": k.detach(), "padded": sizes, "valid": sizes}
    given |= {name: x.detach() for name, x in weights._asdict().items()}
    given |= change
    if "grad" in change:
        del given["mask_bias"]
        operator = torch.ops.psf.mask_maps_backward
    else:
        operator = torch.ops.psf.mask_maps
    with pytest.raises(RuntimeError, match=message):
        operator(**given)


def test_derivatives_are_those_of_the_output(way):
    q, k, weights = arguments(2)
    assert torch.autograd.gradcheck(
        lambda q, k, *w: mask_maps(q, k, PART, HeadWeights(*w)), (q, k, *weights)
    )


def test_second_derivative_is_refused(way):
    q, k, weights = arguments()
    loss = mask_maps(q, k, WHOLE, weights).square().sum()
    (grad,) = torch.autograd.grad(loss, q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_single_precision_is_as_accurate_as_the_definition(way):
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


def test_nothing_but_inputs_is_saved(way):
    q, k, weights = arguments()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        mask_maps(q, k, WHOLE, weights)
    # Queries twice, once scaled; parameters of a few numbers; no map of any size.
    assert sum(x.numel() for x in saved) <= 2 * q.numel() + k.numel() + 100


def test_chunks_bound_what_exists_at_a_time(monkeypatch, plain):
    monkeypatch.setattr(mask_head, "CHUNK_SIZE", 2 * 2 * HEADS * 30)  # two queries' finest logits
    sizes = []
    make_logits = mask_head._logits
    monkeypatch.setattr(
        mask_head, "_logits", lambda q, k: sizes.append(q.shape[2]) or make_logits(q, k)
    )
    q, k, weights = arguments(5)
    mask_maps(q, k, WHOLE, weights)
    assert sizes == [2] * 6 + [1] * 3
