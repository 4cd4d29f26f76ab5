#!/usr/bin/env python3
"""Feed damaged files to everything that reads files, for a number of seconds.

    python tools/fuzz_files.py --seconds 60

Images, panoptic PNGs, annotations and checkpoints are damaged at random; the same seed damages them
the same way. A reader may return something, or raise its own error: a ValueError or an OSError of
one line that names the file. Anything else is a fault: it is printed, and the exit status is 1.
"""

import argparse
import functools
import io
import json
import logging
import os
import pickle
import random
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# Before they are loaded. Few pixels, since decoding many takes seconds.
os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")
os.environ.setdefault("PSF_MAX_IMAGE_PIXELS", str(2**20))

import psf.threads  # isort: skip  # noqa: F401  before torch is loaded

import numpy as np
import torch
from PIL import Image
from torch import nn

from psf.data import load_coco_panoptic
from psf.data.check import check_dataset
from psf.evaluation.ground_truth import load_ground_truth, read_annotations
from psf.images import read_image, read_values
from psf.panoptic_png import read_panoptic_ids, write_panoptic_ids
from psf.weights import Checkpointer

SIZE = (24, 32)  # height and width of the images
MOST_SECONDS, MOST_MEMORY = 30, 500_000_000  # of one file
# So that a fault ends this process, and not others for want of memory.
ADDRESS_SPACE = 8 << 30
# Values that a key of a JSON is given instead of its own.
WRONG_VALUES = (
    *(None, True, False, 0, 1, -1, 3, 255, 1 << 24, 1 << 31, 1 << 63, 10**30),
    *(0.5, -2.5, 1e308, float("nan"), float("inf"), -float("inf")),
    *(
        "",
        "0",
        "1",
        "cat",
        "../x.png",
        "/etc/hosts",
        "a\0b",
        "x" * 5000,
        "ä\ud800",
        "~",
        "a\\b.png",
    ),
    *([], [[]], [None], [1, 2, 3, 4], ["a"], {}, {"id": 1}, [{"id": 1}], [[1, 2], [3]]),
)


class Fault(Exception):
    """What a reader did and must not do."""


def main(argv: Sequence[str] | None = None) -> int:
    usage, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(description=usage)
    parser.add_argument("--seconds", type=float, default=60, help="of fuzzing (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the damage (%(default)s)")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    counts: Counter[str] = Counter()
    faults = 0
    with tempfile.TemporaryDirectory() as folder:
        targets = make_targets(Path(folder))
        stop, round_number = time.monotonic() + args.seconds, 0
        while time.monotonic() < stop and faults < 20:
            for name, target in targets.items():
                rng = random.Random(f"{args.seed} {name} {round_number}")
                try:
                    counts[f"{name}: {watch(lambda: target(rng))}"] += 1  # noqa: B023
                except Fault as fault:
                    faults += 1
                    print(f"seed {args.seed}, {name}, round {round_number}: {fault}\n")
            round_number += 1
    for name, count in sorted(counts.items()):
        print(f"{count:8d} {name}")
    print(f"{counts.total() + faults} damaged files, {faults} faults")
    return 1 if faults else 0


def watch(call: Callable[[], str]) -> str:
    """Call something that must end soon and with little memory."""
    start, before = time.monotonic(), peak_memory()
    ended = call()
    seconds, taken = time.monotonic() - start, peak_memory() - before
    if seconds > MOST_SECONDS or taken > MOST_MEMORY:
        raise Fault(f"{ended} after {seconds:.0f} s, with {taken / 1e6:.0f} MB more at its peak")
    return ended


