"""Seconds and peak memory of a training iteration.

python benchmarks/train.py                   # R50, one image of 800 x 1333
python benchmarks/train.py --plain PATH      # also of another checkout of the project
PYTHONPATH=PEERS python benchmarks/train.py  # also transformers' Mask2Former, if it is there

Each way runs in its own process, and the ways take turns within each round. A first step with a
small image creates the optimizer's state, compiled code and the libraries' buffers; memory is the
peak beyond that. On a CPU, "of tensors" sums the allocations of one more step, under the profiler,
and "of the process" is resident memory, which includes the C library's gaps and scratch space of
kernels. On a GPU both are PyTorch's count. Weights are random; every image has the same segments.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psf  # isort: skip  # noqa: F401  before torch is loaded (psf.threads)

import torch
from cpu_time import RESULTS, environment, write_result

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/coco/panoptic_segformer_R50_24ep.yaml"
SMALL = (128, 192)
EVERYTHING = "['backbone', 'encoder', 'location_decoder', 'mask_decoder']"
TRANSFORMER = "['encoder', 'location_decoder', 'mask_decoder']"
ENCODER = "['encoder']"

# Options of each way on top of the config.
WAYS: dict[str, list[str]] = {
    "default": [],
    "checkpoint encoder": ["MODEL.PSF.CHECKPOINT", ENCODER],
    "checkpoint transformer": ["MODEL.PSF.CHECKPOINT", TRANSFORMER],
    "checkpoint everything": ["MODEL.PSF.CHECKPOINT", EVERYTHING],
    "bf16": ["SOLVER.AMP.ENABLED", "True"],
    "bf16, checkpoint everything": [
        *("SOLVER.AMP.ENABLED", "True"),
        *("MODEL.PSF.CHECKPOINT", EVERYTHING),
    ],
    "decoupled decoder": ["MODEL.PSF.MASK_DECODER.NAME", "decoupled"],
    "decoupled decoder, mask matching at points": [
        *("MODEL.PSF.MASK_DECODER.NAME", "decoupled"),
        *("MODEL.PSF.MASK_DECODER.MATCHING.NUM_POINTS", "12544"),
    ],
    "compile": ["SOLVER.COMPILE", "True"],
}
PLAIN = "plain"
PEER = "transformers Mask2Former"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--plain", type=Path, help="a checkout of the project to compare with")
    parser.add_argument("--ways", nargs="*", help="only these (default: all)")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1333))
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--segments", type=int, default=25, help="per image, 3/5 of them things")
    parser.add_argument("--steps", type=int, default=1, help="per turn")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--name", default="train", help="name of the result's file")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result's file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_child(args)
        return
    ways = args.ways or [*WAYS, *([PLAIN] if args.plain else []), *([PEER] if has_peer() else [])]
    turns: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for _ in range(args.rounds):
        for way in ways:
            turns[way].append(start_child(way, args))
    results = {way: summarise(found) for way, found in turns.items()}
    content: dict[str, Any] = {
        "machine": {
            **environment("torch"),
            **({"gpu": torch.cuda.get_device_name()} if args.device == "cuda" else {}),
            "threads": args.threads,
        },
        "size": args.size,
        "images": args.images,
        "segments an image": args.segments,
        "steps": args.steps * args.rounds,
        "results": results,
    }
    if args.plain:
        commit = ["git", "-C", str(args.plain), "rev-parse", "--short", "HEAD"]
        content["plain commit"] = subprocess.check_output(commit, text=True).strip()
    write_result(args.name, content, args.output)


def has_peer() -> bool:
    return find_spec("transformers") is not None


def start_child(way: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run this file in a new process, with the code of the checkout that ``way`` names."""
    if way == PLAIN and args.plain is None:
        raise SystemExit("the way 'plain' needs --plain PATH")
    root = args.plain.resolve() if way == PLAIN else ROOT
    command = [sys.executable, str(Path(__file__).resolve()), "--child", way]
    for option in ("images", "segments", "steps", "threads", "device"):
        command += [f"--{option}", str(getattr(args, option))]
    command += ["--size", *map(str, args.size)]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"'{way}' failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(way, found, file=sys.stderr, flush=True)
    return found


