"""Time of a training iteration of ``configs/shapes`` by spin count of waiting OpenMP threads.

python benchmarks/threads.py --spins 300000 10000 1000 0

Each spin count (GOMP_SPINCOUNT; libgomp's default is 300000) trains in its own process. In each
round every process runs some iterations alone, then some beside a busy process. Ratios are medians
over the rounds, relative to the first spin count alone.
"""

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Ends with the process that starts it.
BUSY = [
    sys.executable,
    "-c",
    "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--spins", type=int, nargs="+", default=[300000, 10000, 1000, 0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=10, help="per turn (%(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="(%(default)s)")
    parser.add_argument("--name", default="threads", help="name of the result's file")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve()
        return
    from cpu_time import environment, write_result

    machine = {**environment("torch"), "threads": args.threads}
    results = measure(args)
    write_result(args.name, {"machine": machine, "rounds": args.rounds, "results": results})


def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Milliseconds and ratios by spin count."""
    trainings = {spins: start(spins, args.threads) for spins in args.spins}
    busy = subprocess.Popen(BUSY)
    busy.send_signal(signal.SIGSTOP)
    turns: dict[tuple[int, str], list[float]] = {}
    try:
        for process in trainings.values():
            run(process, args.iterations)
        for i in range(args.rounds):
            shift = i % len(args.spins)
            for spins in args.spins[shift:] + args.spins[:shift]:
                seconds = run(trainings[spins], args.iterations)
                turns.setdefault((spins, "alone"), []).append(seconds)
                with running(busy):
                    seconds = run(trainings[spins], args.iterations)
                turns.setdefault((spins, "beside"), []).append(seconds)
            print(f"{i + 1}/{args.rounds}", file=sys.stderr, flush=True)
    finally:
        for process in (busy, *trainings.values()):
            process.kill()
    first = turns[args.spins[0], "alone"]
    results: dict[str, dict[str, float]] = {}
    for (spins, where), seconds_of_turns in turns.items():
        ratios = [a / b for a, b in zip(seconds_of_turns, first, strict=True)]
        row = results.setdefault(str(spins), {})
        row[f"ms {where}"] = 1e3 * statistics.median(seconds_of_turns) / args.iterations
        row[f"ratio {where}"] = statistics.median(ratios)
    return results


@contextlib.contextmanager
def running(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Let a stopped process run."""
    process.send_signal(signal.SIGCONT)
    yield
    process.send_signal(signal.SIGSTOP)


def start(spins: int, threads: int) -> "subprocess.Popen[str]":
    """Start a process that reads numbers of iterations and answers with their seconds."""
    variables = {"GOMP_SPINCOUNT": str(spins), "OMP_NUM_THREADS": str(threads)}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, __file__, "--serve"],
        env={**os.environ, "PYTHONPATH": path, **variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def run(process: "subprocess.Popen[str]", iterations: int) -> float:
    """Run iterations in a process; returns seconds."""
    assert process.stdin is not None
    assert process.stdout is not None
    print(iterations, file=process.stdin, flush=True)
    line = process.stdout.readline()
    if not line:
        raise SystemExit("A training failed; see its messages above")
    return float(line)


def serve() -> None:
    from detectron2.utils.env import seed_all_rng
    from detectron2.utils.events import EventStorage

    from psf.config import load_config
    from psf.trainer import Trainer

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # all other output
    cfg = load_config("shapes/panoptic_segformer_shapes.yaml", ["MODEL.DEVICE", "cpu"])
    seed_all_rng(cfg.SEED)
    with tempfile.TemporaryDirectory() as folder, EventStorage() as storage:
        cfg.OUTPUT_DIR = folder
        trainer = Trainer(cfg)
        for line in sys.stdin:
            begin = time.perf_counter()
            for _ in range(int(line)):
                trainer.iter = storage.iter
                trainer.run_step()
                storage.step()
            print(time.perf_counter() - begin, file=answers)


if __name__ == "__main__":
    main()
