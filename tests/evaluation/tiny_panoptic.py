"""A tiny data set in the COCO panoptic format, its things and stuff interleaved."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from numpy.typing import NDArray
from panopticapi.utils import id2rgb
from PIL import Image

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
        (root / "panoptic").mkdir(parents=True)
        records = [_write(root, i, file_name, layout) for i, layout in enumerate(layouts)]
        _write_json(root / "panoptic.json", records, instances=False)
        if instances:
            _write_json(root / "instances.json", records, instances=True)
        contiguous = {c["id"]: i for i, c in enumerate(CATEGORIES)}
        things = {c["id"]: contiguous[c["id"]] for c in CATEGORIES if c["isthing"]}
        names = [c["name"] for c in CATEGORIES]
        DatasetCatalog.register(name, lambda: records)
        MetadataCatalog.get(name).set(
            thing_classes=names,
            stuff_classes=names,
            thing_colors=[[60 * i, 80, 200] for i in range(4)],
            stuff_colors=[[60 * i, 80, 200] for i in range(4)],
            thing_dataset_id_to_contiguous_id=things,
            stuff_dataset_id_to_contiguous_id={
                k: v for k, v in contiguous.items() if k not in things
            },
            panoptic_root=str(root / "panoptic"),
            panoptic_json=str(root / "panoptic.json"),
            json_file=str(root / "instances.json") if instances else None,
            evaluator_type="coco_panoptic_seg",
            ignore_label=255,
        )
        self.names.append(name)
        return name


def _write(root: Path, number: int, file_name: str, layout: Layout) -> dict[str, Any]:
    ids = np.array(layout[0], dtype=np.int64)
    image, png = root / "images" / file_name.format(number), root / "panoptic" / f"{number}.png"
    for path in (image, png):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*ids.shape, 3), 128, dtype=np.uint8)).save(image)
    Image.fromarray(id2rgb(ids)).save(png)
    return {
        "file_name": str(image),
        "image_id": 100 + number,
        "height": ids.shape[0],
        "width": ids.shape[1],
        "pan_seg_file_name": str(png),
        "segments_info": [
            {
                "id": i,
                "category_id": category,
                "isthing": bool(CATEGORIES[category]["isthing"]),
                "iscrowd": crowd,
                "area": int((ids == i).sum()),
                "bbox": _box(ids == i),
            }
            for i, (category, crowd) in layout[1].items()
        ],
    }


def _box(mask: NDArray[np.bool_]) -> list[int]:
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    x, y = int(columns[0]), int(rows[0])
    return [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]


def _write_json(path: Path, records: list[dict[str, Any]], *, instances: bool) -> None:
    annotations: list[dict[str, Any]] = []
    for record in records:
        segments = [
            {**s, "category_id": CATEGORIES[s["category_id"]]["id"]}
            for s in record["segments_info"]
        ]
        if instances:
            annotations += [
                {
                    **{k: s[k] for k in ("category_id", "iscrowd", "area", "bbox")},
                    "id": 1000 * record["image_id"] + s["id"],
                    "image_id": record["image_id"],
                    "segmentation": [_polygon(s["bbox"])],
                }
                for s in segments
                if s["isthing"]
            ]
        else:
            annotations.append(
                {
                    "image_id": record["image_id"],
                    "file_name": Path(record["pan_seg_file_name"]).name,
                    "segments_info": segments,
                }
            )
    images = [
        {
            "id": r["image_id"],
            "file_name": r["file_name"],
            "height": r["height"],
            "width": r["width"],
        }
        for r in records
    ]
    categories = [c for c in CATEGORIES if c["isthing"] or not instances]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))


def _polygon(box: list[int]) -> list[int]:
    x, y, w, h = box
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def panoptic_output(layout: Layout) -> dict[str, Any]:
    """A model's panoptic output with the segments of a layout."""
    infos = [
        {"id": i, "category_id": c, "isthing": bool(CATEGORIES[c]["isthing"]), "score": 0.5}
        for i, (c, _) in layout[1].items()
    ]
    return {"panoptic_seg": (torch.tensor(layout[0], dtype=torch.int32), infos)}
