"""Loads and registers data sets in the COCO panoptic format (cocodataset.org/#format-data).

Contiguous category ids: things 0..K-1, then stuff K..K+T-1, each in the order of the JSON's
categories. With ``things_first=False`` all are numbered in that order, as Detectron2 and
Mask2Former do.
"""

import colorsys
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

logger = logging.getLogger(__name__)

_ROOT_HINT = (
    "Set the environment variable DETECTRON2_DATASETS (default './datasets') to the folder of your "
    "data sets."
)


def datasets_root() -> str:
    """The folder of the data sets: the environment variable DETECTRON2_DATASETS, as Detectron2."""
    return os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))


def register_panoptic(  # noqa: PLR0913  one argument per part of a data set
    name: str,
    *,
    image_root: str,
    panoptic_root: str,
    panoptic_json: str,
    categories: Sequence[dict[str, Any]] | None = None,
    instances_json: str | None = None,
    sem_seg_root: str | None = None,
    things_first: bool = True,
    image_file: Callable[[str], str] | None = None,
    prepare: Callable[[], None] | None = None,
) -> None:
    """
    Register a data set as Detectron2's "standard" COCO panoptic data sets.

    The annotations are loaded on first use; the metadata is set at once.

    Args:
        name: the name for ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        image_root: folder of the images.
        panoptic_root: folder of the panoptic PNGs.
        panoptic_json: the JSON of the annotations.
        categories: as in the JSON (id, name, isthing, optionally color); None: read from it now.
        instances_json: the things in COCO's instance format; only needed to evaluate AP.
        sem_seg_root: folder of the JSON's ``sem_seg_file_name``; None: mIoU by the panoptic PNGs.
        things_first: how classes are numbered (see the module).
        image_file: from the JSON's name of an image to its path below ``image_root``.
        prepare: called before the annotations are loaded, to create the files.
    """
    if name in DatasetCatalog.list():
        raise ValueError(
            f"A data set '{name}' is registered already. Choose another name or remove it first "
            "(DatasetCatalog.remove, MetadataCatalog.remove)."
        )
    if categories is None:
        categories = _read_json(panoptic_json, ["categories"])["categories"]

    files: dict[str, Any] = {
        "panoptic_json": panoptic_json,
        "image_root": image_root,
        "panoptic_root": panoptic_root,
        "sem_seg_root": sem_seg_root,
        "image_file": image_file,
    }

    def load() -> list[dict[str, Any]]:
        if prepare is not None:
            prepare()
        return load_coco_panoptic(**files, categories=categories, things_first=things_first)

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        **files,
        **panoptic_metadata(categories, things_first=things_first),
        json_file=instances_json,
        evaluator_type="coco_panoptic_seg",
        ignore_label=255,
        label_divisor=1000,
    )


def register_listed(entries: Sequence[Sequence[str]]) -> None:
    """
    Register the data sets of a config (``DATASETS.REGISTER``) that are not registered yet.

    Args:
        entries: [name, folder of images, folder of PNGs, JSON], optionally with an instances JSON.

    Raises:
        ValueError: an entry has another form, or another data set has its name.
    """
    for entry in entries:
        if len(entry) not in (4, 5) or not all(isinstance(part, str) for part in entry):
            raise ValueError(
                f"DATASETS.REGISTER: {list(entry)} is not of the form [name, folder of images, "
                "folder of PNGs, JSON], optionally with the JSON of the instances."
            )
        name, image_root, panoptic_root, panoptic_json, *instances = entry
        if name in DatasetCatalog.list():
            known = MetadataCatalog.get(name)
            paths = [known.get(k) for k in ("image_root", "panoptic_root", "panoptic_json")]
            if paths != [image_root, panoptic_root, panoptic_json]:
                raise ValueError(
                    f"DATASETS.REGISTER: '{name}' is the name of another data set, with the files "
                    f"{paths}. Choose another name."
                )
            continue
        register_panoptic(
            name,
            image_root=image_root,
            panoptic_root=panoptic_root,
            panoptic_json=panoptic_json,
            instances_json=instances[0] if instances else None,
        )


