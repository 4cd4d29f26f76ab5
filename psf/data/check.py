"""Validation of a data set in the COCO panoptic format, file by file.

Shapes: H x W pixels of an image.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tqdm  # type: ignore[import-untyped]

from psf.panoptic_png import read_panoptic_ids

from .images import read_image
from .index_masks import tight_boxes


class Defect(NamedTuple):
    """Something wrong with a data set."""

    file: str
    where: str  # the id of an image, a segment, a category
    problem: str

    def __str__(self) -> str:
        return f"{self.file}: {self.where}: {self.problem}"


class _Job(NamedTuple):
    """An annotated image."""

    image: Mapping[str, Any]
    annotation: Mapping[str, Any]


def check_dataset(
    panoptic_json: Path,
    image_root: Path,
    panoptic_root: Path,
    *,
    image_file: Callable[[str], str] | None = None,
    num_processes: int = 1,
) -> list[Defect]:
    """
    Find what is wrong with a data set: JSON, images and PNGs, each and against each other.

    Args:
        panoptic_json: the annotations.
        image_root: folder of the images.
        panoptic_root: folder of the PNGs.
        image_file: from the JSON's name of an image to its path below ``image_root``.
        num_processes: that read images.

    Returns:
        Every defect; none if the data set is fine.
    """
    if not panoptic_json.is_file():
        return [Defect(str(panoptic_json), "JSON", "does not exist")]
    try:
        data = json.loads(panoptic_json.read_text(encoding="utf-8"))
    except ValueError as error:
        return [Defect(str(panoptic_json), "JSON", f"is not valid: {error}")]
    report = partial(Defect, str(panoptic_json))
    lacking = [key for key in ("images", "annotations", "categories") if key not in data]
    if lacking:
        return [report("JSON", f"lacks {', '.join(lacking)}")]
    defects = _check_categories(data["categories"], report)
    jobs, more = _pair(data, report)
    defects += more
    isthing = {c["id"]: bool(c.get("isthing")) for c in data["categories"] if "id" in c}
    check = partial(
        _check_image,
        isthing=isthing,
        image_root=image_root,
        image_file=image_file,
        panoptic_root=panoptic_root,
        panoptic_json=str(panoptic_json),
    )
    progress = partial(tqdm.tqdm, total=len(jobs), desc="images", disable=None)
    if num_processes == 1:
        found = list(progress(map(check, jobs)))
    else:
        with Pool(num_processes) as pool:
            found = list(progress(pool.imap(check, jobs, chunksize=16)))
    return defects + [defect for each in found for defect in each]


Report = Callable[[str, str], Defect]  # from where and problem


def _check_categories(categories: Sequence[Mapping[str, Any]], report: Report) -> list[Defect]:
    defects = []
    for i, category in enumerate(categories):
        where = f"category {category.get('id', f'number {i}')}"
        lacking = [key for key in ("id", "name", "isthing") if key not in category]
        if lacking:
            defects.append(report(where, f"lacks {', '.join(lacking)}"))
        elif category["isthing"] not in (0, 1):
            defects.append(report(where, f"isthing is {category['isthing']!r}, not 0 or 1"))
    for key in ("id", "name"):
        values = Counter(c[key] for c in categories if key in c)
        for value, count in values.items():
            if count > 1:
                defects.append(report(f"category {value}", f"{count} categories have this {key}"))
    return defects


def _pair(data: Mapping[str, Any], report: Report) -> tuple[list[_Job], list[Defect]]:
    """Annotations with their images, and what does not fit."""
    defects = []
    images: dict[Any, Mapping[str, Any]] = {}
    for i, image in enumerate(data["images"]):
        where = f"image {image.get('id', f'number {i}')}"
        lacking = [k for k in ("id", "file_name", "height", "width") if k not in image]
        if lacking:
            defects.append(report(where, f"lacks {', '.join(lacking)}"))
        elif image["id"] in images:
            defects.append(report(where, "two images have this id"))
        else:
            images[image["id"]] = image
    jobs: dict[Any, _Job] = {}
    for i, annotation in enumerate(data["annotations"]):
        image_id = annotation.get("image_id", f"of annotation number {i}")
        lacking = [k for k in ("image_id", "file_name", "segments_info") if k not in annotation]
        if lacking:
            defects.append(
                report(f"image {image_id}", f"its annotation lacks {', '.join(lacking)}")
            )
        elif image_id not in images:
            defects.append(report(f"image {image_id}", "is annotated but not among the images"))
        elif image_id in jobs:
            defects.append(report(f"image {image_id}", "has two annotations"))
        else:
            jobs[image_id] = _Job(images[image_id], annotation)
    without = [image_id for image_id in images if image_id not in jobs]
    defects += [report(f"image {i}", "has no annotation (it is left out)") for i in without]
    return list(jobs.values()), defects


def _check_image(
    job: _Job,
    *,
    isthing: Mapping[int, bool],
    image_root: Path,
    image_file: Callable[[str], str] | None,
    panoptic_root: Path,
    panoptic_json: str,
) -> list[Defect]:
    image, annotation = job
    size = (image["height"], image["width"])
    name = image["file_name"]
    path = image_root / (name if image_file is None else image_file(name))
    png = panoptic_root / annotation["file_name"]
    where = f"image {image['id']}"
    defects = _check_size(path, where, size, lambda p: read_image(p).shape[:2])
    report = partial(Defect, panoptic_json)
    defects += _check_segments(annotation["segments_info"], where, isthing, report)
    problems = _check_size(png, where, size, lambda p: read_panoptic_ids(p).shape)
    if problems:
        return defects + problems
    infos = {s["id"]: s for s in annotation["segments_info"] if "id" in s}
    return defects + list(_check_pixels(png, where, infos, report))


def _check_size(
    path: Path, where: str, size: tuple[int, int], read: Callable[[str], tuple[int, ...]]
) -> list[Defect]:
    """Whether a file is there, whole, and of the size that the JSON says."""
    if not path.is_file():
        return [Defect(str(path), where, "does not exist")]
    try:
        found = tuple(read(str(path)))
    except ValueError as error:
        return [Defect(str(path), where, str(error))]
    if found != size:
        problem = f"is {found[1]} x {found[0]} pixels, but {size[1]} x {size[0]} in the JSON"
        return [Defect(str(path), where, problem)]
    return []


def _check_segments(
    infos: Sequence[Mapping[str, Any]], where: str, isthing: Mapping[int, bool], report: Report
) -> list[Defect]:
    """The segments of an image by themselves."""
    defects = []
    counts = Counter(info.get("id") for info in infos)
    for info in infos:
        segment = f"{where}, segment {info.get('id')}"
        lacking = [k for k in ("id", "category_id", "area", "bbox", "iscrowd") if k not in info]
        if lacking:
            defects.append(report(segment, f"lacks {', '.join(lacking)}"))
            continue
        if not isinstance(info["id"], int) or not 0 < info["id"] < 1 << 24:
            defects.append(report(segment, "its id is not in 1..16777215"))
        elif counts[info["id"]] > 1:
            defects.append(report(segment, f"{counts[info['id']]} segments have this id"))
        if info["category_id"] not in isthing:
            problem = f"category_id {info['category_id']} is not among the categories"
            defects.append(report(segment, problem))
        elif info["iscrowd"] not in (0, 1):
            defects.append(report(segment, f"iscrowd is {info['iscrowd']!r}, not 0 or 1"))
        elif info["iscrowd"] and not isthing[info["category_id"]]:
            defects.append(report(segment, "is a crowd, but of a stuff category"))
    return defects


def _check_pixels(
    png: Path, where: str, infos: Mapping[int, Mapping[str, Any]], report: Report
) -> Iterable[Defect]:
    """The segments of an image against its PNG."""
    ids = read_panoptic_ids(str(png))
    found, index = np.unique(ids, return_inverse=True)
    index_map = index.reshape(ids.shape)
    areas = np.bincount(index_map.ravel()).tolist()
    boxes = tight_boxes(index_map + 1, len(found)).tolist()
    present = dict(zip(found.tolist(), zip(areas, boxes, strict=True), strict=True))
    for segment_id in sorted(present.keys() - infos.keys() - {0}):
        yield Defect(
            str(png), f"{where}, segment {segment_id}", "is in the PNG but not in the JSON"
        )
    for segment_id, info in infos.items():
        segment = f"{where}, segment {segment_id}"
        if segment_id not in present:
            yield Defect(str(png), segment, "is in the JSON but not in the PNG")
            continue
        area, (x0, y0, x1, y1) = present[segment_id]
        if "area" in info and info["area"] != area:
            yield report(segment, f"area is {info['area']}, but {area} pixels are in the PNG")
        box = [x0, y0, x1 - x0, y1 - y0]
        if "bbox" in info and [round(v) for v in info["bbox"]] != box:
            yield report(segment, f"bbox is {info['bbox']}, but {box} in the PNG")
