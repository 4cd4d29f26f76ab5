"""Writes a split of a data set in the COCO panoptic format, image by image.

Finished images are noted in a file beside the JSON, ``<JSON>.partial``, one line each; the JSON is
written when all are. So a run that was interrupted goes on where it was, and a JSON is always
whole.

Shapes: H x W pixels of an image.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask
import tqdm  # type: ignore[import-untyped]
from numpy.typing import NDArray
from scipy.ndimage import find_objects

from psf.panoptic_png import write_panoptic_ids

logger = logging.getLogger(__name__)


class Segment(NamedTuple):
    """A segment of an image, whose pixels have its position + 1 in the index map."""

    category_id: int
    iscrowd: int = 0
    id: int | None = None  # None: a number that looks like a random colour


class Converted(NamedTuple):
    """An image in the COCO panoptic format."""

    image_id: Any
    file_name: str  # of the image
    png: str  # of its segments
    index_map: NDArray[np.int32]  # (H, W), 0 is void
    segments: list[Segment]
    sem_seg_file_name: str | None = None


class Split(NamedTuple):
    """Where a split goes, and what is known about it."""

    name: str
    panoptic_root: Path
    panoptic_json: Path
    instances_json: Path | None
    categories: Sequence[Mapping[str, Any]]
    num_images: int  # of the official split


def write_split(
    split: Split,
    sources: Sequence[Path],
    convert: Callable[[Path], Converted],
    *,
    allow_partial: bool,
) -> None:
    """
    Convert the images of a split, unless its JSON files are there with as many images.

    Args:
        split: where it goes.
        sources: a file of each image.
        convert: from the source to the image's segments.
        allow_partial: take fewer images than the official split has.

    Raises:
        ValueError: there are not as many images as there should be.
    """
    if len(sources) != split.num_images and not (allow_partial and sources):
        raise ValueError(
            f"{split.name}: found {len(sources)} images instead of {split.num_images}. Complete "
            "the download, or pass --allow-partial to go on with those that are there."
        )
    if _is_complete(split, len(sources)):
        logger.info("%s: %d images are in place.", split.name, len(sources))
        return
    notes = split.panoptic_json.with_name(f"{split.panoptic_json.name}.partial")
    done = _read_notes(notes)
    split.panoptic_root.mkdir(parents=True, exist_ok=True)
    with open(notes, "a", encoding="utf-8") as file:
        for source in tqdm.tqdm(sources, desc=split.name, unit=" images", disable=None):
            if str(source) not in done:
                done[str(source)] = _write_image(split, convert(source))
                file.write(json.dumps([str(source), done[str(source)]]) + "\n")
    entries = [done[str(source)] for source in sources]
    things = [c for c in split.categories if c["isthing"]]
    images = [entry["image"] for entry in entries]
    annotations = [entry["annotation"] for entry in entries]
    if split.instances_json is not None:
        instances = [a for entry in entries for a in entry["instances"]]
        numbered = [{**a, "id": i} for i, a in enumerate(instances, start=1)]
        _write_json(split.instances_json, images, numbered, things)
    _write_json(split.panoptic_json, images, annotations, split.categories)
    notes.unlink()
    logger.info("%s: %d images converted.", split.name, len(entries))


def _is_complete(split: Split, num_images: int) -> bool:
    if not split.panoptic_json.is_file() or not (
        split.instances_json is None or split.instances_json.is_file()
    ):
        return False
    content = json.loads(split.panoptic_json.read_text(encoding="utf-8"))
    return len(content["annotations"]) == num_images


def _read_notes(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    done = {}
    lines = path.read_text(encoding="utf-8").split("\n")
    for line in lines[:-1]:  # what follows the last line break was cut off
        source, entry = json.loads(line)
        done[source] = entry
    path.write_text("".join(f"{line}\n" for line in lines[:-1]), encoding="utf-8")
    return done


def _write_image(split: Split, converted: Converted) -> dict[str, Any]:
    """Write the PNG of an image; returns its parts of the JSON files."""
    segments = [
        segment._replace(id=_segment_id(i)) if segment.id is None else segment
        for i, segment in enumerate(converted.segments)
    ]
    ids = np.array([0, *[s.id for s in segments]], dtype=np.int64)
    png = split.panoptic_root / converted.png
    png.parent.mkdir(parents=True, exist_ok=True)
    write_panoptic_ids(str(png), ids[converted.index_map])
    infos = describe_segments(converted.index_map, segments)
    height, width = converted.index_map.shape
    annotation = {
        "image_id": converted.image_id,
        "file_name": converted.png,
        "segments_info": infos,
    }
    if converted.sem_seg_file_name is not None:
        annotation["sem_seg_file_name"] = converted.sem_seg_file_name
    return {
        "image": {
            "id": converted.image_id,
            "file_name": converted.file_name,
            "height": height,
            "width": width,
        },
        "annotation": annotation,
        "instances": _instances(split, converted, infos),
    }


def describe_segments(
    index_map: NDArray[np.integer], segments: Sequence[Segment]
) -> list[dict[str, Any]]:
    """``segments_info`` of an image; segments without a pixel are left out."""
    areas = np.bincount(index_map.ravel(), minlength=len(segments) + 1).tolist()
    infos = []
    for i, extent in enumerate(find_objects(index_map, max_label=len(segments))):
        if extent is None:
            continue
        y, x = extent
        infos.append(
            {
                "id": segments[i].id,
                "category_id": segments[i].category_id,
                "iscrowd": segments[i].iscrowd,
                "area": areas[i + 1],
                "bbox": [x.start, y.start, x.stop - x.start, y.stop - y.start],
            }
        )
    return infos


def _instances(
    split: Split, converted: Converted, infos: Iterable[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The things of an image in COCO's instance format, if that is wanted."""
    if split.instances_json is None:
        return []
    things = {c["id"] for c in split.categories if c["isthing"]}
    position = {s.id or _segment_id(i): i + 1 for i, s in enumerate(converted.segments)}
    return [
        {
            **info,
            "image_id": converted.image_id,
            "segmentation": encode_mask(converted.index_map == position[info["id"]]),
        }
        for info in infos
        if info["category_id"] in things
    ]


def encode_mask(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """COCO's run-length encoding, as JSON takes it."""
    rle = pycocotools.mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode("ascii")}


def _segment_id(index: int) -> int:
    """Different ids that look like random colours: a multiple modulo a prime below 2^24."""
    return (index + 1) * 10_368_889 % 16_777_213


def _write_json(
    path: Path, images: Sequence[Any], annotations: Sequence[Any], categories: Sequence[Any]
) -> None:
    partial = path.with_name(f"{path.name}.new")
    content = {"images": images, "annotations": annotations, "categories": list(categories)}
    partial.write_text(json.dumps(content), encoding="utf-8")
    os.replace(partial, path)
