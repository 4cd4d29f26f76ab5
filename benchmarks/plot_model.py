#!/usr/bin/env python3
"""Draw the time of each stage of a prediction, from a result of benchmarks/model.py.

python benchmarks/plot_model.py benchmarks/results/model_cpu_....json docs/images/model_cpu.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
from matplotlib import pyplot as plt

# In the order of the computation.
STAGES = {
    "backbone": "backbone",
    "input_proj": "input projection",
    "encoder": "encoder",
    "location_decoder": "location decoder",
    "mask_decoder": "mask decoder",
    "post-processing": "post-processing",
}
COLORS = ("#4269d0", "#97bbf5", "#3ca951", "#efb118", "#ff725c", "#9c6b4e")
WHOLE = "#9498a0"


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw one bar per way, with its stages if they were measured."""
    ways = result["ways"]
    figure, axes = plt.subplots(figsize=(9, 0.45 * len(ways) + 1.6), layout="constrained")
    for row, way in enumerate(ways):
        stages = way.get("stages_ms")
        # Stages were timed in separate runs: scale them to the total.
        factor = way["wall_ms"] / sum(stages.values()) if stages else 0
        parts = {s: factor * stages[s] for s in STAGES} if stages else {"": way["wall_ms"]}
        colors = COLORS if stages else (WHOLE,)
        left = 0.0
        for (stage, width), color in zip(parts.items(), colors, strict=True):
            axes.barh(row, width, left=left, color=color, height=0.7)
            if width > 0.035 * max(w["wall_ms"] for w in ways) and stage:
                axes.text(
                    left + width / 2, row, f"{width:.0f}", ha="center", va="center", fontsize=8
                )
            left += width
        axes.text(left, row, f"  {left:.0f} ms", va="center", fontsize=9)
    axes.set_yticks(range(len(ways)), [way["way"] for way in ways])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * max(way["wall_ms"] for way in ways))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("milliseconds per image, wall clock (median)")
    for name, color in zip(STAGES.values(), COLORS, strict=True):
        axes.barh(0, 0, color=color, label=name)
    figure.legend(loc="outside upper center", ncols=len(STAGES), fontsize=8, frameon=False)
    machine = result["machine"]
    size = " x ".join(map(str, result["size"]))
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    axes.set_title(f"{result['backbone']}, {size}, {where}", fontsize=10)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Read a result and draw it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    draw(json.loads(args.result.read_text()), args.picture)


if __name__ == "__main__":
    main()
