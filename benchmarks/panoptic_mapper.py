"""CPU time of loading an image: the plain Detectron2 mapper and this project's.

OMP_NUM_THREADS=1 python benchmarks/panoptic_mapper.py --json panoptic.json --images ... --pngs ...

All mappers see the same random numbers. Each image is also used re-encoded at 640 x 480. The
transfer of a 1024 x 1024 image with 25 segments from a worker process is in wall time.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from cpu_time import ROOT, environment, measure, write_result
from detectron2.config import CfgNode, get_cfg
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.structures import BitMasks, Instances
from PIL import Image

from psf import add_psf_config
from psf.data import (
    ClassMap,
    PanopticDatasetMapper,
    build_augmentations,
    load_coco_panoptic,
)
from psf.panoptic_png import read_panoptic_ids, write_panoptic_ids

sys.path.insert(0, str(ROOT / "tests" / "data"))
from plain_mapper import PlainMapper  # kept in the tests as the reference

Mapper = Callable[[dict[str, Any]], dict[str, Any]]
RECIPES: dict[str, list[Any]] = {
    "large-scale jitter 1024": ["INPUT.AUGMENTATION", "large_scale_jitter"],
    "large-scale jitter 640": [
        *("INPUT.AUGMENTATION", "large_scale_jitter"),
        *("INPUT.IMAGE_SIZE", 640),
    ],
    "shorter side 480 to 800": ["INPUT.MIN_SIZE_TRAIN", tuple(range(480, 801, 32))],
    "DETR: shorter side 480 to 800, crop": [
        *("INPUT.MIN_SIZE_TRAIN", tuple(range(480, 801, 32))),
        *("INPUT.CROP.ENABLED", True),
        *("INPUT.CROP.TYPE", "absolute_range"),
        *("INPUT.CROP.SIZE", [384, 600]),
    ],
}


def config(recipe: list[Any]) -> CfgNode:
    cfg = get_cfg()
    add_psf_config(cfg)
    cfg.merge_from_list(["INPUT.FORMAT", "RGB", *recipe])
    return cfg


def run(mapper: Mapper, records: list[dict[str, Any]], repeats: int) -> None:
    np.random.seed(0)
    for _ in range(repeats):
        for record in records:
            mapper(record)


def reencode(records: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The images at 640 x 480."""
    result = []
    for i, record in enumerate(records):
        path, png = folder / f"{i}.jpg", folder / f"{i}.png"
        Image.open(record["file_name"]).resize((640, 480)).save(path, quality=95)
        ids = cv2.resize(
            read_panoptic_ids(record["pan_seg_file_name"]).astype(np.int32),
            (640, 480),
            interpolation=cv2.INTER_NEAREST,
        )
        write_panoptic_ids(str(png), ids)
        present = set(np.unique(ids).tolist())
        infos = [s for s in record["segments_info"] if s["id"] in present]
        result.append(
            {
                **record,
                "file_name": str(path),
                "pan_seg_file_name": str(png),
                "height": 480,
                "width": 640,
                "segments_info": infos,
            }
        )
    return result


def loading(records: list[dict[str, Any]], rounds: int, repeats: int) -> dict[str, Any]:
    things = [i for i, c in enumerate(COCO_CATEGORIES) if c["isthing"]]
    stuff = [i for i, c in enumerate(COCO_CATEGORIES) if not c["isthing"]]
    class_map = ClassMap(tuple(things), tuple(stuff))
    results = {}
    for name, recipe in RECIPES.items():
        augmentations = build_augmentations(config(recipe), is_train=True)
        mappers: dict[str, Mapper] = {
            "plain Detectron2": PlainMapper(augmentations),
            "psf": PanopticDatasetMapper(
                augmentations=augmentations, image_format="RGB", class_map=class_map
            ),
            "psf, INPUT.RESIZE_LIBRARY opencv": PanopticDatasetMapper(
                augmentations=build_augmentations(
                    config([*recipe, "INPUT.RESIZE_LIBRARY", "opencv"]), is_train=True
                ),
                image_format="RGB",
                class_map=class_map,
            ),
        }
        ways = {k: (lambda m=m: run(m, records, repeats)) for k, m in mappers.items()}
        seconds = measure(ways, rounds=rounds)
        per_image = {k: 1000 * v["median"] / repeats / len(records) for k, v in seconds.items()}
        reference = per_image["plain Detectron2"]
        results[name] = {
            "cpu_ms_per_image": per_image,
            "times_less": {k: reference / v for k, v in per_image.items()},
        }
    return results


