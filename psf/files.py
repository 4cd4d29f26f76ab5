"""Writing files whole or not at all, and lines that say what went wrong."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


@contextlib.contextmanager
def write_beside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """
    Write a file under another name in its folder, then move it over the old one.

    A kill, an error or a full disk leaves the old file as it was. The folder is created.

    Yields:
        The file to write in its place, ``<stem>.partial<suffix>``.

    Raises:
        OSError: the file cannot be written; the error names it.
    """
    path = Path(path)
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    with named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of writing name the file; Python's do so only where it is opened."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Errors of files and of what the user gave end the program with their message alone."""
    try:
        yield
    except (OSError, ValueError, FloatingPointError) as error:
        raise SystemExit(str(error)) from error


def printable(text: str) -> str:
    """One line that any terminal shows; names of files may hold anything."""
    encoding = sys.stdout.encoding or "utf-8"
    return " ".join(text.split()).encode(encoding, "backslashreplace").decode(encoding)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with write_beside(path) as partial:
        partial.write_text(text, encoding="utf-8")


def save_tensors(path: str | os.PathLike[str], content: Any) -> None:
    """
    ``torch.save``, whole or not at all.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    with write_beside(path) as partial:
        try:
            torch.save(content, partial)
        except RuntimeError as error:  # torch's, of a full disk
            reason = str(error).partition("\n")[0]
            raise OSError(f"'{path}' cannot be written. Is the disk full? ({reason})") from error
