"""Unpacking the archives that data sets are downloaded as."""

import logging
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO

import tqdm  # type: ignore[import-untyped]

logger = logging.getLogger(__name__)


def unpack(archive: Path, folder: Path, *, members: str = "") -> None:
    """
    Unpack a .zip or .tar, if it exists. Files that are there with the same content are skipped.

    Files that differ are replaced, unless they are newer than the archive; these are logged. Only
    what is below the folder ``members`` of the archive is unpacked.

    Raises:
        ValueError: the archive is damaged, or a member would be written outside ``folder``.
    """
    if not archive.is_file():
        return
    progress = partial(tqdm.tqdm, desc=archive.name, unit=" files", disable=None)
    newer: list[Path] = []
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as zipped:
                for info in progress(zipped.infolist()):
                    target = folder / info.filename
                    if info.filename.startswith(members) and not (
                        _is_whole(target, info.file_size)
                        and _is_current(target, partial(zipped.open, info), archive, newer)
                    ):
                        zipped.extract(info, folder)  # drops ".." from the name
        else:
            with tarfile.open(archive) as tarred:
                for member in progress(tarred):
                    target = folder / member.name
                    if member.name.startswith(members) and not (
                        _is_whole(target, member.size)
                        and _is_current(target, partial(tarred.extractfile, member), archive, newer)
                    ):
                        tarred.extract(member, folder, filter="data")
    except (tarfile.TarError, zipfile.BadZipFile) as error:
        raise ValueError(f"Cannot unpack '{archive}': {error}. Download it again.") from error
    if newer:
        logger.warning(
            "%d files differ from those in '%s', are newer, and kept; the first is '%s'. Delete "
            "them to unpack them again.",
            *(len(newer), archive, newer[0]),
        )


def _is_whole(target: Path, size: int) -> bool:
    # A file that an interrupted run has not finished has another size.
    return target.is_file() and target.stat().st_size == size


def _is_current(
    target: Path, read: Callable[[], IO[bytes] | None], archive: Path, newer: list[Path]
) -> bool:
    """Whether a file has the content of its member, which ``read`` opens, or is newer."""
    member = read()
    if member is None:  # a link
        return False
    with member, open(target, "rb") as file:
        chunks = iter(lambda: file.read(1 << 20), b"")
        if all(chunk == member.read(len(chunk)) for chunk in chunks):
            return True
    if target.stat().st_mtime_ns <= archive.stat().st_mtime_ns:
        return False
    newer.append(target)
    return True


def require_unpacked(path: Path, archive: str, folder: Path) -> None:
    """Raise FileNotFoundError, with the archive to get, unless a path exists."""
    if not path.exists():
        raise FileNotFoundError(
            f"'{path}' does not exist. Put {archive} (see datasets/README.md) into '{folder}', or "
            "unpack it there."
        )
