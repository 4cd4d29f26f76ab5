"""Metadata of ``psf`` and the build of its extension ``psf._C`` (the operator's kernels).

    pip install --no-build-isolation -e .

The extension must be compiled against the torch that will load it, hence no build isolation.
``PSF_SKIP_EXTENSION=1`` leaves it out on purpose: everything works, the operator then runs as plain
PyTorch. Without it, a build that fails stops the installation.

CUDA kernels are built where torch sees a GPU and nvcc is installed; ``FORCE_CUDA=1`` builds them on
a machine without a GPU, for the architectures in ``TORCH_CUDA_ARCH_LIST``.

Detectron2 and panopticapi are needed too but not listed: they are not on the package index under
their own names. INSTALL.md says where to get them.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup

CSRC = Path("psf/layers/csrc")
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0")  # of GPUs that the kernels are compiled for


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
    # Sums of loops marked so are in no particular order. Products and sums may be contracted;
    # vectors are passed between inlined functions only.
    args += ["-fopenmp-simd", "-ffp-contract=fast", "-Wno-psabi"]
    if has_x86_kernels():
        args.append("-DPSF_X86_KERNELS")
    # at::parallel_for is compiled into the extension. Only the compiler gets -fopenmp: without it
    # at the link, the extension uses the OpenMP runtime that torch has loaded, and so obeys
    # torch.set_num_threads. Clang's OpenMP calls another runtime, which torch does not load (and
    # Apple's clang has none): its kernels run on one thread.
    return [*args, "-fopenmp"] if sys.platform == "linux" and not is_clang() else args


def is_clang() -> bool:
    from torch.utils.cpp_extension import get_cxx_compiler

    command = [*shlex.split(get_cxx_compiler()), "--version"]
    return "clang" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def cuda_home() -> str | None:
    """The CUDA toolkit: CUDA_HOME, or that of the nvcc on PATH.

    nvcc itself is asked, since it may be a script that stands far from its toolkit, where torch
    would look for headers in vain.
    """
    nvcc = shutil.which("nvcc")
    if os.environ.get("CUDA_HOME") or nvcc is None:
        return os.environ.get("CUDA_HOME")
    command = [nvcc, "--dryrun", "-x", "cu", os.devnull]
    steps = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    match = re.search(r"^#\$ TOP=(.+)$", steps, re.MULTILINE)
    if match is None:
        raise RuntimeError(f"{nvcc} does not say where its toolkit is: set CUDA_HOME")
    return str(Path(match[1].strip()).resolve())


def wants_cuda(home: str | None) -> bool:
    import torch

    missing = None
    if torch.version.cuda is None:
        missing = f"torch {torch.__version__}, which is built without CUDA"
    elif home is None:
        missing = "no nvcc (none on PATH, and CUDA_HOME is not set)"
    if os.environ.get("FORCE_CUDA") == "1":
        if missing is not None:
            raise RuntimeError(f"FORCE_CUDA=1 asks for CUDA kernels, but there is {missing}")
        return True
    if missing is not None:
        print(f"psf: building without CUDA kernels, since there is {missing}")  # noqa: T201
        return False
    return torch.cuda.is_available()


def default_architectures(home: str) -> str:
    """In the form of TORCH_CUDA_ARCH_LIST: the wanted ones that this compiler knows."""
    nvcc = Path(home, "bin", "nvcc")
    command = [str(nvcc), "--list-gpu-arch"]
    known = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    names = [name for name in ARCHITECTURES if f"compute_{name.replace('.', '')}" in known]
    if not names:
        raise RuntimeError(f"{nvcc} knows none of the architectures {', '.join(ARCHITECTURES)}")
    return ";".join(names) + "+PTX"  # which newer devices compile for themselves


# Flags of the files of kernels, by the end of their names: the platform's least processor and, on
# x86-64, better ones; which of them runs is decided when it runs.
ISA_FLAGS = {
    "_baseline": [],
    "_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "_avx512": [
        *("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ],
}


def has_x86_kernels() -> bool:
    """Whether this compiler knows the flags above: GCC and clang on x86-64."""
    return platform.machine() in ("x86_64", "AMD64") and sys.platform != "win32"


def extension_arguments() -> dict:
    if os.environ.get("PSF_SKIP_EXTENSION") == "1":
        return {}
    home = cuda_home()
    cuda = wants_cuda(home)
    if cuda:
        os.environ["CUDA_HOME"] = home  # before torch.utils.cpp_extension looks for one
    from torch.utils import cpp_extension

    x86 = has_x86_kernels()

    class BuildKernels(cpp_extension.BuildExtension):
        """Builds the files of :data:`ISA_FLAGS` with their own flags, which setuptools cannot."""

        def build_extension(self, extension: Extension) -> None:
            groups = {end: sources_of(extension, end) for end in ISA_FLAGS} if x86 else {}
            if groups:
                # At once, since one file takes nearly all the time of its group. None includes
                # torch, so they need little memory.
                with ThreadPoolExecutor() as pool:
                    builds = [
                        pool.submit(self.build_isa, extension, end, sources)
                        for end, sources in groups.items()
                    ]
                for build, sources in zip(builds, groups.values(), strict=True):
                    extension.extra_objects += build.result()
                    extension.sources = [s for s in extension.sources if s not in sources]
            super().build_extension(extension)

        def build_isa(self, extension: Extension, end: str, sources: list[str]) -> list[str]:
            flags = [*extension.extra_compile_args["cxx"], "-std=c++17", *ISA_FLAGS[end]]
            # Folders of their own, since ninja's files stand in them.
            folder = Path(self.build_temp) / end.lstrip("_")
            return self.compiler.compile(sources, output_dir=str(folder), extra_postargs=flags)

    sources = [path for path in CSRC.glob("*.cpp") if cuda or not is_cuda(path)]
    flags = {"cxx": compile_args()}
    if cuda:
        sources.extend(CSRC.glob("*.cu"))
        # No --use_fast_math: sampling coordinates and the softmax keep their last digits.
        flags["nvcc"] = ["-O3"]
        if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
            os.environ["TORCH_CUDA_ARCH_LIST"] = default_architectures(home)
    extension_class = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    extension = extension_class(
        name="psf._C",
        sources=[str(path) for path in sorted(sources)],
        depends=[str(path) for path in sorted([*CSRC.glob("*.h"), *CSRC.glob("*.cuh")])],
        extra_compile_args=flags,
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildKernels}}


def sources_of(extension: Extension, end: str) -> list[str]:
    return [source for source in extension.sources if Path(source).stem.endswith(end)]


def is_cuda(path: Path) -> bool:
    """Of the kernels ms_deform_attn_cuda*."""
    return "_cuda" in path.stem


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
        "timm>=1.0",
        "tqdm",
        "yacs",
    ],
    **extension_arguments(),
)
