"""Metadata of ``psf`` and the build of its extensions: ``psf._C`` (C++ kernels), ``psf._image``
(loading images).

    pip install --no-build-isolation -e .

The extension must be compiled against the torch that will load it, hence no build isolation.
``PSF_SKIP_EXTENSION=1`` leaves both out on purpose: everything works, the operator then runs as
plain PyTorch and PNGs are read by Pillow. Without it, a build that fails stops the installation.

Detectron2 and panopticapi are needed too but not listed: they are not on the package index under
their own names. INSTALL.md says where to get them.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

CSRC = Path("psf/layers/csrc")


def version() -> str:
    text = Path(__file__).with_name("psf").joinpath("__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('psf/__init__.py has no line __version__ = "..."')
    return match[1]


def compile_args() -> list[str]:
    """Flags of the C++ compiler. No -march: the binary runs on any machine of the platform."""
    if sys.platform == "win32":
        return ["/O2", "/openmp"]
    # The last two let loops with comparisons and square roots vectorise; unlike -ffast-math they
    # keep NaN, infinities and the order of additions.
    args = ["-O3", "-g0", "-Wall", "-fno-math-errno", "-fno-trapping-math"]
    # at::parallel_for is compiled into the extension. Only the compiler gets -fopenmp: without it
    # at the link, the extension uses the OpenMP runtime that torch has loaded, and so obeys
    # torch.set_num_threads. Clang's OpenMP calls another runtime, which torch does not load (and
    # Apple's clang has none): its kernels run on one thread.
    return [*args, "-fopenmp"] if sys.platform == "linux" and not is_clang() else args


def is_clang() -> bool:
    from torch.utils.cpp_extension import get_cxx_compiler

    command = [*shlex.split(get_cxx_compiler()), "--version"]
    return "clang" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def extension_arguments() -> dict:
    if os.environ.get("PSF_SKIP_EXTENSION") == "1":
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    extension = CppExtension(
        name="psf._C",
        sources=[str(path) for path in sorted(CSRC.glob("*.cpp"))],
        depends=[str(path) for path in sorted(CSRC.glob("*.h"))],
        extra_compile_args={"cxx": compile_args()},
    )
    image = Extension(
        name="psf._image",
        sources=[str(path) for path in sorted(Path("psf/csrc").glob("*.cpp"))],
        depends=["psf/csrc/image.h"],
        language="c++",
        extra_compile_args=["/O2", "/std:c++17"]
        if sys.platform == "win32"
        else ["-O3", "-std=c++17"],
    )
    return {"ext_modules": [extension, image], "cmdclass": {"build_ext": BuildExtension}}


setup(
    name="psf",
    version=version(),
    description="Panoptic SegFormer (arXiv 2109.03814) as a Detectron2 project",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["psf", "psf.*"]),
    install_requires=[
        "torch>=2.6",
        "torchvision",
        "fvcore",
        "iopath",
        "matplotlib",
        "numpy",
        "opencv-python-headless",
        "pillow",
        "pycocotools",
        "scipy",
        "tabulate",
        "tensorboard",
        "tqdm",
        "yacs",
    ],
    **extension_arguments(),
)
