"""What the tests of the CUDA operator share: compiling the emulation, inputs, exact results.

Shapes as in psf/layers/ms_deform_attn.py: N images, Q queries, L levels, S positions, M heads, D
channels a head, P sampling points.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import psf
from psf.layers import ms_deform_attn_reference

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

# For the run of the tests without the extension: the emulation needs none, once is enough.
with_extension_only = pytest.mark.skipif(
    os.environ.get("PSF_DISABLE_EXTENSION") == "1", reason="the same with the extension"
)

ODD = [(5, 7), (3, 2), (1, 1)]  # sizes that no tile divides


def compile_emulation(
    folder: Path, sources: Sequence[Path], flags: Sequence[str], libraries: Sequence[str] = ()
) -> str:
    """Path of a shared library of the sources, kernels among them, in the given folder."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("the emulation needs a C++ compiler and Linux")
    # The emulation jumps between stacks, which fortified longjmp takes for an error.
    flags = ["-fPIC", "-U_FORTIFY_SOURCE", "-DPSF_CUDA_EMULATION", f"-I{HERE}", *flags]

    def compile_source(source: Path) -> Path:
        target = folder / f"{source.name}.o"
        names = [f"-D{name}={other}" for name, other in RENAMED.items() if source in KERNELS]
        command = [compiler, *flags, *names, f"-I{SOURCES}", "-x", "c++", "-c", source]
        command += ["-o", target]
        subprocess.run(command, check=True)
        return target

    with ThreadPoolExecutor(max_workers=2) as pool:
        objects = list(pool.map(compile_source, sources))
    library = folder / "emulation.so"
    subprocess.run([compiler, "-shared", *objects, *libraries, "-o", library], check=True)
    return str(library)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def off_the_knots(pixels: Tensor) -> Tensor:
    """At least 1/4 pixel from where derivatives jump."""
    return pixels.floor() + (pixels - pixels.floor()).clamp(0.25, 0.75)


def sides(shapes) -> Tensor:
    """(L, 1, 2), (W, H). 1 where a level is empty, lest dividing makes NaN of what is not used."""
    return torch.tensor(shapes).double().view(-1, 2).flip(-1)[:, None].clamp(min=1)


def make_case(
    shapes=ODD,
    images=2,
    queries=None,
    heads=2,
    channels=32,
    points=4,
    dtype=torch.float32,
    coordinates=None,
    seed=0,
):
    """Inputs whose locations reach beyond every border. queries=None: the queries are the pixels.
    coordinates: 2 or 4 for the fused operator."""
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    positions = sum(h * w for h, w in shapes)
    queries = positions if queries is None else queries
    grid = (images, queries, heads, len(shapes), points)
    sizes = sides(shapes)
    pixels = off_the_knots((2 * torch.rand(*grid, 2, **draw) - 0.5) * sizes - 0.5)
    wide = accumulator(dtype)
    references = None
    if coordinates is None:
        stored, weights = (pixels + 0.5) / sizes, torch.rand(*grid, **draw)
    else:
        centres = torch.rand(images, queries, len(shapes), 2, **draw)
        box = torch.rand(images, queries, len(shapes), 2, **draw) + 0.5
        references = torch.cat([centres, box], dim=-1)[..., :coordinates].to(wide).contiguous()
        offsets = pixels + 0.5 - (centres.unsqueeze(2) * sizes[:, 0]).unsqueeze(4)
        scale = 1 if coordinates == 2 else sizes * box[:, :, None, :, None] / 2 / points
        stored, weights = offsets / scale, torch.randn(*grid, **draw)
    return SimpleNamespace(
        shapes=shapes,
        value=torch.randn(images, positions, heads, channels, **draw).to(dtype),
        positions=stored.to(wide),
        weights=weights.to(wide),
        references=references,
        grad=torch.randn(images, queries, heads * channels, **draw).to(dtype),
    )


def exact(case) -> SimpleNamespace:
    """Output and gradients by plain PyTorch in float64."""
    inputs = (case.value, case.positions, case.weights)
    value, positions, weights = (t.detach().double().requires_grad_() for t in inputs)
    locations, attention, references = positions, weights, None
    if case.references is not None:
        references = case.references.detach().double().requires_grad_()
        attention = weights.flatten(3).softmax(-1).view_as(weights)
        around = references[:, :, None, :, None]  # (N, Q, 1, L, 1, 2 or 4)
        if references.shape[3] == 2:
            locations = around + positions / sides(case.shapes)
        else:
            locations = around[..., :2] + positions / weights.shape[4] * around[..., 2:] * 0.5
    locations.retain_grad()
    output = ms_deform_attn_reference(value, case.shapes, locations, attention)
    output.backward(case.grad.double())
    return SimpleNamespace(
        output=output.detach(),
        value=value.grad,
        positions=positions.grad,
        weights=weights.grad,
        locations=locations.grad,
        softmax=attention.detach(),
        references=None if references is None else references.grad,
    )


def assert_close(actual, expected, tolerance=TOLERANCE, name=""):
    assert actual.shape == expected.shape
    error = (actual.double() - expected).norm()
    assert error <= tolerance[actual.dtype] * expected.norm() + 1e-30, (name, error)
