"""Converts instances with label maps, and LabelMe's files, to the COCO panoptic format.

Shapes: H x W pixels of an image.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycocotools.mask
from numpy.typing import NDArray

from psf.images import read_values

from ..coco_writer import PanopticImage, Segment, Split, convert_split


def convert_instances(
    instances_json: Path,
    label_root: Path,
    stuff_categories: Sequence[Mapping[str, Any]],
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
        ValueError: a thing and a stuff category share an id, or a map has another size.
        FileNotFoundError: a label map is missing.
    """
    data = json.loads(instances_json.read_text(encoding="utf-8"))
    things = [{**c, "isthing": 1} for c in data["categories"]]
    categories = [*things, *({**c, "isthing": 0} for c in stuff_categories)]
    shared = {c["id"] for c in things} & {c["id"] for c in stuff_categories}
    if shared:
        raise ValueError(
            f"The category ids {sorted(shared)} are those of things in '{instances_json}' and of "
            "stuff as well. Renumber the stuff categories and the label maps."
        )
    annotations: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in data["images"]}
    for annotation in data["annotations"]:
        annotations[annotation["image_id"]].append(annotation)
    images = {Path(image["file_name"]): image for image in data["images"]}
    stuff_ids = [c["id"] for c in stuff_categories]

    def convert(source: Path) -> PanopticImage:
        image = images[source]
        return _unite(image, annotations[image["id"]], label_root, stuff_ids)

    _write(output, categories, list(images), convert)


def _unite(
    image: Mapping[str, Any],
    annotations: Sequence[Mapping[str, Any]],
    label_root: Path,
    stuff_ids: Sequence[int],
) -> PanopticImage:
    size = (image["height"], image["width"])
    name = Path(image["file_name"]).with_suffix(".png")
    path = label_root / name
    if not path.is_file():
        raise FileNotFoundError(f"The label map '{path}' of '{image['file_name']}' does not exist.")
    labels = read_values(str(path))
    if labels.shape != size:
        raise ValueError(
            f"The label map '{path}' is {labels.shape}, but its image {size} pixels (height, "
            "width)."
        )
    index_map = np.zeros(size, dtype=np.int32)
    segments: list[Segment] = []
    for label in sorted(set(np.unique(labels).tolist()) & set(stuff_ids)):
        segments.append(Segment(label))
        index_map[labels == label] = len(segments)
    order = sorted(annotations, key=lambda a: (not a.get("iscrowd", 0), -a["area"]))
    for annotation in order:
        segments.append(Segment(annotation["category_id"], int(annotation.get("iscrowd", 0))))
        index_map[_decode(annotation["segmentation"], *size)] = len(segments)
    return PanopticImage(image["id"], image["file_name"], str(name), index_map, segments)


def _decode(segmentation: Any, height: int, width: int) -> NDArray[np.bool_]:
    """(H, W), from COCO's polygons or run lengths."""
    rle = segmentation
    if isinstance(segmentation, list):
        rle = pycocotools.mask.merge(pycocotools.mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        rle = pycocotools.mask.frPyObjects(segmentation, height, width)
    return np.asarray(pycocotools.mask.decode(rle), dtype=bool)


def convert_labelme(source: Path, stuff: Sequence[str], output: Path) -> None:
    """
    Convert LabelMe's files, one JSON per image.

    The shapes of a stuff label are one segment; each shape of a thing label is a segment, unless
    several share a ``group_id``. Later shapes cover earlier ones. The flag ``crowd`` marks a crowd.

    Args:
        source: folder of the JSON files.
        stuff: the labels that are stuff; all others are things.
        output: folder for ``panoptic/``, ``panoptic.json`` and ``instances.json``.

    Raises:
        ValueError: there is no file, a stuff label has no shape, or a shape has no area.
    """
    files = sorted(source.glob("*.json"))
    shapes = [s for f in files for s in json.loads(f.read_text(encoding="utf-8"))["shapes"]]
    labels = sorted({shape["label"] for shape in shapes})
    if not labels:
        raise ValueError(f"No shapes in any *.json of '{source}'. Is it a folder of LabelMe?")
    unknown = sorted(set(stuff) - set(labels))
    if unknown:
        raise ValueError(f"No shape in '{source}' has the stuff labels {unknown}. Known: {labels}.")
    categories = [
        {"id": i, "name": label, "isthing": int(label not in stuff)}
        for i, label in enumerate(labels, start=1)
    ]
    _write(output, categories, files, partial(_convert_labelme, categories))


def _convert_labelme(categories: Sequence[Mapping[str, Any]], source: Path) -> PanopticImage:
    content = json.loads(source.read_text(encoding="utf-8"))
    index_map = np.zeros((content["imageHeight"], content["imageWidth"]), dtype=np.int32)
    known = {c["name"]: c for c in categories}
    segments: list[Segment] = []
    shared: dict[Any, int] = {}  # segment of the shapes that belong together
    for number, shape in enumerate(content["shapes"]):
        category = known[shape["label"]]
        group = shape.get("group_id")
        key = (
            category["id"],
            None if not category["isthing"] else (group, number * (group is None)),
        )
        if key not in shared:
            crowd = bool((shape.get("flags") or {}).get("crowd")) and category["isthing"]
            segments.append(Segment(category["id"], int(crowd)))
            shared[key] = len(segments)
        _fill(index_map, shape, shared[key], source)
    return PanopticImage(
        image_id=source.stem,
        file_name=Path(content["imagePath"].replace("\\", "/")).name,
        png=f"{source.stem}.png",
        index_map=index_map,
        segments=segments,
    )


def _fill(index_map: NDArray[np.int32], shape: Mapping[str, Any], value: int, source: Path) -> None:
    kind = shape.get("shape_type", "polygon")
    points = np.array(shape["points"], dtype=np.float64)
    if kind == "polygon" and len(points) >= 3:
        cv2.fillPoly(index_map, [np.round(points).astype(np.int32)], value)
    elif kind == "rectangle" and len(points) == 2:
        low, high = np.round(points.min(0)).astype(int), np.round(points.max(0)).astype(int)
        index_map[max(low[1], 0) : high[1] + 1, max(low[0], 0) : high[0] + 1] = value
    elif kind == "circle" and len(points) == 2:
        centre = [int(v) for v in np.round(points[0])]
        radius = round(float(np.hypot(*(points[1] - points[0]))))
        cv2.circle(index_map, centre, radius, value, thickness=-1)
    else:
        raise ValueError(
            f"'{source}': a shape '{shape['label']}' of type '{kind}' with {len(points)} points "
            "has no area. Polygons, rectangles and circles are known."
        )


def _write(
    output: Path, categories: Sequence[Mapping[str, Any]], sources: Sequence[Path], convert: Any
) -> None:
    output.mkdir(parents=True, exist_ok=True)
    split = Split(
        name=output.name,
        panoptic_root=output / "panoptic",
        panoptic_json=output / "panoptic.json",
        instances_json=output / "instances.json",
        categories=categories,
    )
    convert_split(split, sources, convert, num_images=len(sources))
