import math

import pytest
import torch
from torch import nn

from psf.layers import native
from psf.layers.ms_deform_attn import has_extension
from psf.layers.total_norm import total_norm

needs_extension = pytest.mark.skipif(not has_extension(), reason="needs psf._C")

# Around the sizes of a task (32768) and of its lanes (16).
SIZES = [(0,), (), (5, 3), (16,), (17,), (32767,), (32768,), (32769,), (3, 40000)]


def make_tensors(dtype):
    torch.manual_seed(0)
    return [torch.randn(size, dtype=dtype) * 3**i for i, size in enumerate(SIZES)]


@pytest.mark.parametrize("extension", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_is_the_norm_of_all(dtype, extension, monkeypatch):
    if not extension:
        monkeypatch.setattr(native, "has_extension", lambda: False)
    tensors = make_tensors(dtype)
    expected = torch.cat([x.double().flatten() for x in tensors]).norm()
    found = total_norm(tensors)
    assert found.dtype == dtype
    assert found.shape == ()
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
    if extension and has_extension() and dtype == torch.float32:
        tolerance = 1e-7  # half a unit in the last place
    assert abs(found / expected - 1) < tolerance


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_number_of_threads_changes_no_bit(dtype):
    tensors, before = make_tensors(dtype), torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(total_norm(tensors))
    torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_no_tensors_and_no_elements():
    assert total_norm([]) == 0
    assert total_norm([torch.zeros(0, 4)]) == 0


def test_any_strides():
    """Transposed (dense), every other element, expanded."""
    x = torch.arange(12.0).view(3, 4)
    tensors = [x.T, x[:, ::2], torch.ones(()).expand(5)]
    expected = math.sqrt(506 + sum(v * v for v in (0, 2, 4, 6, 8, 10)) + 5)
    assert total_norm(tensors) == pytest.approx(expected)


def test_squares_beyond_a_float():
    if has_extension():
        assert total_norm([torch.full((4,), 1e30)]) == pytest.approx(2e30)
        assert total_norm([torch.full((4,), 1e-30)]) == pytest.approx(2e-30)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_shows(value):
    found = total_norm([torch.ones(40), torch.tensor([1.0, value])]).item()
    assert math.isnan(found) if math.isnan(value) else found == math.inf


def test_mixed_types_are_left_to_torch():
    tensors = [torch.ones(3), torch.ones(6, dtype=torch.float64)]
    assert total_norm(tensors) == pytest.approx(3.0)


def test_there_is_no_gradient():
    assert not total_norm([nn.Parameter(torch.ones(3))]).requires_grad


@needs_extension
@pytest.mark.parametrize(
    "tensors",
    [
        [torch.ones(2), torch.ones(2, dtype=torch.float64)],
        [torch.ones(2), torch.eye(2).to_sparse()],
        [torch.ones(2, dtype=torch.int64)],
    ],
    ids=["mixed", "sparse", "integers"],
)
def test_the_operator_refuses_what_it_cannot_read(tensors):
    with pytest.raises(RuntimeError, match="total_norm"):
        torch.ops.psf.total_norm.default(tensors)
