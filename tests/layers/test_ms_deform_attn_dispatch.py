"""The operators as PyTorch's: compilers, transforms, errors that name what is wrong."""

import functools
import itertools

import pytest
import torch
from deformable_inputs import SHAPES, SIZES, fused_inputs, gradients, inputs, needs_extension
from torch.library import opcheck

from psf.layers import ms_deform_attn, ms_deform_attn_fused, ms_deform_attn_reference

pytestmark = pytest.mark.usefixtures("device")
both_paths = pytest.mark.parametrize("op", [ms_deform_attn, ms_deform_attn_reference])
every_operator = pytest.mark.parametrize(
    ("op", "make_inputs"),
    [
        (ms_deform_attn, inputs),
        (ms_deform_attn_fused, fused_inputs),
        (ms_deform_attn_fused, functools.partial(fused_inputs, coordinates=4)),
    ],
    ids=["plain", "points", "boxes"],
)


@needs_extension
@every_operator
@pytest.mark.parametrize(
    ("dtype", "requires_grad"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)],
)
def test_operator_check(op, make_inputs, dtype, requires_grad):
    value, _, *rest = make_inputs(dtype=torch.float32)
    args = [t.requires_grad_(requires_grad) for t in (value.to(dtype), *rest)]
    opcheck(getattr(torch.ops.psf, op.__name__).default, (args[0], SIZES, *args[1:]))


@needs_extension
@every_operator
@pytest.mark.parametrize("mask", [[True] * 4, [True, False] * 2, [False, True] * 2])
def test_operator_check_of_the_backward(op, make_inputs, mask):
    value, _, *rest = make_inputs(dtype=torch.float32)
    mask = mask[: 1 + len(rest)]
    args = (torch.randn(2, 7, 6), value, SIZES, *rest, mask, False)
    opcheck(getattr(torch.ops.psf, f"{op.__name__}_backward").default, args)


@every_operator
def test_gradients_of_some_inputs_only(op, make_inputs):
    args = make_inputs()
    _, expected = gradients(op, *args)
    for wanted in itertools.product([False, True], repeat=len(expected)):
        leaves = [
            t.detach().clone().requires_grad_(flag)
            for t, flag in zip((args[0], *args[2:]), wanted, strict=True)
        ]
        out = op(leaves[0], args[1], *leaves[1:])
        assert out.requires_grad == any(wanted)
        if any(wanted):
            out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
        for leaf, grad, flag in zip(leaves, expected, wanted, strict=True):
            assert (leaf.grad is not None) == flag
            if flag:
                torch.testing.assert_close(leaf.grad, grad)


@every_operator
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_converts_the_value_and_not_the_places(op, make_inputs, dtype, device):
    value, shapes, *rest = make_inputs(dtype=torch.float32)
    value.requires_grad_()
    with torch.autocast(device, dtype):
        out = op(value, shapes, *rest)
    assert out.dtype == dtype
    expected = op(value.to(dtype), shapes, *rest)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    out.sum().backward()
    assert value.grad.dtype == torch.float32


@every_operator
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(op, make_inputs, dynamic):
    def function(value, *rest):
        return op(value, SHAPES, *rest)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for queries in (7, 9):
        value, _, *rest = make_inputs(queries=queries)
        leaves = [t.requires_grad_() for t in (value, *rest)]
        grads = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
        expected = torch.autograd.grad(function(*leaves).square().sum(), leaves)
        torch.testing.assert_close(grads, expected)


@every_operator
def test_compiled_autograd(op, make_inputs):
    """The backward pass in one graph, too."""
    value, _, *rest = make_inputs()
    leaves = [t.requires_grad_() for t in (value, *rest)]
    expected = torch.autograd.grad(op(leaves[0], SHAPES, *leaves[1:]).square().sum(), leaves)

    @torch.compile(backend="aot_eager")
    def step():
        op(leaves[0], SHAPES, *leaves[1:]).square().sum().backward()

    torch._dynamo.reset()
    with torch._dynamo.config.patch(
        compiled_autograd=True, compiled_autograd_kwargs_override={"fullgraph": True}
    ):
        step()
    torch.testing.assert_close([t.grad for t in leaves], list(expected))


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


