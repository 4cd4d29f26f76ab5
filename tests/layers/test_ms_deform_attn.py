"""The plain operator on whichever path is active: kernels, or plain PyTorch without the library."""

import pytest
import torch
from deformable_inputs import fused_inputs, gradients, inputs, loop, needs_extension, transposed
from hypothesis import given, settings
from hypothesis import strategies as st

from psf.layers import (
    MSDeformAttnFunction,
    ms_deform_attn,
    ms_deform_attn_fused,
    ms_deform_attn_fused_reference,
    ms_deform_attn_reference,
)

pytestmark = pytest.mark.usefixtures("device")
both_paths = pytest.mark.parametrize("op", [ms_deform_attn, ms_deform_attn_reference])


@both_paths
@pytest.mark.parametrize(
    "empty",
    [
        {"images": 0},
        {"queries": 0},
        {"heads": 0},
        {"channels": 0},
        {"points": 0},
        {"shapes": [(0, 0)]},
        {"shapes": [(0, 3), (2, 2), (3, 0)]},
    ],
    ids=str,
)
def test_empty_inputs_give_zeros_and_gradients(op, empty):
    value, shapes, locations, weights = inputs(**{"dtype": torch.float32, **empty})
    out, grads = gradients(op, value, shapes, locations, weights)
    assert out.shape == (value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])
    torch.testing.assert_close(out, loop(value, shapes, locations, weights))
    for grad, tensor in zip(grads, (value, locations, weights), strict=True):
        assert grad.shape == tensor.shape
        assert grad.isfinite().all()


@both_paths
def test_no_levels_give_zeros(op):
    out = op(*inputs([]))
    torch.testing.assert_close(out, torch.zeros(2, 7, 6).double())


@both_paths
def test_by_hand(op):
    """A 1 x 2 level with values 10, 30: three quarters of the way, then beyond the right pixel."""
    value = torch.tensor([10.0, 30.0]).view(1, 2, 1, 1)
    locations = torch.tensor([[0.625, 0.5], [1.0, 0.5]]).view(1, 2, 1, 1, 1, 2)
    weights = torch.tensor([1.0, 0.5]).view(1, 2, 1, 1, 1)
    # Pixel coordinates 0.75 and 1.5: 0.25 * 10 + 0.75 * 30, and 0.5 * (0.5 * 30).
    torch.testing.assert_close(
        op(value, [(1, 2)], locations, weights), torch.tensor([[[25.0], [7.5]]])
    )


@both_paths
def test_equals_the_loop_and_its_gradients(op):
    args = inputs(channels=5)
    out, grads = gradients(op, *args)
    expected, expected_grads = gradients(loop, *args)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grads, expected_grads)


@both_paths
@settings(max_examples=15, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=5),
    images=st.integers(1, 3),
    queries=st.integers(1, 5),
    heads=st.sampled_from([1, 2, 3, 16]),
    channels=st.sampled_from([1, 3, 4, 7, 8, 12]),
    points=st.integers(1, 8),
    seed=st.integers(0, 1000),
)
def test_derivatives_are_those_of_the_output(
    op, shapes, images, queries, heads, channels, points, seed
):
    value, shapes, *rest = inputs(shapes, images, queries, heads, channels, points, seed=seed)
    leaves = [t.requires_grad_() for t in (value, *rest)]
    assert torch.autograd.gradcheck(
        lambda v, x, w: op(v, shapes, x, w), leaves, eps=1e-6, fast_mode=True, nondet_tol=1e-10
    )


