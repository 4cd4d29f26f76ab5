"""Writes data sets in the COCO panoptic format (cocodataset.org/#format-data).

Shapes: H x W pixels of an image.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask
import tqdm  # type: ignore[import-untyped]
from filelock import FileLock
from numpy.typing import NDArray

from psf.files import named, write_text
from psf.output_paths import below
from psf.panoptic_png import PNG_END, write_panoptic_ids

from .annotations import ANNOTATION, find_misfit, read_json
from .index_masks import tight_boxes

logger = logging.getLogger(__name__)

# Raise with every change of what conversions write: older files are then replaced.
_VERSION = 1


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
    sem_seg_root: Path | None = None  # of the label PNGs that images name


class Entries(NamedTuple):
    """The entries of an image in the JSON files."""

    image: dict[str, Any]
    annotation: dict[str, Any]
    instances: list[dict[str, Any]]  # the things, in COCO's instance format
    covered: int = 0  # segments without a pixel, which are left out


def fingerprint(*parts: Any) -> str:
    """A text that changes with the content of files (Path) and with values that JSON can hold."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, Path):
            content = part.read_bytes() if part.is_file() else b""  # converting reports it
        else:
            content = json.dumps(part, sort_keys=True).encode()
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def convert_split(
    split: Split,
    sources: Sequence[Path],
    convert: Callable[[Path], PanopticImage],
    *,
    num_images: int,
    inputs: Callable[[Path], Sequence[Any]],
    allow_partial: bool = False,
) -> None:
    """
    Write a split, unless it is there and was made of the same inputs.

    Finished images are noted in a file beside the JSON, ``<JSON>.partial``, one line each, so that
    an interrupted run can go on. The JSON files are written at the end.

    Args:
        split: what to write.
        sources: a file of each image.
        convert: from the source to the image with its segments.
        num_images: the images that there should be.
        inputs: the files (Path) and values that ``convert`` takes for a source. Images are
            converted again if any of them changed.
        allow_partial: accept fewer.

    Raises:
        ValueError: there are not as many images as there should be, two images have the same
            files, or JSON files or PNGs exist that were not written by this.
    """
    if len(sources) != num_images and not (allow_partial and sources):
        raise ValueError(
            f"{split.name}: found {len(sources)} images instead of {num_images}. Complete the "
            "download, or pass --allow-partial to go on with those that exist."
        )
    categories = [dict(category) for category in split.categories]
    marks = {str(source): fingerprint(categories, *inputs(source)) for source in sources}
    conversion = fingerprint(_VERSION, marks)
    split.panoptic_json.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{split.panoptic_json}.lock"):  # another process may convert it, too
        if _is_complete(split, conversion):
            logger.info("%s: %d images exist.", split.name, len(sources))
            return
        written = _convert_all(split, convert, marks)
        write_json_files(split, written, info={"conversion": conversion})
        _notes(split).unlink()
    _report(split, written)


def _notes(split: Split) -> Path:
    return split.panoptic_json.with_name(f"{split.panoptic_json.name}.partial")


def _convert_all(
    split: Split, convert: Callable[[Path], PanopticImage], marks: Mapping[str, str]
) -> list[Entries]:
    """Write the PNGs of the sources, which are the keys of ``marks``."""
    notes = _notes(split)
    ours = any(path.exists() for path in (notes, split.panoptic_json, split.instances_json))
    if not ours and split.panoptic_root.is_dir() and any(split.panoptic_root.iterdir()):
        raise ValueError(
            f"'{split.panoptic_root}' has files that no conversion wrote, which may be overwritten."
            " Move them away, or choose another output folder."
        )
    done = _read_notes(notes, split, marks)
    split.panoptic_root.mkdir(parents=True, exist_ok=True)
    taken: dict[str, str] = {}
    with named(notes), open(notes, "a", encoding="utf-8") as file:
        for source in tqdm.tqdm(marks, desc=split.name, unit=" images", disable=None):
            if source in done:
                entries = done[source]
                _take(taken, source, entries.annotation["file_name"], entries.image["file_name"])
                continue
            image = convert(Path(source))
            _take(taken, source, image.png, image.file_name)
            for path in (split.panoptic_json, split.instances_json):
                path.unlink(missing_ok=True)  # of other PNGs, if this ends early
            done[source] = write_image(split, image)
            file.write(json.dumps([source, marks[source], *done[source]]) + "\n")
    return [done[source] for source in marks]


