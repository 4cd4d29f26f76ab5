#!/usr/bin/env python3
"""Draw the output of the mapper: augmented images with their targets and boxes.

python tools/visualize_data.py --config-file configs/coco/panoptic_segformer_R50_24ep.yaml \\
    --output data.png --samples 4 --repeats 2
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psf.threads  # isort: skip  # noqa: F401  before torch is loaded

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from numpy.typing import NDArray

from psf.config import load_config, user_path
from psf.data import ClassMap, PanopticDatasetMapper
from psf.evaluation.pictures import SheetRow, cell_size, draw_panoptic, resize_picture, write_sheet
from psf.files import one_line
from psf.output_paths import refuse_files


@one_line()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--output", type=user_path, required=True, help="PNG to write")
    parser.add_argument("--samples", type=int, default=4, help="number of images (%(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=2, help="augmentations per image (%(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the augmentation (%(default)s)"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs")
    args = parser.parse_args(argv)
    if min(args.samples, args.repeats) < 1:
        parser.error("--samples and --repeats must be at least 1")
    write_targets(load_config(args.config_file, args.opts), args)
    print(args.output)


def write_targets(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Write the sheet of the command line."""
    results = map_images(cfg, args.samples, args.repeats, args.seed)
    records = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])
    read = [str(r[key]) for r in records for key in ("file_name", "pan_seg_file_name")]
    refuse_files(args.output, read)
    metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
    class_map = ClassMap.from_metadata(metadata)
    images = [to_rgb(result, cfg.INPUT.FORMAT) for result in results]
    cell = cell_size(images)
    rows = [
        draw_row(result, image, metadata, class_map, cell / max(image.shape[:2]))
        for result, image in zip(results, images, strict=True)
    ]
    write_sheet(rows, ("image", "targets"), cell, args.output)


def map_images(cfg: CfgNode, samples: int, repeats: int, seed: int) -> list[dict[str, Any]]:
    """Map images that are evenly spaced over the first data set, several times each."""
    mapper = PanopticDatasetMapper(cfg, is_train=True)
    records = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])
    chosen = records[:: max(1, len(records) // samples)][:samples]
    np.random.seed(seed)
    return [mapper(record) for record in chosen for _ in range(repeats)]


def to_rgb(result: dict[str, Any], image_format: str) -> NDArray[np.uint8]:
    image = np.ascontiguousarray(result["image"].numpy().transpose(1, 2, 0))
    return image if image_format == "RGB" else np.ascontiguousarray(image[:, :, ::-1])


def draw_row(
    result: dict[str, Any],
    image: NDArray[np.uint8],
    metadata: Metadata,
    class_map: ClassMap,
    scale: float,
) -> SheetRow:
    """Draw an image, and its targets with the boxes of things."""
    instances = result["instances"]
    masks = instances.gt_masks
    infos = []
    for value, model_class in zip(masks.values, instances.gt_classes.tolist(), strict=True):
        category_id, isthing = class_map.to_contiguous(model_class)
        infos.append({"id": value, "category_id": category_id, "isthing": isthing})
    drawn = draw_panoptic(image, masks.index_map.int(), infos, metadata, scale=scale)
    drawn = np.ascontiguousarray(drawn)
    for box, info in zip(instances.gt_boxes.tensor.tolist(), infos, strict=True):
        if info["isthing"]:
            x0, y0, x1, y1 = (round(scale * v) for v in box)
            cv2.rectangle(drawn, (x0, y0), (x1 - 1, y1 - 1), (255, 255, 255), 1)
    height, width = image.shape[:2]
    caption = (
        f"{Path(result['file_name']).name}: {width} x {height}, {len(infos)} targets, "
        f"{sum(i['isthing'] for i in infos)} of them things"
    )
    return SheetRow(caption, [resize_picture(image, scale), drawn])


if __name__ == "__main__":
    main()
