"""Writes the data set shapes in the COCO panoptic format, and registers it with Detectron2.

For both splits, ``train`` and ``val``, the data set's folder holds ``<split>/`` (images),
``panoptic_<split>/`` (PNGs), ``panoptic_<split>.json`` and ``instances_<split>.json`` (for AP).
"""

import json
import logging
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask
import tqdm  # type: ignore[import-untyped]
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import find_objects

from ..coco_panoptic import datasets_root, register_panoptic
from .scene import CATEGORIES, Scene, draw_scene

logger = logging.getLogger(__name__)

# To be raised with every change of the images or of the files: older data is then made anew.
GENERATOR_VERSION = 2

NUM_TRAIN = 2000
NUM_VAL = 200
SIZE = 128
SEED = 0

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
    Register ``<prefix>_train`` and ``<prefix>_val``, which are generated when first used.

    Args:
        root: folder of the data set.
        prefix: of the two names.
        num_train: training images.
        num_val: validation images.
        size: pixels a side.
        seed: of all images.
    """
    generate = partial(
        generate_shapes, root, num_train=num_train, num_val=num_val, size=size, seed=seed
    )
    for split in _SPLITS:
        register_panoptic(
            f"{prefix}_{split}",
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
    Make sure that ``root`` holds this data set; does nothing if it does already.

    The files are made in a temporary folder beside ``root`` that takes its place when complete. Any
    number of processes may call this at the same time: one generates, the others wait.

    Args:
        root: folder of the data set. If it holds another version of shapes, that is replaced.
        num_train: training images.
        num_val: validation images.
        size: pixels a side.
        seed: of all images. An image depends on the seed, the split and its number alone.

    Raises:
        OSError: ``root`` cannot be written.
        ValueError: ``root`` holds something else, or the arguments make no sense.
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
    target = Path(root).absolute()
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
    """Generate the data set and put it at ``target``, whatever was there."""
    if target.exists() and any(target.iterdir()):
        if _read_stamp(target) is None:
            raise ValueError(
                f"'{target}' is not empty and holds no shapes data set. Choose another folder, or "
                "remove what is in it."
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
    """Version and parameters of the shapes data set in a folder; None if it holds none."""
    path = root / "panoptic_val.json"
    if not path.is_file():
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file).get("info", {}).get("shapes")


class _SegmentExtent(NamedTuple):
    """Where a segment is."""

    mask: NDArray[np.bool_]  # (S, S)
    area: int
    bbox: list[int]  # x, y, width, height


def _write_split(root: Path, split: str, stamp: dict[str, int]) -> None:
    """Write the images, the PNGs and the two JSON files of one split."""
    image_root, panoptic_root = root / split, root / f"panoptic_{split}"
    image_root.mkdir(parents=True)
    panoptic_root.mkdir()
    info = {"description": f"synthetic panoptic data, {split} split", "shapes": stamp}
    things = [c for c in CATEGORIES if c["isthing"]]
    thing_ids = {c["id"] for c in things}
    panoptic: dict[str, Any] = {
        "info": info,
        "images": [],
        "annotations": [],
        "categories": CATEGORIES,
    }
    instances: list[dict[str, Any]] = []

    size = stamp["size"]
    # disable=None: no bar where there is no terminal.
    for index in tqdm.trange(stamp[f"num_{split}"], desc=f"shapes {split}", disable=None):
        seeds = [stamp["seed"], _SPLITS.index(split), index]
        scene = draw_scene(np.random.Generator(np.random.PCG64(seeds)), size)
        image_id, file_name = index + 1, f"{index + 1:06d}.png"
        # Fast rather than small: the default level takes four times as long to save a fifth.
        Image.fromarray(scene.image).save(image_root / file_name, compress_level=1)
        Image.fromarray(_ids_to_rgb(scene.ids)).save(panoptic_root / file_name)
        extents = _extents(scene)
        segments_info = [
            {**segment._asdict(), "iscrowd": int(segment.iscrowd), "area": area, "bbox": bbox}
            for segment, (_, area, bbox) in zip(scene.segments, extents, strict=True)
        ]
        panoptic["images"].append(
            {"id": image_id, "file_name": file_name, "height": size, "width": size}
        )
        panoptic["annotations"].append(
            {"image_id": image_id, "file_name": file_name, "segments_info": segments_info}
        )
        for segment, extent in zip(segments_info, extents, strict=True):
            if segment["category_id"] in thing_ids:
                number, rle = len(instances) + 1, _encode(extent.mask)
                instances.append(
                    {**segment, "id": number, "image_id": image_id, "segmentation": rle}
                )
    _write_json(root / f"panoptic_{split}.json", panoptic)
    _write_json(
        root / f"instances_{split}.json",
        {**panoptic, "annotations": instances, "categories": things},
    )


def _extents(scene: Scene) -> list[_SegmentExtent]:
    """Mask, area and box of every segment of a scene, exactly as its PNG has them."""
    order = np.argsort([s.id for s in scene.segments])
    sorted_ids = np.array([0] + [scene.segments[i].id for i in order])
    index_map = np.searchsorted(sorted_ids, scene.ids)  # (S, S), 0 is void
    boxes = find_objects(index_map, max_label=len(order))
    extents: list[_SegmentExtent] = []
    for rank in np.argsort(order):
        mask = index_map == rank + 1
        y, x = boxes[rank]
        bbox = [x.start, y.start, x.stop - x.start, y.stop - y.start]
        extents.append(_SegmentExtent(mask, int(np.count_nonzero(mask)), bbox))
    return extents


def _ids_to_rgb(ids: NDArray[np.int32]) -> NDArray[np.uint8]:
    """(H, W) segment ids -> (H, W, 3), id = R + 256 G + 65536 B."""
    return np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=-1).astype(np.uint8)


def _encode(mask: NDArray[np.bool_]) -> dict[str, Any]:
    rle = pycocotools.mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode("ascii")}


def _write_json(path: Path, data: dict[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(data))  # much faster than json.dump
