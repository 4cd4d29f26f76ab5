"""The CUDA kernels without a GPU: run on an emulation of one, and compiled for real ones.

``cuda_emulation.h`` explains the emulation. It finds accesses out of bounds or misaligned, elements
that are written twice or never, and divergent barriers, besides wrong numbers.
"""

import ctypes
import itertools
import mmap
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
from cuda_emulation import (
    FIXED_POINT_TOLERANCE,
    HERE,
    KERNELS,
    TOLERANCE,
    accumulator,
    assert_close,
    compile_emulation,
    exact,
    make_case,
    with_extension_only,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytestmark = with_extension_only

SCALARS = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}


class Problem(ctypes.Structure):
    """The struct of that name in cuda_emulation.cpp."""

    _fields_ = (
        *[
            (name, ctypes.c_int64)
            for name in ("images", "queries", "levels", "positions", "heads", "channels", "points")
        ],
        ("shapes", ctypes.POINTER(ctypes.c_int64)),
        *[(name, ctypes.c_int64) for name in ("type", "positions_type", "weights_type")],
        ("value", ctypes.c_void_p),
        *[
            (name, ctypes.c_int64)
            for name in ("value_bytes", "image_stride", "position_stride", "head_stride")
        ],
        *[(name, ctypes.c_void_p) for name in ("locations", "weights", "references")],
        ("coordinates", ctypes.c_int64),
    )


class Wanted(ctypes.Structure):
    """The struct of that name in cuda_emulation.cpp."""

    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in ("value", "positions", "weights", "locations", "softmax")
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("emulation")
    sources = [*KERNELS, HERE / "cuda_emulation.cpp"]
    return ctypes.CDLL(compile_emulation(folder, sources, ["-std=c++17", "-O1"]))


