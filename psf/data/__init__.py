"""Data sets in the COCO panoptic format. Importing this registers the public ones and shapes.

Like Detectron2, it reads the environment variable DETECTRON2_DATASETS when it is imported.
"""

from psf.images import read_image

from .augmentation import build_augmentations
from .builtin import register_builtin
from .class_map import ClassMap, ClassNames
from .coco_panoptic import (
    datasets_root as _datasets_root,
)
from .coco_panoptic import (
    load_coco_panoptic,
    panoptic_metadata,
    register_listed,
    register_panoptic,
)
from .index_masks import IndexMasks
from .mapper import PanopticDatasetMapper
from .shapes import generate_shapes, register_shapes, register_tuning_shapes
from .shapes.dataset import default_root as _shapes_root

__all__ = [
    "ClassMap",
    "ClassNames",
    "IndexMasks",
    "PanopticDatasetMapper",
    "build_augmentations",
    "generate_shapes",
    "load_coco_panoptic",
    "panoptic_metadata",
    "read_image",
    "register_builtin",
    "register_listed",
    "register_panoptic",
    "register_shapes",
    "register_tuning_shapes",
]

register_shapes(_shapes_root())
register_tuning_shapes(f"{_shapes_root()}_tune")
register_builtin(_datasets_root())
