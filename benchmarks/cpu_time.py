"""Paired measurements of CPU time, with machine and versions.

CPU seconds (user and system, with child processes) depend less on other programs than wall-clock
time. The alternatives take turns within each round, so changes of the machine's speed affect all.
"""

import gc
import importlib.metadata
import json
import multiprocessing
import platform
import resource
import statistics
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(
    ways: Mapping[str, Callable[[], Any]], *, rounds: int, warm_up: int = 1
) -> dict[str, dict[str, float]]:
    """
    Run every way once per round, in turn.

    Returns:
        Median, minimum and maximum CPU seconds of each way.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(warm_up + rounds):
        for name, way in ways.items():
            gc.collect()
            start = cpu_seconds()
            way()
            for child in multiprocessing.active_children():  # panopticapi leaves its pool
                child.terminate()
                child.join()
            if turn >= warm_up:
                times[name].append(cpu_seconds() - start)
    return {
        name: {"median": statistics.median(t), "min": min(t), "max": max(t)}
        for name, t in times.items()
    }


def environment(*packages: str) -> dict[str, Any]:
    """Machine, commit and versions."""
    models = {
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    }
    return {
        "cpu": ", ".join(sorted(models)),
        "cores": multiprocessing.cpu_count(),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "uncommitted changes": bool(_git("status", "--porcelain", ":!benchmarks/results")),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def write_result(name: str, content: Mapping[str, Any], folder: Path = RESULTS) -> None:
    """Write ``<name>.json`` into a folder, by default ``results/``, and print it."""
    folder.mkdir(exist_ok=True)
    text = json.dumps(content, indent=1)
    (folder / f"{name}.json").write_text(text + "\n")
    print(text)
