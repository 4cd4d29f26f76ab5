"""The public data sets, under the names of Detectron2 and Mask2Former.

Names that Detectron2 registers itself are registered again, with the same classes, numbers and
files; the records then have the size of each image and whether a segment is a thing, and missing or
contradictory files are reported by name. ``datasets/README.md`` says how to get the files.
"""

import os
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from . import categories
from .coco_panoptic import register_panoptic

_FILES = ("image_root", "panoptic_root", "panoptic_json", "instances_json", "sem_seg_root")


def _coco(split: str) -> dict[str, Any]:
    annotations = "coco/annotations"
    return {
        "image_root": f"coco/{split}",
        "panoptic_root": f"coco/panoptic_{split}",
        "panoptic_json": f"{annotations}/panoptic_{split}.json",
        "instances_json": f"{annotations}/instances_{split}.json",
        "categories": categories.COCO,
    }


def _ade20k(split: str, folder: str) -> dict[str, Any]:
    root = "ADEChallengeData2016"
    return {
        "image_root": f"{root}/images/{folder}",
        "panoptic_root": f"{root}/ade20k_panoptic_{split}",
        "panoptic_json": f"{root}/ade20k_panoptic_{split}.json",
        "instances_json": f"{root}/ade20k_instance_{split}.json",
        "sem_seg_root": f"{root}/annotations_detectron2",
        "categories": categories.ADE20K,
    }


def _cityscapes(split: str) -> dict[str, Any]:
    truth = "cityscapes/gtFine"
    return {
        "image_root": f"cityscapes/leftImg8bit/{split}",
        "panoptic_root": f"{truth}/cityscapes_panoptic_{split}",
        "panoptic_json": f"{truth}/cityscapes_panoptic_{split}.json",
        "instances_json": f"{truth}/cityscapes_instances_{split}.json",
        "sem_seg_root": truth,
        "categories": categories.CITYSCAPES,
        "image_file": _in_city,
    }


def _in_city(file_name: str) -> str:
    """Add the folder of the city, which the JSON files of Cityscapes leave out."""
    return file_name if "/" in file_name else f"{file_name.partition('_')[0]}/{file_name}"


# Arguments of register_panoptic; paths are relative to the folder of the data sets.
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
    """Register all of them, in place of Detectron2's data sets of the same names."""
    for name, arguments in DATA_SETS.items():
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        files = {key: os.path.join(root, arguments[key]) for key in _FILES if key in arguments}
        register_panoptic(name, **{**arguments, **files}, things_first=False)
