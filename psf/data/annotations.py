"""Reads JSON files in the COCO panoptic format (cocodataset.org/#format-data).

Types and ranges of their values are checked here, for training, evaluation and tools alike.
"""

import json
import os
import re
import reprlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from detectron2.utils.file_io import PathManager

from psf.panoptic_png import MAX_ID


class Problem(NamedTuple):
    """A value that cannot be used."""

    where: str  # an image, a segment, a category
    what: str


class PanopticJson(NamedTuple):
    """The checked content of a file."""

    categories: list[dict[str, Any]]
    images: dict[Any, dict[str, Any]]  # by id
    annotations: list[dict[str, Any]] | None  # None: a test set without annotations


def _is_int(value: Any) -> bool:
    return type(value) is int  # a bool is an int as well


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e15  # false for NaN


def _is_box(value: Any) -> bool:
    is_four = type(value) is list and len(value) == 4 and all(map(_is_number, value))
    return is_four and min(value[2:]) >= 0


def _is_color(value: Any) -> bool:
    is_three = isinstance(value, list | tuple) and len(value) == 3
    return value is None or (is_three and all(_is_int(v) and 0 <= v <= 255 for v in value))


# What no table can have in a cell: control characters, surrogates and line separators.
_UNWRITABLE = re.compile("[\0-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029]")
_NO_FILES = ("", ".", "..")
_FILE_NAMES = ("file_name", "sem_seg_file_name")

# For each key of an object: whether a value fits, and what would.
Keys = Mapping[str, tuple[Callable[[Any], bool], str]]
TEXT = (lambda v: type(v) is str and bool(v.strip()), "a text")
NAME = (
    lambda v: TEXT[0](v) and not _UNWRITABLE.search(v),
    "a text without line breaks and control characters",
)
FILE = (
    lambda v: TEXT[0](v) and "\0" not in v and slashes(v).rpartition("/")[2] not in _NO_FILES,
    "the name of a file",
)
LIST = (lambda v: type(v) is list, "a list")
SIDE = (lambda v: _is_int(v) and 0 < v < 1 << 31, "a positive integer")
FLAG = (lambda v: type(v) in (int, bool) and v in (0, 1), "0 or 1")
CLASS_ID = (lambda v: _is_int(v) and 0 <= v < 1 << 31, "an integer of at least 0")
SIZE = (lambda v: _is_number(v) and v >= 0, "a number of at least 0")
IMAGE_ID = (lambda v: type(v) in (int, str), "an integer or a text")
_SEGMENT_ID = (lambda v: _is_int(v) and 0 < v <= MAX_ID, f"an integer in 1..{MAX_ID} (0 is void)")
_BOX = (_is_box, "[x, y, width, height]")

CATEGORY: Keys = {"id": CLASS_ID, "name": NAME, "isthing": FLAG}
_HAS_ID: Keys = {"id": CLASS_ID}
_NAMED: Keys = {"id": CLASS_ID, "name": NAME}
_CATEGORY_OPTIONS: Keys = {"color": (_is_color, "three integers in 0..255")}
IMAGE: Keys = {"id": IMAGE_ID, "file_name": FILE, "height": SIDE, "width": SIDE}
ANNOTATION: Keys = {"image_id": IMAGE_ID, "file_name": FILE, "segments_info": LIST}
_ANNOTATION_OPTIONS: Keys = {"sem_seg_file_name": FILE}
SEGMENT: Keys = {"id": _SEGMENT_ID, "category_id": CLASS_ID}
SEGMENT_OPTIONS: Keys = {"iscrowd": FLAG, "area": SIZE, "bbox": _BOX}

PARTS: Keys = {"images": LIST, "annotations": LIST, "categories": LIST}
_MASK = (lambda v: isinstance(v, list | dict), "polygons or run lengths")
_INSTANCE: Keys = {"image_id": IMAGE_ID, "category_id": CLASS_ID, "segmentation": _MASK}


def _is_mask(value: Any) -> bool:
    """Whether pycocotools can read it."""
    if isinstance(value, dict):
        return value.keys() >= {"size", "counts"}
    polygons = value if isinstance(value, list) and value else [None]
    return all(
        isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 and all(map(_is_number, p))
        for p in polygons
    )


# What COCO's evaluation needs.
_SCORED_INSTANCE: Keys = {
    **{"id": (_is_int, "an integer"), "iscrowd": FLAG, "area": SIZE, "bbox": _BOX},
    "segmentation": (_is_mask, "polygons of at least 3 points or run lengths"),
}


def find_misfit(value: Any, required: Keys, optional: Keys | None = None) -> str | None:
    """What is wrong with an object and the values of its keys; None: nothing."""
    if not isinstance(value, Mapping):
        return f"is {reprlib.repr(value)} instead of an object"
    missing = [key for key in required if key not in value]
    if missing:
        return f"lacks {', '.join(missing)}"
    for keys in (required, optional or {}):
        for key, (fits, expected) in keys.items():
            if key in value and not fits(value[key]):
                return f"{key} is {reprlib.repr(value[key])} instead of {expected}"
    return None


