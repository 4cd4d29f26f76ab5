"""Where files are written: below the output folder, and never over an input."""

import os
from collections.abc import Iterable
from pathlib import Path


def below(folder: str | os.PathLike[str], name: str) -> Path:
    """
    The path of an output.

    Args:
        folder: of all outputs.
        name: of this one, possibly from a file of unknown origin.

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


def refuse_inputs(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """
    Check that outputs are no inputs.

    Args:
        outputs: files and folders to write.
        inputs: files and folders to read.

    Raises:
        ValueError: an output is an input, or a folder that has it.
    """
    read = [path.resolve() for path in inputs]
    for output in outputs:
        target = output.resolve()
        for path in read:
            if target == path or target in path.parents:
                raise ValueError(
                    f"'{output}' would overwrite the input '{path}'. Choose another output folder."
                )
