"""``psf`` imports and computes whatever the state of its library, and says so in one line.

Each test runs a package in a process of its own. Most take a copy of ``psf.layers`` alone, which
imports without Detectron2 and thus faster, and give it another ``_C.so`` or none.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import psf
from psf.layers.ms_deform_attn import has_extension

PACKAGE = Path(psf.__path__[0])
BUILD = "pip install --no-build-isolation -e ."

PROGRAM = """
import logging
import sys

lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append((record.name, record.levelname, record.getMessage()))
logging.getLogger().addHandler(handler)

import torch
import psf.layers
from psf.layers.ms_deform_attn import has_extension

assert psf.__path__[0] == sys.argv[1], psf.__path__
assert lines == [], lines  # nothing is said before the operator is needed
value = torch.tensor([10.0, 30.0]).view(1, 2, 1, 1)
locations = torch.tensor([0.625, 0.5]).view(1, 1, 1, 1, 1, 2)
weights = torch.ones(1, 1, 1, 1, 1)
for _ in range(2):
    assert psf.layers.ms_deform_attn(value, [(1, 2)], locations, weights).item() == 25
print(has_extension())
for line in lines:
    print(*line)
"""


@pytest.fixture
def layers(tmp_path) -> Path:
    """A package ``psf`` that has ``psf.layers`` and no library."""
    package = tmp_path / "psf"
    shutil.copytree(PACKAGE / "layers", package / "layers")
    (package / "__init__.py").touch()
    return package


def run(package: Path, **variables: str) -> list[str]:
    """What ``PROGRAM`` prints: whether the kernels are in use, then the lines logged."""
    environment = {k: v for k, v in os.environ.items() if k != "PSF_DISABLE_EXTENSION"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(package)],
        env={**environment, **variables},
        cwd=package.parent,  # python -c looks there first
        capture_output=True,
        text=True,
        timeout=600,  # importing torch takes seconds, or minutes from a slow disk
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_not_built(tmp_path):
    """The whole package, whose import registers everything with Detectron2 too."""
    ignore = shutil.ignore_patterns("_C.*", "__pycache__")
    used, line = run(Path(shutil.copytree(PACKAGE, tmp_path / "psf", ignore=ignore)))
    assert used == "False"
    assert line.startswith("psf.layers.ms_deform_attn WARNING ")
    assert "plain PyTorch" in line
    assert "not built" in line
    assert BUILD in line


def test_not_loadable(layers):
    """As with a torch that lacks what the library needs."""
    (layers / "_C.so").write_bytes(b"not a shared object")
    used, line = run(layers)
    assert used == "False"
    assert f"{layers / '_C.so'}: " in line  # the cause, on the same line
    assert "older than 2.10" in line
    assert BUILD in line


def test_disabled_by_the_environment(layers):
    (layers / "_C.so").write_bytes(b"must not be loaded")
    used, line = run(layers, PSF_DISABLE_EXTENSION="1")
    assert used == "False"
    assert "PSF_DISABLE_EXTENSION" in line


@pytest.mark.skipif(not has_extension(), reason="psf/_C.so is not in use")
def test_no_line_with_the_library():
    assert run(PACKAGE) == ["True"]
