"""A tiny data set in the COCO panoptic format, its things and stuff interleaved."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from psf.data import load_coco_panoptic, panoptic_metadata
from psf.data.coco_writer import (
    PanopticImage,
    Segment,
    Split,
    write_image,
    write_json_files,
)

# Contiguous ids are 0, 1, 2, 3 in this order; neither ids nor kinds are sorted.
CATEGORIES = [
    {"id": 10, "name": "grass", "isthing": 0},
    {"id": 3, "name": "cat", "isthing": 1},
    {"id": 7, "name": "sky", "isthing": 0},
    {"id": 20, "name": "ant", "isthing": 1},
]
GRASS, CAT, SKY, ANT = range(4)

# The segment at each pixel, and (contiguous class, iscrowd) of each segment.
Layout = tuple[list[list[int]], dict[int, tuple[int, int]]]


class Maker:
    """Writes data sets under a folder and registers them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: list[str] = []

    def __call__(
        self, layouts: list[Layout], *, file_name: str = "{}.jpg", instances: bool = False
    ) -> str:
        """Register the images; ``{}`` in ``file_name`` stands for the number of each."""
        name = f"tiny_{self.folder.name}_{len(self.names)}"
        root = self.folder / name
        (root / "images").mkdir(parents=True)
        panoptic_root, panoptic_json = root / "panoptic", root / "panoptic.json"
        split = Split(name, panoptic_root, panoptic_json, root / "instances.json", CATEGORIES)
        panoptic_root.mkdir()
        entries = [
            write_image(split, _image(root / "images" / file_name.format(i), i, layout))
            for i, layout in enumerate(layouts)
        ]
        write_json_files(split, entries)
        paths = (str(panoptic_json), str(root / "images"), str(panoptic_root))
        records = load_coco_panoptic(*paths, things_first=False)
        DatasetCatalog.register(name, lambda: records)
        MetadataCatalog.get(name).set(
            **panoptic_metadata(CATEGORIES, things_first=False),
            panoptic_root=str(panoptic_root),
            panoptic_json=str(panoptic_json),
            json_file=str(split.instances_json) if instances else None,
            evaluator_type="coco_panoptic_seg",
            ignore_label=255,
        )
        self.names.append(name)
        return name


def _image(path: Path, number: int, layout: Layout) -> PanopticImage:
    """A gray image with the segments of a layout."""
    ids = np.array(layout[0], dtype=np.int64)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*ids.shape, 3), 128, dtype=np.uint8)).save(path)
    index_map = np.zeros_like(ids)
    for index, segment_id in enumerate(layout[1], start=1):
        index_map[ids == segment_id] = index
    segments = [Segment(CATEGORIES[c]["id"], crowd, i) for i, (c, crowd) in layout[1].items()]
    return PanopticImage(100 + number, str(path), f"{number}.png", index_map, segments)


def panoptic_output(layout: Layout) -> dict[str, Any]:
    """A model's panoptic output with the segments of a layout."""
    infos = [
        {"id": i, "category_id": c, "isthing": bool(CATEGORIES[c]["isthing"]), "score": 0.5}
        for i, (c, _) in layout[1].items()
    ]
    return {"panoptic_seg": (torch.tensor(layout[0], dtype=torch.int32), infos)}
