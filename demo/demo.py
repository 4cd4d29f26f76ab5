#!/usr/bin/env python3
r"""Draw the panoptic segmentation of images.

    python demo/demo.py --config-file configs/... --input photo.jpg --output result.png \
        --opts MODEL.WEIGHTS output/model_final.pth
    python demo/demo.py --config-file configs/... --input "photos/*.jpg" more/ --output results/ \
        --opts MODEL.WEIGHTS output/model_final.pth MODEL.PSF.TEST.SCORE_THRESHOLD 0.5

Without --output the pictures are shown in a window, one after the other.
"""

import argparse
import glob
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psf.threads  # isort: skip  # noqa: F401  before torch is loaded

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import Metadata
from detectron2.utils.logger import setup_logger
from numpy.typing import NDArray
from PIL import Image

from psf.config import load_config, user_path
from psf.evaluation.pictures import draw_panoptic
from psf.files import one_line, printable, write_beside
from psf.images import read_image
from psf.output_paths import refuse_inputs
from psf.predictor import Predictor
from psf.weights import check_weights

# Formats of images in folders, and of pictures.
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# The longest side of a picture, of some formats and of all (Matplotlib before 3.9, which writes the
# names). Pictures of larger images are reduced.
MOST_SIDE = {".jpeg": 65_500, ".jpg": 65_500, ".webp": 16_383}
MOST_OF_ALL = 65_535
# What one image may raise without ending the others.
FAILURES = (OSError, ValueError, MemoryError, torch.OutOfMemoryError)
# Pictures have at least this longest side, so that the names of the classes fit.
MIN_SIDE = 512

WINDOW = "psf demo: any key for the next image, Esc or q to quit"

Predict = Callable[[NDArray[np.uint8]], dict[str, Any]]


class Job(NamedTuple):
    """An image to predict, and the file of its picture (None: a window)."""

    source: Path
    target: Path | None


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line (default: ``sys.argv``)."""
    usage, _, description = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=usage,
        epilog=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", type=user_path, required=True, metavar="YAML")
    parser.add_argument(
        "--input", required=True, nargs="+", metavar="PATH", help="image files, folders or globs"
    )
    parser.add_argument(
        "--output", type=user_path, metavar="PATH", help="a file for one image, or a folder"
    )
    parser.add_argument(
        "--fast",
        action="store_true",
        help="bfloat16, two mask-decoder layers, compiled (the first image takes minutes)",
    )
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs; must come last"
    )
    return parser.parse_args(argv)


@one_line()
def setup(config_file: str | Path, opts: list[str]) -> CfgNode:
    """Load the config of the command line, check it and freeze it."""
    cfg = load_config(config_file, opts)
    check_weights(cfg.MODEL.WEIGHTS)
    if not cfg.MODEL.WEIGHTS:
        raise SystemExit("There are no weights: add --opts MODEL.WEIGHTS <file>")
    if not cfg.DATASETS.TEST:
        raise SystemExit("DATASETS.TEST is empty; it must name a data set with the model's classes")
    cfg.MODEL.PSF.TEST.PANOPTIC_ON = True
    cfg.freeze()
    return cfg


def find_images(patterns: Sequence[str]) -> list[Path]:
    """
    Find the images of the command line, in order and without duplicates.

    Args:
        patterns: files, folders (searched for images, not recursively) or globs (``**`` is
            recursive).
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = user_path(pattern)
        if path.is_file():
            matches = [path]
        elif path.is_dir():
            matches = _images(path.iterdir())
        else:
            matches = _images(map(Path, glob.glob(str(path), recursive=True)))
        if not matches:
            raise SystemExit(
                f"--input: there is no image at '{pattern}' (formats: {' '.join(SUFFIXES)})"
            )
        found |= dict.fromkeys(matches)
    return list(found)


def _images(paths: Iterable[Path]) -> list[Path]:
    return sorted(p for p in paths if p.suffix.lower() in SUFFIXES and p.is_file())


