"""Writing files whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def write_beside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """
    Write a file under another name in its folder, then move it over the old one.

    A kill, an error or a full disk leaves the old file as it was.

    Args:
        path: the file to write.

    Yields:
        The file to write in its place, ``<stem>.partial<suffix>``.
    """
    path = Path(path)
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
