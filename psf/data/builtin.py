"""The public data sets, under the names that users of Detectron2 and Mask2Former know.

Detectron2 registers some of these names itself. They are registered anew: same classes, numbers
and files, but each image has its size, segments say whether they are things, and missing or
contradictory files are named. ``datasets/README.md`` says how to get the files.
"""

import os
from typing import Any, NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog

from . import categories
from .coco_panoptic import register_panoptic


class _Files(NamedTuple):
    """Paths of a data set, relative to the folder of data sets."""

    images: str
    panoptic: str  # and with .json at its end, unless given
    instances: str
    classes: list[dict[str, Any]]
    panoptic_json: str | None = None
    sem_seg: str | None = None


def _coco(split: str) -> _Files:
    return _Files(
        images=f"coco/{split}",
        panoptic=f"coco/panoptic_{split}",
        instances=f"coco/annotations/instances_{split}.json",
        classes=categories.COCO,
        panoptic_json=f"coco/annotations/panoptic_{split}.json",
    )


def _ade20k(split: str, folder: str) -> _Files:
    root = "ADEChallengeData2016"
    return _Files(
        images=f"{root}/images/{folder}",
        panoptic=f"{root}/ade20k_panoptic_{split}",
        instances=f"{root}/ade20k_instance_{split}.json",
        classes=categories.ADE20K,
        sem_seg=f"{root}/annotations_detectron2",
    )


def _cityscapes(split: str) -> _Files:
    return _Files(
        images=f"cityscapes/leftImg8bit/{split}",
        panoptic=f"cityscapes/gtFine/cityscapes_panoptic_{split}",
        instances=f"cityscapes/gtFine/cityscapes_instances_{split}.json",
        classes=categories.CITYSCAPES,
        sem_seg="cityscapes/gtFine",
    )


DATA_SETS = {
    "coco_2017_train_panoptic": _coco("train2017"),
    "coco_2017_val_panoptic": _coco("val2017"),
    "coco_2017_val_panoptic_with_sem_seg": _coco("val2017"),
    "ade20k_panoptic_train": _ade20k("train", "training"),
    "ade20k_panoptic_val": _ade20k("val", "validation"),
    "cityscapes_fine_panoptic_train": _cityscapes("train"),
    "cityscapes_fine_panoptic_val": _cityscapes("val"),
}


def register_builtin(root: str) -> None:
    """Register all of them, in place of Detectron2's where it has one of that name."""
    for name, files in DATA_SETS.items():
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        register_panoptic(
            name,
            image_root=os.path.join(root, files.images),
            panoptic_root=os.path.join(root, files.panoptic),
            panoptic_json=os.path.join(root, files.panoptic_json or f"{files.panoptic}.json"),
            instances_json=os.path.join(root, files.instances),
            sem_seg_root=None if files.sem_seg is None else os.path.join(root, files.sem_seg),
            categories=files.classes,
            things_first=False,
            image_file=_in_city if name.startswith("cityscapes") else None,
        )


def _in_city(file_name: str) -> str:
    """Cityscapes' images are in a folder for each city, which the JSON files leave out."""
    return file_name if "/" in file_name else f"{file_name.partition('_')[0]}/{file_name}"
