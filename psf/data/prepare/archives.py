"""Unpacking the archives that data sets are downloaded as."""

import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

import tqdm  # type: ignore[import-untyped]


class Member(NamedTuple):
    """A file of an archive."""

    name: str
    size: int
    read: Callable[[], IO[bytes]]


def unpack(archive: Path, folder: Path, *, members: str = "") -> int:
    """
    Unpack a .zip or .tar; files that are there with the right size are left alone.

    Args:
        archive: the file.
        folder: where its members go.
        members: unpack those alone that are below this folder of the archive.

    Returns:
        How many files were written.
    """
    written = 0
    opened = _zip_members(archive) if archive.suffix == ".zip" else _tar_members(archive)
    for name, size, read in tqdm.tqdm(opened, desc=archive.name, unit=" files", disable=None):
        target = _target(folder, name)
        if name.startswith(members) and not _is_there(target, size):
            with read() as content:
                _write(content, target)
            written += 1
    return written


def _zip_members(archive: Path) -> Iterator[Member]:
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            if not info.is_dir():
                yield Member(info.filename, info.file_size, partial(file.open, info))


def _tar_members(archive: Path) -> Iterator[Member]:
    with tarfile.open(archive) as file:
        for member in file:
            if member.isfile():
                yield Member(member.name, member.size, partial(_tar_content, file, member))


def _tar_content(file: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = file.extractfile(member)
    if content is None:
        raise ValueError(f"'{member.name}' of '{file.name!r}' has no content. Download it again.")
    return content


def _target(folder: Path, name: str) -> Path:
    target = (folder / name).resolve()
    if not target.is_relative_to(folder.resolve()):
        raise ValueError(f"The archive has a member '{name}' that would leave '{folder}'.")
    return target


def _is_there(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _write(content: IO[bytes], target: Path) -> None:
    """Write under another name first, so that an interrupted run leaves no half of a file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    with open(partial, "wb") as file:
        while chunk := content.read(1 << 20):
            file.write(chunk)
    os.replace(partial, target)
