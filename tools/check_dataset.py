#!/usr/bin/env python3
"""Check a data set in the COCO panoptic format, and draw some of it.

python tools/check_dataset.py --json data.json --images images/ --pngs panoptic/ --sheet sheet.png

Prints the first defects of each kind with their files and ids, and counts the rest. The exit status
is 1 if there are any.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psf.threads  # isort: skip  # noqa: F401  before torch is loaded

from detectron2.data import DatasetCatalog, Metadata

from psf.config import user_path
from psf.data import load_coco_panoptic, panoptic_metadata
from psf.data.annotations import read_categories
from psf.data.check import Defect, check_dataset
from psf.data.coco_panoptic import Files, find_files
from psf.evaluation.ground_truth import load_ground_truth
from psf.evaluation.pictures import Drawing, write_drawings
from psf.files import one_line, printable
from psf.images import read_image
from psf.output_paths import refuse_files

EXAMPLES = 5  # defects of one kind that are printed
VALUES = re.compile(r"'[^']*'|\[[^]]*\]|-?\d[\d.e+]*")  # what differs within a kind


@one_line()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", help="a registered data set, instead of the three paths")
    parser.add_argument("--json", type=user_path, help="the annotations")
    parser.add_argument("--images", type=user_path, help="folder of the images")
    parser.add_argument("--pngs", type=user_path, help="folder of the panoptic PNGs")
    parser.add_argument(
        "--processes", type=positive, default=1, help="processes that read images (%(default)s)"
    )
    parser.add_argument("--all", action="store_true", help="print all defects of a kind")
    parser.add_argument("--sheet", type=user_path, help="PNG to write, with images and annotations")
    parser.add_argument(
        "--samples", type=positive, default=6, help="images in the PNG (%(default)s)"
    )
    args = parser.parse_args(argv)
    if args.name:
        files = find_files(args.name)
        if not files.panoptic_json.is_file():
            DatasetCatalog.get(args.name)  # generates data sets such as shapes
    elif None in (args.json, args.images, args.pngs):
        parser.error("give --json, --images and --pngs, or --name")
    else:
        files = Files(args.json, args.images, args.pngs)
    defects = check_dataset(*files[:3], image_file=files.image_file, num_processes=args.processes)
    kinds: dict[str, list[Defect]] = {}
    for defect in defects:
        kinds.setdefault(VALUES.sub("#", defect.problem), []).append(defect)
    for alike in kinds.values():
        shown = alike if args.all else alike[:EXAMPLES]
        for defect in shown:
            print(printable(str(defect)))
        if len(alike) > len(shown):
            print(f"... and {len(alike) - len(shown)} more of this kind (--all lists them)")
    print(f"{len(defects)} defects" if defects else "no defects")
    if args.sheet is not None:
        draw(args, files)
    return 1 if defects else 0


def positive(text: str) -> int:
    """A number of at least 1."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of at least 1")
    return int(text)


def draw(args: argparse.Namespace, files: Files) -> None:
    """Draw images that are evenly spaced over the data set, with their annotations."""
    try:
        records = load_coco_panoptic(*map(str, files[:3]), image_file=files.image_file)
        read = [str(r[key]) for r in records for key in ("file_name", "pan_seg_file_name")]
        refuse_files(args.sheet, [files.panoptic_json, *read])
        categories = read_categories(files.panoptic_json)
        metadata = Metadata(name="checked", **panoptic_metadata(categories))
        chosen = records[:: max(1, len(records) // args.samples)][: args.samples]
        readable = [read for record in chosen if (read := read_annotated(record)) is not None]
        write_drawings(readable, metadata, ("image", "annotation"), args.sheet)
    except (OSError, ValueError) as error:
        print(printable(f"No sheet: {error}"))
        return
    print(args.sheet)


def read_annotated(record: dict[str, Any]) -> Drawing | None:
    """Read an image and its PNG; None, after a line, if one of them is damaged."""
    name = Path(record["file_name"]).name
    try:
        picture, truth = read_image(record["file_name"], "RGB"), load_ground_truth(record)
    except (OSError, ValueError) as error:
        print(printable(f"Not on the sheet: {error}"))
        return None
    return Drawing(f"{name}: {len(record['segments_info'])} segments", picture, [truth])


if __name__ == "__main__":
    sys.exit(main())
