#!/usr/bin/env python3
"""Feed damaged files to everything that reads files, for a number of seconds.

    python tools/fuzz_files.py --seconds 60

Images, panoptic PNGs, annotations of several kinds, configs and checkpoints are damaged at random.
The seed and the number of the round decide how; only the number of rounds depends on the machine. A
reader may return something, or raise its own error: a ValueError or an OSError of one line that
names the file. Anything else is a fault: it is printed, and the exit status is 1.
"""

import argparse
import copy
import faulthandler
import functools
import io
import json
import logging
import os
import pickle
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Before they are loaded. Few pixels, since decoding many takes seconds.
os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")
os.environ.setdefault("PSF_MAX_IMAGE_PIXELS", str(2**20))

import psf.threads  # isort: skip  # noqa: F401  before torch is loaded

import numpy as np
import safetensors.torch
import torch
import yaml
from PIL import Image
from torch import nn

from psf.config import load_config
from psf.data import load_coco_panoptic
from psf.data.check import check_dataset
from psf.data.prepare.convert import convert_instances, convert_labelme
from psf.evaluation.ground_truth import load_ground_truth, read_annotations
from psf.evaluation.offline import score_predictions
from psf.images import read_image, read_values
from psf.panoptic_png import read_panoptic_ids, write_panoptic_ids
from psf.weights import Checkpointer, read_file

