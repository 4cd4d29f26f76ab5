"""Generates the data set shapes in the COCO panoptic format, and registers it with Detectron2.

For each split, ``train`` and ``val``, the folder of the data set has ``<split>/`` (images),
``panoptic_<split>/`` (PNGs), ``panoptic_<split>.json`` and ``instances_<split>.json`` (for AP).
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import tqdm  # type: ignore[import-untyped]
from filelock import FileLock
from PIL import Image

from ..annotations import read_json
from ..coco_panoptic import datasets_root, register_panoptic
from ..coco_writer import PanopticImage, Split, write_image, write_json_files
from .scene import CATEGORIES, draw_scene

logger = logging.getLogger(__name__)

# Raise with every change of the images or JSON files: older data is then replaced.
GENERATOR_VERSION = 2

NUM_TRAIN = 2000
NUM_VAL = 200
SIZE = 128
SEED = 0
TUNING_SEED = 1

_SPLITS = ("train", "val")


def default_root() -> str:
    """``shapes`` in the folder of data sets."""
    return os.path.join(datasets_root(), "shapes")


def register_shapes(
    root: str,
    *,
    prefix: str = "shapes_panoptic",
    num_train: int = NUM_TRAIN,
    num_val: int = NUM_VAL,
    size: int = SIZE,
    seed: int = SEED,
) -> None:
    """
    Register ``<prefix>_train`` and ``<prefix>_val``, which are generated on first use.

    The other arguments are those of :func:`generate_shapes`.
    """
    generate = partial(
        generate_shapes, root, num_train=num_train, num_val=num_val, size=size, seed=seed
    )
    for split in _SPLITS:
        _register_split(f"{prefix}_{split}", root, split, generate)


def register_tuning_shapes(root: str, *, name: str = "shapes_panoptic_tune") -> None:
    """Register other images, to choose options and thresholds with: of no split of shapes."""
    generate = partial(generate_shapes, root, num_train=0, seed=TUNING_SEED)
    _register_split(name, root, "val", generate)


def _register_split(name: str, root: str, split: str, generate: Callable[[], None]) -> None:
    register_panoptic(
        name,
        image_root=os.path.join(root, split),
        panoptic_root=os.path.join(root, f"panoptic_{split}"),
        panoptic_json=os.path.join(root, f"panoptic_{split}.json"),
        instances_json=os.path.join(root, f"instances_{split}.json"),
        categories=CATEGORIES,
        prepare=generate,
    )


def generate_shapes(
    root: str | os.PathLike[str],
    *,
    num_train: int = NUM_TRAIN,
    num_val: int = NUM_VAL,
    size: int = SIZE,
    seed: int = SEED,
) -> None:
    """
    Generate the data set in ``root``, unless it is there.

    The files are written to a temporary folder, which is renamed to ``root`` when complete. Several
    processes may call this at the same time: one generates, the others wait.

    Another version of shapes in ``root`` is replaced. Images have ``size`` pixels a side; each
    depends on the seed, its split and its number only.

    Raises:
        OSError: ``root`` cannot be written.
        ValueError: ``root`` has other contents, or an argument is invalid.
    """
    if size < 32 or num_train < 0 or num_val < 0:
        raise ValueError(
            "shapes needs a size of at least 32 and no negative number of images, got size "
            f"{size}, {num_train} training and {num_val} validation images."
        )
    stamp = {
        "generator_version": GENERATOR_VERSION,
        "num_train": num_train,
        "num_val": num_val,
        "size": size,
        "seed": seed,
    }
    target = Path(root).expanduser().absolute()
    if _read_stamp(target) == stamp:
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=target.parent).close()
    except OSError as error:
        raise OSError(
            f"Cannot generate the data set shapes in '{target}': {error}. Set the environment "
            "variable DETECTRON2_DATASETS to a folder that can be written."
        ) from error
    with FileLock(f"{target}.lock"):
        # Another process may have been faster.
        if _read_stamp(target) != stamp:
            _replace(target, stamp)


def _replace(target: Path, stamp: dict[str, int]) -> None:
    """Generate the data set, in place of another version of it."""
    if target.exists() and any(target.iterdir()):
        if _read_stamp(target) is None:
            raise ValueError(
                f"'{target}' is not empty and holds no shapes data set. Choose another folder or "
                "empty it."
            )
        logger.info("'%s' holds another version of shapes, which is replaced.", target)
    prefix = f"{target.name}.partial-"
    for leftover in target.parent.glob(f"{prefix}*"):  # of processes that were killed
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=target.parent) as folder:
        partial_root = Path(folder, "new")
        logger.info("Generating the data set shapes in '%s'.", target)
        for split in _SPLITS:
            _write_split(partial_root, split, stamp)
        if target.exists():
            target.rename(Path(folder, "old"))
        partial_root.rename(target)


def _read_stamp(root: Path) -> dict[str, int] | None:
    """Version and parameters of the shapes data set in a folder; None: there is none."""
    path = root / "panoptic_val.json"
    content = read_json(path) if path.is_file() else None
    info = content.get("info") if isinstance(content, dict) else None
    return info.get("shapes") if isinstance(info, dict) else None


def _write_split(root: Path, split: str, stamp: dict[str, int]) -> None:
    """Write the images, the PNGs and the two JSON files of one split."""
    image_root = root / split
    files = Split(
        name=f"shapes {split}",
        panoptic_root=root / f"panoptic_{split}",
        panoptic_json=root / f"panoptic_{split}.json",
        instances_json=root / f"instances_{split}.json",
        categories=CATEGORIES,
    )
    image_root.mkdir(parents=True)
    files.panoptic_root.mkdir()
    entries = []
    # disable=None: no bar where there is no terminal.
    for index in tqdm.trange(stamp[f"num_{split}"], desc=files.name, disable=None):
        seeds = [stamp["seed"], _SPLITS.index(split), index]
        scene = draw_scene(np.random.Generator(np.random.PCG64(seeds)), stamp["size"])
        name = f"{index + 1:06d}.png"
        # Fast rather than small: the default level takes four times as long to save a fifth.
        Image.fromarray(scene.image).save(image_root / name, compress_level=1)
        image = PanopticImage(index + 1, name, name, scene.index_map, scene.segments)
        entries.append(write_image(files, image))
    info = {"description": f"synthetic panoptic data, {split} split", "shapes": stamp}
    write_json_files(files, entries, info=info)