def read_json(path: str | os.PathLike[str]) -> Any:
    """
    Read a JSON file in UTF-8, -16 or -32, with or without byte-order mark.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not valid JSON.
    """
    if not PathManager.isfile(os.fspath(path)):
        raise FileNotFoundError(f"There is no file '{path}'.")
    with PathManager.open(os.fspath(path), "rb") as file:
        try:
            return json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"'{path}' is not valid JSON ({error}). Copy it again.") from error


def read_panoptic_json(
    path: str | os.PathLike[str], categories: Sequence[Mapping[str, Any]] | None = None
) -> PanopticJson:
    """
    Read a JSON in the COCO panoptic format. Categories replace its own, which must not differ.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not valid JSON, or a value is missing, of another type or out of range.
    """
    data = read_json(path)
    require_none(find_problems(data, categories), path)
    images = {image["id"]: with_slashes(image) for image in data["images"]}
    chosen = [dict(c) for c in categories or data["categories"]]
    annotations = data.get("annotations")
    if annotations is not None:
        annotations = [with_slashes(annotation) for annotation in annotations]
    return PanopticJson(chosen, images, annotations)


def slashes(file_name: str) -> str:
    """A file name with / between folders; Windows writes a backslash."""
    return file_name.replace("\\", "/")


def with_slashes(item: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of an image or an annotation with / between folders."""
    names = {key: slashes(item[key]) for key in _FILE_NAMES if key in item}
    return {**item, **names}


def read_categories(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the categories of a file only; raises as :func:`read_panoptic_json`."""
    data = read_json(path)
    require_keys(data, {"categories": LIST}, path)
    require_none(find_category_problems(data["categories"]), path)
    categories: list[dict[str, Any]] = data["categories"]
    return categories


def read_predictions(
    path: str | os.PathLike[str], categories: Sequence[Mapping[str, Any]]
) -> dict[Any, dict[str, Any]]:
    """
    Read predictions in the format of COCO's server (cocodataset.org/#format-results).

    Args:
        path: the file. Its categories, if it has them, must not contradict the ground truth's.
        categories: of the ground truth.

    Returns:
        The annotations by image id.
    """
    data = read_json(path)
    require_keys(data, {"annotations": LIST}, path)
    require_none(_contradictions(data.get("categories"), categories), path)
    ids = {category["id"] for category in categories}
    require_none(_annotation_problems(data["annotations"], ids, None, {}), path)
    return {a["image_id"]: with_slashes(a) for a in data["annotations"]}


def require_keys(data: Any, keys: Keys, path: object) -> None:
    """Raise ValueError unless the content of a file has these keys."""
    misfit = find_misfit(data, keys)
    require_none((Problem("JSON", what) for what in [misfit] if what), path)


def require_none(problems: Iterator[Problem], path: object) -> None:
    """Raise ValueError with the first problem of a file, if there is one."""
    for where, what in problems:
        raise ValueError(
            f"'{path}': {where}: {what}. Correct the file (tools/check_dataset.py lists all "
            "defects of a data set)."
        )


def find_problems(
    data: Any, categories: Sequence[Mapping[str, Any]] | None = None
) -> Iterator[Problem]:
    """Find the values that :func:`read_panoptic_json` cannot use."""
    required = {"images": LIST} if categories else {"images": LIST, "categories": LIST}
    misfit = find_misfit(data, required, {"annotations": LIST})
    if misfit:
        yield Problem("JSON", misfit)
        return
    yield from find_category_problems(categories or data["categories"])
    if categories:
        yield from _contradictions(data.get("categories"), categories)
    image_ids: set[Any] = set()
    yield from _image_problems(data["images"], image_ids, None)
    # A category with another fault is known, too: one line tells of it.
    known = {c["id"] for c in categories or data["categories"] if not find_misfit(c, _HAS_ID)}
    names = {i["id"]: slashes(i["file_name"]) for i in data["images"] if not find_misfit(i, IMAGE)}
    yield from _annotation_problems(data.get("annotations", []), known, image_ids, names)


def _image_problems(
    images: Sequence[Any], ids: set[Any], names: set[Any] | None
) -> Iterator[Problem]:
    """Note the ids, and where asked the names, which no two images may share."""
    for i, image in enumerate(images):
        misfit = find_misfit(image, IMAGE) or _repetition(image["id"], ids, "images")
        if not misfit and names is not None:
            misfit = _repetition(image["file_name"], names, "images", "file_name")
        if misfit:
            yield Problem(f"image {label(image, i)}", misfit)


def find_category_problems(categories: Sequence[Any]) -> Iterator[Problem]:
    """Find the categories that are incomplete, or share an id or a name."""
    if not categories:
        yield Problem("categories", "there are none")
    ids: set[Any] = set()
    names: set[Any] = set()
    for i, category in enumerate(categories):
        misfit = find_misfit(category, CATEGORY, _CATEGORY_OPTIONS)
        misfit = misfit or _repetition(category["id"], ids, "categories")
        if not misfit and _repetition(normal_name(category["name"]), names, ""):
            misfit = f"another category has the name '{category['name']}', too (in any case)"
        if misfit:
            yield Problem(f"category {label(category, i)}", misfit)


def normal_name(name: str) -> str:
    """A class name as it is compared: case and outer blanks do not count."""
    return name.strip().casefold()


def _contradictions(theirs: Any, categories: Sequence[Mapping[str, Any]]) -> Iterator[Problem]:
    """Categories of a file that are others under the same ids."""
    known = {category["id"]: category for category in categories}
    for category in theirs if isinstance(theirs, list) else []:
        if find_misfit(category, CATEGORY) or category["id"] not in known:
            continue
        ours = known[category["id"]]
        if normal_name(category["name"]) != normal_name(ours["name"]):
            what = f"is '{category['name']}', but '{ours['name']}' is expected under this id"
            yield Problem(f"category {category['id']}", what)
        elif category["isthing"] != ours["isthing"]:
            what = f"isthing is {category['isthing']}, but {ours['isthing']} is expected"
            yield Problem(f"category {category['id']}", what)


def _annotation_problems(
    annotations: Sequence[Any],
    category_ids: Collection[int],
    image_ids: Collection[Any] | None,
    image_names: Mapping[Any, str],
) -> Iterator[Problem]:
    """Wrong values of annotations; ``image_ids`` None: any image may be annotated."""
    annotated: set[Any] = set()
    partners: dict[tuple[str, str], str] = {}  # an image's PNG, and a PNG's image
    for i, annotation in enumerate(annotations):
        where = f"annotation of image {label(annotation, i, 'image_id')}"
        misfit = find_misfit(annotation, ANNOTATION, _ANNOTATION_OPTIONS)
        if not misfit and image_ids is not None and annotation["image_id"] not in image_ids:
            misfit = "is not among the images"
        misfit = misfit or _repetition(annotation["image_id"], annotated, "annotations")
        if not misfit:
            image = image_names.get(annotation["image_id"], f"id {annotation['image_id']}")
            misfit = _second_partner(image, slashes(annotation["file_name"]), partners)
        if misfit:
            yield Problem(where, misfit)
            continue
        seen: set[Any] = set()
        for j, segment in enumerate(annotation["segments_info"]):
            misfit = find_misfit(segment, SEGMENT, SEGMENT_OPTIONS)
            if not misfit and segment["category_id"] not in category_ids:
                misfit = f"category_id {segment['category_id']} is not among the categories"
            misfit = misfit or _repetition(segment["id"], seen, "segments")
            if misfit:
                yield Problem(f"{where}, segment {label(segment, j)}", misfit)


def find_instance_problems(data: Mapping[str, Any], *, scored: bool) -> Iterator[Problem]:
    """Find the values in COCO's instance format that cannot be used; AP needs more (scored)."""
    ids: set[Any] = set()
    yield from _image_problems(data["images"], ids, set())
    for i, category in enumerate(data["categories"]):
        misfit = find_misfit(category, _NAMED)
        if misfit:
            yield Problem(f"category {label(category, i)}", misfit)
    known = {c["id"] for c in data["categories"] if not find_misfit(c, _NAMED)}
    keys = {**_INSTANCE, **_SCORED_INSTANCE} if scored else _INSTANCE
    for i, annotation in enumerate(data["annotations"]):
        misfit = find_misfit(annotation, keys, {"iscrowd": FLAG})
        if not misfit and annotation["image_id"] not in ids:
            misfit = f"image_id {annotation['image_id']!r} is not among the images"
        elif not misfit and annotation["category_id"] not in known:
            misfit = f"category_id {annotation['category_id']} is not among the categories"
        if misfit:
            yield Problem(f"annotation {label(annotation, i)}", misfit)


def _second_partner(image: str, png: str, partners: dict[tuple[str, str], str]) -> str | None:
    """Note an image and its PNG; the problem if one of them has another partner already."""
    for kind, one, other_kind, other in (
        ("image", image, "PNG", png),
        ("PNG", png, "image", image),
    ):
        known = partners.setdefault((kind, one), other)
        if known != other:
            return f"its {kind} '{one}' belongs to the {other_kind} '{known}', too"
    return None


def _repetition(value: Any, seen: set[Any], kind: str, key: str = "id") -> str | None:
    """Note a value; the problem if it was noted before."""
    if value in seen:
        return f"two {kind} have this {key}"
    seen.add(value)
    return None


def label(value: Any, number: int, key: str = "id") -> str:
    """The id of an object, or its position where it has none."""
    has_id = isinstance(value, Mapping) and type(value.get(key)) in (int, str, float)
    return reprlib.repr(value[key]) if has_id else f"number {number}"
