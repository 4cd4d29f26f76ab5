"""The operator's tests again, with its sources for a CPU under AddressSanitizer."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deformable_inputs import needs_extension

import psf

HERE = Path(__file__).parent
PACKAGE = Path(psf.__path__[0])
FILES = ("test_ms_deform_attn.py", "test_ms_deform_attn_fused.py")
# Other code than the kernels', and rounding without optimization.
LEFT_OUT = "not reference and not single_precision"
# Calls instead of inlined checks, which take minutes to compile.
FLAGS = "-O1 -g0 --param asan-instrumentation-with-call-threshold=0"
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")


def build(folder: Path) -> None:
    """Copy the package and build its library, with checks of every access to memory."""
    shutil.copytree(PACKAGE, folder / "psf", ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    variables = {k: v for k, v in os.environ.items() if k != "FORCE_CUDA"}
    variables |= {"CXX": "g++ -fsanitize=address", "CXXFLAGS": FLAGS, "CUDA_VISIBLE_DEVICES": ""}
    options = ["--build-lib", str(folder), "--build-temp", str(folder / "build")]
    command = [sys.executable, "setup.py", "--quiet", "build_ext", *options]
    subprocess.run(command, cwd=PACKAGE.parent, env=variables, check=True)


@pytest.mark.slow
@needs_extension
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_no_access_out_of_bounds(tmp_path):
    build(tmp_path)
    print_library = ["g++", "-print-file-name=libasan.so"]
    library = subprocess.run(print_library, capture_output=True, text=True, check=True).stdout
    variables = {
        "PYTHONPATH": str(tmp_path),
        "LD_PRELOAD": library.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "CUDA_VISIBLE_DEVICES": "",
    }
    tests = [*(str(HERE / name) for name in FILES), "-k", LEFT_OUT]
    best = INSTRUCTION_SETS.index(torch.ops.psf.cpu_capability())
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "pytest", "-qs", "-p", "no:cacheprovider", *tests],
            cwd=tmp_path,
            env={**os.environ, **variables, "PSF_CPU_CAPABILITY": instruction_set},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for instruction_set in INSTRUCTION_SETS[: best + 1]
    ]
    outputs = [process.communicate()[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-9000:]
        assert "AddressSanitizer" not in output
