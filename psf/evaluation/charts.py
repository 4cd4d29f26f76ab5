"""Charts of a training's metrics and of the quality of the classes."""

import contextlib
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray

from psf.files import write_beside

from .panoptic_quality import ClassQuality

logger = logging.getLogger(__name__)

_DPI = 100

# What drawing raises, in matplotlib, Pillow and Detectron2's Visualizer.
_DRAWING_ERRORS = (
    *(ArithmeticError, AttributeError, LookupError, MemoryError),
    *(OSError, RuntimeError, TypeError, ValueError),
)

# Names of classes are not formulas: "note $5_$" is drawn as it is.
plain_text = matplotlib.rc_context({"text.parse_math": False})


@contextlib.contextmanager
def drawn_or_warned(path: str | os.PathLike[str]) -> Iterator[None]:
    """A picture that cannot be drawn is a warning: it never costs the results beside it."""
    try:
        yield
    except _DRAWING_ERRORS as error:
        logger.warning("'%s' is not drawn: %s: %s", path, type(error).__name__, error)


@plain_text
def write_curves(
    metrics_json: str | os.PathLike[str], path: str | os.PathLike[str], *, window: int = 9
) -> None:
    """
    Draw losses and panoptic quality against the iterations.

    The losses of all decoder layers (``loss_mask``, ``loss_mask_0``, ...) are added up. If resumed
    training repeated iterations, the last values are drawn. Losses are drawn with their running
    mean over ``window`` logged values.
    """
    records = read_metrics(metrics_json)
    figure = Figure(figsize=(12, 4.5), dpi=_DPI, layout="constrained")
    loss_axes, quality_axes = figure.subplots(1, 2, sharex=True)
    _draw_losses(loss_axes, loss_curves(records), window)
    _draw_quality(quality_axes, quality_curves(records))
    for axes in (loss_axes, quality_axes):
        axes.set_xlabel("iteration")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        else:
            axes.text(0.5, 0.5, "nothing logged yet", ha="center", transform=axes.transAxes)
    write_figure(figure, path)


@plain_text
def write_quality_bars(
    rows: Sequence[ClassQuality], path: str | os.PathLike[str], *, title: str = "Panoptic quality"
) -> None:
    """
    Draw the PQ of each class as a bar, things and stuff separately, best first.

    Means of groups are drawn as lines. Classes without a value are only counted.
    """
    columns = [
        sorted((r for r in rows if r.kind == kind and r.pq == r.pq), key=lambda r: r.pq)
        for kind in ("thing", "stuff")
    ]
    height = 1.2 + 0.17 * max(5, *map(len, columns))
    figure = Figure(figsize=(11, height), dpi=_DPI, layout="constrained")
    figure.suptitle(title, weight="bold")
    means = {row.name: row.pq for row in rows if row.kind == "mean"}
    groups = (("things", "tab:blue"), ("stuff", "tab:green"))
    for axes, column, (group, color) in zip(figure.subplots(1, 2), columns, groups, strict=True):
        kind = group.removesuffix("s")
        absent = sum(r.kind == kind and r.pq != r.pq for r in rows)
        _draw_bars(axes, column, means.get(group, math.nan), color)
        without = f", {absent} without" if absent else ""
        axes.set_title(f"{group}: {len(column)} classes{without}", fontsize="medium")
    write_figure(figure, path)


def _draw_bars(axes: Axes, rows: Sequence[ClassQuality], mean: float, color: str) -> None:
    """Horizontal bars of PQ, the last row on top, and a line at the mean."""
    positions = range(len(rows))
    axes.barh(positions, [row.pq for row in rows], color=color, alpha=0.75, height=0.8)
    names = [row.name if len(row.name) <= 28 else f"{row.name[:27]}…" for row in rows]
    axes.set_yticks(positions, names, fontsize=7, parse_math=False)
    for y, row in zip(positions, rows, strict=True):
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.3}  # over the line of the mean
        x = min(row.pq, 92) + 0.9
        axes.text(x, y, f"{row.pq:.1f}", va="center", fontsize=6, bbox=box)
    if mean == mean:
        axes.axvline(mean, color="black", linewidth=1, linestyle="--", label=f"mean {mean:.1f}")
        axes.legend(fontsize="small", loc="lower right")
    axes.set_xlim(0, 100)
    axes.set_ylim(-0.7, max(len(rows), 5) - 0.3)
    axes.set_xlabel("PQ (%)")


