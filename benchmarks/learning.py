#!/usr/bin/env python3
"""How fast models learn: panoptic quality after the same CPU time, of ours and of others.

python benchmarks/learning.py run --model psf --lr 1e-3 --seed 1 --seconds 480
python benchmarks/learning.py run --model panoptic_fpn --lr 1e-3 --dataset shapes_panoptic_tune
PYTHONPATH=PEERS python benchmarks/learning.py run --model mask2former ...   # needs transformers
python benchmarks/learning.py show
python benchmarks/learning.py draw docs/images/learning.png

All models have the same backbone (ResNet-18 of half the width, group normalization, from random
weights), see the same images with the same augmentation in the same order for a seed, and are
trained by the same optimizer: AdamW, linear warm-up, then half a cosine over the CPU time, clipped
gradients, an average of the weights if the config has one. They are evaluated by the same
evaluator; only training takes from the CPU time. Each run is a process of its own, adds one line
to a file in benchmarks/results, and is skipped if its line is there.

The learning rate of each model is the one that is best on shapes_panoptic_tune; ``show`` and
``draw`` choose it, and report the runs with this rate on shapes_panoptic_val. Runs of one label are
seeds of the same; to compare options, give each its own:

python benchmarks/learning.py run --model psf --label "without EMA" --lr 1e-3 SOLVER.EMA_DECAY 0.0
python benchmarks/learning.py show --dataset shapes_panoptic_tune
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psf  # isort: skip  # noqa: F401  before torch is loaded (psf.threads)

import torch
from cpu_time import RESULTS, environment
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from peers import Mask2Former, PanopticFpn
from tabulate import tabulate
from torch import nn

from psf.config import load_config
from psf.data import ClassMap
from psf.evaluation import build_evaluators
from psf.layers.host_memory import keep_freed_memory
from psf.modeling.build import model_dataset
from psf.solver import build_optimizer, full_model_clip_norm
from psf.train_step import TrainStep
from psf.trainer import Trainer

CONFIG = "shapes/panoptic_segformer_shapes.yaml"
TUNING, REPORTED = "shapes_panoptic_tune", "shapes_panoptic_val"
MODELS = {
    "psf": "Panoptic SegFormer",
    "panoptic_fpn": "Panoptic FPN (Detectron2)",
    "mask2former": "Mask2Former (transformers)",
}
METRICS = ("PQ", "PQ_th", "PQ_st")
SHOWN = (0.25, 0.5, 1.0)  # of the CPU time

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS / "learning.jsonl")
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="train one model once")
    runs.add_argument("--model", choices=MODELS, required=True)
    runs.add_argument("--label", help="default: the model's name")
    runs.add_argument("--lr", type=float, required=True)
    runs.add_argument("--seed", type=int, default=1)
    runs.add_argument("--seconds", type=float, default=480, help="CPU time (%(default)g)")
    runs.add_argument("--points", type=int, default=8, help="evaluations (%(default)s)")
    runs.add_argument("--dataset", default=REPORTED, help="to evaluate on (%(default)s)")
    runs.add_argument("--threads", type=int, default=1)
    runs.add_argument("--config-file", default=CONFIG)
    runs.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    shows = commands.add_parser("show", help="print tables")
    draws = commands.add_parser("draw", help="draw the curves")
    draws.add_argument("picture", type=Path)
    for command in (shows, draws):
        command.add_argument("--dataset", default=REPORTED, help="(%(default)s)")
    args = parser.parse_args()
    if args.command == "run":
        run(args)
    elif args.command == "show":
        show(read(args.results), args.dataset)
    else:
        draw(races(read(args.results), args.dataset), args.picture)


def run(args: argparse.Namespace) -> None:
    """Train and evaluate; adds a line to the results."""
    keys = ("model", "lr", "seed", "seconds", "dataset", "threads", "opts")
    what = {key: getattr(args, key) for key in keys}
    what["label"] = args.label or MODELS[args.model]
    if any(what.items() <= row.items() for row in read(args.results)):
        print("This run is in the results already")
        return
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    opts = [*args.opts, "SOLVER.BASE_LR", args.lr, "SEED", args.seed, "MODEL.DEVICE", "cpu"]
    cfg = load_config(args.config_file, [*opts, "DATASETS.TEST", (args.dataset,)])
    seed_all_rng(args.seed)
    model = build(cfg, args.model)
    packages = ["torch", "sal-detectron2"]
    if args.model == "mask2former":
        packages.append("transformers")
    row = {
        **what,
        "ema decay": cfg.SOLVER.EMA_DECAY,
        "parameters": sum(p.numel() for p in model.parameters()),
        "curve": race(cfg, model, args),
        "machine": environment(*packages),
    }
    args.results.parent.mkdir(parents=True, exist_ok=True)
    with args.results.open("a") as file:  # one write: runs may go on side by side
        file.write(json.dumps(row) + "\n")


def build(cfg: CfgNode, name: str) -> nn.Module:
    """Build one of the models, in training mode."""
    class_map = ClassMap.from_metadata(MetadataCatalog.get(model_dataset(cfg)))
    if name == "psf":
        return build_model(cfg).train()
    return {"panoptic_fpn": PanopticFpn, "mask2former": Mask2Former}[name](cfg, class_map).train()


def race(cfg: CfgNode, model: nn.Module, args: argparse.Namespace) -> list[Row]:
    """Train for the CPU time; returns the qualities at evenly spaced points of it."""
    optimizer = build_optimizer(cfg, model)
    rates = [group["lr"] for group in optimizer.param_groups]
    step = TrainStep(
        model,
        Trainer.build_train_loader(cfg),
        optimizer,
        amp=False,
        clip_norm=full_model_clip_norm(cfg),
        ema_decay=cfg.SOLVER.EMA_DECAY,
    )
    used, curve = 0.0, []
    with EventStorage() as storage:
        for point in range(1, args.points + 1):
            while used < args.seconds * point / args.points:
                start = time.process_time()
                warm_up = min(1.0, (storage.iter + 1) / max(1, cfg.SOLVER.WARMUP_ITERS))
                factor = warm_up * (1 + math.cos(math.pi * used / args.seconds)) / 2
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
                step.iter = storage.iter
                step.run_step()
                storage.step()
                used += time.process_time() - start
            loss = storage.history("total_loss").median(20)
            if step.ema is None:
                quality = evaluate(cfg, model, args.dataset)
            else:
                with step.ema.applied():
                    quality = evaluate(cfg, model, args.dataset)
            numbers = {"fraction": point / args.points, "cpu_seconds": round(used, 2)}
            curve.append({**numbers, "iterations": storage.iter, "loss": loss, **quality})
            print(" ".join(f"{key} {value:.4g}" for key, value in curve[-1].items()), flush=True)
    return curve


@torch.no_grad()
def evaluate(cfg: CfgNode, model: nn.Module, dataset: str) -> dict[str, float]:
    """PQ, PQ_th and PQ_st."""
    evaluator = build_evaluators(
        dataset,
        panoptic=True,
        instances=False,
        sem_seg=False,
        output_dir=None,
        model_dataset=model_dataset(cfg),
    )
    evaluator.reset()
    model.eval()
    for inputs in Trainer.build_test_loader(cfg, dataset):
        evaluator.process(inputs, model(inputs))
    model.train()
    results = evaluator.evaluate()["panoptic_seg"]
    return {metric: round(results[metric], 3) for metric in METRICS}


def read(path: Path) -> list[Row]:
    """All runs of a file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def best_rate(rows: Sequence[Row]) -> float | None:
    """The learning rate that is best at the end, on average over the seeds of the tuning runs."""
    finals: dict[float, list[float]] = {}
    for row in rows:
        if row["dataset"] == TUNING:
            finals.setdefault(row["lr"], []).append(row["curve"][-1]["PQ"])
    return max(finals, key=lambda lr: statistics.mean(finals[lr]), default=None)


