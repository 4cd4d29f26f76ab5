"""Loading ``MODEL.WEIGHTS``: Detectron2's checkpoints and, converted, third-party ones."""

import logging
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from torch import Tensor

from psf import checkpoint, checkpoint_files
from psf.files import save_tensors, write_text

logger = logging.getLogger(__name__)

# The file in OUTPUT_DIR that holds the name of the last checkpoint.
LAST_CHECKPOINT = "last_checkpoint"

# What Detectron2 downloads from.
SCHEMES = ("detectron2", "http", "https", "ftp")

# The key in a converted file for the name of its original format.
CONVERTED_FROM = "converted_from"


class Origin(NamedTuple):
    """Where converted weights come from."""

    path: str
    source: checkpoint.Format
    dropped: dict[str, str]  # dropped entries and the reasons


def check_weights(path: str) -> None:
    """
    Check that ``MODEL.WEIGHTS`` is empty, a URL, or a file that exists.

    Raises:
        FileNotFoundError: it is a path without a file.
        ValueError: it is a URL of another kind than those that can be downloaded.
    """
    scheme = path.partition("://")[0] if "://" in path else ""
    if scheme and scheme not in SCHEMES:
        raise ValueError(f"MODEL.WEIGHTS: '{path}': known are files, and {', '.join(SCHEMES)}")
    if path and not scheme and not PathManager.isfile(path):
        raise FileNotFoundError(
            f"MODEL.WEIGHTS: there is no file '{path}'. Correct the path, or train first"
        )


def read_file(path: str) -> dict[str, Any]:
    """
    Read a file of ``torch.save``, or ``.safetensors``, without running code.

    Raises:
        ValueError: the file holds something else, is damaged, or has another format.
    """
    if not path.endswith(".safetensors"):
        return checkpoint_files.read(path)
    from safetensors import SafetensorError  # comes with timm
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise ValueError(f"'{path}' is no complete safetensors file: {error}") from error


class Checkpointer(DetectionCheckpointer):
    """
    Detectron2's checkpointer, which also loads the formats of :mod:`psf.checkpoint`.

    Files in these formats are converted on reading. They are loaded strictly, as are files that
    were converted before: no entry is left over, and only those that the format lacks are missing.
    One line in the log summarizes the conversion.
    """

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load a file or a URL; raises OSError or ValueError with one line that names it."""
        path = os.path.expanduser(path)
        check_weights(path)
        try:
            rest: dict[str, Any] = super().load(path, checkpointables)
        except URLError as error:
            raise OSError(
                f"MODEL.WEIGHTS: '{path}' cannot be downloaded ({error}). Check the URL and the "
                "connection, or download the file by other means and give its path."
            ) from error
        except ValueError as error:
            message = " ".join(str(error).split())
            if message == str(error) and Path(path).name in message:
                raise
            raise ValueError(f"MODEL.WEIGHTS: '{path}': {message}") from error
        return rest

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``<name>.pth``, then its name for ``--resume``, each whole or not at all."""
        if not self.save_dir or not self.save_to_disk:
            return
        states = {key: part.state_dict() for key, part in self.checkpointables.items()}
        path = Path(self.save_dir, f"{name}.pth")
        logger.info("Saving the checkpoint '%s'", path)
        save_tensors(path, {"model": self.model.state_dict(), **states, **kwargs})
        self.tag_last_checkpoint(path.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Write the name of the file for ``--resume``."""
        write_text(Path(self.save_dir, LAST_CHECKPOINT), last_filename_basename)

    def get_checkpoint_file(self) -> str:
        """
        The file named by ``last_checkpoint``, for ``--resume``.

        Raises:
            ValueError: what is written there is not the name of a file in this folder.
        """
        tag = Path(self.save_dir, LAST_CHECKPOINT)
        name = tag.read_text(encoding="utf-8", errors="replace").strip()
        file = tag.with_name(name) if name and Path(name).name == name else None
        if file is None or file.suffix != ".pth" or not file.is_file():
            raise ValueError(
                f"'{tag}' names {name[:100]!r}, which is not a .pth file in its folder. Write the "
                "name of the checkpoint to continue from into it."
            )
        return str(file)

    def _load_file(self, filename: str) -> dict[str, Any]:
        """As Detectron2's, without running code that a file contains."""
        if filename.endswith(".pkl"):
            content = checkpoint_files.read_pickle(filename)
            if "model" in content and "__author__" in content:  # Detectron2's model zoo
                return {**content, "model": checkpoint_files.arrays(content["model"], filename)}
            weights = checkpoint_files.arrays(content.get("blobs", content), filename)  # Caffe2's
            weights = {k: v for k, v in weights.items() if not k.endswith("_momentum")}
            return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}
        if filename.endswith(".pyth"):
            content = checkpoint_files.read(filename)
            weights = checkpoint.find_state_dict(content.get("model_state", {}))
            weights = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
            return {"model": weights, "__author__": "pycls", "matching_heuristics": True}
        if filename.endswith(".safetensors"):
            return self._torch_load(filename)
        loaded: dict[str, Any] = super()._load_file(filename)
        return loaded

    def _torch_load(self, f: str) -> dict[str, Any]:
        content = read_file(f)
        weights = checkpoint.find_state_dict(content)
        if CONVERTED_FROM in content:
            origin = Origin(f, checkpoint.by_name(content[CONVERTED_FROM]), {})
            return {"model": weights, "origin": origin}
        source = checkpoint.recognise(weights)
        if source is None:  # this project's, or unknown, which loading refuses
            return content if "model" in content else {"model": weights}
        conversion = checkpoint.convert(weights, source)
        origin = Origin(f, source, conversion.dropped)
        return {"model": conversion.state_dict, "origin": origin}

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        self._convert_ndarray_to_tensor(checkpoint["model"])
        check_values(checkpoint["model"], self.model.state_dict())
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


