"""The operator on whichever path is active (kernels, or plain PyTorch without the extension).

Every test runs on the CPU, and on a CUDA device where there is one, unless the extension was built
without kernels for it (the run of the tests without the extension has plain PyTorch there).
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from psf.layers import (
    MSDeformAttn,
    MSDeformAttnFunction,
    ms_deform_attn,
    ms_deform_attn_fused,
    ms_deform_attn_fused_reference,
    ms_deform_attn_reference,
)
from psf.layers.ms_deform_attn import _KERNEL_DEVICES, has_extension

needs_extension = pytest.mark.skipif(not has_extension(), reason="psf._C is not in use")
both_paths = pytest.mark.parametrize("op", [ms_deform_attn, ms_deform_attn_reference])

DEVICES = ["cpu"]
if torch.cuda.is_available() and ("cuda" in _KERNEL_DEVICES or not has_extension()):
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.cuda))


@pytest.fixture(autouse=True, params=DEVICES)
def device(request):
    """The device that tensors are made on unless another is named."""
    with torch.device(request.param):
        yield request.param


SHAPES = [(5, 4), (1, 3), (1, 1)]
SIZES = [5, 4, 1, 3, 1, 1]


def off_the_knots(locations, shapes):
    """Move each coordinate to the nearest at least 1/4 pixel from where the derivative jumps."""
    sizes = torch.tensor(shapes, device="cpu").view(-1, 2).flip(-1)[:, None].double()  # (L, 1, 2)
    pixels = locations * sizes - 0.5
    return (pixels.floor() + (pixels - pixels.floor()).clamp(0.25, 0.75) + 0.5) / sizes


def inputs(
    shapes=SHAPES, images=2, queries=7, heads=2, channels=3, points=2, dtype=torch.float64, seed=0
):
    """Locations reach half a level beyond every border."""
    generator = torch.Generator("cpu").manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    positions = sum(h * w for h, w in shapes)
    value = torch.randn(images, positions, heads, channels, **draw)
    locations = 2 * torch.rand(images, queries, heads, len(shapes), points, 2, **draw) - 0.5
    weights = torch.rand(images, queries, heads, len(shapes), points, **draw)
    locations = off_the_knots(locations, shapes)
    place = {"dtype": dtype, "device": torch.get_default_device()}
    return value.to(**place), shapes, locations.to(**place), weights.to(**place)


def loop(value, shapes, locations, weights):
    """The definition, one sample and one pixel at a time, differentiable."""
    images, _, heads, channels = value.shape
    queries, levels, points = locations.shape[1], locations.shape[3], locations.shape[4]
    out = value.new_zeros(images, queries, heads, channels)
    starts = list(itertools.accumulate((h * w for h, w in shapes), initial=0))
    for n, q, m, level, p in itertools.product(
        *map(range, (images, queries, heads, levels, points))
    ):
        height, width = shapes[level]
        x = locations[n, q, m, level, p, 0] * width - 0.5
        y = locations[n, q, m, level, p, 1] * height - 0.5
        for row, column in itertools.product(range(height), range(width)):
            if abs(x - column) < 1 and abs(y - row) < 1:
                share = (1 - abs(x - column)) * (1 - abs(y - row)) * weights[n, q, m, level, p]
                pixel = value[n, starts[level] + row * width + column, m]
                index = tuple(map(torch.tensor, (n, q, m)))
                out = out.index_put(index, share * pixel, accumulate=True)
    return out.flatten(2)


def gradients(op, value, shapes, locations, weights):
    leaves = [t.detach().clone().requires_grad_() for t in (value, locations, weights)]
    out = op(leaves[0], shapes, *leaves[1:])
    grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out.detach(), torch.autograd.grad(out, leaves, grad)


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
@pytest.mark.parametrize("channels", [1, 3, 4, 7, 8, 12, 16, 30, 32, 33, 64, 71, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_is_as_accurate_as_the_reference(channels, dtype):
    """Error against float64 at most twice that of plain PyTorch in the same precision."""
    value, shapes, *rest = inputs(channels=channels)
    value = value.to(dtype)
    rest = [t.float() for t in rest]
    exact, exact_grads = gradients(
        ms_deform_attn_reference, value.double(), shapes, *(t.double() for t in rest)
    )
    results = {}
    for op in (ms_deform_attn, ms_deform_attn_reference):
        out, grads = gradients(op, value, shapes, *rest)
        assert [t.dtype for t in (out, *grads)] == [dtype, dtype, torch.float32, torch.float32]
        results[op] = [
            (a.double() - b).norm() / b.norm()
            for a, b in zip((out, *grads), (exact, *exact_grads), strict=True)
        ]
    # Two roundings of the arithmetic are allowed where plain PyTorch is exact by luck.
    floor = 2 * torch.finfo(torch.float32).eps
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
def test_identical_points_add_up(op):
    value, shapes, locations, weights = inputs(queries=1, points=1)
    many = (locations.repeat(1, 500, 1, 1, 1, 1), weights.repeat(1, 500, 1, 1, 1))
    _, grads = gradients(
        lambda v, s, x, w: op(v, s, x, w).sum(1, keepdim=True), value, shapes, *many
    )
    _, grads_of_one = gradients(op, value, shapes, locations, weights)
    torch.testing.assert_close(grads[0], 500 * grads_of_one[0])


def transposed(tensor):
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


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
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
def test_gradients_of_some_inputs_only(op, wanted):
    args = inputs()
    _, expected = gradients(op, *args)
    leaves = [
        t.detach().clone().requires_grad_(flag)
        for t, flag in zip((args[0], *args[2:]), wanted, strict=True)
    ]
    out = op(leaves[0], args[1], *leaves[1:])
    assert out.requires_grad == any(wanted)
    if any(wanted):
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
    for leaf, grad, flag in zip(leaves, expected, wanted, strict=True):
        if flag:
            torch.testing.assert_close(leaf.grad, grad)
        else:
            assert leaf.grad is None


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_converts_the_value_and_not_the_locations(dtype, device):
    value, shapes, locations, weights = inputs(dtype=torch.float32)
    value.requires_grad_()
    with torch.autocast(device, dtype):
        out = ms_deform_attn(value, shapes, locations, weights)
    assert out.dtype == dtype
    expected = ms_deform_attn(value.to(dtype), shapes, locations, weights)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    out.sum().backward()
    assert value.grad.dtype == torch.float32


def test_autocast_leaves_double_alone(device):
    args = inputs()
    with torch.autocast(device, torch.bfloat16):
        out = ms_deform_attn(*args)
    torch.testing.assert_close(out, ms_deform_attn(*args))


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


@needs_extension
def test_same_bits_for_any_number_of_threads(device):
    if device != "cpu":
        pytest.skip("threads are the CPU's")
    shapes = [(16, 16), (8, 8), (4, 4)]
    args = inputs(shapes, images=2, queries=336, heads=8, channels=12, points=4)
    args = (args[0].float(), shapes, args[2].float(), args[3].float())
    fused = fused_inputs(
        shapes, images=2, queries=336, heads=8, channels=12, points=4, dtype=torch.float32
    )
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 5, *[40] * 10):  # often, where levels are apart: a race is rare
            torch.set_num_threads(count)
            out, grads = gradients(ms_deform_attn, *args)
            fused_out, fused_grads = fused_gradients(ms_deform_attn_fused, *fused)
            results.append((out, *grads, fused_out, *fused_grads))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@needs_extension
def test_deterministic_mode_gives_the_same_bits(device):
    """Always so on a CPU; on a GPU additions are atomic otherwise."""
    args = inputs([(9, 9)], queries=500, channels=32, points=4, dtype=torch.float32)
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        results = [gradients(ms_deform_attn, *args)[1] for _ in range(20)]
    finally:
        torch.use_deterministic_algorithms(was)
    expected = gradients(ms_deform_attn_reference, *args)[1] if device == "cpu" else results[0]
    torch.testing.assert_close(results[0], expected, atol=1e-4, rtol=1e-4)
    for grads in results[1:]:
        assert all(map(torch.equal, grads, results[0]))


@needs_extension
def test_second_derivative_is_refused_with_a_reason():
    args = [t.requires_grad_() if torch.is_tensor(t) else t for t in inputs()]
    out = ms_deform_attn(*args)
    (grad,) = torch.autograd.grad(out.sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"ms_deform_attn.*second derivatives"):
        grad.square().sum().backward()


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_operator_check(dtype, requires_grad):
    value, _, *rest = inputs(dtype=torch.float32)
    args = [t.requires_grad_(requires_grad) for t in (value.to(dtype), *rest)]
    opcheck(torch.ops.psf.ms_deform_attn.default, (args[0], SIZES, *args[1:]))


@needs_extension
@pytest.mark.parametrize("mask", [[True, True, True], [True, False, False], [False, True, True]])
def test_operator_check_of_the_backward(mask):
    value, _, *rest = inputs(dtype=torch.float32)
    args = (torch.randn(2, 7, 6), value, SIZES, *rest, mask)
    opcheck(torch.ops.psf.ms_deform_attn_backward.default, args)


@needs_extension
def test_meta_tensors():
    value, shapes, locations, weights = inputs()
    out = ms_deform_attn(value.to("meta"), shapes, locations.to("meta"), weights.to("meta"))
    assert (out.shape, out.dtype, out.device.type) == ((2, 7, 6), torch.float64, "meta")


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic):
    def function(value, locations, weights):
        return ms_deform_attn(value, SHAPES, locations, weights)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for queries in (7, 9):
        value, _, *rest = inputs(queries=queries)
        leaves = [t.requires_grad_() for t in (value, *rest)]
        grads = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
        expected = torch.autograd.grad(function(*leaves).square().sum(), leaves)
        torch.testing.assert_close(grads, expected)


def test_exports():
    class Model(torch.nn.Module):
        def forward(self, value, locations, weights):
            return ms_deform_attn(value, SHAPES, locations, weights)

    value, _, *rest = inputs()
    queries = torch.export.Dim("queries", min=2, max=100)
    program = torch.export.export(
        Model(), (value, *rest), dynamic_shapes=(None, {1: queries}, {1: queries})
    )
    args = inputs(queries=11)
    torch.testing.assert_close(program.module()(args[0], *args[2:]), ms_deform_attn(*args))


def broken(**changes):
    value, shapes, locations, weights = inputs(dtype=torch.float32)
    args = {"value": value, "shapes": shapes, "locations": locations, "weights": weights}
    return {**args, **{name: change(args[name]) for name, change in changes.items()}}.values()


@both_paths
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (broken(value=lambda t: t.flatten(2)), r"value must have shape \(N, S, M, D\), got"),
        (broken(value=lambda t: t.long()), "value must be floating point"),
        (broken(value=lambda t: t[:, 1:]), "value has S = 23 positions.*sum to 24"),
        (broken(shapes=lambda s: s[:-1]), "value has S = 24 positions.*sum to 23"),
        (broken(shapes=lambda s: [*s, (0, 1)]), r"sampling_locations must.*\[2, 7, 2, 4, 2, 2\]"),
        (broken(shapes=lambda s: [(-5, -4), *s[1:]]), "spatial_shapes must not be negative"),
        (broken(locations=lambda t: t[..., 0]), "sampling_locations must have shape"),
        (broken(locations=lambda t: t[..., :1]), "sampling_locations must have shape"),
        (broken(locations=lambda t: t[:1]), r"got \[1, 7, 2, 3, 2, 2\]"),
        (broken(locations=lambda t: t[:, :, :1]), r"\[2, 7, 2, 3, 2, 2\] to match value"),
        (broken(locations=lambda t: t.long()), "sampling_locations must be floating point"),
        (broken(weights=lambda t: t[:, 1:]), "attention_weights must have shape"),
        (broken(weights=lambda t: t.flatten(3)), "attention_weights must have shape"),
        (broken(weights=lambda t: t.bool()), "attention_weights must be floating point"),
    ],
)
def test_bad_input_is_named(op, args, message):
    with pytest.raises(RuntimeError, match=message):
        op(*args)


@both_paths
@pytest.mark.parametrize("shapes", [[(5, 4, 1)], torch.tensor([5, 4])], ids=["triple", "flat"])
def test_bad_spatial_shapes(op, shapes):
    value, _, locations, weights = inputs()
    with pytest.raises(ValueError, match="spatial_shapes must be"):
        op(value, shapes, locations, weights)


@needs_extension
def test_gradient_of_the_wrong_shape_is_named():
    value, _, *rest = inputs()
    with pytest.raises(RuntimeError, match=r"grad_output must have shape .*\[2, 7, 6\], got"):
        torch.ops.psf.ms_deform_attn_backward(
            torch.zeros(2, 7, 5).double(), value, SIZES, *rest, [True, True, True]
        )


# ---- the fused operator --------------------------------------------------------------------------

both_fused_paths = pytest.mark.parametrize(
    "op", [ms_deform_attn_fused, ms_deform_attn_fused_reference]
)
both_kinds = pytest.mark.parametrize("coordinates", [2, 4], ids=["points", "boxes"])


def fused_inputs(shapes=SHAPES, *, coordinates=2, dtype=torch.float64, seed=0, **sizes):
    """Offsets that lead to the locations of :func:`inputs`, from points or boxes."""
    value, shapes, locations, _ = inputs(shapes, seed=seed, **sizes)
    images, queries, _, levels, points = locations.shape[:5]
    generator = torch.Generator("cpu").manual_seed(seed + 1)
    draw = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    reference = (0.2 + 0.6 * torch.rand(images, queries, levels, coordinates, **draw)).to(locations)
    shift = locations - reference[:, :, None, :, None, :2]
    if coordinates == 2:
        unit = 1 / torch.tensor(shapes).flip(-1)[:, None].to(locations)
    else:
        unit = reference[:, :, None, :, None, 2:] / 2 / points
    logits = torch.randn(*locations.shape[:-1], **draw).to(locations)
    tensors = (value, reference, shift / unit, logits)
    value, *rest = (t.to(dtype) for t in tensors)
    return value, shapes, *rest


def chain(value, shapes, reference, offsets, logits):
    """What the fused operator stands for, level by level."""
    locations = torch.empty_like(offsets)
    for level, (h, w) in enumerate(shapes):
        point = reference[:, :, None, level, None]  # (N, Q, 1, 1, 2 or 4)
        if point.shape[-1] == 2:
            unit = torch.tensor([1 / w, 1 / h], dtype=offsets.dtype)
        else:
            unit = point[..., 2:] / 2 / offsets.shape[-2]
        locations[:, :, :, level] = point[..., :2] + offsets[:, :, :, level] * unit
    weights = logits.exp() / logits.exp().sum((-1, -2), keepdim=True)
    return loop(value, shapes, locations, weights)


def fused_gradients(op, value, shapes, *rest):
    leaves = [t.detach().clone().requires_grad_() for t in (value, *rest)]
    out = op(leaves[0], shapes, *leaves[1:])
    grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out.detach(), torch.autograd.grad(out, leaves, grad)


@both_fused_paths
@both_kinds
@pytest.mark.parametrize(
    "empty", [{"images": 0}, {"queries": 0}, {"heads": 0}, {"channels": 0}], ids=str
)
def test_fused_empty_inputs(op, coordinates, empty):
    args = fused_inputs(coordinates=coordinates, dtype=torch.float32, **empty)
    out, grads = fused_gradients(op, *args)
    assert out.shape == (args[0].shape[0], args[2].shape[1], args[0].shape[2] * args[0].shape[3])
    for grad, tensor in zip(grads, (args[0], *args[2:]), strict=True):
        assert grad.shape == tensor.shape
        assert not grad.any()


def test_fused_without_points_or_levels_gives_zeros():
    value, shapes, reference, offsets, logits = fused_inputs()
    out = ms_deform_attn_fused(value, shapes, reference, offsets[..., :0, :], logits[..., :0])
    torch.testing.assert_close(out, torch.zeros(2, 7, 6).double())


@both_fused_paths
@both_kinds
def test_fused_equals_the_chain_and_its_gradients(op, coordinates):
    args = fused_inputs(coordinates=coordinates, channels=5)
    out, grads = fused_gradients(op, *args)
    expected, expected_grads = fused_gradients(chain, *args)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grads, expected_grads)


@both_kinds
@pytest.mark.parametrize("points", [1, 3, 4, 8])
@pytest.mark.parametrize("channels", [4, 12, 32])
@pytest.mark.parametrize("levels", [1, 3, 5, 9])
def test_fused_sizes(coordinates, points, channels, levels):
    shapes = [(4 + i % 3, 5 + i % 2) for i in range(levels)]
    sizes = {"images": 1, "queries": 70, "points": points, "channels": channels}
    args = fused_inputs(shapes, coordinates=coordinates, **sizes)
    out, grads = fused_gradients(ms_deform_attn_fused, *args)
    expected, expected_grads = fused_gradients(ms_deform_attn_fused_reference, *args)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grads, expected_grads)


@needs_extension
@both_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused_kernel_is_as_accurate_as_the_reference(coordinates, dtype):
    """Error against float64 at most twice that of plain PyTorch in the same precision."""
    sizes = {"queries": 40, "channels": 32, "points": 4}
    value, shapes, *rest = fused_inputs([(30, 40), (15, 20)], coordinates=coordinates, **sizes)
    value, rest = value.to(dtype), [t.float() for t in rest]
    exact, exact_grads = fused_gradients(
        ms_deform_attn_fused_reference, value.double(), shapes, *(t.double() for t in rest)
    )
    floor = 4 * torch.finfo(torch.float32).eps
    results = [
        fused_gradients(op, value, shapes, *rest)
        for op in (ms_deform_attn_fused, ms_deform_attn_fused_reference)
    ]
    for a, b, exact_value in zip(
        (results[0][0], *results[0][1]),
        (results[1][0], *results[1][1]),
        (exact, *exact_grads),
        strict=True,
    ):
        assert a.dtype == b.dtype
        error, bound = ((x.double() - exact_value).norm() for x in (a, b))
        assert error <= 2 * bound + floor * exact_value.norm()


@needs_extension
def test_fused_single_precision_is_as_exact_as_its_inputs():
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


@both_fused_paths
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_fused_points_that_are_nowhere(op, bad):
    """Their share of the softmax is lost, and no gradient comes from where they would be."""
    value, shapes, reference, offsets, logits = fused_inputs(dtype=torch.float32)
    offsets[:, :, :, 1, 0] = bad
    far = offsets.clone()
    far[:, :, :, 1, 0] = 50.0
    out, grads = fused_gradients(op, value, shapes, reference, offsets, logits)
    expected, expected_grads = fused_gradients(op, value, shapes, reference, far, logits)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grads[0], expected_grads[0])
    torch.testing.assert_close(grads[3], expected_grads[3])
    assert not grads[2][:, :, :, 1, 0].any()


@both_fused_paths
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_fused_references_that_are_nowhere(op, bad):
    value, shapes, reference, offsets, logits = fused_inputs(dtype=torch.float32)
    reference[:, 2] = bad
    out = op(value, shapes, reference, offsets, logits)
    assert not out[:, 2].any()
    assert out.isfinite().all()


def test_fused_logits_of_any_size():
    """The softmax neither overflows nor divides by nothing."""
    value, shapes, reference, offsets, logits = fused_inputs(dtype=torch.float32)
    logits = logits * 200
    out = ms_deform_attn_fused(value, shapes, reference, offsets, logits)
    expected = ms_deform_attn_fused_reference(value, shapes, reference, offsets, logits)
    torch.testing.assert_close(out, expected)
    shifted = ms_deform_attn_fused(value, shapes, reference, offsets, logits - 1e4)
    torch.testing.assert_close(shifted, expected, atol=1e-2, rtol=1e-2)


@both_kinds
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=4)), ids=str)
def test_fused_gradients_of_some_inputs_only(coordinates, wanted):
    args = fused_inputs(coordinates=coordinates)
    _, expected = fused_gradients(ms_deform_attn_fused, *args)
    leaves = [
        t.detach().clone().requires_grad_(flag)
        for t, flag in zip((args[0], *args[2:]), wanted, strict=True)
    ]
    out = ms_deform_attn_fused(leaves[0], args[1], *leaves[1:])
    assert out.requires_grad == any(wanted)
    if any(wanted):
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
    for leaf, grad, flag in zip(leaves, expected, wanted, strict=True):
        assert (leaf.grad is not None) == flag
        if flag:
            torch.testing.assert_close(leaf.grad, grad)


@both_kinds
def test_fused_derivatives_are_those_of_the_output(coordinates):
    value, shapes, *rest = fused_inputs(coordinates=coordinates)
    leaves = [t.requires_grad_() for t in (value, *rest)]
    assert torch.autograd.gradcheck(
        lambda v, *r: ms_deform_attn_fused(v, shapes, *r),
        leaves,
        eps=1e-6,
        fast_mode=True,
        nondet_tol=1e-10,
    )


@needs_extension
def test_fused_second_derivative_is_refused_with_a_reason():
    args = [t.requires_grad_() if torch.is_tensor(t) else t for t in fused_inputs()]
    (grad,) = torch.autograd.grad(ms_deform_attn_fused(*args).sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"ms_deform_attn.*second derivatives"):
        grad.square().sum().backward()


@needs_extension
@both_kinds
@pytest.mark.parametrize("requires_grad", [False, True])
def test_fused_operator_check(coordinates, requires_grad):
    value, _, *rest = fused_inputs(coordinates=coordinates, dtype=torch.float32)
    args = [t.requires_grad_(requires_grad) for t in (value, *rest)]
    opcheck(torch.ops.psf.ms_deform_attn_fused.default, (args[0], SIZES, *args[1:]))


@needs_extension
@both_kinds
@pytest.mark.parametrize("mask", [[True] * 4, [True, False, False, True], [False, True] * 2])
def test_fused_operator_check_of_the_backward(coordinates, mask):
    value, _, *rest = fused_inputs(coordinates=coordinates, dtype=torch.float32)
    args = (torch.randn(2, 7, 6), value, SIZES, *rest, mask)
    opcheck(torch.ops.psf.ms_deform_attn_fused_backward.default, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_fused_compiles_to_one_graph(dynamic):
    def function(value, *rest):
        return ms_deform_attn_fused(value, SHAPES, *rest)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for queries in (7, 9):
        value, _, *rest = fused_inputs(queries=queries)
        leaves = [t.requires_grad_() for t in (value, *rest)]
        grads = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
        expected = torch.autograd.grad(function(*leaves).square().sum(), leaves)
        torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_autocast_converts_the_value_and_not_the_references(dtype, device):
    value, shapes, *rest = fused_inputs(dtype=torch.float32)
    with torch.autocast(device, dtype):
        out = ms_deform_attn_fused(value, shapes, *rest)
    expected = ms_deform_attn_fused(value.to(dtype), shapes, *rest)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    assert out.dtype == dtype


def broken_fused(**changes):
    names = ("value", "shapes", "reference", "offsets", "logits")
    args = dict(zip(names, fused_inputs(dtype=torch.float32), strict=True))
    return {**args, **{name: change(args[name]) for name, change in changes.items()}}.values()


@needs_extension
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value": lambda t: t[:, 1:]}, "value has S = 23 positions.*sum to 24"),
        ({"offsets": lambda t: t[:, :, :1]}, r"sampling_offsets must .*\[2, 7, 2, 3, 2, 2\]"),
        ({"logits": lambda t: t[:, 1:]}, "attention_logits must have shape"),
        ({"logits": lambda t: t.long()}, "attention_logits must be floating point"),
        ({"reference": lambda t: t[..., :1]}, r"reference_points must be .*got \[2, 7, 3, 1\]"),
        ({"reference": lambda t: t[:, :-1]}, r"reference_points must be .*got \[2, 6, 3, 2\]"),
    ],
    ids=str,
)
def test_fused_bad_input_is_named(changes, message):
    with pytest.raises(RuntimeError, match=message):
        ms_deform_attn_fused(*broken_fused(**changes))
    meta = [t.to("meta") if torch.is_tensor(t) else t for t in broken_fused(**changes)]
    with pytest.raises(RuntimeError, match=message):
        ms_deform_attn_fused(*meta)


# ---- for other projects --------------------------------------------------------------------------


def test_the_signature_of_deformable_detr():
    value, shapes, locations, weights = inputs(images=3)
    starts = torch.tensor([0, 20, 23])
    out = MSDeformAttnFunction.apply(value, torch.tensor(shapes), starts, locations, weights, 64)
    torch.testing.assert_close(out, ms_deform_attn(value, shapes, locations, weights))


class TestModule:
    dim = 12
    positions = sum(h * w for h, w in SHAPES)

    @pytest.fixture
    def module(self):
        torch.manual_seed(0)
        module = MSDeformAttn(dim=self.dim, num_levels=3, num_heads=4, num_points=2)
        for parameter in module.parameters():  # all different, so that each matters
            torch.nn.init.normal_(parameter, std=0.3)
        return module

    def arguments(self, queries=5, coordinates=2):
        torch.manual_seed(1)
        return (
            torch.randn(2, queries, self.dim),
            torch.rand(2, queries, 3, coordinates),
            torch.randn(2, self.positions, self.dim),
            SHAPES,
        )

    @pytest.mark.parametrize("coordinates", [2, 4])
    @pytest.mark.parametrize("queries", [0, 5])
    def test_output_shape(self, module, queries, coordinates):
        out = module(*self.arguments(queries, coordinates))
        assert out.shape == (2, queries, self.dim)

    def test_parameter_names_are_those_of_released_checkpoints(self, module):
        projections = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
        names = {f"{name}.{kind}" for name in projections for kind in ("weight", "bias")}
        assert set(module.state_dict()) == names

    def test_initial_offsets(self):
        """Four heads look right, down, left, up; point p + 1 pixels far, in every level."""
        module = MSDeformAttn(dim=8, num_levels=2, num_heads=4, num_points=3)
        offsets = module.sampling_offsets(torch.randn(8)).view(4, 2, 3, 2)
        for head, direction in enumerate([(1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0)]):
            expected = torch.tensor(direction) * torch.tensor([[1.0], [2.0], [3.0]])
            torch.testing.assert_close(offsets[head], expected.expand(2, 3, 2))
        # Diagonal heads reach the corners of the square.
        module = MSDeformAttn(dim=8, num_levels=1, num_heads=8, num_points=1)
        torch.testing.assert_close(module.sampling_offsets.bias[2:4], torch.tensor([1.0, 1.0]))
        assert not module.attention_weights(torch.randn(8)).any()

    @pytest.mark.parametrize("coordinates", [2, 4])
    def test_sampling_locations(self, module, coordinates):
        """Offsets are pixels around points, and halves of the box divided by P around boxes."""
        query, reference, value, _ = self.arguments(coordinates=coordinates)
        offsets = module.sampling_offsets(query).view(2, 5, 4, 3, 2, 2)
        locations = torch.empty_like(offsets)
        for level, (h, w) in enumerate(SHAPES):
            point = reference[:, :, None, level, None]  # (N, Q, 1, 1, 2 or 4)
            unit = torch.tensor([1 / w, 1 / h]) if coordinates == 2 else point[..., 2:] / 2 / 2
            locations[:, :, :, level] = point[..., :2] + offsets[:, :, :, level] * unit
        weights = module.attention_weights(query).view(2, 5, 4, 6).softmax(-1).view(2, 5, 4, 3, 2)
        values = module.value_proj(value).view(2, -1, 4, 3)
        expected = module.output_proj(loop(values, SHAPES, locations, weights))
        out = module(query, reference, value, SHAPES)
        torch.testing.assert_close(out, expected)
        tensor_shapes = torch.tensor(SHAPES)
        torch.testing.assert_close(module(query, reference, value, tensor_shapes), out)

    def test_padding_is_not_seen(self, module):
        query, reference, value, shapes = self.arguments()
        mask = torch.rand(2, self.positions) < 0.3
        changed = torch.where(mask[..., None], 100.0, value)
        out = module(query, reference, value, shapes, mask)
        torch.testing.assert_close(module(query, reference, changed, shapes, mask), out)
        assert not torch.allclose(module(query, reference, value, shapes), out)

    def test_reference_points_stay_single_precision_under_autocast(self, module, device):
        """Only the linear layers and the value are rounded, not where the points are."""
        query, reference, value, shapes = self.arguments()
        with torch.autocast(device, torch.bfloat16):
            out = module(query, reference, value, shapes)
            split = (4, 3, 2)
            expected = module.output_proj(
                ms_deform_attn_fused_reference(
                    module.value_proj(value).unflatten(-1, (4, -1)),
                    shapes,
                    reference,
                    module.sampling_offsets(query).unflatten(-1, (*split, 2)),
                    module.attention_weights(query).unflatten(-1, split),
                )
            )
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out, expected, atol=0.05, rtol=0.02)

    def test_compiles_to_one_graph(self, module):
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*self.arguments()), module(*self.arguments()))

    def test_bad_arguments(self, module):
        with pytest.raises(ValueError, match="10 and 4"):
            MSDeformAttn(dim=10, num_levels=1, num_heads=4)
        with pytest.raises((ValueError, RuntimeError), match=r"\[2, 5, 3, 3\]"):
            module(*self.arguments(coordinates=3))