def read_metrics(metrics_json: str | os.PathLike[str]) -> dict[int, dict[str, float]]:
    """
    Read Detectron2's log.

    Returns:
        The metrics of every logged iteration, by rising iteration.
    """
    records: dict[int, dict[str, float]] = {}
    damaged = 0
    for line in Path(metrics_json).read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
            records.setdefault(record["iteration"], {}).update(record)
        except (json.JSONDecodeError, KeyError, TypeError):
            damaged += 1
    if damaged:
        logger.warning("Skipped %d damaged lines of '%s'.", damaged, metrics_json)
    return dict(sorted(records.items()))


Curves = dict[str, list[tuple[int, float]]]


def loss_curves(records: dict[int, dict[str, float]]) -> Curves:
    curves: Curves = {}
    for iteration, record in records.items():
        sums: dict[str, float] = {}
        for key, value in record.items():
            if key == "total_loss" or key.startswith("loss_"):
                group = re.sub(r"_\d+$", "", key)
                sums[group] = sums.get(group, 0.0) + value
        for group, value in sums.items():
            curves.setdefault(group, []).append((iteration, value))
    return dict(sorted(curves.items(), key=lambda item: item[0] != "total_loss"))


def quality_curves(records: dict[int, dict[str, float]]) -> Curves:
    """PQ, PQ_th and PQ_st; with several data sets, Detectron2 puts their names in front."""
    curves: Curves = {}
    for iteration, record in records.items():
        for key, value in record.items():
            prefix, found, name = key.rpartition("panoptic_seg/")
            if found and name in ("PQ", "PQ_th", "PQ_st") and math.isfinite(value):
                curves.setdefault(prefix + name, []).append((iteration, value))
    return curves


def _draw_losses(axes: Axes, curves: Curves, window: int) -> None:
    for name, points in curves.items():
        iterations, values = (np.array(column, dtype=float) for column in zip(*points, strict=True))
        smooth = running_mean(values, window)
        style: dict[str, Any] = {"linewidth": 1.2}
        if name == "total_loss":
            axes.plot(iterations, values, color="black", alpha=0.2, linewidth=0.8)
            style = {"linewidth": 2, "color": "black"}
        marker = "o" if len(points) < 3 else None
        axes.plot(iterations, smooth, label=name, marker=marker, markersize=3, **style)
    axes.set_title("training losses")
    axes.set_ylabel("loss")
    if curves and all(value > 0 for points in curves.values() for _, value in points):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_quality(axes: Axes, curves: Curves) -> None:
    for name, points in curves.items():
        iterations, values = zip(*points, strict=True)
        axes.plot(iterations, values, marker="o", markersize=4, label=f"{name}: {values[-1]:.1f}")
    axes.set_title("panoptic quality")
    axes.set_ylabel("PQ (%)")
    axes.set_ylim(0, 100)


def running_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Mean over the window around each value; smaller windows at the ends."""
    sums = np.concatenate([[0.0], values.cumsum()])
    index = np.arange(len(values))
    # Symmetric windows, so that the ends do not lag.
    half = np.minimum(np.minimum(index, len(values) - 1 - index), window // 2)
    return (sums[index + half + 1] - sums[index - half]) / (2 * half + 1)


def write_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a PNG; its folder is created."""
    with write_beside(path) as partial:
        FigureCanvasAgg(figure).print_png(os.fspath(partial))
