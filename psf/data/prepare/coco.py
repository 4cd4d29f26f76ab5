"""COCO panoptic: unpacks the official archives, which need no conversion, and counts files."""

import json
import logging
from pathlib import Path

from .archives import unpack

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
    """Unpack what is downloaded to ``root``, and check that every image has its PNG."""
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
        if not path.exists():
            raise FileNotFoundError(
                f"'{path}' does not exist. Put {', '.join(_ARCHIVES)} (datasets/README.md says "
                f"where they are from) into '{data}', or unpack them there."
            )
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
    logger.info("COCO %s: %d images and PNGs are in place.", split, count)