def summarise(turns: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = [s for turn in turns for s in turn["seconds"]]
    return {
        "seconds": statistics.median(seconds),
        "least and greatest": [min(seconds), max(seconds)],
        "CPU seconds": statistics.median(s for turn in turns for s in turn["cpu_seconds"]),
        "peak MiB of tensors": statistics.median(turn["tensors_mib"] for turn in turns),
        "peak MiB of the process": statistics.median(turn["process_mib"] for turn in turns),
        "loss": turns[0]["loss"],
    }


def run_child(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    make = peer_step if args.child == PEER else own_step
    step = make(args.child, args)
    step(SMALL)
    if args.device == "cuda" or args.child == "compile":
        step(tuple(args.size))  # selects algorithms, compiles for this size
    on_gpu = args.device == "cuda"
    before = memory_mib(on_gpu, "now")
    reset_peak(on_gpu)
    seconds, cpu_seconds = [], []
    for _ in range(args.steps):
        start, cpu_start = time.perf_counter(), time.process_time()
        loss = step(tuple(args.size))
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    process_mib = memory_mib(on_gpu, "peak") - before
    result = {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "tensors_mib": process_mib if on_gpu else profiled_peak_mib(step, tuple(args.size)),
        "process_mib": process_mib,
        "loss": loss,
    }
    print(json.dumps(result))


def reset_peak(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark of resident memory


def memory_mib(on_gpu: bool, which: str) -> float:
    """MiB allocated on the GPU, or resident on a CPU: ``now``, or the peak since the reset."""
    if on_gpu:
        torch.cuda.synchronize()
        used = torch.cuda.memory_allocated if which == "now" else torch.cuda.max_memory_allocated
        return used() / 2**20
    field = "VmRSS" if which == "now" else "VmHWM"
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def profiled_peak_mib(step: Any, size: tuple[int, int]) -> float:
    """Peak CPU memory of tensors in a step, from the profiler's allocation events."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profiler:
        step(size)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    used = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        used += event.nbytes()
        peak = max(peak, used)
    return peak / 2**20


def own_step(way: str, args: argparse.Namespace) -> Any:
    """A training step of the imported checkout's model."""
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model
    from detectron2.utils.events import EventStorage

    from psf import add_psf_config
    from psf.solver import build_optimizer, full_model_clip_norm
    from psf.trainer import TrainStep

    cfg = get_cfg()  # older checkouts have no psf.load_config
    add_psf_config(cfg)
    cfg.merge_from_file(CONFIG, allow_unsafe=False)
    cfg.merge_from_list([*WAYS.get(way, []), "MODEL.WEIGHTS", "", "MODEL.DEVICE", args.device])
    model = build_model(cfg).train()
    if way == "compile":
        from psf.trainer import compile_layers

        compile_layers(model)
    sizes: list[tuple[int, int]] = []

    def batches() -> Iterator[list[dict[str, Any]]]:
        while True:
            yield own_input(sizes.pop(), args)

    step = TrainStep(
        model,
        batches(),
        build_optimizer(cfg, model),
        amp=cfg.SOLVER.AMP.ENABLED,
        clip_norm=full_model_clip_norm(cfg),
    )
    step.iter = 0

    def run(size: tuple[int, int]) -> float:
        sizes.append(size)
        with EventStorage() as storage:
            step.run_step()
        return float(storage.latest()["total_loss"][0])

    return run


def segments_of(size: tuple[int, int], number: int) -> torch.Tensor:
    """(number, H, W) bool: a grid of rectangles that covers the image."""
    height, width = size
    columns = max(1, round((number * width / height) ** 0.5))
    rows = -(-number // columns)
    y = torch.arange(height) * rows // height
    x = torch.arange(width) * columns // width
    cell = (y[:, None] * columns + x).clamp(max=number - 1)
    return cell == torch.arange(number)[:, None, None]


def own_input(size: tuple[int, int], args: argparse.Namespace) -> list[dict[str, Any]]:
    from detectron2.structures import BitMasks, Boxes, Instances

    generator = torch.Generator().manual_seed(0)
    batch = []
    for _ in range(args.images):
        num_things = args.segments * 3 // 5
        masks = segments_of(size, args.segments)
        instances = Instances(size)
        things = torch.randint(0, 80, (num_things,), generator=generator)
        stuff = 80 + torch.randperm(53, generator=generator)[: args.segments - num_things]
        instances.gt_classes = torch.cat([things, stuff])
        instances.gt_masks = BitMasks(masks)
        instances.gt_boxes = Boxes(instances.gt_masks.get_bounding_boxes().tensor)
        image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances})
    return batch


def peer_step(way: str, args: argparse.Namespace) -> Any:
    """A training step of transformers' Mask2Former: ResNet-50, 100 queries, 133 classes."""
    del way
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig

    backbone = ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
    config = Mask2FormerConfig(backbone_config=backbone, num_labels=133)
    model = Mask2FormerForUniversalSegmentation(config).to(args.device).train()
    # As in Detectron2, batch normalization of the backbone is frozen.
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval().requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.05, fused=True)

    def run(size: tuple[int, int]) -> float:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(args.images, 3, *size, generator=generator)
        masks = segments_of(size, args.segments).float().to(args.device)
        labels = torch.randperm(133, generator=generator)[: args.segments].to(args.device)
        optimizer.zero_grad()
        loss = model(
            pixel_values=pixels.to(args.device),
            mask_labels=[masks] * args.images,
            class_labels=[labels] * args.images,
        ).loss.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.01)
        optimizer.step()
        return float(loss)

    return run


if __name__ == "__main__":
    main()