def plan(sources: Sequence[Path], output: Path | None) -> list[Job]:
    """
    Choose the file of each picture; stops if it would overwrite an image or another picture.

    Args:
        sources: the images.
        output: a file, for one image and a name with an image's suffix; otherwise a folder, where
            pictures are named after their images; None: a window.
    """
    if output is None:
        return [Job(source, None) for source in sources]
    if output.suffix.lower() in SUFFIXES and not output.is_dir():
        if len(sources) > 1:
            raise SystemExit(
                f"--output: '{output}' is one file, but there are {len(sources)} images"
            )
        targets = [output]
    else:
        targets = [output / _picture_name(source) for source in sources]
    by_target: dict[Path, Path] = {}
    for source, target in zip(sources, targets, strict=True):
        other = by_target.setdefault(target, source)
        if other != source:
            raise SystemExit(f"--output: '{other}' and '{source}' would both be '{target}'")
    try:
        refuse_inputs(targets, sources)
    except ValueError as error:
        raise SystemExit(f"--output: {error}") from error
    return [Job(source, target) for source, target in zip(sources, targets, strict=True)]


def _picture_name(source: Path) -> str:
    return source.name if source.suffix.lower() in SUFFIXES else f"{source.name}.png"


def check_window() -> None:
    """Stop if no window can be opened."""
    gui = re.search(r"^\s*GUI:\s*(\S+)", cv2.getBuildInformation(), re.MULTILINE)
    if gui is not None and gui.group(1) == "NONE":
        raise SystemExit("This OpenCV is headless and cannot open windows: use --output <folder>")
    on_desktop = sys.platform in ("win32", "darwin")
    if not on_desktop and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise SystemExit("There is no display: use --output <folder>")


def show(picture_rgb: NDArray[np.uint8]) -> bool:
    """Show a picture until a key is pressed; False for Esc or q."""
    cv2.namedWindow(WINDOW, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO)
    cv2.imshow(WINDOW, picture_rgb[:, :, ::-1])
    return cv2.waitKey(0) & 0xFF not in (27, ord("q"))


def run(jobs: Sequence[Job], predictor: Predict, metadata: Metadata) -> list[Path]:
    """
    Predict, draw, and write or show every image; print one line per image.

    Args:
        jobs: the images.
        predictor: takes (H, W, 3) BGR, returns a dict with ``panoptic_seg`` (:class:`Predictor`).
        metadata: of the data set that the model was trained on.

    Returns:
        The images that could not be read, predicted or written.
    """
    failed = []
    for i, (source, target) in enumerate(jobs, 1):
        count = f"[{i}/{len(jobs)}]"
        try:
            suffix = "" if target is None else target.suffix.lower()
            most = MOST_SIDE.get(suffix, MOST_OF_ALL)
            line, picture = draw(source, predictor, metadata, most)
            if target is not None:
                save(picture, target)
        except FAILURES as error:
            failed.append(source)
            message = describe(error)
            named = message if str(source) in message else f"{source}: {message}"
            print(printable(f"{count} {named}"), file=sys.stderr)
            continue
        print(printable(f"{count} {line}" + ("" if target is None else f" -> {target}")))
        if target is None and not show(picture):
            break
    return failed


def draw(
    source: Path, predictor: Predict, metadata: Metadata, most: int
) -> tuple[str, NDArray[np.uint8]]:
    """A line about an image, and its picture (h, w, 3) in RGB with sides of at most ``most``."""
    image = read_image(str(source), "BGR")
    start = time.perf_counter()
    panoptic_seg, segments_info = predictor(image)["panoptic_seg"]
    seconds = time.perf_counter() - start
    longest = max(image.shape[:2])
    scale = min(max(1.0, MIN_SIDE / longest), most / longest)
    picture = draw_panoptic(image[:, :, ::-1], panoptic_seg, segments_info, metadata, scale=scale)
    reduced = f", picture reduced to {most} pixels" if longest > most else ""
    return f"{source}: {len(segments_info)} segments, {seconds:.2f} s{reduced}", picture


def save(picture: NDArray[np.uint8], target: Path) -> None:
    """Write a picture; raises OSError, which names the file."""
    with write_beside(target) as partial:
        Image.fromarray(picture).save(partial, quality=95)  # of JPEG and WebP


def describe(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return "not enough memory for this image: make it smaller, or lower INPUT.MAX_SIZE_TEST"
    return " ".join(str(error).split())


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo; the exit status is 1 if an image failed."""
    args = parse_args(argv)
    jobs = plan(find_images(args.input), args.output)
    if args.output is None:
        check_window()
    setup_logger(name="psf")
    cfg = setup(args.config_file, args.opts)
    with one_line():
        predictor = Predictor(cfg, fast=args.fast)
    failed = run(jobs, predictor, predictor.metadata)
    if failed:
        names = ", ".join(str(path) for path in failed)
        raise SystemExit(printable(f"{len(failed)} of {len(jobs)} images failed: {names}"))


if __name__ == "__main__":
    main()
