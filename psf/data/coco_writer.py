"""Writes data sets in the COCO panoptic format (cocodataset.org/#format-data).

Shapes: H x W pixels of an image.
"""

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask
import tqdm  # type: ignore[import-untyped]
from numpy.typing import NDArray

from psf.panoptic_png import write_panoptic_ids

from .index_masks import tight_boxes

logger = logging.getLogger(__name__)


class Segment(NamedTuple):
    """A segment of an image."""

    category_id: int
    iscrowd: int = 0
    id: int | None = None  # None: chosen by its position, to look like a random colour


class PanopticImage(NamedTuple):
    """An image with its segments."""

    image_id: Any
    file_name: str  # of the image
    png: str  # of its segments
    index_map: NDArray[np.integer]  # (H, W), 1 + the segment at each pixel; 0 is void
    segments: list[Segment]
    sem_seg_file_name: str | None = None


class Split(NamedTuple):
    """The files of a split of a data set, and its categories."""

    name: str
    panoptic_root: Path
    panoptic_json: Path
    instances_json: Path
    categories: Sequence[Mapping[str, Any]]


class Entries(NamedTuple):
    """The entries of an image in the JSON files."""

    image: dict[str, Any]
    annotation: dict[str, Any]
    instances: list[dict[str, Any]]  # the things, in COCO's instance format


def convert_split(
    split: Split,
    sources: Sequence[Path],
    convert: Callable[[Path], PanopticImage],
    *,
    num_images: int,
    allow_partial: bool = False,
) -> None:
    """
    Write a split, unless its JSON files exist with as many images.

    Finished images are noted in a file beside the JSON, ``<JSON>.partial``, one line each, so that
    an interrupted run can go on. The JSON files are written at the end.

    Args:
        split: what to write.
        sources: a file of each image.
        convert: from the source to the image with its segments.
        num_images: the images that there should be.
        allow_partial: accept fewer.

    Raises:
        ValueError: there are not as many images as there should be.
    """
    if len(sources) != num_images and not (allow_partial and sources):
        raise ValueError(
            f"{split.name}: found {len(sources)} images instead of {num_images}. Complete the "
            "download, or pass --allow-partial to go on with those that exist."
        )
    if _is_complete(split, len(sources)):
        logger.info("%s: %d images exist.", split.name, len(sources))
        return
    notes = split.panoptic_json.with_name(f"{split.panoptic_json.name}.partial")
    done = _read_notes(notes)
    split.panoptic_root.mkdir(parents=True, exist_ok=True)
    with open(notes, "a", encoding="utf-8") as file:
        for source in tqdm.tqdm(sources, desc=split.name, unit=" images", disable=None):
            if str(source) not in done:
                done[str(source)] = write_image(split, convert(source))
                file.write(json.dumps([str(source), *done[str(source)]]) + "\n")
    write_json_files(split, [done[str(source)] for source in sources])
    notes.unlink()
    logger.info("%s: %d images converted.", split.name, len(sources))


def _is_complete(split: Split, num_images: int) -> bool:
    if not (split.panoptic_json.is_file() and split.instances_json.is_file()):
        return False
    content = json.loads(split.panoptic_json.read_text(encoding="utf-8"))
    return len(content["annotations"]) == num_images


def _read_notes(path: Path) -> dict[str, Entries]:
    if not path.is_file():
        return {}
    done = {}
    lines = path.read_text(encoding="utf-8").split("\n")
    for line in lines[:-1]:  # what follows the last line break was cut off
        source, *entries = json.loads(line)
        done[source] = Entries(*entries)
    path.write_text("".join(f"{line}\n" for line in lines[:-1]), encoding="utf-8")
    return done


def write_image(split: Split, image: PanopticImage) -> Entries:
    """Write the PNG of an image. Segments without a pixel are left out of the entries."""
    segments = [
        segment._replace(id=_segment_id(i)) if segment.id is None else segment
        for i, segment in enumerate(image.segments)
    ]
    ids = np.array([0, *(s.id for s in segments)], dtype=np.int64)
    png = split.panoptic_root / image.png
    png.parent.mkdir(parents=True, exist_ok=True)
    write_panoptic_ids(str(png), ids[image.index_map])

    things = {c["id"] for c in split.categories if c["isthing"]}
    areas = np.bincount(image.index_map.ravel(), minlength=len(ids)).tolist()
    boxes = tight_boxes(image.index_map, len(segments)).tolist()
    infos, instances = [], []
    for i, (segment, (x0, y0, x1, y1)) in enumerate(zip(segments, boxes, strict=True), start=1):
        if not areas[i]:
            continue
        info = {
            "id": segment.id,
            "category_id": segment.category_id,
            "iscrowd": segment.iscrowd,
            "area": areas[i],
            "bbox": [x0, y0, x1 - x0, y1 - y0],
        }
        infos.append(info)
        if segment.category_id in things:
            mask = _encode(image.index_map == i)
            instances.append({**info, "image_id": image.image_id, "segmentation": mask})

    height, width = image.index_map.shape
    size = {"height": height, "width": width}
    annotation = {"image_id": image.image_id, "file_name": image.png, "segments_info": infos}
    if image.sem_seg_file_name is not None:
        annotation["sem_seg_file_name"] = image.sem_seg_file_name
    entry = {"id": image.image_id, "file_name": image.file_name, **size}
    return Entries(entry, annotation, instances)


def _encode(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """COCO's run-length encoding, as JSON takes it."""
    rle = pycocotools.mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode("ascii")}


def _segment_id(index: int) -> int:
    """Distinct ids that look like random colours: a multiple modulo a prime below 2^24."""
    return (index + 1) * 10_368_889 % 16_777_213


def write_json_files(split: Split, entries: Sequence[Entries], **more: Any) -> None:
    """Write the panoptic and the instance JSON of a split; ``more`` stands in both."""
    common = {**more, "images": [e.image for e in entries]}
    instances = [instance for e in entries for instance in e.instances]
    instances_content = {
        **common,
        "annotations": [{**a, "id": i} for i, a in enumerate(instances, start=1)],
        "categories": [c for c in split.categories if c["isthing"]],
    }
    panoptic_content = {
        **common,
        "annotations": [e.annotation for e in entries],
        "categories": list(split.categories),
    }
    for path, content in (
        (split.instances_json, instances_content),
        (split.panoptic_json, panoptic_content),
    ):
        partial = path.with_name(f"{path.name}.new")
        partial.write_text(json.dumps(content), encoding="utf-8")
        os.replace(partial, path)
