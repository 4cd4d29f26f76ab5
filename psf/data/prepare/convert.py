"""Converts instances with label maps, and LabelMe's files, to the COCO panoptic format.

Shapes: H x W pixels of an image.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycocotools.mask
from numpy.typing import NDArray

from psf.images import read_values, require_few_pixels
from psf.output_paths import refuse_inputs

from ..annotations import (
    FILE,
    LIST,
    NAME,
    PARTS,
    SIDE,
    TEXT,
    Keys,
    Problem,
    find_category_problems,
    find_instance_problems,
    find_misfit,
    label,
    read_json,
    require_keys,
    require_none,
    slashes,
    with_slashes,
)
from ..coco_writer import PanopticImage, Segment, Split, convert_split

logger = logging.getLogger(__name__)

_RUNS: Keys = {"size": LIST, "counts": (lambda v: isinstance(v, list | str), "run lengths")}
_LABELME: Keys = {"shapes": LIST, "imageHeight": SIDE, "imageWidth": SIDE, "imagePath": FILE}
_SHAPE: Keys = {"label": NAME, "points": LIST}
_SHAPE_OPTIONS: Keys = {
    "group_id": (lambda v: v is None or type(v) in (int, str), "an integer, a text or null"),
    "flags": (lambda v: v is None or isinstance(v, dict), "an object or null"),
    "shape_type": TEXT,
}


def convert_instances(
    instances_json: Path,
    label_root: Path,
    stuff_categories: Any,
    output: Path,
) -> None:
    """
    Unite COCO instance annotations with label maps of the stuff (as in COCO-Stuff).

    Things cover stuff, small things cover large ones, and all other things cover crowds. Labels
    that are not stuff categories are void.

    Args:
        instances_json: things, as polygons or run lengths; its categories are the thing classes.
        label_root: folder of PNGs named as the images, with stuff category ids as values.
        stuff_categories: id and name of each.
        output: folder for ``panoptic/``, ``panoptic.json`` and ``instances.json``.

    Raises:
        ValueError: a thing and a stuff category share an id, or a map has another size, or a
            value of the JSON cannot be used.
        FileNotFoundError: a label map is missing.
    """
    data = read_json(instances_json)
    require_keys(data, PARTS, instances_json)
    require_keys({"stuff categories": stuff_categories}, {"stuff categories": LIST}, "--stuff")
    categories = _unite_categories(data["categories"], stuff_categories, instances_json)
    require_none(find_instance_problems(data, scored=False), instances_json)
    if not data["images"]:
        raise ValueError(f"'{instances_json}' has no images.")
    data["images"] = [with_slashes(image) for image in data["images"]]
    annotations: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in data["images"]}
    for annotation in data["annotations"]:
        annotations[annotation["image_id"]].append(annotation)
    images = {Path(image["file_name"]): image for image in data["images"]}
    png, count = Counter(map(_png, data["images"])).most_common(1)[0]
    if count > 1:
        raise ValueError(f"'{instances_json}': {count} images have the PNG '{png}'. Rename them.")
    stuff_ids = [c["id"] for c in stuff_categories]

    def convert(source: Path) -> PanopticImage:
        image = images[source]
        where = f"'{instances_json}': image {image['id']}"
        return _unite(image, annotations[image["id"]], label_root, stuff_ids, where)

    def inputs(source: Path) -> list[Any]:
        image = images[source]
        return [image, annotations[image["id"]], label_root / _png(image)]

    _write(output, categories, list(images), convert, inputs, [instances_json, label_root])


def _unite_categories(
    things: Sequence[Any], stuff: Sequence[Any], instances_json: Path
) -> list[dict[str, Any]]:
    categories = [
        {**category, "isthing": isthing} if isinstance(category, Mapping) else category
        for isthing, kind in ((1, things), (0, stuff))
        for category in kind
    ]
    require_none(find_category_problems(categories), instances_json)
    return categories


def _png(image: Mapping[str, Any]) -> Path:
    return Path(slashes(image["file_name"])).with_suffix(".png")


def _unite(
    image: Mapping[str, Any],
    annotations: Sequence[Mapping[str, Any]],
    label_root: Path,
    stuff_ids: Sequence[int],
    where: str,
) -> PanopticImage:
    size = (image["height"], image["width"])
    path = label_root / _png(image)
    labels = read_values(str(path))
    if labels.shape != size:
        raise ValueError(
            f"The label map '{path}' is {labels.shape}, but its image {size} pixels (height, "
            "width)."
        )
    index_map = np.zeros(size, dtype=np.int32)
    segments: list[Segment] = []
    for value in sorted(set(np.unique(labels).tolist()) & set(stuff_ids)):
        segments.append(Segment(value))
        index_map[labels == value] = len(segments)
    masks = []
    for i, annotation in enumerate(annotations):
        described = f"{where}, annotation {label(annotation, i)}"
        mask = _decode(annotation["segmentation"], size, described)
        crowd = int(annotation.get("iscrowd", 0))
        if mask.any():
            masks.append((Segment(annotation["category_id"], crowd), mask))
        else:
            logger.warning("%s has no pixel in the image and is left out.", described)
    for segment, mask in sorted(masks, key=lambda m: (not m[0].iscrowd, -int(m[1].sum()))):
        segments.append(segment)
        index_map[mask] = len(segments)
    return PanopticImage(image["id"], image["file_name"], str(_png(image)), index_map, segments)


def _decode(segmentation: Any, size: tuple[int, int], where: str) -> NDArray[np.bool_]:
    """(H, W), from COCO's polygons or run lengths."""
    if isinstance(segmentation, dict):
        return _decode_runs(segmentation, size, where)
    mask = np.zeros(size, dtype=bool)
    for polygon in segmentation or [None]:
        points = polygon if isinstance(polygon, list) and len(polygon) % 2 == 0 else []
        pairs = [list(pair) for pair in zip(points[::2], points[1::2], strict=True)]
        flat = _points(pairs, size, where, 3).ravel().tolist()
        (rle,) = pycocotools.mask.frPyObjects([flat], *size)
        mask |= np.asarray(pycocotools.mask.decode(rle), dtype=bool)
    return mask


