"""COCO panoptic: unpacks the official archives and counts the files."""

import logging
from pathlib import Path

from .. import categories
from ..coco_panoptic import load_coco_panoptic
from .archives import require_unpacked, unpack

logger = logging.getLogger(__name__)

# Split and its images (cocodataset.org/#download).
_SPLITS = (("train2017", 118_287), ("val2017", 5_000))
_ARCHIVES = (
    "train2017.zip",
    "val2017.zip",
    "annotations_trainval2017.zip",
    "panoptic_annotations_trainval2017.zip",
)


def prepare(root: Path, *, allow_partial: bool) -> None:
    """Unpack the archives in ``root``, and check that every image has a PNG."""
    data = root / "coco"
    for name in _ARCHIVES:
        for archive in (root / name, data / name):
            unpack(archive, data)
    for split, num_images in _SPLITS:
        nested = data / "annotations" / f"panoptic_{split}.zip"  # an archive in the archive
        unpack(nested, data, members=f"panoptic_{split}/")
        _check(data, split, num_images, allow_partial)


def _check(data: Path, split: str, num_images: int, allow_partial: bool) -> None:
    panoptic_json = data / "annotations" / f"panoptic_{split}.json"
    paths = (panoptic_json, data / split, data / f"panoptic_{split}")
    for path in paths:
        require_unpacked(path, " and ".join(_ARCHIVES), data)
    count = len(load_coco_panoptic(*map(str, paths), categories=categories.COCO))
    if count != num_images and not allow_partial:
        raise ValueError(
            f"'{panoptic_json}' has {count} annotated images instead of {num_images}. Download it "
            "again, or pass --allow-partial to go on with it."
        )
    logger.info("COCO %s: %d images and PNGs exist.", split, count)