def peak_memory() -> int:
    """The most bytes that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_targets(folder: Path) -> dict[str, Callable[[random.Random], str]]:
    """What is fuzzed, by name; each damages something, reads it, and says how that ended."""
    images = make_images()
    pngs = [content for name, content in images.items() if name.startswith("PNG")]
    return {
        "image": lambda rng: fuzz_image(rng, folder, list(images.values())),
        "panoptic PNG": lambda rng: fuzz_png(rng, folder, pngs),
        "annotations": DataSet(folder / "data").fuzz,
        "checkpoint": lambda rng: fuzz_checkpoint(rng, folder, make_checkpoints()),
        "last_checkpoint": lambda rng: fuzz_last_checkpoint(rng, folder),
    }


def expect(read: Callable[[], Any], path: Path) -> str:
    """Read a file: "read", or "refused" with an error as it must be."""
    try:
        read()
    except (OSError, ValueError) as error:
        if len(str(error).splitlines()) != 1 or path.name not in str(error):
            raise Fault(
                f"an error of {path.name} does not name it in one line: {error!r}"
            ) from error
        if isinstance(error.__cause__, MemoryError):
            raise Fault(f"asks for more than {ADDRESS_SPACE} bytes: {error}") from error
        return "refused"
    except BaseException as error:  # what is looked for: any other error of any kind
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise Fault("".join(traceback.format_exception(error)[-3:])) from error
    return "read"


def damage(rng: random.Random, content: bytes) -> bytes:
    """Change bytes, remove, repeat or insert some, or cut the end off."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        start = (
            rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(len(data), 64))
        )
        stop = min(len(data), start + rng.choice((1, 1, 2, 4, 8, 32)))
        kind = rng.randrange(6)
        if kind == 0:
            data[start] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[start:stop] = rng.choice((b"\0", b"\xff", b"\x7f")) * (stop - start)
        elif kind == 2:
            data[start:stop] = rng.randbytes(stop - start)
        elif kind == 3:
            del data[start:stop]
        elif kind == 4:
            data[start:start] = data[start:stop]
        else:
            del data[max(start, 1) :]
        if not data:
            return b""
    return bytes(data)


def make_images() -> dict[str, bytes]:
    """Small images of all formats and modes."""
    noise = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    rgb = Image.fromarray(noise)
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp = b'<x:xmpmeta><a tiff:Orientation="8"/></x:xmpmeta>'
    deep = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    saved: list[tuple[Image.Image, str, dict[str, Any]]] = [
        *((rgb.convert(mode), "PNG", {}) for mode in ("RGB", "RGBA", "L", "LA", "P", "1")),
        (deep, "PNG", {}),
        (rgb, "PNG", {"exif": exif}),
        *((rgb.convert(mode), "JPEG", {}) for mode in ("RGB", "L", "CMYK")),
        (rgb, "JPEG", {"exif": exif}),
        (rgb, "JPEG", {"xmp": xmp}),
        (rgb, "JPEG", {"progressive": True}),
        *((rgb.convert(mode), "TIFF", {}) for mode in ("RGB", "L", "CMYK", "LAB", "F", "1")),
        (deep, "TIFF", {"exif": exif}),
        *(
            (rgb, "TIFF", {"compression": c})
            for c in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits")
        ),
        (rgb, "WEBP", {}),
        (rgb.convert("RGBA"), "WEBP", {"lossless": True, "exif": exif}),
        (rgb, "GIF", {}),
        (rgb, "GIF", {"save_all": True, "append_images": [rgb.rotate(90), rgb.convert("L")]}),
        *((rgb.convert(mode), "BMP", {}) for mode in ("RGB", "L", "P", "1")),
        *((rgb.convert(mode), "PPM", {}) for mode in ("RGB", "L", "1")),
    ]
    contents = {}
    for i, (image, form, options) in enumerate(saved):
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        contents[f"{form} {i}"] = buffer.getvalue()
    return contents


def fuzz_image(rng: random.Random, folder: Path, contents: Sequence[bytes]) -> str:
    path = folder / rng.choice(("photo.jpg", "photo.png", "photo.tif"))
    path.write_bytes(damage(rng, rng.choice(contents)))
    read = read_values if rng.random() < 0.2 else read_image
    return expect(lambda: read(str(path)), path)


def fuzz_png(rng: random.Random, folder: Path, contents: Sequence[bytes]) -> str:
    path = folder / "panoptic.png"
    path.write_bytes(damage(rng, rng.choice(contents)))
    return expect(lambda: read_panoptic_ids(str(path)), path)


@functools.cache
def make_checkpoints() -> dict[str, bytes]:
    """Weights of a layer, as this project and as Detectron2's model zoo store them."""
    weights = nn.Linear(4, 4).state_dict()
    buffer = io.BytesIO()
    torch.save({"model": weights, "iteration": 3}, buffer)
    arrays = {name: value.numpy() for name, value in weights.items()}
    content = {"model": arrays, "__author__": "fuzz", "matching_heuristics": True}
    return {".pth": buffer.getvalue(), ".pkl": pickle.dumps(content, protocol=2)}


def fuzz_checkpoint(rng: random.Random, folder: Path, contents: Mapping[str, bytes]) -> str:
    suffix = rng.choice(list(contents))
    path = folder / f"weights{suffix}"
    path.write_bytes(damage(rng, contents[suffix]))
    return expect(lambda: Checkpointer(nn.Linear(4, 4)).load(str(path)), path)