def _decode_runs(rle: dict[str, Any], size: tuple[int, int], where: str) -> NDArray[np.bool_]:
    misfit = find_misfit(rle, _RUNS)
    if misfit:
        raise ValueError(f"{where}: segmentation {misfit}.")
    if rle["size"] != list(size):
        raise ValueError(
            f"{where}: its run lengths are of {rle['size']}, but its image is {list(size)} pixels "
            "(height, width)."
        )
    counts = rle["counts"]
    runs = _uncompress(counts) if isinstance(counts, str) else counts
    if not all(type(n) is int and n >= 0 for n in runs) or sum(runs) != size[0] * size[1]:
        raise ValueError(f"{where}: its run lengths are not those of {size[0] * size[1]} pixels.")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(size[::-1]).T


def _uncompress(counts: str) -> list[int]:
    """The run lengths of COCO's text: groups of 5 bits, from the third run on differences."""
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        group = ord(character) - 48
        value |= (group & 31) << shift
        shift += 5
        if shift > 60:
            return []  # no run is that long
        if not group & 32:  # the last group of a run
            if group & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs


def _points(points: Any, size: tuple[int, int], where: str, least: int) -> NDArray[np.float64]:
    """(P, 2) x and y; at least as many as needed, all near the image."""
    far = max(size)
    good = all(
        isinstance(point, list | tuple)
        and len(point) == 2
        and all(type(v) in (int, float) and -far <= v <= 2 * far for v in point)
        for point in points
    )
    if not good or len(points) < least:
        raise ValueError(
            f"{where}: its shape needs at least {least} points of two numbers, in or near the "
            f"image of {size[1]} x {size[0]} pixels."
        )
    return np.array(points, dtype=np.float64)


def convert_labelme(source: Path, stuff: Sequence[str], output: Path) -> None:
    """
    Convert LabelMe's files, one JSON per image. Other JSON files in the folder are left out.

    The shapes of a stuff label are one segment; each shape of a thing label is a segment, unless
    several share a ``group_id``. Things cover stuff, and of each kind later shapes cover earlier
    ones. The flag ``crowd`` of a shape marks its segment as a crowd.

    Writes ``panoptic/``, ``panoptic.json`` and ``instances.json`` into the output folder.

    Raises:
        ValueError: there is no file, a stuff label has no shape, or a shape has no area.
    """
    files: dict[Path, list[str]] = {}  # with the labels of their shapes
    for path in sorted(source.glob("*.json")):
        content = read_json(path) if path.is_file() else None
        if isinstance(content, dict) and "shapes" in content:
            require_none(_labelme_problems(content), path)
            require_few_pixels(str(path), content["imageWidth"], content["imageHeight"])
            files[path] = [shape["label"] for shape in content["shapes"]]
        else:
            logger.warning("'%s' is no file of LabelMe (it lacks 'shapes') and is left out.", path)
    labels = sorted({name for names in files.values() for name in names})
    if not labels:
        raise ValueError(f"No shapes in any *.json of '{source}'. Is it a folder of LabelMe?")
    unknown = sorted(set(stuff) - set(labels))
    if unknown:
        raise ValueError(f"No shape in '{source}' has the stuff labels {unknown}. Known: {labels}.")
    categories = [
        {"id": i, "name": name, "isthing": int(name not in stuff)}
        for i, name in enumerate(labels, start=1)
    ]
    require_none(find_category_problems(categories), source)
    convert = partial(_convert_labelme, categories)
    _write(output, categories, list(files), convert, lambda path: [path], list(files))


