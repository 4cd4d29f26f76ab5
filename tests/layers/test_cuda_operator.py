"""The operators' CUDA entries without a GPU: as ``torch.ops.psf_emulated``, for CPU tensors.

What psf._C has for CUDA is compiled with the emulation of cuda_emulation.h, under another name:
checks, conversions, allocations, autograd and the choice of kernels are the real ones.
"""

import re
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cuda_emulation import (
    FIXED_POINT_TOLERANCE,
    HERE,
    KERNELS,
    SOURCES,
    TOLERANCE,
    assert_close,
    compile_emulation,
    exact,
    make_case,
    with_extension_only,
)
from torch.library import opcheck
from torch.utils import cpp_extension

pytestmark = with_extension_only


def entries(folder: Path) -> list[Path]:
    """Copies of the operators' sources that register CUDA entries for the CPU, as psf_emulated."""
    copies = []
    for source in sorted(SOURCES.glob("*.cpp")):
        if "_cpu" in source.stem:
            continue
        text = source.read_text(encoding="utf-8")
        text = re.sub(r"#include <c10/cuda/\w+\.h>", '#include "cuda_emulation_torch.h"', text)
        text = re.sub(r"(TORCH_LIBRARY\w*)\(psf, CUDA,", r"\1(psf, CPU,", text)
        text = re.sub(r"(TORCH_LIBRARY\w*)\(psf,", r"\1(psf_emulated,", text)
        copies.append(folder / source.name)
        copies[-1].write_text(text.replace('"psf::', '"psf_emulated::'), encoding="utf-8")
    return copies


@pytest.fixture(scope="module")
def ops(tmp_path_factory):
    folder = tmp_path_factory.mktemp("operators")
    include = [f"-I{path}" for path in cpp_extension.include_paths()]
    include.append(f"-I{sysconfig.get_paths()['include']}")
    sources = [*KERNELS, HERE / "cuda_emulation.cpp", *entries(folder)]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    libraries += ["-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"]
    flags = ["-std=c++20", "-O0", *include]
    torch.ops.load_library(compile_emulation(folder, sources, flags, libraries))
    return torch.ops.psf_emulated


UNFUSED, FUSED = ("value", "positions", "weights"), ("value", "references", "positions", "weights")


def call(ops, case, tensors, **options):
    """The operator of the case on its tensors, in the order of the operator's arguments."""
    sizes = [size for shape in case.shapes for size in shape]
    op = ops.ms_deform_attn if case.references is None else ops.ms_deform_attn_fused
    return op(tensors[0], sizes, *tensors[1:], **options)


def differentiate(ops, case, **options):
    """Output and gradients, through autograd."""
    names = UNFUSED if case.references is None else FUSED
    leaves = [getattr(case, name).detach().requires_grad_() for name in names]
    output = call(ops, case, leaves, **options)
    grads = torch.autograd.grad(output, leaves, case.grad)
    assert [grad.dtype for grad in grads] == [leaf.dtype for leaf in leaves]
    return SimpleNamespace(output=output.detach(), **dict(zip(names, grads, strict=True)))


def check_gradients(ops, case, of_value=TOLERANCE, others=TOLERANCE, **options):
    """With tolerances for the value gradient and for the output and all other gradients."""
    actual, expected = differentiate(ops, case, **options), exact(case)
    for name in vars(actual):
        tolerance = of_value if name == "value" else others
        assert_close(getattr(actual, name), getattr(expected, name), tolerance, name)


@pytest.fixture(params=[None, 2, 4])
def coordinates(request, ops):
    return request.param


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("channels", [5, 32])
@pytest.mark.parametrize("deterministic", [False, True])
def test_equals_the_reference(ops, coordinates, dtype, channels, deterministic):
    case = make_case(dtype=dtype, channels=channels, coordinates=coordinates)
    tolerance = FIXED_POINT_TOLERANCE if deterministic else TOLERANCE
    check_gradients(ops, case, tolerance, deterministic=deterministic)


@pytest.mark.parametrize("queries", [None, 13])
@pytest.mark.parametrize("images", [1, 3])
def test_queries_and_images(ops, coordinates, queries, images):
    check_gradients(ops, make_case(queries=queries, images=images, coordinates=coordinates))


def test_other_types_of_samples(ops, coordinates):
    """They are converted, and so are their gradients; the arithmetic is that of the value."""
    tolerance = {**TOLERANCE, torch.float64: TOLERANCE[torch.float32]}
    for dtype in (torch.float64, torch.float16):
        case = make_case(channels=8, coordinates=coordinates)
        case.weights = case.weights.to(dtype)
        if coordinates is not None:
            case.positions, case.references = case.positions.to(dtype), case.references.to(dtype)
        check_gradients(ops, case, tolerance, others=tolerance)
    case = make_case(channels=8, coordinates=coordinates)
    case.positions = case.positions.double()
    check_gradients(ops, case, tolerance, others=tolerance)


def transposed(tensor):
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def unaligned(tensor):
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


@pytest.mark.parametrize("change", [transposed, unaligned])
def test_any_strides_and_alignment(ops, coordinates, change):
    case = make_case(channels=8, coordinates=coordinates)
    for name in ("value", "positions", "weights", "references", "grad"):
        if getattr(case, name) is not None:
            setattr(case, name, change(getattr(case, name)))
    check_gradients(ops, case)
    case.value = case.value.transpose(2, 3).contiguous().transpose(2, 3)  # channels apart
    check_gradients(ops, case)


def test_global_switch_makes_it_deterministic(ops, coordinates):
    case = make_case(channels=8, coordinates=coordinates)
    flagged = differentiate(ops, case, deterministic=True)
    torch.use_deterministic_algorithms(True)
    try:
        switched = differentiate(ops, case)
    finally:
        torch.use_deterministic_algorithms(False)
    for name in vars(flagged):
        assert torch.equal(getattr(flagged, name), getattr(switched, name))


def test_gradients_of_some_inputs_only(ops, coordinates):
    case = make_case(channels=8, coordinates=coordinates)
    names = UNFUSED if coordinates is None else FUSED
    expected = exact(case)
    for name in names:
        tensors = [getattr(case, other).detach().requires_grad_(other == name) for other in names]
        leaf = tensors[names.index(name)]
        (grad,) = torch.autograd.grad(call(ops, case, tensors), leaf, case.grad)
        assert_close(grad, getattr(expected, name), name=name)


@pytest.mark.parametrize(
    "empty",
    [
        {"images": 0},
        {"queries": 0},
        {"heads": 0},
        {"channels": 0},
        {"points": 0},
        {"shapes": [(0, 0)], "queries": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_empty(ops, coordinates, empty, deterministic):
    case = make_case(**empty, coordinates=coordinates)
    check_gradients(ops, case, deterministic=deterministic)


def test_limits_are_named(ops, coordinates):
    case = make_case([(1, 1)] * 65, images=1, queries=1, heads=1, points=1, coordinates=coordinates)
    with pytest.raises(RuntimeError, match="at most 64 levels on CUDA, got 65"):
        differentiate(ops, case)


def test_operator_check(ops, coordinates):
    case = make_case([(3, 2)], channels=4, coordinates=coordinates)
    names = UNFUSED if coordinates is None else FUSED
    tensors = [getattr(case, name).requires_grad_() for name in names]
    op = ops.ms_deform_attn if coordinates is None else ops.ms_deform_attn_fused
    checks = ("test_schema", "test_autograd_registration")
    opcheck(op.default, (tensors[0], [3, 2], *tensors[1:]), test_utils=checks)
