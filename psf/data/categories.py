"""The classes of the public data sets, as the categories of their panoptic JSON files."""

from typing import Any

from detectron2.data.datasets.builtin_meta import ADE20K_SEM_SEG_CATEGORIES, COCO_CATEGORIES
from detectron2.data.datasets.cityscapes_panoptic import CITYSCAPES_CATEGORIES

COCO: list[dict[str, Any]] = COCO_CATEGORIES  # 80 things and 53 stuff classes

# The class of scene parsing (1..150) of each category of the instance annotations (1..100), from
# categoryMapping.txt of the Places Challenge 2017.
ADE20K_INSTANCE_CLASSES = (
    *(8, 9, 11, 13, 15, 16, 19, 20, 21, 23, 24, 25, 28, 31, 32, 33, 34, 36, 37, 38, 39, 40, 42, 43),
    *(44, 45, 46, 48, 50, 51, 54, 56, 57, 58, 59, 63, 65, 66, 67, 68, 70, 71, 72, 73, 74, 75, 76),
    *(77, 79, 81, 82, 83, 84, 86, 87, 88, 89, 90, 91, 93, 94, 96, 98, 99, 103, 104, 105, 108, 109),
    *(111, 112, 113, 116, 117, 119, 120, 121, 122, 124, 125, 126, 127, 128, 130, 131, 133, 134),
    *(135, 136, 137, 138, 139, 140, 143, 144, 145, 147, 148, 149, 150),
)

# 100 things and 50 stuff classes. The ids begin at 0, as in Mask2Former's files.
ADE20K: list[dict[str, Any]] = [
    {"id": i, "name": name.strip(), "isthing": int(i + 1 in ADE20K_INSTANCE_CLASSES)}
    for i, name in enumerate(ADE20K_SEM_SEG_CATEGORIES)
]

# 8 things and 11 stuff classes; the ids are those of the label files.
CITYSCAPES: list[dict[str, Any]] = [
    {"id": c["id"], "name": c["name"], "isthing": c["isthing"], "color": list(c["color"])}
    for c in CITYSCAPES_CATEGORIES
]
CITYSCAPES_TRAIN_IDS: dict[int, int] = {c["id"]: c["trainId"] for c in CITYSCAPES_CATEGORIES}