@needs_extension
@pytest.mark.parametrize(
    ("op", "reference", "make_inputs"),
    [
        (ms_deform_attn, ms_deform_attn_reference, inputs),
        (ms_deform_attn_fused, ms_deform_attn_fused_reference, fused_inputs),
    ],
    ids=["plain", "fused"],
)
@pytest.mark.parametrize("channels", [1, 3, 4, 7, 8, 12, 16, 30, 32, 33, 64, 71, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_is_as_accurate_as_the_reference(op, reference, make_inputs, channels, dtype):
    """Error against float64 at most twice that of plain PyTorch in the same precision."""
    value, shapes, *rest = make_inputs(channels=channels)
    value = value.to(dtype)
    rest = [t.float() for t in rest]
    exact, exact_grads = gradients(reference, value.double(), shapes, *(t.double() for t in rest))
    results = {}
    for function in (op, reference):
        out, grads = gradients(function, value, shapes, *rest)
        assert [t.dtype for t in (out, *grads)] == [dtype, dtype, *[torch.float32] * len(rest)]
        results[function] = [
            (a.double() - b).norm() / b.norm()
            for a, b in zip((out, *grads), (exact, *exact_grads), strict=True)
        ]
    # A few roundings of the arithmetic are allowed where plain PyTorch is exact by luck.
    floor = 4 * torch.finfo(torch.float32).eps
    for error, bound in zip(*results.values(), strict=True):
        assert error <= 2 * bound + floor


@needs_extension
def test_many_queries_equal_the_reference():
    """Enough work for several threads and for tasks of unequal size; queries prime, images odd."""
    shapes = [(16, 13), (8, 7), (4, 4)]
    args = inputs(shapes, images=3, queries=331, heads=8, channels=12, points=4)
    out, grads = gradients(ms_deform_attn, *args)
    expected, expected_grads = gradients(ms_deform_attn_reference, *args)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grads, expected_grads)


@needs_extension
def test_single_precision_is_as_exact_as_its_inputs():
    """
    The rounding of a coordinate in pixels is carried along: 1e-6 on a level 2000 pixels wide.

    Without that, coordinates alone would be wrong by up to 6e-5 pixels.
    """
    value, shapes, *rest = inputs([(3, 2000), (40, 50)], queries=50, channels=32, points=4)
    args = [value.float(), *(t.float() for t in rest)]
    out, grads = gradients(ms_deform_attn, args[0], shapes, *args[1:])
    exact, exact_grads = gradients(
        ms_deform_attn_reference, args[0].double(), shapes, *(t.double() for t in args[1:])
    )
    for a, b in zip((out, *grads), (exact, *exact_grads), strict=True):
        assert (a.double() - b).norm() <= 1e-6 * b.norm()


@both_paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_knots(op, dtype):
    """At pixel centres, at the borders of the level and of the band that touches it."""
    shapes = [(4, 8)]
    value = inputs(shapes, images=1, heads=1, channels=3, dtype=dtype)[0]
    # Exact in binary: centres of the first and last pixel, borders, and one pixel beyond the
    # outermost centres, where the contribution has just become 0.
    x, y = [1 / 16, 15 / 16, 0.0, 1.0, -1 / 16, 17 / 16], [1 / 8, 7 / 8, 0.0, 1.0, -1 / 8, 9 / 8]
    locations = torch.cartesian_prod(torch.tensor(x, dtype=dtype), torch.tensor(y, dtype=dtype))
    locations = locations.view(1, -1, 1, 1, 1, 2)
    weights = torch.ones(locations.shape[:-1], dtype=dtype)
    out = op(value, shapes, locations, weights)
    torch.testing.assert_close(out, loop(value, shapes, locations, weights))
    grads = gradients(op, value, shapes, locations, weights)[1]
    assert all(grad.isfinite().all() for grad in grads)


FAR = [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 3e9, 5.0, -4.0]


@both_paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("coordinate", FAR)
def test_far_and_undefined_locations_contribute_nothing(op, dtype, axis, coordinate):
    value, shapes, locations, weights = inputs(dtype=dtype)
    locations[:, :, :, 1, 0, axis] = coordinate
    weights[:, :, :, 1, 0] = float("nan")  # nor does the weight of such a point count
    without = weights.clone()
    without[:, :, :, 1, 0] = 0
    sane = locations.clone()
    sane[:, :, :, 1, 0, axis] = 5.0
    out, grads = gradients(op, value, shapes, locations, weights)
    expected, expected_grads = gradients(op, value, shapes, sane, without)
    torch.testing.assert_close(out, expected)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad.nan_to_num(99.0), expected_grad)
    assert (grads[1][:, :, :, 1, 0] == 0).all()
    assert (grads[2][:, :, :, 1, 0] == 0).all()


@both_paths
def test_denormal_location(op):
    value, shapes, locations, weights = inputs(dtype=torch.float32)
    locations[...] = 1e-42
    torch.testing.assert_close(
        op(value, shapes, locations, weights),
        op(value, shapes, torch.zeros_like(locations), weights),
    )