class _Mapped(torch.utils.data.Dataset):
    """One image, mapped repeatedly, with the time at which it was mapped."""

    def __init__(self, mapper: Mapper, record: dict[str, Any], what: str, length: int) -> None:
        self.mapper, self.record, self.what, self.length = mapper, record, what, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.mapper(self.record)
        result: dict[str, Any] = {"image": item["image"]}
        if self.what == "image and map":
            result["instances"] = item["instances"]
        elif self.what == "image and dense masks":
            instances = item["instances"]
            result["instances"] = Instances(
                instances.image_size,
                gt_classes=instances.gt_classes,
                gt_boxes=instances.gt_boxes,
                gt_masks=BitMasks(instances.gt_masks.tensor),
            )
        result["made"] = time.perf_counter()
        return result


def transfer(folder: Path) -> dict[str, dict[str, float]]:
    """Wall ms per image from a worker to the main process."""
    index_map = np.repeat(np.repeat(np.arange(1, 26).reshape(5, 5), 205, 0), 205, 1)[:1024, :1024]
    write_panoptic_ids(str(folder / "t.png"), index_map)
    noise = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "t.jpg")
    mapper = PanopticDatasetMapper(
        augmentations=[], image_format="RGB", class_map=ClassMap((0,), ())
    )
    segment = {"category_id": 0, "isthing": True, "iscrowd": 0}
    record = {
        "file_name": str(folder / "t.jpg"),
        "pan_seg_file_name": str(folder / "t.png"),
        "segments_info": [{"id": i, **segment} for i in range(1, 26)],
    }
    ways = ("image alone", "image and map", "image and dense masks")
    times: dict[str, list[float]] = {what: [] for what in ways}
    for _ in range(4):
        for what in ways:
            loader = torch.utils.data.DataLoader(
                _Mapped(mapper, record, what, 60),
                batch_size=None,
                num_workers=1,
                prefetch_factor=1,
            )
            for i, received in enumerate(loader):
                if i >= 5:
                    times[what].append(1000 * (time.perf_counter() - received["made"]))
            del received
    return {
        what: {
            "median": statistics.median(t),
            "least tenth": statistics.quantiles(t, n=10)[0],
            "greatest tenth": statistics.quantiles(t, n=10)[-1],
        }
        for what, t in times.items()
    }


def main() -> None:
    sample = ROOT.parent / "shared" / "data" / "coco_sample"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=sample / "panoptic.json")
    parser.add_argument("--images", type=Path, default=sample / "images")
    parser.add_argument("--pngs", type=Path, default=sample / "panoptic")
    parser.add_argument("--rounds", type=int, default=5, help="after one to warm up (%(default)s)")
    parser.add_argument("--repeats", type=int, default=10, help="of all images per round")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    records = load_coco_panoptic(
        str(args.json), str(args.images), str(args.pngs), categories=COCO_CATEGORIES
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        records += reencode(records, folder)
        write_result(
            "panoptic_mapper",
            {
                "environment": environment("torch", "numpy", "opencv-python-headless", "pillow"),
                "images": len(records),
                "segments": [len(r["segments_info"]) for r in records],
                "loading": loading(records, args.rounds, args.repeats),
                "transfer_wall_ms_of_1024x1024_with_25_segments": transfer(folder),
            },
        )


if __name__ == "__main__":
    main()