def races(rows: Sequence[Row], dataset: str) -> dict[str, list[Row]]:
    """The runs on a data set with the tuned rate, by label; without tuning runs, all rates."""
    found = {}
    for label in dict.fromkeys(row["label"] for row in rows):
        own = [row for row in rows if row["label"] == label]
        rate = best_rate(own)
        chosen = [r for r in own if r["dataset"] == dataset and rate in (None, r["lr"])]
        if chosen:
            found[label] = chosen
    return found


def show(rows: Sequence[Row], dataset: str) -> None:
    """Print the tuning runs, then the qualities at parts of the CPU time, means over the seeds."""
    tuning = sorted(
        (r for r in rows if r["dataset"] == TUNING), key=lambda r: (r["label"], r["lr"])
    )
    columns = [
        (r["label"], f"{r['lr']:g}", r["seed"], r["seconds"], *(r["curve"][-1][m] for m in METRICS))
        for r in tuning
    ]
    headers = ["model", "learning rate", "seed", "CPU seconds", *METRICS]
    print(f"On {TUNING}:\n{tabulate(columns, headers, tablefmt='pipe')}\n")
    table = []
    for label, chosen in races(rows, dataset).items():
        seeds = len(chosen)
        for fraction in SHOWN:
            points = [p for r in chosen for p in r["curve"] if p["fraction"] == fraction]
            if points:
                means = [f"{statistics.mean(p[m] for p in points):.1f}" for m in METRICS]
                spread = max(p["PQ"] for p in points) - min(p["PQ"] for p in points)
                iterations = round(statistics.mean(p["iterations"] for p in points))
                part = f"{fraction:.0%} of {chosen[0]['seconds']:g} s"
                table.append((label, part, iterations, *means, f"{spread:.1f}", seeds))
    headers = ["model", "CPU time", "iterations", *METRICS, "range of PQ", "seeds"]
    print(f"On {dataset}:\n{tabulate(table, headers, tablefmt='pipe', disable_numparse=True)}")


def draw(found: dict[str, list[Row]], path: Path) -> None:
    """Draw the mean over the seeds, and their range, against the CPU time."""
    figure = Figure(figsize=(12, 4.2), dpi=100, layout="constrained")
    for axes, metric in zip(figure.subplots(1, 3, sharex=True, sharey=True), METRICS, strict=True):
        for number, (name, rows) in enumerate(found.items()):
            by_fraction: dict[float, list[Row]] = {}
            for point in (point for row in rows for point in row["curve"]):
                by_fraction.setdefault(point["fraction"], []).append(point)
            points = [by_fraction[fraction] for fraction in sorted(by_fraction)]
            seconds = [0.0, *(statistics.mean(p["cpu_seconds"] for p in group) for group in points)]
            values = [[p[metric] for p in group] for group in points]
            means = [0.0, *map(statistics.mean, values)]
            label, color = f"{name}: {means[-1]:.1f}", f"C{number}"
            axes.plot(seconds, means, "o-", markersize=4, color=color, label=label)
            low, high = [0.0, *map(min, values)], [0.0, *map(max, values)]
            axes.fill_between(seconds, low, high, color=color, alpha=0.15, linewidth=0)
        axes.set(title=metric, xlabel="CPU seconds of training", xlim=(0, None), ylim=(0, 100))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))


if __name__ == "__main__":
    main()
