"""ADE20K panoptic: unites the semantic and instance annotations of the Places Challenge 2017.

As in Mask2Former's preparation, things cover stuff. Unlike there, areas and boxes are of the
visible pixels, as panopticapi requires, and stuff that is covered completely is left out.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from psf.files import named
from psf.images import read_values

from .. import categories
from ..coco_writer import PanopticImage, Segment, Split, convert_split
from .archives import require_unpacked, unpack

ROOT = "ADEChallengeData2016"
# Split, its folder, and its images.
_SPLITS = (("train", "training", 20_210), ("val", "validation", 2_000))
# Folders, and the archives that have them.
_FOLDERS = {
    "images": f"{ROOT}.zip",
    "annotations": f"{ROOT}.zip",
    "annotations_instance": "annotations_instance.tar",
}
_VOID = 255


def prepare(root: Path, *, allow_partial: bool) -> None:
    """Unpack the archives in ``root`` and write labels, instances and panoptic files."""
    data = root / ROOT
    for name, target in ((f"{ROOT}.zip", root), ("annotations_instance.tar", data)):
        for archive in (root / name, data / name):
            unpack(archive, target)
    for split, folder, num_images in _SPLITS:
        for kind, archive_name in _FOLDERS.items():
            require_unpacked(data / kind / folder, archive_name, data)
        convert_split(
            Split(
                name=f"ADE20K {split}",
                panoptic_root=data / f"ade20k_panoptic_{split}",
                panoptic_json=data / f"ade20k_panoptic_{split}.json",
                instances_json=data / f"ade20k_instance_{split}.json",
                categories=categories.ADE20K,
                sem_seg_root=data / "annotations_detectron2",
            ),
            sorted((data / "images" / folder).glob("*.jpg")),
            partial(_convert, data, folder),
            num_images=num_images,
            inputs=partial(_inputs, data, folder),
            allow_partial=allow_partial,
        )


def _inputs(data: Path, folder: str, image: Path) -> list[Any]:
    kinds = ("annotations", "annotations_instance")
    return [image.name, *(data / kind / folder / f"{image.stem}.png" for kind in kinds)]


def _convert(data: Path, folder: str, image: Path) -> PanopticImage:
    labels = read_values(str(data / "annotations" / folder / f"{image.stem}.png"))
    if labels.ndim != 2:
        raise ValueError(f"'{image.stem}.png' of annotations is not a map of labels.")
    semantic = labels - np.uint8(1)  # 0, unlabelled, becomes 255
    target = data / "annotations_detectron2" / folder / f"{image.stem}.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    with named(target):
        Image.fromarray(semantic).save(target)

    things = read_values(str(data / "annotations_instance" / folder / f"{image.stem}.png"))
    if things.shape != (*semantic.shape, 3):
        raise ValueError(
            f"'{data / 'annotations_instance' / folder / image.stem}.png' has the shape "
            f"{things.shape} instead of {(*semantic.shape, 3)}, which its labels have."
        )
    index_map = np.zeros(semantic.shape, dtype=np.int32)
    segments: list[Segment] = []
    for category_id in np.unique(semantic).tolist():
        if category_id != _VOID and not categories.ADE20K[category_id]["isthing"]:
            segments.append(Segment(category_id))
            index_map[semantic == category_id] = len(segments)
    for instance in np.unique(things[..., 1]).tolist():
        if instance:
            mask = things[..., 1] == instance
            segments.append(Segment(_thing_category(things[..., 0][mask], image, instance)))
            index_map[mask] = len(segments)
    return PanopticImage(
        image_id=image.stem,
        file_name=image.name,
        png=f"{image.stem}.png",
        index_map=index_map,
        segments=segments,
        sem_seg_file_name=f"{folder}/{image.stem}.png",
    )


def _thing_category(values: NDArray[np.uint8], image: Path, instance: int) -> int:
    """The category of an instance; all its pixels must have one value in 1..100."""
    found = np.unique(values).tolist()
    if len(found) != 1 or not 1 <= found[0] <= len(categories.ADE20K_INSTANCE_CLASSES):
        raise ValueError(
            f"Instance {instance} of '{image.name}' has the categories {found}; it should have one "
            "in 1..100. Download annotations_instance.tar again."
        )
    return categories.ADE20K_INSTANCE_CLASSES[found[0] - 1] - 1
