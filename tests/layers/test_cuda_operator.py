"""The operators on CUDA without a GPU: as ``torch.ops.psf_emulated``, for CPU tensors.

What the library has for CUDA is compiled with the emulation of cuda_emulation.h, under another
name: checks, conversions, allocations and the choice of kernels are the real ones. The emulation
finds accesses out of bounds or misaligned, elements that are written twice or never, and missing
barriers.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deformable_inputs import fused_inputs, inputs, transposed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import cpp_extension

import psf
from psf.layers import ms_deform_attn_fused_reference, ms_deform_attn_reference

pytestmark = pytest.mark.skipif(
    os.environ.get("PSF_DISABLE_EXTENSION") == "1", reason="the same with the extension"
)

HERE = Path(__file__).parent
SOURCES = Path(psf.__path__[0]) / "layers" / "csrc"
KERNELS = sorted(SOURCES.glob("*.cu"))
# The kernels' functions under the names by which cuda_emulation.cpp calls them.
RENAMED = {
    "ms_deform_attn_cuda": "kernels_forward",
    "ms_deform_attn_backward_cuda": "kernels_backward",
    "value_gradient_exponent_cuda": "kernels_exponent",
    "ms_deform_attn_deterministic_backward_cuda": "kernels_deterministic",
    "value_gradient_from_fixed_point_cuda": "kernels_from_fixed_point",
    "reference_gradient_cuda": "kernels_references",
}

# Relative error of the norm against float64, by the type of what is compared.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
# The fixed point of a few hundred samples resolves 2^-50 of the largest possible term.
FIXED_POINT_TOLERANCE = {**TOLERANCE, torch.float64: 1e-12}

ODD = [(5, 7), (3, 2), (1, 1)]  # sizes that no tile divides


def entries(folder: Path) -> list[Path]:
    """Copies of the sources that register the CUDA operators for the CPU, as psf_emulated."""
    copies = []
    for source in sorted(SOURCES.glob("*.cpp")):
        if "_cpu" not in source.stem:
            text = source.read_text(encoding="utf-8")
            text = text.replace("_IMPL(psf, CUDA,", "_IMPL(psf, CPU,")
            text = re.sub(r"(STABLE_TORCH_LIBRARY\w*)\(psf,", r"\1(psf_emulated,", text)
            copies.append(folder / source.name)
            copies[-1].write_text(text, encoding="utf-8")
    return copies


def compile_source(compiler: str, source: Path, folder: Path) -> Path:
    """The object file of a source."""
    target = folder / f"{source.name}.o"
    # The emulation jumps between stacks, which fortified longjmp takes for an error.
    flags = ["-std=c++17", "-O1", "-fPIC", "-U_FORTIFY_SOURCE"]
    flags += ["-DUSE_CUDA", "-DPSF_CUDA_EMULATION", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += [f"-I{path}" for path in (HERE, SOURCES, *cpp_extension.include_paths())]
    flags += [f"-D{name}={other}" for name, other in RENAMED.items() if source in KERNELS]
    subprocess.run([compiler, *flags, "-x", "c++", "-c", source, "-o", target], check=True)
    return target


@pytest.fixture(scope="module")
def ops(tmp_path_factory):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("the emulation needs a C++ compiler and Linux")
    folder = tmp_path_factory.mktemp("operators")
    sources = [*KERNELS, HERE / "cuda_emulation.cpp", *entries(folder)]
    with ThreadPoolExecutor(max_workers=2) as pool:
        objects = list(pool.map(lambda source: compile_source(compiler, source, folder), sources))
    libraries = [*(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch_cpu"]
    library = folder / "emulation.so"
    subprocess.run([compiler, "-shared", *objects, *libraries, "-o", library], check=True)
    torch.ops.load_library(str(library))
    return torch.ops.psf_emulated


def make_case(
    shapes=ODD, *, queries=None, channels=32, coordinates=None, dtype=torch.float32, **sizes
):
    """queries=None: as many as pixels. coordinates: 2 or 4 for the fused operator."""
    queries = sum(h * w for h, w in shapes) if queries is None else queries
    sizes = {"points": 4, "queries": queries, "channels": channels, **sizes}
    if coordinates is None:
        value, _, *samples = inputs(shapes, **sizes)
        references = None
    else:
        value, _, references, *samples = fused_inputs(shapes, coordinates=coordinates, **sizes)
    wide = torch.promote_types(dtype, torch.float32)
    images, _, heads, _ = value.shape
    return SimpleNamespace(
        shapes=shapes,
        value=value.to(dtype),
        references=None if references is None else references.to(wide),
        positions=samples[0].to(wide),
        weights=samples[1].to(wide),
        grad=torch.randn(images, queries, heads * channels).to(dtype),
    )


def exact(case) -> SimpleNamespace:
    """Output and gradients by plain PyTorch in float64."""
    names, (value, _, *rest) = arguments(case)
    leaves = [t.detach().double().requires_grad_() for t in (value, *rest)]
    reference = (
        ms_deform_attn_reference if case.references is None else ms_deform_attn_fused_reference
    )
    output = reference(leaves[0], case.shapes, *leaves[1:])
    grads = torch.autograd.grad(output, leaves, case.grad.double())
    # An empty level's size of 0 makes NaN of gradients that are 0.
    grads = [grad.nan_to_num() for grad in grads]
    return SimpleNamespace(output=output.detach(), **dict(zip(names, grads, strict=True)))


def assert_close(actual, expected, tolerance=TOLERANCE, name=""):
    assert actual.shape == expected.shape
    error = (actual.double() - expected).norm()
    assert error <= tolerance[actual.dtype] * expected.norm() + 1e-30, (name, error)


def arguments(case):
    """The names of the case's tensors and the operator's arguments."""
    fused = () if case.references is None else ("references",)
    names = ("value", *fused, "positions", "weights")
    tensors = [getattr(case, name) for name in names]
    sizes = [size for shape in case.shapes for size in shape]
    return names, (tensors[0], sizes, *tensors[1:])


def run_forward(ops, case):
    op = ops.ms_deform_attn if case.references is None else ops.ms_deform_attn_fused
    return op(*arguments(case)[1])


def run_backward(ops, case, wanted=None, deterministic=False):
    """The gradients by name; those that are not among the wanted must be empty."""
    names, args = arguments(case)
    mask = [wanted is None or name in wanted for name in names]
    op = (
        ops.ms_deform_attn_backward
        if case.references is None
        else ops.ms_deform_attn_fused_backward
    )
    grads = dict(zip(names, op(case.grad, *args, mask, deterministic), strict=True))
    for name, flag in zip(names, mask, strict=True):
        assert grads[name].dtype == getattr(case, name).dtype
        assert flag or grads.pop(name).shape == (0,)
    return SimpleNamespace(**grads)


def check(ops, case, deterministic=(False, True), tolerance=TOLERANCE):
    """Output and gradients against float64."""
    expected = exact(case)
    assert_close(run_forward(ops, case), expected.output, tolerance, "output")
    for flag in deterministic:
        grads = run_backward(ops, case, deterministic=flag)
        for name, grad in vars(grads).items():
            bound = FIXED_POINT_TOLERANCE if flag and name == "value" else tolerance
            assert_close(grad, getattr(expected, name), bound, (name, flag))


@pytest.fixture(params=[None, 2, 4], ids=["plain", "points", "boxes"])
def coordinates(request, ops):
    return request.param


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("channels", "queries"),
    # Vectors of several widths; lanes that stay idle; more channels than one round takes.
    [(1, 13), (8, None), (32, 13), (33, None), (48, 13), (64, None), (160, 3)],
)
def test_equals_the_reference(ops, coordinates, dtype, channels, queries):
    check(ops, make_case(dtype=dtype, channels=channels, queries=queries, coordinates=coordinates))


@settings(max_examples=20, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=4),
    images=st.integers(0, 2),
    queries=st.sampled_from([None, 0, 1, 13]),
    heads=st.integers(0, 2),
    channels=st.sampled_from([0, 1, 4, 8, 20, 32, 64]),
    points=st.integers(0, 6),
    kind=st.sampled_from([None, 2, 4]),
    seed=st.integers(0, 1000),
)
def test_any_sizes(ops, kind, **sizes):
    check(ops, make_case(coordinates=kind, **sizes))


def test_more_images_than_one_axis_of_the_grid_has(ops):
    """The emulated device takes 3 blocks there."""
    check(ops, make_case([(2, 2)], images=7, queries=3, channels=8))


def test_many_samples_of_a_row(ops):
    """Blocks become small for the fused backward, whose rows wait in shared memory."""
    check(ops, make_case([(3, 3)] * 5, images=1, queries=2, points=80, coordinates=2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_samples_in_half_precision(ops, coordinates, dtype):
    case = make_case([(4, 5), (2, 3)], dtype=dtype, coordinates=coordinates)
    case.weights = case.weights.to(dtype)
    if coordinates is not None:
        case.positions = case.positions.to(dtype)
    check(ops, case)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_samples_of_other_types(ops, coordinates, dtype):
    """They are converted, and so are their gradients; the arithmetic is that of the value."""
    case = make_case(channels=8, coordinates=coordinates)
    case.weights = case.weights.to(dtype)
    if coordinates is not None:
        case.references = case.references.to(dtype)
    if coordinates is not None or dtype == torch.float64:
        case.positions = case.positions.to(dtype)
    check(ops, case, tolerance={**TOLERANCE, torch.float64: TOLERANCE[torch.float32]})


def unaligned(tensor):
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


@pytest.mark.parametrize("change", [transposed, unaligned])
def test_any_strides_and_alignment(ops, coordinates, change):
    case = make_case(channels=8, coordinates=coordinates)
    for name in ("value", "positions", "weights", "references", "grad"):
        if getattr(case, name) is not None:
            setattr(case, name, change(getattr(case, name)))
    check(ops, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["head-major", "channels apart", "expanded", "gaps"])
def test_value_of_any_strides(ops, dtype, layout):
    case = make_case(dtype=dtype, channels=16)
    value = case.value
    if layout == "head-major":
        value = value.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "channels apart":
        value = value.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == "expanded":
        value = value[:1].expand_as(value)
    else:
        value = torch.cat([value, value], dim=-1)[..., :16]
    case.value = value
    check(ops, case)


@pytest.mark.parametrize("channels", [6, 32])
def test_deterministic_bits(ops, coordinates, channels):
    """The same for every order of threads."""
    case = make_case([(5, 7), (3, 2)], channels=channels, coordinates=coordinates)
    results = [run_backward(ops, case, deterministic=True) for _ in range(4)]
    for result in results[1:]:
        for name, grad in vars(result).items():
            assert torch.equal(grad, getattr(results[0], name))


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_fixed_point_follows_the_size_of_the_gradient(ops, scale):
    case = make_case([(5, 7)])
    case.grad *= scale
    check(ops, case, [True])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_fixed_point_of_something_not_finite_is_nan(ops, bad):
    case = make_case([(5, 7)])
    case.grad[0, 0, 0] = bad
    assert run_backward(ops, case, deterministic=True).value.isnan().all()


@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_of_some_inputs_only(ops, coordinates, deterministic):
    case = make_case([(5, 7)], channels=8, coordinates=coordinates)
    expected = exact(case)
    for name in arguments(case)[0]:
        grads = run_backward(ops, case, [name], deterministic)
        assert_close(getattr(grads, name), getattr(expected, name), name=name)


FAR = [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 3e9, 5.0, -4.0]


@pytest.mark.parametrize("far", FAR)
def test_far_and_undefined_positions_contribute_nothing(ops, coordinates, far):
    case = make_case([(5, 4), (2, 3)], coordinates=coordinates)
    case.positions[:, :, :, 1, 0, 1] = far * (100 if coordinates else 1)
    sane = SimpleNamespace(**vars(case))
    sane.positions = case.positions.clone()
    sane.positions[:, :, :, 1, 0, 1] = 1e4
    if coordinates is None:  # nor does the weight of such a sample count
        case.weights[:, :, :, 1, 0] = float("nan")
        sane.weights = case.weights.nan_to_num(0.0)
    expected = exact(sane)
    assert_close(run_forward(ops, case), expected.output)
    for deterministic in (False, True):
        grads = run_backward(ops, case, deterministic=deterministic)
        for name, grad in vars(grads).items():
            assert_close(grad, getattr(expected, name), name=name)
        assert (grads.positions[:, :, :, 1, 0] == 0).all()


@pytest.mark.parametrize("channels", [3, 8])
def test_only_sampled_pixels_count(ops, channels):
    """Around the border and away from it: a poisoned pixel reaches those that touch it alone."""
    case = make_case([(4, 4)], images=1, queries=6, heads=1, channels=channels, points=1)
    case.value[:, 5] = float("nan")  # row 1, column 1
    pixels = torch.tensor(
        [[1.0, 1.0], [0.5, 1.5], [2.5, 2.5], [-0.5, 1.0], [3.5, 3.5], [2.5, -0.5]]
    )
    case.positions[...] = ((pixels + 0.5) / 4).view(1, 6, 1, 1, 1, 2)
    touched = [True, True, False, False, False, False]
    assert run_forward(ops, case).isnan().any(-1)[0].tolist() == touched
    grads = run_backward(ops, case)
    assert grads.value.isfinite().all()
    assert grads.weights.isnan().flatten().tolist() == touched
    assert grads.positions.isnan().flatten(1).any(0).view(6, 2).any(-1).tolist() == touched


def test_infinite_logits_are_nan_as_in_pytorch(ops):
    case = make_case([(3, 3)], coordinates=2)
    case.weights[0, 0, 0, 0, 0] = float("inf")
    case.weights[0, 1] = -float("inf")
    output, expected = run_forward(ops, case), exact(case).output
    assert torch.equal(output.isnan(), expected.isnan())
    assert_close(output.nan_to_num(), expected.nan_to_num())


def test_limits_are_named(ops, coordinates):
    case = make_case([(1, 1)] * 65, images=1, queries=1, heads=1, points=1, coordinates=coordinates)
    with pytest.raises(RuntimeError, match="at most 64 levels on CUDA, got 65"):
        run_forward(ops, case)


@pytest.mark.slow
@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.name)
def test_compiles_for_real_devices(source, tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    architectures = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in (80, 90)]
    flags = ["-std=c++17", "-O3", "-Werror", "all-warnings", *architectures]
    subprocess.run(["nvcc", *flags, "-c", source, "-o", tmp_path / "kernels.o"], check=True)
