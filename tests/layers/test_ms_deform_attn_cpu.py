"""The kernels of every instruction set, and their bits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deformable_inputs import fused_inputs, gradients, inputs, needs_extension

from psf.layers import (
    ms_deform_attn,
    ms_deform_attn_fused,
    ms_deform_attn_fused_reference,
    ms_deform_attn_reference,
)

pytestmark = needs_extension

INSTRUCTION_SETS = ("baseline", "avx2", "avx512")


def check_everything():
    """What a process of every instruction set runs: values, gradients and bits."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for channels, levels in ((3, 1), (8, 3), (32, 4), (40, 9)):
            check(dtype, channels, levels)
    check_threads()


def check(dtype, channels, levels):
    """Against the reference in float64; samples outside and far outside among them."""
    sizes = {"queries": 70, "channels": channels, "points": 3, "dtype": torch.float64}
    shapes = [(5 + i % 3, 4 + i % 2) for i in range(levels)]
    # Relative to the norm; of the output, of the gradients of points and weights.
    tolerances = {torch.float64: (1e-13, 1e-13), torch.float32: (1e-6, 1e-6)}
    low = {torch.bfloat16: (4e-3, 6e-3), torch.float16: (5e-4, 1e-3)}
    tolerance = {**tolerances, **low}[dtype]
    wide = torch.promote_types(dtype, torch.float32)
    for op, reference, (value, _, *rest) in (
        (ms_deform_attn, ms_deform_attn_reference, inputs(shapes, **sizes)),
        (ms_deform_attn_fused, ms_deform_attn_fused_reference, fused_inputs(shapes, **sizes)),
        (
            ms_deform_attn_fused,
            ms_deform_attn_fused_reference,
            fused_inputs(shapes, coordinates=4, **sizes),
        ),
    ):
        given = [value.to(dtype), *(t.to(wide) for t in rest)]
        out, grads = gradients(op, given[0], shapes, *given[1:])
        exact = gradients(reference, given[0].double(), shapes, *(t.double() for t in given[1:]))
        bounds = (tolerance[0], *[tolerance[1]] * len(grads))
        for a, b, bound in zip((out, *grads), (exact[0], *exact[1]), bounds, strict=True):
            assert (a.double() - b).norm() <= bound * b.norm(), (op, dtype, channels, levels)


def check_threads():
    """The same bits for any number of threads."""
    sizes = {"images": 2, "queries": 336, "heads": 8, "channels": 12, "points": 4}
    shapes = [(16, 16), (8, 8), (4, 4)]
    plain = inputs(shapes, **sizes, dtype=torch.float32)
    fused = fused_inputs(shapes, **sizes, dtype=torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 5, *[40] * 10):  # often, where levels are apart: a race is rare
            torch.set_num_threads(count)
            out, grads = gradients(ms_deform_attn, *plain)
            fused_out, fused_grads = gradients(ms_deform_attn_fused, *fused)
            results.append((out, *grads, fused_out, *fused_grads))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def run(program: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_every_instruction_set(instruction_set):
    best = INSTRUCTION_SETS.index(torch.ops.psf.cpu_capability())
    if INSTRUCTION_SETS.index(instruction_set) > best:
        pytest.skip("not of this processor")
    program = (
        "import torch, test_ms_deform_attn_cpu as test\n"
        f"assert torch.ops.psf.cpu_capability() == '{instruction_set}'\n"
        "test.check_everything()"
    )
    result = run(program, PSF_CPU_CAPABILITY=instruction_set)
    assert result.returncode == 0, result.stderr


def test_an_unknown_instruction_set_is_refused():
    program = "import torch, psf.layers; torch.ops.psf.cpu_capability()"
    result = run(program, PSF_CPU_CAPABILITY="avx1024")
    assert "PSF_CPU_CAPABILITY is 'avx1024'" in result.stderr


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
