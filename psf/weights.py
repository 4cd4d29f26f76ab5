"""Loading ``MODEL.WEIGHTS``: Detectron2's checkpoints, and those of others by conversion."""

import logging
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.error import URLError

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from torch import Tensor

from psf import checkpoint

logger = logging.getLogger(__name__)

# The key of a converted file that names the format which it was converted from.
CONVERTED_FROM = "converted_from"


class Origin(NamedTuple):
    """Where converted weights are from."""

    path: str
    source: checkpoint.Format
    dropped: dict[str, str]  # entries to reasons


def check_weights(path: str) -> None:
    """
    Check that ``MODEL.WEIGHTS`` is empty, an address, or a file that exists.

    Raises:
        FileNotFoundError: it is a path without a file.
    """
    if path and "://" not in path and not PathManager.isfile(path):
        raise FileNotFoundError(
            f"MODEL.WEIGHTS: there is no file '{path}'. Correct the path, or train first"
        )


class Checkpointer(DetectionCheckpointer):
    """
    Detectron2's checkpointer, which also knows the formats of :mod:`psf.checkpoint`.

    A file in one of these is converted when it is read. It, or one that was converted before, must
    fit the model when it is loaded: nothing in it is left over, and only what its format cannot
    have is missing. One line in the log says what became of it.
    """

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """
        Load a file, or what is at an address.

        Raises:
            OSError: there is no such file, or nothing can be fetched from the address.
        """
        check_weights(path)
        try:
            rest: dict[str, Any] = super().load(path, checkpointables)
        except URLError as error:
            raise OSError(
                f"MODEL.WEIGHTS: '{path}' cannot be fetched ({error}). Check the address and the "
                "connection, or download it by other means and name the file."
            ) from error
        return rest

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Name the file that ``--resume`` takes; a kill leaves the name before or this one."""
        path = os.path.join(self.save_dir, "last_checkpoint")
        with open(f"{path}.partial", "w", encoding="utf-8") as file:
            file.write(last_filename_basename)
        os.replace(f"{path}.partial", path)

    def _torch_load(self, f: str) -> dict[str, Any]:
        content = checkpoint.read(f)
        weights = checkpoint.find_state_dict(content)
        if CONVERTED_FROM in content:
            origin = Origin(f, checkpoint.by_name(content[CONVERTED_FROM]), {})
            return {"model": weights, "origin": origin}
        source = checkpoint.recognise(weights)
        if source is None:  # this project's own, or what the model will refuse
            return content if "model" in content else {"model": weights}
        conversion = checkpoint.convert(weights, source)
        origin = Origin(f, source, conversion.dropped)
        return {"model": conversion.state_dict, "origin": origin}

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        origin: Origin | None = checkpoint.pop("origin", None)
        if origin is not None:
            weights = checkpoint["model"]
            absent = check_fit(weights, self.model.state_dict(), origin)
            logger.info(
                "Weights of %s, from '%s': %s",
                origin.source.name,
                origin.path,
                describe(weights, origin.dropped, absent),
            )
        return super()._load_model(checkpoint)


def check_fit(
    weights: Mapping[str, Tensor], own: Mapping[str, Tensor], origin: Origin
) -> list[str]:
    """
    Check that weights belong to a model: to its backbone, if they are of nothing else.

    Args:
        weights: converted.
        own: the model's state dict.
        origin: of the weights.

    Returns:
        What the weights lack, as all of their format do.

    Raises:
        ValueError: an entry is not in the model or of another shape, or another one is missing.
    """
    part = "backbone." if all(name.startswith("backbone.") for name in weights) else ""
    absent = sorted(n for n in own.keys() - weights.keys() if n.startswith(part))
    missing = [name for name in absent if not name.startswith(origin.source.lacks)]
    unexpected = sorted(weights.keys() - own.keys())
    misshapen = [
        f"{name} {list(value.shape)} instead of {list(own[name].shape)}"
        for name, value in weights.items()
        if name in own and value.shape != own[name].shape
    ]
    if unexpected or misshapen or missing:
        raise ValueError(
            f"'{origin.path}' is incomplete or of another model. Not in this one: "
            f"{_shorten(unexpected)}. Of another shape: {_shorten(misshapen)}. Missing: "
            f"{_shorten(missing)}. Use the config that belongs to the file (MODEL_ZOO.md), or, to "
            "train on with other classes, name in MODEL.PSF.WEIGHTS_DATASET a data set with the "
            "file's."
        )
    return absent


def describe(weights: Mapping[str, Tensor], dropped: Mapping[str, str], absent: list[str]) -> str:
    """What became of the entries of a file, in one line."""
    parts = [f"{len(weights)} entries"]
    reasons = Counter(dropped.values())
    parts += [f"{count} dropped ({reason})" for reason, count in reasons.items()]
    if absent:
        parts.append(f"not in the file and left as initialised: {_shorten(absent)}")
    return "; ".join(parts)


def _shorten(names: list[str], most: int = 10) -> str:
    return (", ".join(names[:most]) + (" ..." if len(names) > most else "")) or "none"
