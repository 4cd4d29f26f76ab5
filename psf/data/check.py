"""Checks a data set in the COCO panoptic format, file by file.

Shapes: H x W pixels of an image.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tqdm  # type: ignore[import-untyped]

from psf.images import read_image
from psf.panoptic_png import read_panoptic_ids, unknown_ids

from .annotations import (
    ANNOTATION,
    CATEGORY,
    IMAGE,
    PARTS,
    SEGMENT,
    SEGMENT_OPTIONS,
    find_misfit,
    find_problems,
    read_json,
    slashes,
)
from .index_masks import tight_boxes

MOST_UNKNOWN = 5  # ids of a PNG that are listed one by one


class Defect(NamedTuple):
    """An error in a data set."""

    file: str
    where: str  # the id of an image, a segment, a category
    problem: str

    def __str__(self) -> str:
        return f"{self.file}: {self.where}: {self.problem}"


class _Report:
    """Collects defects of one file."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.defects: list[Defect] = []

    def add(self, where: str, problem: object) -> None:
        # Errors of readers begin with the file.
        without_file = str(problem).removeprefix(f"'{self.file}' ")
        self.defects.append(Defect(self.file, where, without_file))


def check_dataset(
    panoptic_json: Path,
    image_root: Path,
    panoptic_root: Path,
    *,
    image_file: Callable[[str], str] | None = None,
    num_processes: int = 1,
) -> list[Defect]:
    """
    Find the defects of a data set, in its JSON, images and PNGs and between them.

    The files are those of :func:`psf.data.register_panoptic`; so many processes read images.
    """
    report = _Report(str(panoptic_json))
    try:
        data = read_json(panoptic_json)
    except (OSError, ValueError) as error:
        report.add("JSON", error)
        return report.defects
    other = _other_format(data)
    if other:
        report.add("JSON", other)
        return report.defects
    for where, problem in find_problems(data):
        report.add(where, problem)
    pairs = _pair(data, report)
    if not pairs:
        report.add("JSON", "has no image with a usable annotation")
    categories = [c for c in data["categories"] if not find_misfit(c, CATEGORY)]
    check = partial(
        _check_image,
        stuff=[c["id"] for c in categories if not c["isthing"]],
        image_root=image_root,
        image_file=image_file,
        panoptic_root=panoptic_root,
        panoptic_json=str(panoptic_json),
    )
    progress = partial(tqdm.tqdm, total=len(pairs), desc="images", disable=None)
    if num_processes == 1:
        found = list(progress(map(check, pairs)))
    else:
        with Pool(num_processes) as pool:
            found = list(progress(pool.imap(check, pairs, chunksize=16)))
    return report.defects + [defect for defects in found for defect in defects]


def _other_format(data: Any) -> str | None:
    """Why a JSON is not in the panoptic format at all; None if it may be."""
    if isinstance(data, dict) and "shapes" in data and "imagePath" in data:
        return "is a file of LabelMe: convert it first (tools/convert_to_panoptic.py)"
    misfit = find_misfit(data, PARTS)
    if misfit:
        return misfit
    if any(isinstance(a, dict) and "segmentation" in a for a in data["annotations"]):
        return "has instance annotations: convert it first (tools/convert_to_panoptic.py)"
    return None


_Pair = tuple[Mapping[str, Any], Mapping[str, Any]]  # an image and its annotation


def _pair(data: Mapping[str, Any], report: _Report) -> list[_Pair]:
    """The annotations that can be used, with their images; the others are reported already."""
    images = {image["id"]: image for image in data["images"] if not find_misfit(image, IMAGE)}
    annotations = [a for a in data["annotations"] if not find_misfit(a, ANNOTATION)]
    of_image = {a["image_id"]: a for a in annotations}
    # By their text, since a wrong id may be of any type.
    annotated = {repr(a.get("image_id")) for a in data["annotations"] if isinstance(a, dict)}
    for image_id in [i for i in images if repr(i) not in annotated]:
        report.add(f"image {image_id}", "has no annotation (it is left out)")
    return [(images[i], annotation) for i, annotation in of_image.items() if i in images]