def _take(taken: dict[str, str], source: str, png: str, image: str) -> None:
    """Note that a source has this PNG and image, which no other may have."""
    for name in (f"PNG '{os.path.normpath(png)}'", f"image '{os.path.normpath(image)}'"):
        if name in taken:
            raise ValueError(f"'{taken[name]}' and '{source}' both have the {name}. Rename one.")
        taken[name] = source


def _report(split: Split, entries: Sequence[Entries]) -> None:
    logger.info("%s: %d images converted.", split.name, len(entries))
    covered = [e for e in entries if e.covered]
    if covered:
        logger.warning(
            "%s: %d segments are covered by others completely and left out, in %d images; the "
            "first is '%s'.",
            *(split.name, sum(e.covered for e in covered), len(covered)),
            covered[0].image["file_name"],
        )
    used = {info["category_id"] for e in entries for info in e.annotation["segments_info"]}
    absent = [c["name"] for c in split.categories if c["id"] not in used]
    if absent:
        logger.warning(
            "%s: no image shows %d of the %d categories: %s.",
            *(split.name, len(absent), len(split.categories), ", ".join(absent)),
        )


_NOTHING: Any = {"info": {"conversion": None}}  # no file


def _is_complete(split: Split, conversion: str) -> bool:
    """Whether the files of a conversion exist; ValueError if others are in their place."""
    found: list[tuple[Any, Any]] = []
    for path in (split.panoptic_json, split.instances_json):
        content = read_json(path) if path.is_file() else _NOTHING
        info = content.get("info") if isinstance(content, dict) else None
        if not isinstance(info, dict) or "conversion" not in info:
            raise ValueError(
                f"'{path}' exists, but was not written by this version of the conversion. Move it "
                "away, or choose another output folder."
            )
        found.append((info["conversion"], content))
    if any(mark != conversion for mark, _ in found):
        return False
    annotations = found[0][1].get("annotations")
    return isinstance(annotations, list) and all(_has_files(split, a) for a in annotations)


def _has_files(split: Split, annotation: Mapping[str, Any]) -> bool:
    """Whether the PNG and the label PNG of an image exist, as a whole."""
    if find_misfit(annotation, ANNOTATION):
        return False
    paths = [split.panoptic_root / annotation["file_name"]]
    if split.sem_seg_root is not None and "sem_seg_file_name" in annotation:
        paths.append(split.sem_seg_root / annotation["sem_seg_file_name"])
    return all(path.is_file() and path.read_bytes().endswith(PNG_END) for path in paths)


def _read_notes(path: Path, split: Split, marks: Mapping[str, str]) -> dict[str, Entries]:
    """The finished images whose inputs have not changed since; the notes then hold only them."""
    if not path.is_file():
        return {}
    done = {}
    lines = []
    text = path.read_text(encoding="utf-8", errors="replace")
    for line in text.split("\n")[:-1]:  # the last was cut off
        try:
            source, mark, *fields = json.loads(line)
        except (TypeError, ValueError):
            continue  # damaged: the image is converted again
        finished = Entries(*fields) if marks.get(source) == mark else None
        if finished is not None and _has_files(split, finished.annotation):
            done[source] = finished
            lines.append(f"{line}\n")
    write_text(path, "".join(lines))
    return done


def write_image(split: Split, image: PanopticImage) -> Entries:
    """Write the PNG of an image. Segments without a pixel are left out of the entries."""
    segments = [
        segment._replace(id=_segment_id(i)) if segment.id is None else segment
        for i, segment in enumerate(image.segments)
    ]
    ids = np.array([0, *(s.id for s in segments)], dtype=np.uint32)
    png = below(split.panoptic_root, image.png)
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
    return Entries(entry, annotation, instances, len(segments) - len(infos))


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
        write_text(path, json.dumps(content))
