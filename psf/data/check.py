"""Checks a data set in the COCO panoptic format, file by file.

Shapes: H x W pixels of an image.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tqdm  # type: ignore[import-untyped]

from psf.images import read_image
from psf.panoptic_png import MAX_ID, read_panoptic_ids

from .index_masks import tight_boxes


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

    def add(self, where: str, problem: str) -> None:
        self.defects.append(Defect(self.file, where, problem))

    def has(self, mapping: Mapping[str, Any], keys: Sequence[str], where: str) -> bool:
        """Whether a mapping has all keys; else that is a defect."""
        missing = [key for key in keys if key not in mapping]
        if missing:
            self.add(where, f"lacks {', '.join(missing)}")
        return not missing


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

    Args:
        panoptic_json: the annotations.
        image_root: folder of the images.
        panoptic_root: folder of the PNGs.
        image_file: from the JSON's name of an image to its path below ``image_root``.
        num_processes: processes that read images.

    Returns:
        All defects; empty if the data set is fine.
    """
    report = _Report(str(panoptic_json))
    if not panoptic_json.is_file():
        report.add("JSON", "does not exist")
        return report.defects
    try:
        data = json.loads(panoptic_json.read_text(encoding="utf-8"))
    except ValueError as error:
        report.add("JSON", f"is not valid: {error}")
        return report.defects
    if not report.has(data, ("images", "annotations", "categories"), "JSON"):
        return report.defects
    _check_categories(data["categories"], report)
    pairs = _pair(data, report)
    check = partial(
        _check_image,
        isthing={c["id"]: bool(c.get("isthing")) for c in data["categories"] if "id" in c},
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


def _check_categories(categories: Sequence[Mapping[str, Any]], report: _Report) -> None:
    for i, category in enumerate(categories):
        where = f"category {category.get('id', f'number {i}')}"
        complete = report.has(category, ("id", "name", "isthing"), where)
        if complete and category["isthing"] not in (0, 1):
            report.add(where, f"isthing is {category['isthing']!r}, not 0 or 1")
    for key in ("id", "name"):
        values = Counter(c[key] for c in categories if key in c)
        for value, count in values.items():
            if count > 1:
                report.add(f"category {value}", f"{count} categories have this {key}")


_Pair = tuple[Mapping[str, Any], Mapping[str, Any]]  # an image and its annotation


def _pair(data: Mapping[str, Any], report: _Report) -> list[_Pair]:
    """The complete annotations with their images."""
    images: dict[Any, Mapping[str, Any]] = {}
    for i, image in enumerate(data["images"]):
        where = f"image {image.get('id', f'number {i}')}"
        if not report.has(image, ("id", "file_name", "height", "width"), where):
            continue
        if image["id"] in images:
            report.add(where, "two images have this id")
        else:
            images[image["id"]] = image
    pairs: dict[Any, _Pair] = {}
    for i, annotation in enumerate(data["annotations"]):
        image_id = annotation.get("image_id", f"of annotation number {i}")
        where = f"image {image_id}"
        missing = [k for k in ("image_id", "file_name", "segments_info") if k not in annotation]
        if missing:
            report.add(where, f"its annotation lacks {', '.join(missing)}")
        elif image_id not in images:
            report.add(where, "is annotated but not among the images")
        elif image_id in pairs:
            report.add(where, "has two annotations")
        else:
            pairs[image_id] = (images[image_id], annotation)
    for image_id in [i for i in images if i not in pairs]:
        report.add(f"image {image_id}", "has no annotation (it is left out)")
    return list(pairs.values())


def _check_image(
    pair: _Pair,
    *,
    isthing: Mapping[int, bool],
    image_root: Path,
    image_file: Callable[[str], str] | None,
    panoptic_root: Path,
    panoptic_json: str,
) -> list[Defect]:
    image, annotation = pair
    size = (image["height"], image["width"])
    name = image["file_name"] if image_file is None else image_file(image["file_name"])
    where = f"image {image['id']}"
    of_image = _Report(str(image_root / name))
    of_png = _Report(str(panoptic_root / annotation["file_name"]))
    of_json = _Report(panoptic_json)
    _check_size(of_image, where, size, lambda path: read_image(path).shape[:2])
    _check_segments(annotation["segments_info"], where, isthing, of_json)
    if _check_size(of_png, where, size, lambda path: read_panoptic_ids(path).shape):
        infos = {s["id"]: s for s in annotation["segments_info"] if "id" in s}
        _check_pixels(infos, where, of_png, of_json)
    return of_image.defects + of_png.defects + of_json.defects


def _check_size(
    report: _Report, where: str, size: tuple[int, int], read: Callable[[str], tuple[int, ...]]
) -> bool:
    """Whether the file of a report exists, is readable, and has the size that the JSON says."""
    if not Path(report.file).is_file():
        report.add(where, "does not exist")
        return False
    try:
        height, width = read(report.file)
    except ValueError as error:
        report.add(where, str(error))
        return False
    if (height, width) != size:
        report.add(where, f"is {width} x {height} pixels, but {size[1]} x {size[0]} in the JSON")
    return (height, width) == size


def _check_segments(
    infos: Sequence[Mapping[str, Any]], where: str, isthing: Mapping[int, bool], report: _Report
) -> None:
    """The segments of an image, without its pixels."""
    counts = Counter(info.get("id") for info in infos)
    for info in infos:
        segment = f"{where}, segment {info.get('id')}"
        if not report.has(info, ("id", "category_id", "area", "bbox", "iscrowd"), segment):
            continue
        if not isinstance(info["id"], int) or not 0 < info["id"] <= MAX_ID:
            report.add(segment, f"its id is not in 1..{MAX_ID}")
        elif counts[info["id"]] > 1:
            report.add(segment, f"{counts[info['id']]} segments have this id")
        if info["category_id"] not in isthing:
            report.add(segment, f"category_id {info['category_id']} is not among the categories")
        elif info["iscrowd"] not in (0, 1):
            report.add(segment, f"iscrowd is {info['iscrowd']!r}, not 0 or 1")
        elif info["iscrowd"] and not isthing[info["category_id"]]:
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
    for segment_id in sorted(present.keys() - infos.keys() - {0}):
        of_png.add(f"{where}, segment {segment_id}", "is in the PNG but not in the JSON")
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
