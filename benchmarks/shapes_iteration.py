"""Milliseconds of a training iteration of ``configs/shapes``, against other checkouts.

python benchmarks/shapes_iteration.py --other before=PATH [NAME=PATH ...]

An iteration is the trainer's own, loading the images included. Every checkout runs in a process
of its own, with this checkout's values of the config on top of its own defaults. The processes take
turns of a few iterations, in changing order, so that a slow minute slows all of them; a ratio is
the median over rounds of the ratio of the turns' medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from cpu_time import RESULTS, environment, write_result

ROOT = Path(__file__).resolve().parent.parent
CONFIG = Path("configs/shapes/panoptic_segformer_shapes.yaml")
PRESENT = "present"
# What checkouts that do not take the numbers of classes from the data have to be told.
CLASSES = ["MODEL.PSF.NUM_THING_CLASSES", "5", "MODEL.PSF.NUM_STUFF_CLASSES", "5"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--other", nargs="*", default=[], metavar="NAME=PATH", type=_named_path)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--turn", type=int, default=8, help="iterations of a turn")
    parser.add_argument("--warm-up", type=int, default=15, help="iterations before the first turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--options", nargs="*", default=[], help="config keys for all checkouts")
    parser.add_argument("--name", default="shapes_iteration", help="of the result's file")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_child(args)
        return
    checkouts = {PRESENT: ROOT, **dict(args.other)}
    children = {name: start_child(path, args) for name, path in checkouts.items()}
    for child in children.values():
        take_turn(child, args.warm_up)
    turns: dict[str, list[list[float]]] = {name: [] for name in children}
    for i in range(args.rounds):
        names = list(children)
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            turns[name].append(take_turn(children[name], args.turn))
        print(f"{i + 1}/{args.rounds}", file=sys.stderr, flush=True)
    for child in children.values():
        assert child.stdin is not None
        child.stdin.close()
        child.wait()
    write_result(
        args.name,
        {
            "machine": {
                **environment("torch"),
                "instruction set": torch.backends.cpu.get_cpu_capability(),
                "threads": args.threads,
            },
            "iterations": args.rounds * args.turn,
            "results": {name: summarise(turns, name) for name in children},
            "commits": {name: _commit(path) for name, path in checkouts.items()},
        },
        args.output,
    )


def _named_path(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and (Path(path) / CONFIG).is_file()):
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=PATH of a checkout with {CONFIG}")
    return name, Path(path).resolve()


def _commit(path: Path) -> str:
    command = ["git", "-C", str(path), "rev-parse", "--short", "HEAD"]
    return subprocess.check_output(command, text=True).strip()


def summarise(turns: dict[str, list[list[float]]], name: str) -> dict[str, Any]:
    medians = [statistics.median(turn) for turn in turns[name]]
    present = [statistics.median(turn) for turn in turns[PRESENT]]
    ratios = [other / own for other, own in zip(medians, present, strict=True)]
    return {
        "ms": 1e3 * statistics.median(medians),
        "least and greatest ms of a turn": [1e3 * min(medians), 1e3 * max(medians)],
        "ratio to present": statistics.median(ratios),
    }


def start_child(path: Path, args: argparse.Namespace) -> subprocess.Popen[str]:
    """A process that trains the checkout in ``path``, so many iterations at a time as it reads."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", str(path)]
    command += ["--threads", str(args.threads), "--options", *args.options]
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": str(args.threads),
    }
    return subprocess.Popen(
        command, cwd=path, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def take_turn(child: subprocess.Popen[str], iterations: int) -> list[float]:
    """Seconds of each iteration."""
    assert child.stdin is not None
    assert child.stdout is not None
    print(iterations, file=child.stdin, flush=True)
    return list(json.loads(child.stdout.readline() or _ended(child)))


def _ended(child: subprocess.Popen[str]) -> str:
    raise SystemExit(f"{child.args} ended with code {child.wait()}: see its messages above")


def run_child(args: argparse.Namespace) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print is none of the answers
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(args, folder)
        trainer.register_hooks([turns(sys.stdin, answers)])
        trainer.train()


def build_trainer(args: argparse.Namespace, folder: str) -> Any:
    from detectron2.config import CfgNode, get_cfg
    from detectron2.utils.env import seed_all_rng

    import psf.data
    from psf import add_psf_config
    from psf.trainer import Trainer

    if not Path(psf.data.__file__).is_relative_to(args.child):
        raise SystemExit(f"psf comes from '{psf.data.__file__}', not from '{args.child}'")
    cfg = get_cfg()
    add_psf_config(cfg)
    cfg.merge_from_file(str(args.child / CONFIG))
    values = yaml.safe_load((ROOT / CONFIG).read_text())
    del values["_BASE_"]
    cfg.merge_from_other_cfg(CfgNode(values))
    cfg.merge_from_list([*CLASSES, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", folder, *args.options])
    cfg.merge_from_list(["TEST.EVAL_PERIOD", "0", "SOLVER.CHECKPOINT_PERIOD", "1000000"])
    cfg.freeze()
    seed_all_rng(cfg.SEED)
    return Trainer(cfg)


def turns(requests: IO[str], answers: IO[str]) -> Any:
    """The hook that lets a trainer run so many iterations at a time as it is asked for."""
    from detectron2.engine import HookBase

    class Turns(HookBase):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.left = 0

        def before_step(self) -> None:
            if self.left == 0:
                request = requests.readline()
                if not request:
                    sys.exit()
                self.left, self.seconds = int(request), []
            self.start = time.perf_counter()

        def after_step(self) -> None:
            self.seconds.append(time.perf_counter() - self.start)
            self.left -= 1
            if self.left == 0:
                print(json.dumps(self.seconds), file=answers, flush=True)

    return Turns()


if __name__ == "__main__":
    main()
