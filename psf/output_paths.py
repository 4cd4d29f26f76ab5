"""Where files are written: below the output folder, and never over an input."""

import os
from collections.abc import Iterable
from pathlib import Path


def below(folder: str | os.PathLike[str], name: str) -> Path:
    """
    The path of an output in a folder, by a name that may be from a file of unknown origin.

    Raises:
        ValueError: it would not be below the folder, by its name or by a link.
    """
    path = Path(folder, name)
    if Path(folder).resolve() not in path.resolve().parents:
        raise ValueError(
            f"'{name}' would be written outside of the output folder '{folder}'. Names of images "
            "and PNGs in a JSON must be relative and without '..'."
        )
    return path


def refuse_files(output: Path, files: Iterable[str | Path]) -> None:
    """As :func:`refuse_inputs` for one file, fast where there are many inputs."""
    name = output.resolve().name
    refuse_inputs([output], (path for path in map(Path, files) if path.name == name))


def refuse_inputs(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """
    Check that files and folders to write are none that are read.

    Raises:
        ValueError: an output is an input, or a folder that has it.
    """
    resolved = [(path, path.resolve()) for path in inputs]
    read = {part: path for path, full in resolved for part in (full, *full.parents)}
    for output in outputs:
        path = read.get(output.resolve())
        if path is not None:
            raise ValueError(
                f"'{output}' would overwrite the input '{path}'. Choose another output folder."
            )