SIZE = (24, 32)  # height and width of the images
# Of one file. Seconds of the processor, since others may share it.
MOST_SECONDS, MOST_MEMORY = 30, 500_000_000
# So that a fault ends this process, and not others for want of memory.
ADDRESS_SPACE = 8 << 30
# Values that a key of a JSON is given instead of its own.
WRONG_VALUES = (
    *(None, True, False, 0, 1, -1, 3, 255, 1 << 24, 1 << 31, 1 << 63, 10**30),
    *(0.5, -2.5, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", "0", "1", "cat", "../x.png", "/data/outside.png", "a\0b", "x" * 5000, "ä\ud800", "~"),
    "a\\b.png",
    *([], [[]], [None], [1, 2, 3, 4], ["a"], {}, {"id": 1}, [{"id": 1}], [[1, 2], [3]]),
)


# Damage of a text that damage of bytes does not hit upon.
LARGE_TEXTS = (b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000, b"1e" + b"9" * 400)


class Fault(Exception):
    """What a reader did and must not do."""


def prepare_process() -> None:
    """No output but this script's; what takes far too much memory or time ends the process."""
    warnings.simplefilter("ignore")
    logging.disable()
    sys.stderr = os.fdopen(os.dup(2), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where libraries in C print
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    faulthandler.enable(sys.stderr)
    faulthandler.register(signal.SIGPROF, sys.stderr, chain=True)


def main(argv: Sequence[str] | None = None) -> int:
    usage, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(description=usage)
    parser.add_argument("--seconds", type=float, default=60, help="of fuzzing (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the damage (%(default)s)")
    args = parser.parse_args(argv)
    prepare_process()
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
    start, before = time.process_time(), peak_memory()
    signal.setitimer(signal.ITIMER_PROF, 4 * MOST_SECONDS)  # for what does not end
    ended = call()
    signal.setitimer(signal.ITIMER_PROF, 0)
    seconds, taken = time.process_time() - start, peak_memory() - before
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
    data = DataSet(folder / "data")
    return {
        "image": lambda rng: fuzz_image(rng, folder, list(images.values())),
        "panoptic PNG": lambda rng: fuzz_png(rng, folder, pngs),
        "annotations": data.fuzz,
        "predictions": data.fuzz_predictions,
        "instances": data.fuzz_instances,
        "LabelMe": lambda rng: fuzz_labelme(rng, folder / "labelme"),
        "config": lambda rng: fuzz_config(rng, folder / "own.yaml"),
        "checkpoint": lambda rng: fuzz_checkpoint(rng, folder),
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


def repair_png(data: bytes) -> bytes:
    """With the right checksums of chunks, so that damage gets further."""
    at, repaired = 8, data[:8]
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            break
        repaired += data[at:end] + zlib.crc32(data[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return repaired + data[at:]


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
    content = damage(rng, rng.choice(contents))
    path.write_bytes(repair_png(content) if content[1:4] == b"PNG" else content)
    read = read_values if rng.random() < 0.2 else read_image
    return expect(lambda: read(str(path)), path)


def fuzz_png(rng: random.Random, folder: Path, contents: Sequence[bytes]) -> str:
    path = folder / "panoptic.png"
    content = damage(rng, rng.choice(contents))
    path.write_bytes(repair_png(content) if rng.random() < 0.7 else content)
    return expect(lambda: read_panoptic_ids(str(path)), path)


def damage_content(rng: random.Random, content: Any) -> Any:
    """A copy with damage in one to five places."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        content = damage_json(rng, content)
    return content


def write_damaged(rng: random.Random, path: Path, content: Any) -> None:
    """Write JSON, damaged as a text or in its values."""
    if rng.random() < 0.7:
        text = json.dumps(damage_content(rng, content)).encode()
    else:
        text = damage(rng, json.dumps(content).encode())
    if rng.random() < 0.05:
        start = rng.randrange(len(text) + 1)
        text = text[:start] + rng.choice(LARGE_TEXTS) + text[start:]
    path.write_bytes(text)


def fuzz_config(rng: random.Random, path: Path) -> str:
    """A config in YAML, of which JSON is a part."""
    content = {
        "_BASE_": str(path.with_name("base.yaml")),
        "MODEL": {"PSF": {"HIDDEN_DIM": 64, "IN_FEATURES": ["res3"]}, "WEIGHTS": "a.pth"},
        "DATASETS": {"TRAIN": ["own"], "REGISTER": [["own", "images", "pngs", "own.json"]]},
        "SOLVER": {"BASE_LR": 1e-4, "STEPS": [3, 4]},
    }
    path.with_name("base.yaml").write_text("SOLVER: {MAX_ITER: 9}\n", encoding="utf-8")
    if rng.random() < 0.3:
        path.write_bytes(damage(rng, yaml.safe_dump(content).encode()))
    else:
        write_damaged(rng, path, content)
    return expect(lambda: load_config(path), path)


def fuzz_labelme(rng: random.Random, folder: Path) -> str:
    """A folder with one file of LabelMe."""
    folder.mkdir(exist_ok=True)
    height, width = SIZE
    polygon = {"label": "cat", "points": [[1, 1], [9, 1.5], [5, 20]], "shape_type": "polygon"}
    shapes = [
        {**polygon, "group_id": None, "flags": {}},
        {"label": "sky", "points": [[0, 0], [31, 5]], "shape_type": "rectangle"},
        {"label": "dog", "points": [[9, 9], [12, 12]], "shape_type": "circle", "group_id": 3},
    ]
    sizes = {"imagePath": "1.jpg", "imageHeight": height, "imageWidth": width}
    path = folder / "labelme.json"
    write_damaged(rng, path, {"version": "5.5.0", "shapes": shapes, **sizes, "flags": {}})
    return expect(lambda: convert_labelme(folder, ["sky"], folder / "converted"), folder)


@functools.cache
def make_weights() -> dict[str, torch.Tensor]:
    return nn.Linear(4, 4).state_dict()


def fuzz_checkpoint(rng: random.Random, folder: Path) -> str:
    """Weights of a layer, as this project, Detectron2's model zoo and timm store them."""
    weights = make_weights()
    suffix = rng.choice((".pth", ".pkl", ".safetensors"))
    path = folder / f"weights{suffix}"
    if suffix == ".safetensors":
        path.write_bytes(damage(rng, safetensors.torch.save(weights)))
        return expect(lambda: read_file(str(path)), path)
    content: dict[str, Any] = {"model": weights, "iteration": 3}
    if suffix == ".pkl":
        arrays = {name: value.numpy() for name, value in weights.items()}
        content = {"model": arrays, "__author__": "fuzz", "matching_heuristics": True}
    whole = rng.random() < 0.3
    if whole:
        content = damage_content(rng, content)
    buffer = io.BytesIO()
    if suffix == ".pkl":
        pickle.dump(content, buffer, protocol=rng.choice((0, 2, 4, 5)))
    else:
        torch.save(content, buffer, _use_new_zipfile_serialization=rng.random() < 0.5)
    path.write_bytes(buffer.getvalue() if whole else damage(rng, buffer.getvalue()))
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
        self.labels = root / "labels"
        self.labels.mkdir(parents=True)
        self.json = root / "panoptic.json"
        ids = np.full(SIZE, 5)
        ids[2:9, 3:11] = 70000
        for i in (1, 2):
            Image.new("RGB", SIZE[::-1]).save(root / f"{i}.jpg")
            write_panoptic_ids(str(root / f"{i}.png"), ids)
            Image.new("L", SIZE[::-1], 2).save(self.labels / f"{i}.png")
        self.content = self.make_content()

    @staticmethod
    def make_content() -> dict[str, Any]:
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
        write_damaged(rng, self.json, self.content)
        return self.read()

    def fuzz_predictions(self, rng: random.Random) -> str:
        """Score predictions with a damaged JSON; those without damage are the truth."""
        truth, predictions = self.root / "truth.json", self.root / "predictions.json"
        truth.write_text(json.dumps(self.content), encoding="utf-8")
        write_damaged(rng, predictions, {"annotations": self.content["annotations"]})
        # What is missing may be a PNG, in the same folder.
        return expect(
            lambda: score_predictions(truth, self.root, predictions, self.root), self.root
        )

    def fuzz_instances(self, rng: random.Random) -> str:
        """Convert a damaged JSON of instances; the label maps are the PNGs of images."""
        height, width = SIZE
        masks = [
            [[1, 1, 9, 1.5, 5, 20], [20, 2, 30, 2, 25, 9]],
            {"size": [height, width], "counts": [99, 9, height * width - 108]},
            {"size": [height, width], "counts": "S36b000000ma0"},
        ]
        annotations = [
            {"id": i, "image_id": 1 + i % 2, "category_id": 1, "segmentation": mask, "iscrowd": 0}
            for i, mask in enumerate(masks)
        ]
        path = self.root / "instances.json"
        images, things = self.content["images"], [{"id": 1, "name": "cat"}]
        write_damaged(
            rng, path, {"images": images, "annotations": annotations, "categories": things}
        )
        stuff, output = [{"id": 2, "name": "grass"}], self.root / "converted"
        # What is missing may be a label map, in a folder below.
        return expect(lambda: convert_instances(path, self.labels, stuff, output), self.root)

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
    return copy.deepcopy(rng.choice(WRONG_VALUES))


if __name__ == "__main__":
    sys.exit(main())
