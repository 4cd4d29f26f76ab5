"""Unpacking the archives that data sets are downloaded as."""

import tarfile
import zipfile
from functools import partial
from pathlib import Path

import tqdm  # type: ignore[import-untyped]


def unpack(archive: Path, folder: Path, *, members: str = "") -> None:
    """
    Unpack a .zip or .tar, if it exists. Files that have the right size already are skipped.

    Args:
        archive: the file.
        folder: where to unpack it.
        members: unpack only what is below this folder of the archive.

    Raises:
        ValueError: the archive is damaged, or a member would be written outside ``folder``.
    """
    if not archive.is_file():
        return
    progress = partial(tqdm.tqdm, desc=archive.name, unit=" files", disable=None)
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as zipped:
                for info in progress(zipped.infolist()):
                    if _is_wanted(info.filename, info.file_size, folder, members):
                        zipped.extract(info, folder)  # drops ".." from the name
        else:
            with tarfile.open(archive) as tarred:
                for member in progress(tarred):
                    if _is_wanted(member.name, member.size, folder, members):
                        tarred.extract(member, folder, filter="data")
    except (tarfile.TarError, zipfile.BadZipFile) as error:
        raise ValueError(f"Cannot unpack '{archive}': {error}. Download it again.") from error


def _is_wanted(name: str, size: int, folder: Path, members: str) -> bool:
    target = folder / name
    # A file that an interrupted run has not finished has another size.
    return name.startswith(members) and not (target.is_file() and target.stat().st_size == size)


def require_unpacked(path: Path, archive: str, folder: Path) -> None:
    """Raise FileNotFoundError, with the archive to get, unless a path exists."""
    if not path.exists():
        raise FileNotFoundError(
            f"'{path}' does not exist. Put {archive} (see datasets/README.md) into '{folder}', or "
            "unpack it there."
        )
