"""Reading files of weights from anywhere: nothing in them is run.

Memory is allocated for what a file holds, not for what it says that it holds.
"""

import contextlib
import io
import mmap
import pickle
import pickletools
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch

# First bytes of the old and the present file format of torch.save, and the pickles of the old.
_PICKLE, _ZIP, _NUM_PICKLES = b"\x80", b"PK\x03\x04", 5

# What PyTorch lets a file call, although the call can allocate far more than the file holds.
_CALLS = re.compile(r"(__builtin__|builtins) bytearray|_codecs encode|torch(\.\w+)? \w*Tensor")

# What unpickling raises on damaged files, besides UnpicklingError.
DAMAGED = (
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
)


def read(path: str) -> dict[str, Any]:
    """
    Read a file of ``torch.save`` that holds tensors and plain values only, without running code.

    Raises:
        ValueError: the file holds something else, is damaged, or has another format.
    """
    with open(path, "rb") as file:
        begin = file.read(4)
    if begin[:1] != _PICKLE and begin != _ZIP:
        raise ValueError(
            f"'{path}' is not a PyTorch checkpoint: it {_describe(begin)}. If a download failed, "
            "repeat it."
        )
    try:
        (_check_zip if begin == _ZIP else _check_pickles)(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        forbidden = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = "a pickle of another kind" if forbidden is None else f"it holds {forbidden[1]}"
        raise ValueError(
            f"'{path}' is not a PyTorch checkpoint of tensors and plain values: {what}. Reading it "
            "could run code or fill the memory. If you trust its source, load it with "
            "torch.load(path, weights_only=False) and save its state dict with torch.save."
        ) from error
    except DAMAGED as error:
        raise ValueError(
            f"'{path}' is not a complete PyTorch checkpoint: it is truncated or damaged, or a zip "
            "file of another kind. Copy or download it again."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' holds a {type(content).__name__}, not a dict of weights")
    return content


def _check_zip(path: str) -> None:
    """
    Raises:
        ValueError: entries are compressed, which ``torch.save`` does not: they are read whole.
        UnpicklingError: see :func:`_check_calls`.
    """
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("compressed entries")
        for name in archive.namelist():
            if name.endswith("data.pkl"):
                _check_calls(io.BytesIO(archive.read(name)))


def _check_pickles(path: str) -> None:
    with _mapped(path) as file:
        for _ in range(_NUM_PICKLES):
            if file.tell() < len(file):
                _check_calls(file)


def _check_calls(file: Any) -> None:
    """
    Raises:
        UnpicklingError: the pickle that begins here calls one of ``_CALLS``.
    """
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "GLOBAL" and _CALLS.fullmatch(str(argument)):
            raise pickle.UnpicklingError(f"GLOBAL {str(argument).replace(' ', '.')}")


@contextlib.contextmanager
def _mapped(path: str) -> Iterator[mmap.mmap]:
    """A file whose ``read`` allocates no more than the file has, whatever it is asked for."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        yield content


def read_pickle(path: str) -> dict[str, Any]:
    """
    Read a pickle of NumPy arrays and strings, as Detectron2's model zoo has, without running code.

    Raises:
        ValueError: the file holds something else, or is damaged.
    """
    try:
        with _mapped(path) as file:
            content = _ArrayUnpickler(file, encoding="latin1").load()
    except _NotAllowed as error:
        raise ValueError(
            f"'{path}' is not a pickle of arrays and strings: {error}. Reading it could run code. "
            "If you trust its source, save its weights with torch.save."
        ) from error
    except (pickle.UnpicklingError, SystemError, *DAMAGED) as error:  # SystemError is NumPy's
        raise ValueError(f"'{path}' is truncated or damaged. Copy or download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' holds a {type(content).__name__}, not a dict of weights")
    return content


def arrays(content: Any, path: str) -> dict[str, Any]:
    """
    Check the weights of a pickle.

    Raises:
        ValueError: they are not a dict of arrays by name.
    """
    named = isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(value, np.ndarray) for name, value in content.items()
    )
    if not named or not content:
        raise ValueError(f"'{path}' holds no dict of arrays by name, but other things")
    return dict(content)


class _NotAllowed(pickle.UnpicklingError):
    """The file holds something that is not an array, text or number."""


class _ArrayUnpickler(pickle._Unpickler):
    """
    Refuses everything but what NumPy arrays of numbers and dicts are made of.

    Python's own unpickler, since that in C allocates 64 GB if four bytes of the file say so. Arrays
    get memory for what the file holds of them, not for what it says that it holds.
    """

    def _byte_array(self: Any) -> None:
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(length)))

    def _build(self: Any) -> None:
        of, state = self.stack[-2:]
        number = isinstance(of, np.dtype) and state[2:5] == (None, None, None)  # has no fields
        if not number and type(of) not in (np.ndarray, OrderedDict):
            raise _NotAllowed(f"it holds the state of {of!r:.99}")
        self.load_build()

    _loads: ClassVar[dict[int, Any]] = pickle._Unpickler.dispatch
    dispatch: ClassVar[dict[int, Any]] = {
        **_loads,
        pickle.BYTEARRAY8[0]: _byte_array,
        pickle.BUILD[0]: _build,
    }

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        """Called by pickle for each object that is not a plain value."""
        allowed = _PICKLED.get(f"{module.replace('numpy._core', 'numpy.core')}.{name}")
        if allowed is None:
            raise _NotAllowed(f"it holds {f'{module}.{name}'!r}")
        return allowed


def _number_type(code: str, *options: bool) -> "np.dtype[Any]":
    if not re.fullmatch(r"[<>=|]?[biuf][0-9]+", code):
        raise _NotAllowed(f"it holds an array of type '{code}'")
    return np.dtype(code, *options)


def _ndarray() -> None:
    """What stands for the type in a pickle, where nothing but its name is needed."""


def _reconstruct(kind: Any, shape: tuple[int, ...], code: bytes) -> "np.ndarray[Any, Any]":
    """An array that has no elements yet."""
    if kind is not _ndarray or shape != (0,):
        raise _NotAllowed(f"it holds an array without elements, of shape {shape!r:.99}")
    return np.empty(0)


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 pickles bytes in the protocols of Python 2."""
    if encoding != "latin1":
        raise _NotAllowed(f"it holds text in '{encoding}'")
    return text.encode(encoding)


_PICKLED: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": OrderedDict,
    "_codecs.encode": _encode,
    "numpy.ndarray": _ndarray,
    "numpy.dtype": _number_type,
    # The functions that NumPy names in pickles, by their names in NumPy 1.
    "numpy.core.multiarray._reconstruct": _reconstruct,
    "numpy.core.multiarray.scalar": np.float32(0).__reduce__()[0],  # type: ignore[dict-item]
    "numpy.core.numeric._frombuffer": np.empty(0).__reduce_ex__(5)[0],  # type: ignore[dict-item]
}


def _describe(begin: bytes) -> str:
    return f"begins with {begin!r}" if begin else "is empty"
