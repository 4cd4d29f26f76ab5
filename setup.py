"""Metadata of ``psf`` and the build of its library ``psf/_C.so`` (the operator's kernels).

    pip install --no-build-isolation -e .

The library uses LibTorch's stable ABI and no Python: one build serves torch 2.10 and later, and
every Python. ``PSF_SKIP_EXTENSION=1`` leaves it out on purpose: everything works, the operator then
runs as plain PyTorch. Without it, a build that fails stops the installation.

CUDA kernels are built where torch sees a GPU and nvcc is installed; ``FORCE_CUDA=1`` builds them on
a machine without a GPU, for the architectures in ``TORCH_CUDA_ARCH_LIST``. ``CXX`` and ``CXXFLAGS``
are the compiler and more of its flags.

Detectron2 and panopticapi are needed too but not listed: they are not on the package index under
their own names. INSTALL.md says where to get them.
"""

import os
import platform
import re
import shlex
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

CSRC = Path("psf/layers/csrc")
TARGET_TORCH = "0x020a000000000000"  # 2.10, the oldest whose stable ABI suffices
ARCHITECTURES = "8.0;8.6;8.9;9.0+PTX"  # of GPUs; PTX is what newer ones compile for themselves

CXX_FLAGS = ["-O3", "-g0", "-Wall", "-fPIC", "-fvisibility=hidden"]
# These let loops with comparisons and square roots vectorise; unlike -ffast-math they keep NaN,
# infinities and the order of additions. Products and sums may be contracted.
CXX_FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
CXX_FLAGS += ["-Wno-psabi"]  # vectors are passed between inlined functions only
CXX_FLAGS += shlex.split(os.environ.get("CXXFLAGS", ""))
# Of the files of kernels, by the end of their names: the platform's least processor and, on x86-64,
# better ones; which of them runs is decided when it runs.
ISA_FLAGS = {
    "_avx2": ["-mavx2", "-mfma"],
    "_avx512": [
        *("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"),
        "-mprefer-vector-width=512",
    ],
}


def version() -> str:
    text = Path(__file__).with_name("psf").joinpath("__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('psf/__init__.py has no line __version__ = "..."')
    return match[1]


def reason_not_to_build() -> str | None:
    """Why this machine's psf goes without the library."""
    if os.environ.get("PSF_SKIP_EXTENSION") == "1":
        return "PSF_SKIP_EXTENSION=1 is set"
    if sys.platform == "win32":
        return "the kernels need GCC or Clang"
    import torch

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        return f"torch {torch.__version__} is older than 2.10"
    return None


def find_nvcc() -> str | None:
    """The CUDA compiler, if CUDA kernels are to be built."""
    import torch

    home = os.environ.get("CUDA_HOME")
    nvcc = str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc")
    missing = None
    if torch.version.cuda is None:
        missing = f"torch {torch.__version__}, which is built without CUDA"
    elif nvcc is None:
        missing = "no nvcc (none on PATH, and CUDA_HOME is not set)"
    if os.environ.get("FORCE_CUDA") == "1":
        if missing is not None:
            raise RuntimeError(f"FORCE_CUDA=1 asks for CUDA kernels, but there is {missing}")
        return nvcc
    if missing is not None:
        print(f"psf: building without CUDA kernels, since there is {missing}")  # noqa: T201
        return None
    return nvcc if torch.cuda.is_available() else None


def architecture_flags() -> list[str]:
    flags = []
    for name in re.split(r"[ ;]+", os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES):
        number = name.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class BuildLibrary(build_ext):
    """Builds psf/_C.so: a shared library that torch loads, not a module of Python's."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"

    def build_extension(self, extension: Extension) -> None:
        self.nvcc = find_nvcc()
        self.cxx = shlex.split(os.environ.get("CXX", "c++"))
        sources = [Path(path) for path in extension.sources if self.nvcc or "_cuda" not in path]
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        objects = [str(folder / f"{source.name}.o") for source in sources]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self.compile, sources, objects))
        library = Path(self.get_ext_fullpath(extension.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        self.link(objects, library)

    def compile(self, source: Path, target: str) -> None:
        if source.suffix == ".cu":
            # No --use_fast_math: sampling coordinates and the softmax keep their last digits.
            flags = ["-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", *architecture_flags()]
            command = [self.nvcc, *flags]
        else:
            command = [*self.cxx, *CXX_FLAGS, *cpp_flags(source)]
        self.spawn([*command, "-std=c++17", "-c", str(source), "-o", target])

    def link(self, objects: list[str], library: Path) -> None:
        folder = torch_folder() / "lib"
        # torch has loaded these before, so no path to them is needed when the library is loaded.
        torch_libraries = [f"-L{folder}", "-ltorch_cpu"]
        if self.nvcc:
            # nvcc adds the static CUDA runtime, which does not tie the library to torch's CUDA.
            command = [self.nvcc, "-shared", *objects, *torch_libraries, "-ltorch_cuda"]
        elif sys.platform == "darwin":
            command = [*self.cxx, "-dynamiclib", *objects, *torch_libraries]
        else:
            command = [*self.cxx, "-shared", "-s", *objects, *torch_libraries]
        self.spawn([*command, "-o", str(library)])


def cpp_flags(source: Path) -> list[str]:
    x86 = platform.machine() in ("x86_64", "AMD64")
    flags = [f"-I{torch_folder() / 'include'}", f"-DTORCH_TARGET_VERSION={TARGET_TORCH}"]
    if x86:
        flags.append("-DPSF_X86_KERNELS")
    if "_cuda" in source.stem:
        flags.append("-DUSE_CUDA")  # for torch's declarations
    for end, isa_flags in ISA_FLAGS.items():
        if x86 and source.stem.endswith(end):
            flags += isa_flags
    return flags


def torch_folder() -> Path:
    import torch

    return Path(torch.__path__[0])


class BuildPackage(build_py):
    """Adds configs/ as psf/configs/, where psf.config.load_config looks for them."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "psf", "configs")
            shutil.copytree("configs", target, dirs_exist_ok=True)


class Wheel(bdist_wheel):
    """A wheel for every Python, since the library has nothing of one in it."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def build_arguments() -> dict:
    reason = reason_not_to_build()
    if reason is not None:
        print(f"psf: building without the operator's kernels, since {reason}")  # noqa: T201
        return {"cmdclass": {"build_py": BuildPackage}}
    sources = [*CSRC.glob("*.cpp"), *CSRC.glob("*.cu")]
    sources.sort(key=lambda path: "_avx" not in path.stem)  # these take the longest
    extension = Extension(name="psf._C", sources=[str(path) for path in sources])
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_py": BuildPackage, "build_ext": BuildLibrary, "bdist_wheel": Wheel},
    }


setup(
    name="psf",
    version=version(),
    description="Panoptic SegFormer (arXiv 2109.03814) as a Detectron2 project",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["psf", "psf.*"]),
    package_data={"psf": ["py.typed"]},
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
    **build_arguments(),
)