def fuzz_last_checkpoint(rng: random.Random, folder: Path) -> str:
    """Names of the file to continue from; only that of a .pth file in the folder is taken."""
    run = folder / "run"
    run.mkdir(exist_ok=True)
    for path in (folder / "outside.pth", run / "model.pth", run / "model.pkl"):
        path.touch()
    outside = ("../outside.pth", str(folder / "outside.pth"), ".", "..", "~")
    texts = [value for value in WRONG_VALUES if isinstance(value, str)]
    name = rng.choice(["model.pth", "model.pkl", *outside, *texts]).encode("utf-8", "surrogatepass")
    tag = run / "last_checkpoint"
    tag.write_bytes(name if rng.random() < 0.5 or not name else damage(rng, name))
    found: list[str] = []
    checkpointer = Checkpointer(nn.Linear(1, 1), str(run))
    ended = expect(lambda: found.append(checkpointer.get_checkpoint_file()), tag)
    if found and Path(found[0]).resolve() != (run / "model.pth").resolve():
        raise Fault(f"last_checkpoint leads to '{found[0]}'")
    return ended


class DataSet:
    """Two images with their annotation, of which the JSON or a PNG is damaged."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir()
        self.json = root / "panoptic.json"
        ids = np.full(SIZE, 5)
        ids[2:9, 3:11] = 70000
        for i in (1, 2):
            Image.new("RGB", SIZE[::-1]).save(root / f"{i}.jpg")
            write_panoptic_ids(str(root / f"{i}.png"), ids)
        self.text = json.dumps(self.content())

    @staticmethod
    def content() -> dict[str, Any]:
        height, width = SIZE
        area = height * width
        segments = [
            {"id": 5, "category_id": 2, "area": area - 56, "bbox": [0, 0, 32, 24], "iscrowd": 0},
            {"id": 70000, "category_id": 1, "area": 56, "bbox": [3, 2, 8, 7], "iscrowd": 0},
        ]
        return {
            "info": {"description": "fuzz"},
            "images": [
                {"id": i, "file_name": f"{i}.jpg", "height": height, "width": width} for i in (1, 2)
            ],
            "annotations": [
                {"image_id": i, "file_name": f"{i}.png", "segments_info": segments} for i in (1, 2)
            ],
            "categories": [
                {"id": 1, "name": "cat", "isthing": 1, "color": [1, 2, 3]},
                {"id": 2, "name": "grass", "isthing": 0},
            ],
        }

    def fuzz(self, rng: random.Random) -> str:
        """Check a damaged data set, which raises nothing, then load it, then read its PNGs."""
        if rng.random() < 0.3:
            self.json.write_bytes(damage(rng, self.text.encode()))
        else:
            content = json.loads(self.text)
            for _ in range(rng.choice((1, 1, 2, 5))):
                content = damage_json(rng, content)
            self.json.write_text(json.dumps(content), encoding="utf-8")
        return self.read()

    def read(self) -> str:
        defects = expect_no_error(lambda: check_dataset(self.json, self.root, self.root))
        if any("\n" in str(defect) for defect in defects):
            raise Fault(f"a defect has more than one line: {defects}")
        records: list[dict[str, Any]] = []
        root = str(self.root)
        paths = (str(self.json), root, root)
        ended = expect(lambda: records.extend(load_coco_panoptic(*paths)), self.json)
        expect(lambda: read_annotations(str(self.json)), self.json)
        for record in records:
            if record["pan_seg_file_name"] is not None:
                read_truth(record)
        if ended == "refused" and not defects:
            raise Fault("what check_dataset finds fine is refused by the loader")
        return f"{ended}, {'some' if defects else 'no'} defects"


def read_truth(record: dict[str, Any]) -> None:
    """Read the PNG of a record."""
    expect(lambda: load_ground_truth(record), Path(record["pan_seg_file_name"]))


def expect_no_error(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:  # what is looked for
        raise Fault("".join(traceback.format_exception(error)[-3:])) from error


def damage_json(rng: random.Random, value: Any) -> Any:
    """Replace, remove, repeat or nest one value somewhere below."""
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        kind = rng.randrange(8)
        if kind == 0:
            del value[key]
        elif kind == 1 and isinstance(value, list):
            value.append(value[key])
        else:
            value[key] = damage_json(rng, value[key])
        return value
    kind = rng.randrange(4)
    if kind == 0:
        return [value]
    if kind == 1:
        return {"value": value}
    return rng.choice(WRONG_VALUES)


if __name__ == "__main__":
    sys.exit(main())