def _labelme_problems(content: dict[str, Any]) -> Any:
    misfit = find_misfit(content, _LABELME)
    if misfit:
        yield Problem("JSON", misfit)
        return
    for i, shape in enumerate(content["shapes"], start=1):
        misfit = find_misfit(shape, _SHAPE, _SHAPE_OPTIONS)
        if misfit:
            yield Problem(f"shape number {i}", misfit)


def _convert_labelme(categories: Sequence[Mapping[str, Any]], source: Path) -> PanopticImage:
    content = read_json(source)
    index_map = np.zeros((content["imageHeight"], content["imageWidth"]), dtype=np.int32)
    known = {c["name"]: c for c in categories}
    segments: list[Segment] = []
    shared: dict[Any, int] = {}  # segment of the shapes that belong together
    numbered = enumerate(content["shapes"], start=1)
    stuff_first = sorted(numbered, key=lambda item: known[item[1]["label"]]["isthing"])  # stable
    for number, shape in stuff_first:
        category = known[shape["label"]]
        group = shape.get("group_id")
        key = (
            category["id"],
            None if not category["isthing"] else (group, number * (group is None)),
        )
        if key not in shared:
            segments.append(Segment(category["id"]))
            shared[key] = len(segments)
        if (shape.get("flags") or {}).get("crowd") and category["isthing"]:
            segments[shared[key] - 1] = Segment(category["id"], iscrowd=1)
        where = f"'{source}': shape number {number}, '{shape['label']}'"
        if not _fill(index_map, shape, shared[key], where):
            logger.warning("%s has no pixel in the image.", where)
    return PanopticImage(
        image_id=source.stem,
        file_name=Path(slashes(content["imagePath"])).name,
        png=f"{source.stem}.png",
        index_map=index_map,
        segments=segments,
    )


def _fill(index_map: NDArray[np.int32], shape: Mapping[str, Any], value: int, where: str) -> bool:
    """Draw a shape; whether it has a pixel."""
    kind = shape.get("shape_type", "polygon")
    least = {"polygon": 3, "rectangle": 2, "circle": 2}.get(kind)
    count = len(shape["points"])
    if least is None or count < least or (kind != "polygon" and count != 2):
        raise ValueError(
            f"{where}: a shape of type '{kind}' with {count} points cannot be converted. Draw it "
            "as a polygon (3 points or more), a rectangle or a circle (2 points)."
        )
    points = _points(shape["points"], index_map.shape, where, least)
    drawn = np.zeros(index_map.shape, dtype=np.uint8)
    if kind == "polygon":
        cv2.fillPoly(drawn, [np.round(points).astype(np.int32)], 1)
    elif kind == "rectangle":
        low, high = np.round(points.min(0)).astype(int), np.round(points.max(0)).astype(int)
        stop = np.maximum(high + 1, 0)
        drawn[max(low[1], 0) : stop[1], max(low[0], 0) : stop[0]] = 1
    else:
        centre = [int(v) for v in np.round(points[0])]
        radius = round(float(np.hypot(*(points[1] - points[0]))))
        cv2.circle(drawn, centre, radius, 1, thickness=-1)
    index_map[drawn == 1] = value
    return bool(drawn.any())


def _write(
    output: Path,
    categories: Sequence[Mapping[str, Any]],
    sources: Sequence[Path],
    convert: Any,
    inputs: Any,
    read: Sequence[Path],
) -> None:
    split = Split(
        name=output.name,
        panoptic_root=output / "panoptic",
        panoptic_json=output / "panoptic.json",
        instances_json=output / "instances.json",
        categories=categories,
    )
    refuse_inputs((split.panoptic_root, split.panoptic_json, split.instances_json), read)
    output.mkdir(parents=True, exist_ok=True)
    convert_split(split, sources, convert, num_images=len(sources), inputs=inputs)
