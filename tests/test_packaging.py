"""What the wheel and the sdist contain. tools/check_wheel.sh installs and runs them."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "psf", "configs")


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> Path:
    """The folder of a wheel without the library, which takes seconds, and of an sdist."""
    project = tmp_path_factory.mktemp("project")
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(source, project / part, ignore=ignore)
        else:
            shutil.copy(source, project)
    command = [sys.executable, "setup.py", "--quiet", "sdist", "bdist_wheel"]
    environment = {**os.environ, "PSF_SKIP_EXTENSION": "1"}
    subprocess.run(command, cwd=project, env=environment, check=True, capture_output=True)
    return project / "dist"


def files(folder: Path, *patterns: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for p in patterns for path in folder.rglob(p)}


def test_the_wheel_has_all_modules_and_configs(distributions):
    (wheel,) = distributions.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert files(ROOT / "psf", "*.py", "py.typed") <= names
    assert {f"psf/{name}" for name in files(ROOT / "configs", "*.yaml")} <= names
    assert any(name.endswith("LICENSE") for name in names)
    assert not any(name.startswith("tests") for name in names)


def test_the_sdist_has_all_that_a_build_needs(distributions):
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = files(ROOT / "psf", "*.py", "*.cpp", "*.h", "*.cu", "*.cuh")
    assert sources | files(ROOT / "configs", "*.yaml") <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "psf/py.typed"} <= names
