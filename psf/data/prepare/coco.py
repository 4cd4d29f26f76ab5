"""COCO panoptic: unpacks the official archives and counts the files."""

import json
import logging
from pathlib import Path

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
    for path in (data / split, data / f"panoptic_{split}", panoptic_json):
        require_unpacked(path, " and ".join(_ARCHIVES), data)
    with open(panoptic_json, encoding="utf-8") as file:
        content = json.load(file)
    images = {path.name for path in (data / split).iterdir()}
    pngs = {path.name for path in (data / f"panoptic_{split}").iterdir()}
    lacking = [i["file_name"] for i in content["images"] if i["file_name"] not in images]
    lacking += [a["file_name"] for a in content["annotations"] if a["file_name"] not in pngs]
    if lacking:
        raise ValueError(
            f"{len(lacking)} files that '{panoptic_json}' names do not exist, the first is "
            f"'{lacking[0]}'. Complete the download and run this again."
        )
    count = len(content["annotations"])
    if count != num_images and not allow_partial:
        raise ValueError(
            f"'{panoptic_json}' has {count} annotated images instead of {num_images}. Download it "
            "again, or pass --allow-partial to go on with it."
        )
    logger.info("COCO %s: %d images and PNGs exist.", split, count)