def _check_image(
    pair: _Pair,
    *,
    stuff: Sequence[int],
    image_root: Path,
    image_file: Callable[[str], str] | None,
    panoptic_root: Path,
    panoptic_json: str,
) -> list[Defect]:
    image, annotation = pair
    size = (image["height"], image["width"])
    name = slashes(image["file_name"])
    if image_file is not None:
        name = image_file(name)
    where = f"image {image['id']}"
    of_image = _Report(str(image_root / name))
    of_png = _Report(str(panoptic_root / slashes(annotation["file_name"])))
    of_json = _Report(panoptic_json)
    _check_size(of_image, where, size, lambda path: read_image(path).shape[:2])
    infos = [
        info
        for info in annotation["segments_info"]
        if not find_misfit(info, SEGMENT, SEGMENT_OPTIONS)
    ]
    _check_segments(infos, where, stuff, of_json)
    if _check_size(of_png, where, size, lambda path: read_panoptic_ids(path).shape):
        _check_pixels({info["id"]: info for info in infos}, where, of_png, of_json)
    return of_image.defects + of_png.defects + of_json.defects


def _check_size(
    report: _Report, where: str, size: tuple[int, int], read: Callable[[str], tuple[int, ...]]
) -> bool:
    """Whether the file of a report exists, is readable, and has the size that the JSON says."""
    try:
        height, width = read(report.file)
    except (OSError, ValueError) as error:
        report.add(where, error)
        return False
    if (height, width) != size:
        report.add(where, f"is {width} x {height} pixels, but {size[1]} x {size[0]} in the JSON")
    return (height, width) == size


def _check_segments(
    infos: Sequence[Mapping[str, Any]], where: str, stuff: Sequence[int], report: _Report
) -> None:
    """What the format asks for beyond what training needs."""
    classes = Counter(info["category_id"] for info in infos if not info.get("iscrowd"))
    for category_id in (i for i in stuff if classes[i] > 1):
        report.add(
            where, f"has {classes[category_id]} segments of the stuff category {category_id}"
        )
    for info in infos:
        segment = f"{where}, segment {info['id']}"
        missing = [key for key in ("area", "bbox", "iscrowd") if key not in info]
        if missing:
            report.add(segment, f"lacks {', '.join(missing)}")
        if info.get("iscrowd") and info["category_id"] in stuff:
            report.add(segment, "is a crowd, but of a stuff category")


def _check_pixels(
    infos: Mapping[int, Mapping[str, Any]], where: str, of_png: _Report, of_json: _Report
) -> None:
    """The segments of an image against the pixels of its PNG."""
    ids = read_panoptic_ids(of_png.file)
    found, index = np.unique(ids, return_inverse=True)
    index_map = index.reshape(ids.shape)
    areas = np.bincount(index_map.ravel()).tolist()
    boxes = tight_boxes(index_map + 1, len(found)).tolist()
    present = dict(zip(found.tolist(), zip(areas, boxes, strict=True), strict=True))
    unknown = sorted(present.keys() - infos.keys() - {0})
    for segment_id in unknown[:MOST_UNKNOWN]:
        of_png.add(f"{where}, segment {segment_id}", "is in the PNG but not in the JSON")
    if unknown:
        of_png.add(where, unknown_ids(of_png.file, unknown, infos))
    for segment_id, info in infos.items():
        segment = f"{where}, segment {segment_id}"
        if segment_id not in present:
            of_png.add(segment, "is in the JSON but not in the PNG")
            continue
        area, (x0, y0, x1, y1) = present[segment_id]
        if "area" in info and info["area"] != area:
            of_json.add(segment, f"area is {info['area']}, but {area} pixels are in the PNG")
        box = [x0, y0, x1 - x0, y1 - y0]
        if "bbox" in info and [round(v) for v in info["bbox"]] != box:
            of_json.add(segment, f"bbox is {info['bbox']}, but {box} in the PNG")