def poisoned(shape, dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def aligned(tensor: Tensor) -> Tensor:
    """The CPU's memory of torch is aligned to 64 bytes; this asserts it where kernels need it."""
    assert tensor.is_contiguous()
    assert tensor.data_ptr() % 16 == 0
    return tensor


class Emulation:
    """The functions of ms_deform_attn_cuda.h on one set of CPU tensors."""

    def __init__(self, library, case, seed=0):
        self.library, self.case, self.seed = library, case, seed
        value = case.value
        images, queries, heads, levels, points = case.weights.shape
        self.wide = accumulator(value.dtype)
        self.shapes = (ctypes.c_int64 * (2 * levels))(*itertools.chain(*case.shapes))
        last = sum(
            (size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True)
        )
        self.problem = Problem(
            *(images, queries, levels, value.shape[1], heads, value.shape[3], points),
            self.shapes,
            *(SCALARS[t.dtype] for t in (value, case.positions, case.weights)),
            value.data_ptr(),
            (last + 1) * value.element_size() if value.numel() else 0,
            *value.stride()[:3],
            *(aligned(t).data_ptr() for t in (case.positions, case.weights)),
            None if case.references is None else aligned(case.references).data_ptr(),
            0 if case.references is None else case.references.shape[3],
        )

    def call(self, name: str, *arguments) -> None:
        function = getattr(self.library, f"emulate_{name}")
        function.restype = ctypes.c_char_p
        pointers = [
            ctypes.c_void_p(aligned(a).data_ptr()) if isinstance(a, Tensor) else ctypes.byref(a)
            for a in arguments
        ]
        error = function(ctypes.byref(self.problem), ctypes.c_uint(self.seed), *pointers)
        assert error == b"", error.decode()

    def forward(self) -> Tensor:
        images, queries, heads = self.case.weights.shape[:3]
        shape = (images, queries, heads * self.case.value.shape[3])
        output = poisoned(shape, self.case.value.dtype)
        if output.numel() > 0:
            self.call("forward", output)
        return output

    def wanted(self, value: Tensor | None, names=("positions", "weights")) -> SimpleNamespace:
        """Buffers for the named gradients, that by value given."""
        case = self.case
        buffers = {
            "value": value,
            "positions": poisoned(case.positions.shape, case.positions.dtype),
            "weights": poisoned(case.weights.shape, case.weights.dtype),
            "locations": poisoned(case.positions.shape, self.wide),
            "softmax": poisoned(case.weights.shape, self.wide),
        }
        names = (*names, "value")
        return SimpleNamespace(**{k: t if k in names else None for k, t in buffers.items()})

    def struct(self, wanted: SimpleNamespace) -> Wanted:
        tensors = (getattr(wanted, name) for name, _ in Wanted._fields_)
        return Wanted(*(None if t is None else aligned(t).data_ptr() for t in tensors))

    def backward(self, names=("positions", "weights"), value=True) -> SimpleNamespace:
        zeros = torch.zeros(self.case.value.shape, dtype=self.wide)
        wanted = self.wanted(zeros if value else None, names)
        self.call("backward", self.case.grad, self.struct(wanted))
        return wanted

    def deterministic_backward(self, names=("positions", "weights")) -> SimpleNamespace:
        exponent = torch.zeros(1, dtype=torch.int32)
        self.call("value_gradient_exponent", self.case.grad, exponent)
        fixed_point = torch.zeros(self.case.value.shape, dtype=torch.int64)
        wanted = self.wanted(fixed_point, names)
        self.call("deterministic_backward", self.case.grad, exponent, self.struct(wanted))
        wanted.value = poisoned(self.case.value.shape, self.case.value.dtype)
        self.call("value_gradient_from_fixed_point", fixed_point, exponent, wanted.value)
        return wanted

    def value_gradient_by_pixel(self) -> Tensor:
        grad_value = torch.zeros(self.case.value.shape, dtype=torch.float32)
        self.call("value_gradient_by_pixel", self.case.grad, grad_value)
        return grad_value

    def reference_gradient(self, grad_locations: Tensor) -> Tensor:
        result = poisoned(self.case.references.shape, self.wide)
        self.call("reference_gradient", grad_locations, result)
        return result


def check_all(library, case, seed=0):
    """Every kernel that takes the case, against float64."""
    expected = exact(case)
    emulation = Emulation(library, case, seed)
    fused = case.references is not None
    names = ("positions", "weights", *(("locations", "softmax") if fused else ()))
    assert_close(emulation.forward(), expected.output, name="output")
    results = {
        "scattered": (emulation.backward(names), TOLERANCE),
        "deterministic": (emulation.deterministic_backward(names), FIXED_POINT_TOLERANCE),
    }
    for kind, (grads, tolerance) in results.items():
        for name in ("value", *names):
            if grads.value.dtype == torch.float64 and name != "value":
                tolerance = TOLERANCE
            assert_close(getattr(grads, name), getattr(expected, name), tolerance, (kind, name))
    grads = results["scattered"][0]
    if fused:
        assert_close(emulation.reference_gradient(grads.locations), expected.references)
    if case.value.dtype != torch.float64 and case.value.shape[3] % 4 == 0:
        if fused:
            case = SimpleNamespace(**{**vars(case), "weights": grads.softmax})
        by_pixel = Emulation(library, case, seed).value_gradient_by_pixel()
        assert_close(by_pixel, expected.value, name="by pixel")


@pytest.mark.parametrize("dtype", SCALARS)
@pytest.mark.parametrize("channels", [1, 3, 8, 16, 32, 33, 64])
@pytest.mark.parametrize("queries", [None, 13])
def test_types_and_channels(library, dtype, channels, queries):
    check_all(library, make_case(dtype=dtype, channels=channels, queries=queries))


@pytest.mark.parametrize("channels", [48, 128, 160])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_that_leave_lanes_idle_or_need_several_rounds(library, dtype, channels):
    check_all(library, make_case([(3, 5)], images=1, dtype=dtype, channels=channels))


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("dtype", SCALARS)
@pytest.mark.parametrize("channels", [5, 32])
def test_fused(library, coordinates, dtype, channels):
    check_all(library, make_case(dtype=dtype, channels=channels, coordinates=coordinates))


@pytest.mark.parametrize("coordinates", [None, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_positions_and_weights_in_half_precision(library, coordinates, dtype):
    case = make_case([(4, 5), (2, 3)], dtype=dtype, coordinates=coordinates)
    case.weights = case.weights.to(dtype)
    if coordinates is not None:  # locations are always in single precision
        case.positions = case.positions.to(dtype)
    check_all(library, case)


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
    images=st.integers(1, 3),
    queries=st.sampled_from([None, 1, 7, 31]),
    heads=st.integers(1, 3),
    channels=st.sampled_from([1, 4, 8, 20, 32, 64]),
    points=st.integers(1, 8),
    coordinates=st.sampled_from([None, 2, 4]),
    seed=st.integers(0, 1000),
)
def test_any_sizes(library, seed, **sizes):
    check_all(library, make_case(seed=seed, **sizes), seed)


def test_more_images_than_one_axis_of_the_grid_has(library):
    """The emulated device takes 3 blocks there."""
    check_all(library, make_case([(2, 2)], images=7, queries=3, channels=8))


def test_many_samples_of_a_row(library):
    """Blocks become small for the fused backward, whose rows wait in shared memory."""
    check_all(library, make_case([(3, 3)] * 5, images=1, queries=2, points=80, coordinates=2))


def test_more_points_than_are_sorted_at_a_time(library):
    case = make_case([(3, 3)], images=1, queries=2, heads=1, channels=4, points=300)
    assert_close(Emulation(library, case).value_gradient_by_pixel(), exact(case).value)


def test_tiles_wider_than_the_window_that_is_sorted(library):
    case = make_case([(40, 70)], images=1, queries=50, heads=1, channels=4)
    assert_close(Emulation(library, case).value_gradient_by_pixel(), exact(case).value)


@pytest.mark.parametrize("channels", [6, 32])
def test_deterministic_bits(library, channels):
    """The same for every order of threads, and for the scattered gradients of the samples."""
    case = make_case(channels=channels)
    results = [Emulation(library, case, seed).deterministic_backward() for seed in range(4)]
    for result in results[1:]:
        assert torch.equal(result.value, results[0].value)
    scattered = Emulation(library, case, 9).backward()
    for name in ("positions", "weights"):
        assert torch.equal(getattr(scattered, name), getattr(results[0], name))


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_fixed_point_follows_the_size_of_the_gradient(library, scale):
    case = make_case()
    case.grad *= scale
    assert_close(Emulation(library, case).deterministic_backward().value, exact(case).value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_fixed_point_of_something_not_finite_is_nan(library, bad):
    case = make_case()
    case.grad[0, 0, 0] = bad
    grads = Emulation(library, case).deterministic_backward()
    assert grads.value.isnan().all()


def test_gradients_of_some_inputs_only(library):
    case = make_case(coordinates=2)
    expected = exact(case)
    emulation = Emulation(library, case)
    for names in ((), ("positions",), ("weights",), ("locations",)):
        for value in (False, True):
            grads = emulation.backward(names, value)
            for name in (*names, *(("value",) if value else ())):
                assert_close(getattr(grads, name), getattr(expected, name), name=name)


FAR = [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 3e9, 5.0, -4.0]


@pytest.mark.parametrize("coordinates", [None, 2, 4])
@pytest.mark.parametrize("far", FAR)
def test_far_and_undefined_positions_contribute_nothing(library, coordinates, far):
    case = make_case([(5, 4), (2, 3)], coordinates=coordinates)
    case.positions[:, :, :, 1, 0, 1] = far * (100 if coordinates else 1)
    sane = SimpleNamespace(**vars(case))
    sane.positions = case.positions.clone()
    sane.positions[:, :, :, 1, 0, 1] = 1e4
    if coordinates is None:  # nor does the weight of such a sample count
        case.weights[:, :, :, 1, 0] = float("nan")
        sane.weights = case.weights.nan_to_num(0.0)
    emulation, expected = Emulation(library, case), exact(sane)
    assert_close(emulation.forward(), expected.output)
    for grads in (emulation.backward(), emulation.deterministic_backward()):
        assert_close(grads.value, expected.value)
        assert_close(grads.positions, expected.positions)
        assert (grads.positions[:, :, :, 1, 0] == 0).all()
        if coordinates is None:
            assert (grads.weights[:, :, :, 1, 0] == 0).all()
            assert_close(grads.weights[:, :, :, 0], expected.weights[:, :, :, 0])
        else:
            assert_close(grads.weights, expected.weights)
    if coordinates is None:
        assert_close(emulation.value_gradient_by_pixel(), expected.value)
    else:
        locations = emulation.backward(("locations",)).locations
        assert_close(emulation.reference_gradient(locations), expected.references)


@pytest.mark.parametrize("channels", [3, 8])
def test_only_sampled_pixels_count(library, channels):
    """Around the border and away from it: a poisoned pixel reaches those that touch it alone."""
    case = make_case([(4, 4)], images=1, queries=6, heads=1, channels=channels, points=1)
    case.value[:, 5] = float("nan")  # row 1, column 1
    pixels = torch.tensor(
        [[1.0, 1.0], [0.5, 1.5], [2.5, 2.5], [-0.5, 1.0], [3.5, 3.5], [2.5, -0.5]]
    )
    case.positions[...] = ((pixels + 0.5) / 4).view(1, 6, 1, 1, 1, 2)
    emulation = Emulation(library, case)
    touched = [True, True, False, False, False, False]
    assert emulation.forward().isnan().any(-1)[0].tolist() == touched
    grads = emulation.backward()
    assert grads.value.isfinite().all()
    assert grads.weights.isnan().flatten().tolist() == touched
    assert grads.positions.isnan().flatten(1).any(0).view(6, 2).any(-1).tolist() == touched


@pytest.mark.parametrize(
    "empty",
    [
        {"channels": 0},
        {"points": 0},
        {"shapes": [(0, 0)], "queries": 3},
        {"shapes": [(0, 3), (2, 2), (3, 0)]},
        {"shapes": [(0, 3), (2, 2), (3, 0)], "queries": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("coordinates", [None, 2, 4])
def test_empty(library, empty, coordinates):
    check_all(library, make_case(**empty, coordinates=coordinates))


@pytest.mark.parametrize("coordinates", [None, 2, 4])
def test_no_levels(library, coordinates):
    case = make_case([], queries=3, coordinates=coordinates)
    emulation = Emulation(library, case)
    assert (emulation.forward() == 0).all()
    emulation.backward()
    emulation.deterministic_backward()
    assert emulation.value_gradient_by_pixel().numel() == 0


def test_infinite_logits_are_nan_as_in_pytorch(library):
    case = make_case([(3, 3)], coordinates=2)
    case.weights[0, 0, 0, 0, 0] = float("inf")
    case.weights[0, 1] = -float("inf")
    output, expected = Emulation(library, case).forward(), exact(case).output
    assert torch.equal(output.isnan(), expected.isnan())
    assert_close(output.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["head-major", "unaligned", "expanded", "gaps"])
def test_value_of_any_strides(library, dtype, layout):
    case = make_case(dtype=dtype, channels=16)
    value = case.value
    if layout == "head-major":
        value = value.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "unaligned":
        value = torch.cat([value.new_zeros(1), value.flatten()])[1:].view(value.shape)
    elif layout == "expanded":
        value = value[:1].expand_as(value)
    else:
        value = torch.cat([value, value], dim=-1)[..., :16]
    case.value = value
    assert value.is_contiguous() == (layout == "unaligned")
    check_all(library, case)


def test_value_spread_over_more_elements_than_32_bits_count(library):
    """In memory that is reserved and, but for what is read, never used."""
    case = make_case([(8, 9)], images=1, queries=20, channels=8)
    expected = Emulation(library, case).forward()
    gap = 2**25  # elements between positions; 2^31 and more in all
    shape, strides = case.value.shape, (0, gap, 8, 1)
    anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE on Linux
    memory = mmap.mmap(-1, 4 * gap * shape[1], flags=anonymous)
    spread = torch.frombuffer(memory, dtype=torch.float32).as_strided(shape, strides)
    case.value = spread.copy_(case.value)
    assert torch.equal(Emulation(library, case).forward(), expected)
    check_all(library, case)


def test_emulation_notices_a_buffer_that_is_too_small(library):
    emulation = Emulation(library, make_case())
    emulation.problem.value_bytes -= 1
    with pytest.raises(AssertionError, match="out of bounds"):
        emulation.forward()


@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.name)
def test_compiles_for_real_devices(source, tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    architectures = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in (80, 90)]
    flags = ["-std=c++17", "-O3", "-Werror", "all-warnings", *architectures]
    subprocess.run(["nvcc", *flags, "-c", source, "-o", tmp_path / "kernels.o"], check=True)
