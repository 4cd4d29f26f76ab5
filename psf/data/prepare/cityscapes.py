"""Cityscapes panoptic, from the instance ids of the fine annotations, as in cityscapesScripts.

A value of at least 1000 is an instance of class value // 1000. A smaller value is a class: the
segment of stuff, or a crowd of things. Classes that are not evaluated are void.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from psf.files import named
from psf.images import read_values

from .. import categories
from ..coco_writer import PanopticImage, Segment, Split, convert_split
from .archives import require_unpacked, unpack

# Split and its images. The test split has no annotations.
_SPLITS = (("train", 2_975), ("val", 500))
_ARCHIVES = ("gtFine_trainvaltest.zip", "leftImg8bit_trainvaltest.zip")
_ENDING = "_gtFine_instanceIds.png"
_VOID = 255


def prepare(root: Path, *, allow_partial: bool) -> None:
    """Unpack the archives in ``root`` and write labels, instances and panoptic files."""
    data = root / "cityscapes"
    for name in _ARCHIVES:
        for archive in (root / name, data / name):
            unpack(archive, data, members=name.partition("_")[0])
    for split, num_images in _SPLITS:
        for folder, archive_name in zip(("gtFine", "leftImg8bit"), _ARCHIVES, strict=True):
            require_unpacked(data / folder / split, archive_name, data)
        truth = data / "gtFine"
        convert_split(
            Split(
                name=f"Cityscapes {split}",
                panoptic_root=truth / f"cityscapes_panoptic_{split}",
                panoptic_json=truth / f"cityscapes_panoptic_{split}.json",
                instances_json=truth / f"cityscapes_instances_{split}.json",
                categories=categories.CITYSCAPES,
                sem_seg_root=truth,
            ),
            sorted((truth / split).glob(f"*/*{_ENDING}")),
            _convert,
            num_images=num_images,
            inputs=lambda source: [source],
            allow_partial=allow_partial,
        )


def _convert(source: Path) -> PanopticImage:
    values = read_values(str(source)).astype(np.int32)
    name = source.name.removesuffix(_ENDING)  # city, sequence, frame
    labels = source.with_name(f"{name}_gtFine_labelTrainIds.png")
    with named(labels):
        Image.fromarray(_train_ids(values)).save(labels)
    things = {c["id"]: bool(c["isthing"]) for c in categories.CITYSCAPES}
    index_map = np.zeros(values.shape, dtype=np.int32)
    segments: list[Segment] = []
    for value in np.unique(values).tolist():
        category_id = value if value < 1000 else value // 1000
        if category_id in things:
            is_group = value < 1000 and things[category_id]
            segments.append(Segment(category_id, iscrowd=int(is_group), id=value))
            index_map[values == value] = len(segments)
    split, city = source.parent.parent.name, source.parent.name
    return PanopticImage(
        image_id=name,
        file_name=f"{name}_leftImg8bit.png",
        png=f"{name}_gtFine_panoptic.png",
        index_map=index_map,
        segments=segments,
        sem_seg_file_name=f"{split}/{city}/{labels.name}",
    )


def _train_ids(values: NDArray[np.int32]) -> NDArray[np.uint8]:
    """The evaluated classes 0..18 of every pixel, 255 elsewhere (createTrainIdLabelImgs)."""
    classes = np.where(values < 1000, values, values // 1000)
    table = np.full(256, _VOID, dtype=np.uint8)
    for label_id, train_id in categories.CITYSCAPES_TRAIN_IDS.items():
        table[label_id] = train_id
    return table[np.clip(classes, 0, 255)]