def check_values(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """
    Check the numbers of a checkpoint.

    Raises:
        ValueError: a weight is sparse, is not finite, or has integers where the model has not.
    """
    for name, value in weights.items():
        floating = name in own and own[name].is_floating_point()
        if value.layout != torch.strided or (floating and not value.is_floating_point()):
            raise ValueError(
                f"{name} is {value.dtype} ({value.layout}), not floating-point numbers. Save the "
                "weights as dense float32 tensors."
            )
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(
                f"{name} has values that are not finite: the training diverged, or the file is "
                "damaged. Use an earlier checkpoint."
            )


def check_fit(
    weights: Mapping[str, Tensor], own: Mapping[str, Tensor], origin: Origin
) -> list[str]:
    """
    Check that converted weights fit a model, or its backbone if they are a backbone's.

    Returns:
        The entries of the model that the weights' format lacks.

    Raises:
        ValueError: an entry is not in the model, has another shape, or is missing.
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
            f"'{origin.path}' is incomplete or belongs to another model. Not in this model: "
            f"{_shorten(unexpected)}. Other shapes: {_shorten(misshapen)}. Missing: "
            f"{_shorten(missing)}. Use the config of the file (MODEL_ZOO.md). To fine-tune on "
            "other classes, set MODEL.PSF.WEIGHTS_DATASET to a data set with the file's classes."
        )
    return absent


def describe(weights: Mapping[str, Tensor], dropped: Mapping[str, str], absent: list[str]) -> str:
    """Summarize in one line which entries of a file were loaded and dropped."""
    parts = [f"{len(weights)} entries"]
    reasons = Counter(dropped.values())
    parts += [f"{count} dropped ({reason})" for reason, count in reasons.items()]
    if absent:
        parts.append(f"not in the file, randomly initialized: {_shorten(absent)}")
    return "; ".join(parts)


def _shorten(names: list[str], most: int = 10) -> str:
    return (", ".join(names[:most]) + (" ..." if len(names) > most else "")) or "none"
