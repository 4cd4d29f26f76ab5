"""The fused operator on whichever path is active: kernels, or plain PyTorch without the library."""

import pytest
import torch
from deformable_inputs import chain, fused_inputs, gradients, needs_extension

from psf.layers import ms_deform_attn_fused, ms_deform_attn_fused_reference

pytestmark = pytest.mark.usefixtures("device")
both_paths = pytest.mark.parametrize("op", [ms_deform_attn_fused, ms_deform_attn_fused_reference])
both_kinds = pytest.mark.parametrize("coordinates", [2, 4], ids=["points", "boxes"])


@both_paths
@both_kinds
@pytest.mark.parametrize(
    "empty", [{"images": 0}, {"queries": 0}, {"heads": 0}, {"channels": 0}], ids=str
)
def test_empty_inputs(op, coordinates, empty):
    args = fused_inputs(coordinates=coordinates, dtype=torch.float32, **empty)
    out, grads = gradients(op, *args)
    assert out.shape == (args[0].shape[0], args[2].shape[1], args[0].shape[2] * args[0].shape[3])
    for grad, tensor in zip(grads, (args[0], *args[2:]), strict=True):
        assert grad.shape == tensor.shape
        assert not grad.any()


def test_without_points_or_levels_gives_zeros():
    value, shapes, reference, offsets, logits = fused_inputs()
    out = ms_deform_attn_fused(value, shapes, reference, offsets[..., :0, :], logits[..., :0])
    torch.testing.assert_close(out, torch.zeros(2, 7, 6).double())


@both_paths
@both_kinds
def test_equals_the_chain_and_its_gradients(op, coordinates):
    args = fused_inputs(coordinates=coordinates, channels=5)
    out, grads = gradients(op, *args)
    expected, expected_grads = gradients(chain, *args)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grads, expected_grads)


@both_paths
@both_kinds
@pytest.mark.parametrize("level", [(0, 3), (3, 0), (0, 0)], ids=str)
def test_an_empty_level_gives_finite_gradients(op, coordinates, level):
    shapes = [(2, 2), level, (3, 2)]
    value, shapes, *rest = fused_inputs(shapes, coordinates=coordinates)
    out, grads = gradients(op, value, shapes, *rest)
    expected, expected_grads = gradients(ms_deform_attn_fused_reference, value, shapes, *rest)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grads, expected_grads)
    assert all(grad.isfinite().all() for grad in (out, *grads))
    assert not grads[2][:, :, :, 1].any()  # of the offsets


@both_kinds
@pytest.mark.parametrize("points", [1, 3, 4, 8])
@pytest.mark.parametrize(("channels", "levels"), [(4, 9), (12, 5), (32, 1), (32, 3)])
def test_sizes(coordinates, points, channels, levels):
    shapes = [(4 + i % 3, 5 + i % 2) for i in range(levels)]
    sizes = {"images": 1, "queries": 70, "points": points, "channels": channels}
    args = fused_inputs(shapes, coordinates=coordinates, **sizes)
    out, grads = gradients(ms_deform_attn_fused, *args)
    expected, expected_grads = gradients(ms_deform_attn_fused_reference, *args)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grads, expected_grads)


@needs_extension
def test_single_precision_is_as_exact_as_its_inputs():
    """Offsets of hundreds of pixels take no digits from where in a pixel a sample lies."""
    value, shapes, *rest = fused_inputs([(3, 2000), (40, 50)], queries=50, channels=32, points=4)
    reference, offsets, logits = (t.float() for t in rest)
    sizes = torch.tensor(shapes, dtype=torch.float32, device=offsets.device).flip(-1)[:, None]
    offsets = (torch.rand_like(offsets) - reference[:, :, None, :, None]) * sizes  # anywhere
    out = ms_deform_attn_fused(value.float(), shapes, reference, offsets, logits)
    exact = ms_deform_attn_fused_reference(
        value.float().double(), shapes, *(t.double() for t in (reference, offsets, logits))
    )
    assert (out.double() - exact).norm() <= 3e-7 * exact.norm()


@both_paths
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_points_that_are_nowhere(op, bad):
    """Their share of the softmax is lost, and no gradient comes from where they would be."""
    value, shapes, reference, offsets, logits = fused_inputs(dtype=torch.float32)
    offsets[:, :, :, 1, 0] = bad
    far = offsets.clone()
    far[:, :, :, 1, 0] = 50.0
    out, grads = gradients(op, value, shapes, reference, offsets, logits)
    expected, expected_grads = gradients(op, value, shapes, reference, far, logits)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grads[0], expected_grads[0])
    torch.testing.assert_close(grads[3], expected_grads[3])
    assert not grads[2][:, :, :, 1, 0].any()


@both_paths
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_references_that_are_nowhere(op, bad):
    value, shapes, reference, offsets, logits = fused_inputs(dtype=torch.float32)
    reference[:, 2] = bad
    out = op(value, shapes, reference, offsets, logits)
    assert not out[:, 2].any()
    assert out.isfinite().all()


def test_logits_of_any_size():
    """The softmax neither overflows nor divides by nothing."""
    value, shapes, reference, offsets, logits = fused_inputs(dtype=torch.float32)
    logits = logits * 200
    out = ms_deform_attn_fused(value, shapes, reference, offsets, logits)
    expected = ms_deform_attn_fused_reference(value, shapes, reference, offsets, logits)
    torch.testing.assert_close(out, expected)
    shifted = ms_deform_attn_fused(value, shapes, reference, offsets, logits - 1e4)
    torch.testing.assert_close(shifted, expected, atol=1e-2, rtol=1e-2)


@both_kinds
def test_derivatives_are_those_of_the_output(coordinates):
    value, shapes, *rest = fused_inputs(coordinates=coordinates)
    leaves = [t.requires_grad_() for t in (value, *rest)]
    assert torch.autograd.gradcheck(
        lambda v, *r: ms_deform_attn_fused(v, shapes, *r),
        leaves,
        eps=1e-6,
        fast_mode=True,
        nondet_tol=1e-10,
    )
