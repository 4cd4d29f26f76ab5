#!/usr/bin/env python3
"""Evaluate saved predictions, list confused classes, and draw the worst images.

python tools/evaluate_predictions.py --name coco_2017_val_panoptic --predictions predictions.json \\
    --output scores/

Predictions have the format of COCO's server: a JSON file, and PNGs in a folder with the same name
(or --prediction-pngs). Instead of --name: --json, --pngs and, for pictures, --images.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import psf.threads  # isort: skip  # noqa: F401  before torch is loaded

import torch
from detectron2.data import Metadata
from tabulate import tabulate

from psf.config import user_path
from psf.data import panoptic_metadata
from psf.data.annotations import read_panoptic_json, read_predictions
from psf.data.coco_panoptic import find_files
from psf.evaluation.charts import write_quality_bars
from psf.evaluation.ground_truth import PanopticSegmentation
from psf.evaluation.offline import Scores, score_predictions
from psf.evaluation.panoptic import quality_table
from psf.evaluation.pictures import Drawing, write_drawings
from psf.files import one_line, write_text
from psf.images import read_image
from psf.output_paths import refuse_inputs
from psf.panoptic_png import read_panoptic_ids

# The files in the output folder.
WRITTEN = ("pq.txt", "confusion.txt", "images.txt", "pq.png", "worst.png")


@one_line()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    write_scores(args)
    print(f"\n{args.output}")


def write_scores(args: argparse.Namespace) -> None:
    """Print and write the tables, then draw the pictures."""
    folders = [args.pngs, args.prediction_pngs, *([args.images] if args.images else [])]
    inputs = [args.json, args.predictions, *(f / name for f in folders for name in WRITTEN)]
    refuse_inputs([args.output / name for name in WRITTEN], inputs)
    scores = score_predictions(
        args.json, args.pngs, args.predictions, args.prediction_pngs, boundary=args.boundary
    )
    table = quality_table(scores.rows)
    confused = confusion_table(scores, args.confusions)
    print(f"{table}\n\n{confused}")
    title = "Boundary panoptic quality" if args.boundary else "Panoptic quality"
    lines = [f"{s.pq:.2f} {s.image_id} {s.file_name}\n" for s in scores.images]
    texts = {"pq.txt": f"{table}\n", "confusion.txt": f"{confused}\n", "images.txt": "".join(lines)}
    for name, text in texts.items():
        write_text(args.output / name, text)
    write_quality_bars(scores.rows, args.output / "pq.png", title=title)
    if args.images is not None:
        draw_worst(args, scores)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", help="a registered data set")
    parser.add_argument("--json", type=user_path, help="ground truth")
    parser.add_argument("--pngs", type=user_path, help="folder of its PNGs")
    parser.add_argument("--images", type=user_path, help="folder of the images, for pictures")
    parser.add_argument(
        "--predictions", type=user_path, required=True, help="JSON of the predictions"
    )
    parser.add_argument("--prediction-pngs", type=user_path, help="folder of their PNGs")
    parser.add_argument(
        "--output", type=user_path, required=True, help="folder for tables and pictures"
    )
    parser.add_argument("--boundary", action="store_true", help="Boundary PQ instead of PQ")
    parser.add_argument("--worst", type=int, default=6, help="images to draw (%(default)s)")
    parser.add_argument(
        "--confusions", type=int, default=20, help="confusions to list (%(default)s)"
    )
    args = parser.parse_args(argv)
    args.image_file = None
    if args.name:
        args.json, args.images, args.pngs, args.image_file = find_files(args.name)
    elif None in (args.json, args.pngs):
        parser.error("give --json and --pngs, or --name")
    for option, path in (("--json", args.json), ("--predictions", args.predictions)):
        if not path.is_file():
            parser.error(f"{option}: there is no file '{path}'")
    if args.prediction_pngs is None:
        args.prediction_pngs = args.predictions.with_suffix("")
    return args


def confusion_table(scores: Scores, most: int) -> str:
    """The most frequent confusions, including missed and false segments."""
    pairs = [(t, p, n) for (t, p), n in scores.confusion.most_common() if t != p]
    headers = ["true class", "predicted class", "segments"]
    return tabulate(pairs[:most], headers=headers, tablefmt="pipe")


def draw_worst(args: argparse.Namespace, scores: Scores) -> None:
    """Draw image, ground truth and prediction of the images with the lowest PQ."""
    truth = read_panoptic_json(args.json)
    metadata = Metadata(name="scored", **panoptic_metadata(truth.categories))
    things = metadata.thing_dataset_id_to_contiguous_id
    known = {**things, **metadata.stuff_dataset_id_to_contiguous_id}

    def load(root: Path, annotation: dict) -> PanopticSegmentation:
        ids = read_panoptic_ids(str(root / annotation["file_name"])).astype("int32")
        infos = [
            {**s, "category_id": known[s["category_id"]], "isthing": s["category_id"] in things}
            for s in annotation["segments_info"]
        ]
        return PanopticSegmentation(torch.from_numpy(ids), infos)

    of_truth = {a["image_id"]: a for a in truth.annotations or []}
    of_prediction = read_predictions(args.predictions, truth.categories)
    worst = [s for s in scores.images if s.pq == s.pq][: args.worst]
    names = [
        s.file_name if args.image_file is None else args.image_file(s.file_name) for s in worst
    ]
    drawings = []
    for score, name in zip(worst, names, strict=True):
        truth_and_prediction = (
            load(args.pngs, of_truth[score.image_id]),
            load(args.prediction_pngs, of_prediction[score.image_id]),
        )
        image = read_image(str(args.images / name), "RGB")
        caption = f"{score.file_name}: PQ {score.pq:.1f}"
        drawings.append(Drawing(caption, image, truth_and_prediction))
    titles = ("image", "ground truth", "prediction")
    write_drawings(drawings, metadata, titles, args.output / "worst.png")


if __name__ == "__main__":
    main()
