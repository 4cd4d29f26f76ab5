"""Loads and registers data sets in the COCO panoptic format (cocodataset.org/#format-data).

Contiguous category ids: things 0..K-1, then stuff K..K+T-1, each in the order of the JSON's
categories. With ``things_first=False`` all are numbered in that order, as Detectron2 and
Mask2Former do.
"""

import colorsys
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog

from .annotations import (
    PanopticJson,
    find_category_problems,
    read_categories,
    read_panoptic_json,
    require_none,
)

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
        image_root: folder of the images. ``~`` in a path is the home folder.
        panoptic_root: folder of the panoptic PNGs.
        panoptic_json: the JSON of the annotations.
        categories: as in the JSON (id, name, isthing, optionally color); None: read from it now.
        instances_json: the things in COCO's instance format; only needed to evaluate AP.
        sem_seg_root: folder of the JSON's ``sem_seg_file_name``; None: mIoU by the panoptic PNGs.
        things_first: how classes are numbered (see the module).
        image_file: from the JSON's name of an image to its path below ``image_root``.
        prepare: called before the annotations are loaded, to create the files.
    """
    _check_name(name)
    files: dict[str, Any] = {
        "panoptic_json": os.path.expanduser(panoptic_json),
        "image_root": os.path.expanduser(image_root),
        "panoptic_root": os.path.expanduser(panoptic_root),
        "sem_seg_root": sem_seg_root and os.path.expanduser(sem_seg_root),
        "image_file": image_file,
    }
    if categories is None:
        _require_json(files["panoptic_json"])
        categories = read_categories(files["panoptic_json"])

    def load() -> list[dict[str, Any]]:
        if prepare is not None:
            prepare()
        records = load_coco_panoptic(**files, categories=categories, things_first=things_first)
        return [{**record, "dataset_name": name} for record in records]

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        **files,
        **panoptic_metadata(categories, things_first=things_first),
        json_file=instances_json and os.path.expanduser(instances_json),
        evaluator_type="coco_panoptic_seg",
        ignore_label=255,
        label_divisor=1000,
    )


def _check_name(name: str) -> None:
    """Refuse a name that cannot be a data set's, or is one already."""
    if not name or set(name) & set("/\\\0") or name in (".", ".."):
        raise ValueError(
            f"'{name}' cannot be the name of a data set: its results are written to a folder of "
            "that name. Use letters, digits, '_' and '-'."
        )
    if name in DatasetCatalog.list():
        raise ValueError(
            f"A data set '{name}' is registered already. Choose another name or remove it first "
            "(DatasetCatalog.remove, MetadataCatalog.remove)."
        )


class Files(NamedTuple):
    """The files of a data set."""

    panoptic_json: Path
    image_root: Path
    panoptic_root: Path
    image_file: Callable[[str], str] | None = None  # see register_panoptic


def find_files(name: str) -> Files:
    """
    The files of a registered data set.

    Raises:
        ValueError: there is none of that name, or it is not panoptic.
    """
    if name not in DatasetCatalog.list():
        panoptic = [n for n in DatasetCatalog.list() if MetadataCatalog.get(n).get("panoptic_json")]
        raise ValueError(f"There is no data set '{name}'. Known: {', '.join(sorted(panoptic))}")
    metadata = MetadataCatalog.get(name)
    paths = [metadata.get(key) for key in ("panoptic_json", "image_root", "panoptic_root")]
    if None in paths:
        raise ValueError(f"'{name}' is no panoptic data set")
    panoptic_json, image_root, panoptic_root = map(Path, paths)
    return Files(panoptic_json, image_root, panoptic_root, metadata.get("image_file"))


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

    Args: see :func:`register_panoptic`.

    Returns:
        For each image: file_name, image_id, height, width, pan_seg_file_name and segments_info (the
        JSON's segments with category_id made contiguous, and isthing); with ``sem_seg_root`` also
        sem_seg_file_name, if the annotation has it.

    Raises:
        FileNotFoundError: a file or a folder is missing.
        ValueError: as :func:`psf.data.annotations.read_panoptic_json`.
    """
    _require_json(panoptic_json)
    data = read_panoptic_json(panoptic_json, categories)
    contiguous_ids = _contiguous_ids(data.categories, things_first)
    classes = {c["id"]: (contiguous_ids[c["id"]], bool(c["isthing"])) for c in data.categories}
    records = []
    for image, annotation in _annotated_images(data, panoptic_json):
        png, labels = annotation["file_name"], annotation.get("sem_seg_file_name")
        name = image["file_name"] if image_file is None else image_file(image["file_name"])
        record = {
            "file_name": os.path.join(image_root, name),
            "image_id": image["id"],
            "height": image["height"],
            "width": image["width"],
            "pan_seg_file_name": None if png is None else os.path.join(panoptic_root, png),
            "segments_info": [_convert(s, classes) for s in annotation["segments_info"]],
        }
        if sem_seg_root is not None and labels is not None:
            record["sem_seg_file_name"] = os.path.join(sem_seg_root, labels)
        records.append(record)
    _require_files("image", panoptic_json, image_root, [r["file_name"] for r in records])
    pngs = [r["pan_seg_file_name"] for r in records if r["pan_seg_file_name"] is not None]
    _require_files("panoptic PNG", panoptic_json, panoptic_root, pngs)
    return records


def _require_json(path: str) -> None:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"The annotations '{path}' do not exist. {_ROOT_HINT}")


def _annotated_images(data: PanopticJson, path: str) -> Iterator[tuple[Any, Any]]:
    """Each annotation with its image."""
    annotations = data.annotations
    if annotations is None:
        annotations = [{"image_id": i, "file_name": None, "segments_info": []} for i in data.images]
    for annotation in annotations:
        yield data.images[annotation["image_id"]], annotation
    unannotated = len(data.images) - len(annotations)
    if unannotated:
        logger.info("Left out %d images of '%s' that have no annotation.", unannotated, path)


def _convert(segment: dict[str, Any], classes: dict[int, tuple[int, bool]]) -> dict[str, Any]:
    """Replace the category id by the contiguous id; ``classes`` has it and isthing of each."""
    contiguous_id, isthing = classes[segment["category_id"]]
    return {"iscrowd": 0, **segment, "category_id": contiguous_id, "isthing": isthing}


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
    require_none(find_category_problems(categories), "categories")
    in_order = sorted(categories, key=lambda c: things_first and not c["isthing"])  # stable
    return {category["id"]: i for i, category in enumerate(in_order)}


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
