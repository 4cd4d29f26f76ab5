"""Random panoptic ground truth and predictions that look to an evaluator as those of COCO do.

640 x 480 pixels (one in four upright), the 133 categories of COCO, about 13 segments an image
with ids like random colours, unlabelled gaps and patches, crowds in one image in ten (in 2 % two of
one category). Predictions are the ground truth warped, with segments dropped, relabelled and added.

Shapes: H x W pixels of an image.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import find_objects


class Workload(NamedTuple):
    """A data set on disk, and predictions in memory as a model gives them."""

    panoptic_json: Path
    panoptic_root: Path
    inputs: list[dict[str, Any]]  # file_name and image_id of each image
    outputs: list[dict[str, Any]]  # panoptic_seg of each image, category ids contiguous


class _Segments(NamedTuple):
    index_map: NDArray[np.int32]  # (H, W), 1 + the segment at each pixel; 0 is void
    categories: list[int]  # of each segment, contiguous
    iscrowd: list[int]


def make_workload(folder: Path, num_images: int = 100, seed: int = 0) -> Workload:
    """Write the ground truth under ``folder`` and make the predictions."""
    rng = np.random.default_rng(seed)
    root = folder / "panoptic"
    root.mkdir(parents=True, exist_ok=True)
    images, annotations, inputs, outputs = [], [], [], []
    for image_id in range(1, num_images + 1):
        height, width = (640, 480) if rng.random() < 0.25 else (480, 640)
        truth = _draw_truth(rng, height, width)
        name = f"{image_id:012d}"
        segment_ids = rng.choice(np.arange(1, 1 << 24), len(truth.categories), replace=False)
        _write_png(root / f"{name}.png", np.append(0, segment_ids)[truth.index_map])
        image = {"id": image_id, "file_name": f"{name}.jpg", "height": height, "width": width}
        images.append(image)
        annotations.append(
            {
                "image_id": image_id,
                "file_name": f"{name}.png",
                "segments_info": _segments_info(truth, segment_ids.tolist()),
            }
        )
        inputs.append({"file_name": image["file_name"], "image_id": image_id})
        outputs.append({"panoptic_seg": _predict(rng, truth)})
    panoptic_json = folder / "panoptic.json"
    content = {"images": images, "annotations": annotations, "categories": COCO_CATEGORIES}
    panoptic_json.write_text(json.dumps(content))
    return Workload(panoptic_json, root, inputs, outputs)


def _draw_truth(rng: np.random.Generator, height: int, width: int) -> _Segments:
    """Stuff from smooth noise, things as blobs upon it, void between and in patches."""
    things = [i for i, c in enumerate(COCO_CATEGORIES) if c["isthing"]]
    stuff = [i for i, c in enumerate(COCO_CATEGORIES) if not c["isthing"]]
    num_stuff = int(rng.integers(2, 6))
    fields = np.stack([_noise(rng, height, width, 4) for _ in range(num_stuff)])
    owners = fields.argmax(0).astype(np.int32) + 1
    categories = rng.choice(stuff, num_stuff, replace=False).tolist()
    iscrowd = [0] * num_stuff
    for _ in range(int(rng.integers(4, 15))):
        owners[_blob(rng, height, width)] = len(categories) + 1
        categories.append(int(rng.choice(things)))
        iscrowd.append(0)
    if rng.random() < 0.1:
        crowd_category = int(rng.choice(things))
        for _ in range(2 if rng.random() < 0.2 else 1):
            owners[_blob(rng, height, width)] = len(categories) + 1
            categories.append(crowd_category)
            iscrowd.append(1)
    if rng.random() < 0.7:
        edges = cv2.morphologyEx(
            owners.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)
        )
        owners[edges > 0] = 0
    for _ in range(int(rng.integers(0, 3))):
        owners[_blob(rng, height, width)] = 0
    return _compact(_Segments(owners, categories, iscrowd), min_area=100)


def _predict(
    rng: np.random.Generator, truth: _Segments
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    height, width = truth.index_map.shape
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x += 6 * _noise(rng, height, width, 12)
    y += 6 * _noise(rng, height, width, 12)
    ids = truth.index_map.astype(np.int16)
    ids = cv2.remap(ids, x, y, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE).astype(np.int32)
    categories = list(truth.categories)
    for i in range(len(categories)):
        draw = rng.random()
        if draw < 0.12:
            ids[ids == i + 1] = 0
        elif draw < 0.25:
            categories[i] = int(rng.integers(len(COCO_CATEGORIES)))
    for _ in range(int(rng.integers(0, 4))):
        ids[_blob(rng, height, width)] = len(categories) + 1
        categories.append(int(rng.integers(len(COCO_CATEGORIES))))
    found = _compact(_Segments(ids, categories, [0] * len(categories)), min_area=1)
    infos = [
        {"id": i, "category_id": c, "isthing": bool(COCO_CATEGORIES[c]["isthing"]), "score": 0.9}
        for i, c in enumerate(found.categories, start=1)
    ]
    return torch.from_numpy(found.index_map), infos


def _compact(segments: _Segments, min_area: int) -> _Segments:
    """Drop the segments of less than ``min_area`` pixels and renumber the others."""
    count = len(segments.categories)
    areas = np.bincount(segments.index_map.ravel(), minlength=count + 1)[1:]
    kept = [i for i in range(count) if areas[i] >= min_area]
    lookup = np.zeros(count + 1, dtype=np.int32)
    lookup[[i + 1 for i in kept]] = np.arange(1, len(kept) + 1)
    return _Segments(
        lookup[segments.index_map],
        [segments.categories[i] for i in kept],
        [segments.iscrowd[i] for i in kept],
    )


def _segments_info(segments: _Segments, segment_ids: list[int]) -> list[dict[str, Any]]:
    infos = []
    areas = np.bincount(segments.index_map.ravel(), minlength=len(segment_ids) + 1).tolist()
    for i, (y, x) in enumerate(find_objects(segments.index_map)):
        infos.append(
            {
                "id": segment_ids[i],
                "category_id": COCO_CATEGORIES[segments.categories[i]]["id"],
                "iscrowd": segments.iscrowd[i],
                "area": areas[i + 1],
                "bbox": [x.start, y.start, x.stop - x.start, y.stop - y.start],
            }
        )
    return infos


def _noise(rng: np.random.Generator, height: int, width: int, cells: int) -> NDArray[np.float32]:
    """(H, W), smooth noise of about ``cells`` hills along a side, with a little fine grain."""
    coarse = rng.standard_normal((cells, cells), dtype=np.float32)
    fine = rng.standard_normal((8 * cells, 8 * cells), dtype=np.float32)
    size = (width, height)
    smooth = cv2.resize(coarse, size, interpolation=cv2.INTER_CUBIC)
    return smooth + 0.03 * cv2.resize(fine, size, interpolation=cv2.INTER_CUBIC)


def _blob(rng: np.random.Generator, height: int, width: int) -> NDArray[np.bool_]:
    """(H, W), an ellipse with an uneven outline."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    radius_y, radius_x = rng.uniform(12, 110, 2)
    distance = np.hypot(
        (y - rng.uniform(0, height)) / radius_y, (x - rng.uniform(0, width)) / radius_x
    )
    return distance + 0.25 * _noise(rng, height, width, 8) < 1


def _write_png(path: Path, ids: NDArray[np.integer]) -> None:
    rgb = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=-1).astype(np.uint8)
    Image.fromarray(rgb).save(path)