@both_paths
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_only_sampled_pixels_count(op, poison):
    """Around the border and away from it: a poisoned pixel reaches those that touch it alone."""
    shapes = [(4, 4)]
    value = torch.ones(1, 16, 1, 8)
    value[:, 5] = poison  # row 1, column 1
    pixels = torch.tensor(
        [[1.0, 1.0], [0.5, 1.5], [2.5, 2.5], [-0.5, 1.0], [3.5, 3.5], [2.5, -0.5]]
    )
    locations = ((pixels + 0.5) / 4).view(1, -1, 1, 1, 1, 2)
    out = op(value, shapes, locations, torch.ones(locations.shape[:-1]))
    finite = out.isfinite().all(-1)[0]
    assert finite.tolist() == [False, False, True, True, True, True]


@both_paths
@pytest.mark.parametrize("level", [(0, 3), (3, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("queries", [1, 40])
def test_an_empty_level_is_not_sampled(op, level, queries):
    """Nor are the rows in front of it and behind it, here of levels without attention."""
    shapes = [(2, 2), level, (2, 2)]
    value, shapes, locations, weights = inputs(shapes, queries=queries, dtype=torch.float32)
    locations[...] = 5.0
    locations[:, :, :, 1] = torch.rand(locations[:, :, :, 1].shape)  # anywhere in the empty level
    value[...] = float("nan")
    out, grads = gradients(op, value, shapes, locations, weights)
    assert not out.any()
    assert not any(grad.any() for grad in grads)


@both_paths
def test_any_strides(op):
    value, shapes, locations, weights = inputs()
    head_major = value.transpose(1, 2).contiguous().transpose(1, 2)
    strided = (head_major, shapes, transposed(locations), transposed(weights))
    assert not any(t.is_contiguous() for t in (strided[0], *strided[2:]))
    expected, expected_grads = gradients(op, value, shapes, locations, weights)
    torch.testing.assert_close(op(*strided), expected)
    leaves = [t.requires_grad_() for t in (strided[0], *strided[2:])]
    grad = torch.linspace(-1, 1, expected.numel(), dtype=expected.dtype).view_as(expected)
    grads = torch.autograd.grad(op(leaves[0], shapes, *leaves[1:]), leaves, transposed(grad))
    torch.testing.assert_close(grads, expected_grads)


@both_paths
def test_expanded_gradient(op):
    """sum().backward() hands the operator a gradient with strides 0."""
    value, shapes, locations, weights = inputs()
    value.requires_grad_()
    op(value, shapes, locations, weights).sum().backward()
    expected = torch.autograd.functional.vjp(
        lambda v: loop(v, shapes, locations, weights), value.detach(), torch.ones(2, 7, 6).double()
    )[1]
    torch.testing.assert_close(value.grad, expected)


@both_paths
def test_inference_mode(op):
    args = inputs()
    with torch.inference_mode():
        torch.testing.assert_close(op(*args), loop(*args))


@both_paths
def test_locations_and_weights_of_other_types(op):
    """They are computed with in value's precision, at least single; gradients come in their own."""
    value, shapes, locations, weights = inputs()
    out, grads = gradients(op, value.float(), shapes, locations, weights.half())
    assert out.dtype == torch.float32
    assert [g.dtype for g in grads] == [torch.float32, torch.float64, torch.float16]
    expected, _ = gradients(op, value.float(), shapes, locations.float(), weights.half().float())
    torch.testing.assert_close(out, expected)


def test_spatial_shapes_may_be_a_tensor():
    value, shapes, locations, weights = inputs()
    torch.testing.assert_close(
        ms_deform_attn(value, torch.tensor(shapes), locations, weights),
        ms_deform_attn(value, shapes, locations, weights),
        rtol=0,
        atol=0,
    )


def test_the_signature_of_deformable_detr():
    value, shapes, locations, weights = inputs(images=3)
    starts = torch.tensor([0, 20, 23])
    out = MSDeformAttnFunction.apply(value, torch.tensor(shapes), starts, locations, weights, 64)
    torch.testing.assert_close(out, ms_deform_attn(value, shapes, locations, weights))


def test_autocast_leaves_double_alone(device):
    args = inputs()
    with torch.autocast(device, torch.bfloat16):
        out = ms_deform_attn(*args)
    torch.testing.assert_close(out, ms_deform_attn(*args))