def load_coco_panoptic(
    panoptic_json: str,
    image_root: str,
    panoptic_root: str,
    *,
    categories: Sequence[dict[str, Any]] | None = None,
    sem_seg_root: str | None = None,
    things_first: bool = True,
    image_file: Callable[[str], str] | None = None,
) -> list[dict[str, Any]]:
    """
    Load a JSON in the COCO panoptic format.

    An image whose annotation has no segments is kept: it is known to show nothing. An image without
    an annotation is left out, and logged. If the JSON has no ``annotations`` (COCO's test sets),
    all images are kept, with ``pan_seg_file_name`` None.

    Args:
        panoptic_json: the JSON of the annotations.
        image_root: folder of the images.
        panoptic_root: folder of the panoptic PNGs.
        categories: replace the JSON's.
        sem_seg_root: folder of the label PNGs that the annotations name.
        things_first: how classes are numbered (see the module).
        image_file: from the JSON's name of an image to its path below ``image_root``.

    Returns:
        For each image: file_name, image_id, height, width, pan_seg_file_name and segments_info (the
        JSON's segments with category_id made contiguous, and isthing); with ``sem_seg_root`` also
        sem_seg_file_name, if the annotation has it.

    Raises:
        FileNotFoundError: a file or a folder is missing.
        ValueError: the JSON contradicts itself or lacks keys.
    """
    data = _read_json(panoptic_json, ["images"] if categories else ["images", "categories"])
    where = f"'{panoptic_json}'"
    categories = categories or data["categories"]
    contiguous_ids = _contiguous_ids(categories, things_first)
    classes = {c["id"]: (contiguous_ids[c["id"]], bool(c["isthing"])) for c in categories}
    records = []
    for image, annotation in _annotated_images(data, where):
        png, labels = annotation["file_name"], annotation.get("sem_seg_file_name")
        name = image["file_name"] if image_file is None else image_file(image["file_name"])
        described = f"the annotation of image_id {image['id']!r} in {where}"
        record = {
            "file_name": os.path.join(image_root, name),
            "image_id": image["id"],
            "height": image["height"],
            "width": image["width"],
            "pan_seg_file_name": None if png is None else os.path.join(panoptic_root, png),
            "segments_info": _convert_segments(annotation["segments_info"], classes, described),
        }
        if sem_seg_root is not None and labels is not None:
            record["sem_seg_file_name"] = os.path.join(sem_seg_root, labels)
        records.append(record)
    _require_files("image", panoptic_json, image_root, [r["file_name"] for r in records])
    pngs = [r["pan_seg_file_name"] for r in records if r["pan_seg_file_name"] is not None]
    _require_files("panoptic PNG", panoptic_json, panoptic_root, pngs)
    return records


def _annotated_images(data: dict[str, Any], where: str) -> Iterator[tuple[Any, Any]]:
    """Each annotation of a JSON with its image, both checked."""
    images = {}
    for image in data["images"]:
        _require(image, ("id", "file_name", "height", "width"), f"an image of {where}")
        images[image["id"]] = image
    annotations = data.get("annotations")
    if annotations is None:
        annotations = [{"image_id": i, "file_name": None, "segments_info": []} for i in images]
    keys = ("image_id", "file_name", "segments_info")
    for annotation in annotations:
        _require(annotation, keys, f"an annotation of {where}")
        image_id = annotation["image_id"]
        if image_id not in images:
            raise ValueError(
                f"{where} annotates image_id {image_id!r}, which is not the id of any of its "
                "images. Add the image or remove the annotation."
            )
        yield images[image_id], annotation
    unannotated = len(images) - len(annotations)
    if unannotated:
        logger.info("Left out %d images of %s that have no annotation.", unannotated, where)


