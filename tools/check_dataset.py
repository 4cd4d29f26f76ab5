#!/usr/bin/env python3
"""Check a data set in the COCO panoptic format, and draw some of it.

python tools/check_dataset.py --json data.json --images images/ --pngs panoptic/ --sheet sheet.png

Prints every defect with its file and id. The exit status is 1 if there are any.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import psf.threads  # isort: skip  before torch is loaded

from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog

import psf.data
from psf.data import load_coco_panoptic, panoptic_metadata
from psf.data.check import check_dataset
from psf.evaluation.ground_truth import load_ground_truth
from psf.evaluation.pictures import SheetRow, cell_size, draw_panoptic, resize_picture, write_sheet
from psf.images import read_image


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", help="a registered data set, instead of the three paths")
    parser.add_argument("--json", type=Path, help="the annotations")
    parser.add_argument("--images", type=Path, help="folder of the images")
    parser.add_argument("--pngs", type=Path, help="folder of the panoptic PNGs")
    parser.add_argument(
        "--processes", type=int, default=1, help="processes that read images (%(default)s)"
    )
    parser.add_argument("--sheet", type=Path, help="PNG to write, with images and annotations")
    parser.add_argument("--samples", type=int, default=6, help="images in the PNG (%(default)s)")
    args = parser.parse_args(argv)
    image_file = None
    if args.name:
        if args.name not in DatasetCatalog.list():
            parser.error(f"--name: there is no data set '{args.name}'. Known: {known_names()}")
        metadata = MetadataCatalog.get(args.name)
        args.json, args.images, args.pngs = (
            Path(metadata.get(key)) for key in ("panoptic_json", "image_root", "panoptic_root")
        )
        image_file = metadata.get("image_file")
        if not args.json.is_file():
            try:  # generates data sets such as shapes
                DatasetCatalog.get(args.name)
            except (OSError, ValueError) as error:
                raise SystemExit(str(error)) from error
    elif None in (args.json, args.images, args.pngs):
        parser.error("give --json, --images and --pngs, or --name")
    defects = check_dataset(
        args.json, args.images, args.pngs, image_file=image_file, num_processes=args.processes
    )
    for defect in defects:
        print(defect)
    print(f"{len(defects)} defects" if defects else "no defects")
    if args.sheet is not None and args.json.is_file():
        draw(args, image_file)
    return 1 if defects else 0


def known_names() -> str:
    return ", ".join(sorted([*psf.data.builtin.DATA_SETS, "shapes_panoptic_train"]))


def draw(args: argparse.Namespace, image_file: Callable[[str], str] | None) -> None:
    """Draw images that are evenly spaced over the data set, with their annotations."""
    try:
        records = load_coco_panoptic(
            str(args.json), str(args.images), str(args.pngs), image_file=image_file
        )
    except (OSError, ValueError) as error:
        print(f"No sheet: {error}")
        return
    categories = json.loads(args.json.read_text(encoding="utf-8"))["categories"]
    metadata = Metadata(name="checked", **panoptic_metadata(categories))
    chosen = records[:: max(1, len(records) // args.samples)][: args.samples]
    pictures = [read_image(record["file_name"], "RGB") for record in chosen]
    cell = cell_size(pictures)
    rows = []
    for record, picture in zip(chosen, pictures, strict=True):
        scale = cell / max(picture.shape[:2])
        drawn = draw_panoptic(picture, *load_ground_truth(record), metadata, scale=scale)
        caption = f"{Path(record['file_name']).name}: {len(record['segments_info'])} segments"
        rows.append(SheetRow(caption, [resize_picture(picture, scale), drawn]))
    write_sheet(rows, ("image", "annotation"), cell, args.sheet)
    print(args.sheet)


if __name__ == "__main__":
    sys.exit(main())