@needs_extension
@every_operator
def test_second_derivative_is_refused_with_a_reason(op, make_inputs):
    args = [t.requires_grad_() if torch.is_tensor(t) else t for t in make_inputs()]
    (grad,) = torch.autograd.grad(op(*args).sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"ms_deform_attn.*second derivatives"):
        grad.square().sum().backward()


@needs_extension
@every_operator
def test_function_transforms_are_refused(op, make_inputs):
    value, shapes, *rest = make_inputs()
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda v: op(v, shapes, *rest).sum())(value)
    with pytest.raises(RuntimeError, match="forward-mode derivatives are not implemented"):
        torch.func.jvp(lambda v: op(v, shapes, *rest), (value,), (value,))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
@every_operator
def test_traces_with_the_sizes_as_constants(op, make_inputs):
    """Gradients too; values of other sizes are refused."""

    def of_maps(fine, *args):  # sizes of tensors, which traces record as tensors
        flat = fine.flatten(1, 2)
        return op(flat, [fine.shape[1:3]], *args)

    args = make_inputs(shapes=[(5, 4)])
    fine, rest = args[0].unflatten(1, (5, 4)), args[2:]
    traced = torch.jit.trace(of_maps, (fine, *rest))
    expected = gradients(lambda v, _, *r: of_maps(v, *r), fine, None, *rest)
    found = gradients(lambda v, _, *r: traced(v, *r), fine, None, *rest)
    torch.testing.assert_close(found, expected)
    with pytest.raises(RuntimeError, match=r"positions, value has S = 25|split_sizes"):
        traced(fine.new_zeros(*fine.shape[:1], 5, 5, *fine.shape[3:]), *rest)


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
        (
            {"reference": lambda t: t[..., :1]},
            r"reference_points must have shape .*got \[2, 7, 3, 1\]",
        ),
        (
            {"reference": lambda t: t[:, :-1]},
            r"reference_points must have shape .*got \[2, 6, 3, 2\]",
        ),
    ],
    ids=str,
)
def test_fused_bad_input_is_named(changes, message):
    with pytest.raises(RuntimeError, match=message):
        ms_deform_attn_fused(*broken_fused(**changes))
    meta = [t.to("meta") if torch.is_tensor(t) else t for t in broken_fused(**changes)]
    with pytest.raises(RuntimeError, match=message):
        ms_deform_attn_fused(*meta)


@needs_extension
@pytest.mark.parametrize("sizes", [[2**62, 2], [2**31, 2**33], [2**32, 2**32], [2**40, 0], [-1, 0]])
def test_sizes_that_overflow_are_refused(sizes):
    """Also without the checks of psf.layers, as in an exported program."""
    value, _, locations, weights = inputs([(0, 0)])
    with pytest.raises(RuntimeError, match="ms_deform_attn"):
        torch.ops.psf.ms_deform_attn(value, sizes, locations, weights)
    positions = value.new_zeros(1).expand(1, 2**62, 1, 1)  # as many as the sizes may have
    with pytest.raises(RuntimeError, match="ms_deform_attn"):
        torch.ops.psf.ms_deform_attn(positions, [*sizes, *sizes], locations, weights)


@needs_extension
@pytest.mark.parametrize(
    "change",
    [
        {"grad": torch.zeros(2, 7, 5)},
        {"grad": torch.zeros(2, 7, 6, dtype=torch.long)},
        {"value": torch.zeros(2, 24, 6)},
        {"value": torch.zeros(2, 23, 2, 3)},
        {"sizes": SIZES[:-1]},
        {"locations": torch.zeros(2, 7, 2, 3, 2, 1)},
        {"locations": torch.zeros(2, 7, 2, 3, 2, 2, dtype=torch.int)},
        {"weights": torch.zeros(2, 7, 2, 3, 1)},
        {"mask": [True, True]},
    ],
    ids=str,
)
def test_the_operator_itself_refuses_what_does_not_fit(change):
    """Without the checks of psf.layers."""
    value, _, locations, weights = inputs(dtype=torch.float32)
    args = {
        "grad": torch.zeros(2, 7, 6),
        "value": value,
        "sizes": SIZES,
        "locations": locations,
        "weights": weights,
        "mask": [True, True, True],
    }
    with pytest.raises(RuntimeError):
        torch.ops.psf.ms_deform_attn_backward(*{**args, **change}.values(), False)