def panoptic_metadata(
    categories: Sequence[dict[str, Any]], *, things_first: bool = True
) -> dict[str, Any]:
    """The names, colours and ids of the classes, in the keys of Detectron2's metadata."""
    contiguous_ids = _contiguous_ids(categories, things_first)
    by_contiguous_id = sorted(categories, key=lambda c: contiguous_ids[c["id"]])
    names = [c["name"] for c in by_contiguous_id]
    colors = [list(c.get("color") or _color(i)) for i, c in enumerate(by_contiguous_id)]
    things, stuff = (
        {
            c["id"]: contiguous_ids[c["id"]]
            for c in by_contiguous_id
            if bool(c["isthing"]) == isthing
        }
        for isthing in (True, False)
    )
    # The lists are indexed by contiguous id, so stuff_classes begins with the things. thing_classes
    # has things only where that is possible: Detectron2's COCOEvaluator requires as many names as
    # the instance annotations have categories.
    num_thing_names = len(things) if things_first else len(names)
    return {
        "thing_classes": names[:num_thing_names],
        "stuff_classes": names,
        "thing_colors": colors[:num_thing_names],
        "stuff_colors": colors,
        "thing_dataset_id_to_contiguous_id": things,
        "stuff_dataset_id_to_contiguous_id": stuff,
    }


def _contiguous_ids(categories: Sequence[dict[str, Any]], things_first: bool) -> dict[int, int]:
    for category in categories:
        _require(category, ("id", "name", "isthing"), "a category")
    in_order = sorted(categories, key=lambda c: things_first and not c["isthing"])  # stable
    ids = [c["id"] for c in in_order]
    if len(set(ids)) < len(ids):
        raise ValueError(f"Category ids must be unique, got {sorted(ids)}.")
    return {dataset_id: i for i, dataset_id in enumerate(ids)}


def _convert_segments(
    segments: Sequence[dict[str, Any]], classes: dict[int, tuple[int, bool]], where: str
) -> list[dict[str, Any]]:
    """Replace category ids by contiguous ids; ``classes`` has contiguous id and isthing of each."""
    converted = []
    ids = set()
    for segment in segments:
        _require(segment, ("id", "category_id"), f"a segment of {where}")
        segment_id, category_id = segment["id"], segment["category_id"]
        if category_id not in classes:
            raise ValueError(
                f"Segment {segment_id} of {where} has category_id {category_id}, which is not "
                f"among the data set's categories {sorted(classes)}. Add the category or "
                "correct the segment."
            )
        if not 0 < segment_id < 1 << 24 or segment_id in ids:
            raise ValueError(
                f"Segment id {segment_id} of {where} is not usable: ids must be unique within an "
                "image and in 1..16777215 (0 is void)."
            )
        ids.add(segment_id)
        contiguous_id, isthing = classes[category_id]
        converted.append(
            {"iscrowd": 0, **segment, "category_id": contiguous_id, "isthing": isthing}
        )
    return converted


def _read_json(path: str, keys: Iterable[str]) -> dict[str, Any]:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"The annotations '{path}' do not exist. {_ROOT_HINT}")
    with open(path, encoding="utf-8") as file:
        try:
            data = json.load(file)
        except ValueError as error:
            raise ValueError(f"'{path}' is not valid JSON ({error}). Copy it again.") from error
    _require(data, keys, f"'{path}'")
    return data


def _require(mapping: Any, keys: Iterable[str], what: str) -> None:
    missing = [key for key in keys if not isinstance(mapping, dict) or key not in mapping]
    if missing:
        raise ValueError(
            f"{what[0].upper()}{what[1:]} lacks {missing}; the COCO panoptic format needs them."
        )


def _require_files(kind: str, json_file: str, root: str, paths: Sequence[str]) -> None:
    """Find missing files by listing their folders, much faster than one query per file."""
    if not os.path.isdir(root):
        raise FileNotFoundError(f"The folder of {kind}s '{root}' does not exist. {_ROOT_HINT}")
    listings: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in listings:
            listings[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in listings[folder]:
            missing.append(path)
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(paths)} {kind}s that '{json_file}' names do not exist, "
            f"the first is '{missing[0]}'. Complete the data set or correct the JSON."
        )


def _color(index: int) -> list[int]:
    """A colour that differs from its neighbours' (hues are a golden angle apart)."""
    hue = index * 0.618034 % 1
    return [round(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.65, 0.9 - 0.25 * (index % 3 == 1))]
