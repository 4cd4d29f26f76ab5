"""Pictures of predictions and of the course of a training.

Shapes: H x W pixels of an image.
"""

import contextlib
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.data import Metadata
from detectron2.data.detection_utils import read_image
from detectron2.utils.visualizer import Visualizer
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .ground_truth import PanopticSegmentation, load_ground_truth
from .panoptic_quality import ClassQuality

__all__ = [
    "Sample",
    "draw_panoptic",
    "load_ground_truth",
    "write_contact_sheet",
    "write_curves",
    "write_quality_bars",
]

logger = logging.getLogger(__name__)

# Longest side of a picture on a contact sheet, in pixels: for small images and for photos.
_CELL_RANGE = (384, 640)
_GAP = 8  # between pictures
_CAPTION = 24  # height of a line of text
_DPI = 100


class Sample(NamedTuple):
    """One row of a contact sheet."""

    dataset_dict: dict[str, Any]  # with file_name
    ground_truth: PanopticSegmentation
    prediction: PanopticSegmentation


def draw_panoptic(
    image_rgb: NDArray[np.uint8],
    panoptic_seg: Tensor,
    segments_info: Sequence[dict[str, Any]],
    metadata: Metadata,
    *,
    scale: float = 1.0,
) -> NDArray[np.uint8]:
    """
    Draw segments and their names over an image with Detectron2's Visualizer.

    The same arguments give the same picture, and NumPy's random state stays as it was.

    Args:
        image_rgb: (H, W, 3).
        panoptic_seg: (H, W) int32, the id of the segment at each pixel.
        segments_info: id, category_id (contiguous), isthing and possibly score and iscrowd of each
            segment. Ids that are not listed are not drawn.
        metadata: of the data set, with names and colours of the classes.
        scale: size of the picture relative to the image; text keeps its size.

    Returns:
        (round(scale * H), round(scale * W), 3), each side at least 1.
    """
    if image_rgb.shape[:2] != tuple(panoptic_seg.shape):
        raise ValueError(
            f"The image is {image_rgb.shape[:2]} but its segmentation {tuple(panoptic_seg.shape)} "
            "pixels (height, width)."
        )
    ids = panoptic_seg.cpu().numpy().astype(np.int32)
    image, ids = resize_picture(image_rgb, scale), resize_picture(ids, scale)
    visualizer = Visualizer(image, metadata, font_size_scale=0.8)  # 8 points: many labels fit
    infos = [dict(info) for info in segments_info]  # Detectron2 writes into them
    with _repeatable_colors():
        drawn = visualizer.draw_panoptic_seg(torch.from_numpy(ids), infos)
    return drawn.get_image()


def resize_picture(array: NDArray[Any], scale: float) -> NDArray[Any]:
    """Scale an image (H, W, 3), or a map (H, W) to its nearest values."""
    if scale == 1:
        return array
    size = [max(1, round(scale * side)) for side in array.shape[:2]]
    smooth = array.ndim == 3 and scale < 1
    resample = Image.Resampling.BOX if smooth else Image.Resampling.NEAREST
    return np.array(Image.fromarray(array).resize(size[::-1], resample))


@contextlib.contextmanager
def _repeatable_colors() -> Iterator[None]:
    """Detectron2 varies the colours of instances with NumPy's global random numbers."""
    state = np.random.get_state()
    np.random.seed(0)
    try:
        yield
    finally:
        np.random.set_state(state)


def write_contact_sheet(
    samples: Sequence[Sample], metadata: Metadata, path: str | os.PathLike[str]
) -> None:
    """
    Write a picture with a row for each sample: image, ground truth, prediction.

    Args:
        samples: of any image sizes; small images are enlarged and big ones reduced.
        metadata: of the data set.
        path: the PNG to write; its folder is made.
    """
    images = [read_image(sample[0]["file_name"], "RGB") for sample in samples]
    cell = cell_size(images)
    rows = [
        SheetRow(
            Path(sample[0]["file_name"]).name,
            _draw_row(image, sample, metadata, cell / max(image.shape[:2])),
        )
        for image, sample in zip(images, samples, strict=True)
    ]
    write_sheet(rows, ("image", "ground truth", "prediction"), cell, path)


class SheetRow(NamedTuple):
    """A row of a sheet: pictures of one size, one a column."""

    caption: str
    pictures: list[NDArray[np.uint8]]  # (h, w, 3)


def cell_size(images: Sequence[NDArray[np.uint8]]) -> int:
    """The longest side that pictures of these images get on a sheet, in pixels."""
    least, most = _CELL_RANGE
    return min(max([least, *(max(image.shape[:2]) for image in images)]), most)


def write_sheet(
    rows: Sequence[SheetRow], titles: Sequence[str], cell: int, path: str | os.PathLike[str]
) -> None:
    """
    Write rows of pictures below each other.

    Args:
        rows: from top to bottom.
        titles: of the columns.
        cell: width of a column; no picture is wider.
        path: the PNG to write; its folder is made.
    """
    width = len(titles) * (cell + _GAP) + _GAP
    height = _CAPTION + sum(_CAPTION + row.pictures[0].shape[0] + _GAP for row in rows)
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
    canvas = FigureCanvasAgg(figure)
    sheet = np.full((height, width, 3), 255, dtype=np.uint8)
    columns = [_GAP + i * (cell + _GAP) for i in range(len(titles))]
    for x, title in zip(columns, titles, strict=True):
        _write(figure, title, x + cell / 2, _CAPTION / 2, size=12, ha="center", weight="bold")
    top = _CAPTION
    for row in rows:
        _write(figure, row.caption, _GAP, top + _CAPTION / 2, size=8)
        top += _CAPTION
        for x, picture in zip(columns, row.pictures, strict=True):
            left = x + (cell - picture.shape[1]) // 2
            sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
        top += row.pictures[0].shape[0] + _GAP
    figure.figimage(sheet, zorder=-1)
    _save(canvas, path)


def _draw_row(
    image: NDArray[np.uint8], sample: Sample, metadata: Metadata, scale: float
) -> list[NDArray[np.uint8]]:
    """The pictures of one sample, all of one size."""
    _, ground_truth, prediction = sample
    return [
        resize_picture(image, scale),
        draw_panoptic(image, *ground_truth, metadata, scale=scale),
        draw_panoptic(image, *prediction, metadata, scale=scale),
    ]


def _write(figure: Figure, text: str, x: float, y: float, **style: Any) -> None:
    """Write text at pixel (x, y) from the top left corner."""
    width, height = figure.get_size_inches() * figure.dpi
    figure.text(x / width, 1 - y / height, text, va="center", **style)


def _save(canvas: FigureCanvasAgg, path: str | os.PathLike[str]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    canvas.print_png(os.fspath(path))


def write_curves(
    metrics_json: str | os.PathLike[str], path: str | os.PathLike[str], *, window: int = 9
) -> None:
    """
    Draw losses and panoptic quality against the iterations.

    Losses of all decoder layers (``loss_mask``, ``loss_mask_0``, ...) are added up. Where a resumed
    training repeated iterations, the last values count.

    Args:
        metrics_json: Detectron2's log, one JSON object a line; damaged lines (of a killed training)
            are skipped.
        path: the PNG to write; its folder is made.
        window: logged values in the running mean of the losses.
    """
    records = read_metrics(metrics_json)
    figure = Figure(figsize=(12, 4.5), dpi=_DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    loss_axes, quality_axes = figure.subplots(1, 2, sharex=True)
    _draw_losses(loss_axes, _loss_curves(records), window)
    _draw_quality(quality_axes, _quality_curves(records))
    for axes in (loss_axes, quality_axes):
        axes.set_xlabel("iteration")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        else:
            axes.text(0.5, 0.5, "nothing logged yet", ha="center", transform=axes.transAxes)
    _save(canvas, path)


def write_quality_bars(
    rows: Sequence[ClassQuality], path: str | os.PathLike[str], *, title: str = "Panoptic quality"
) -> None:
    """
    Draw the PQ of every class as a bar, things and stuff apart, best first.

    Args:
        rows: of classes and of groups, whose means are drawn as lines. Classes without a value are
            left out and counted.
        path: the PNG to write; its folder is made.
        title: of the picture.
    """
    columns = [
        sorted((r for r in rows if r.kind == kind and r.pq == r.pq), key=lambda r: r.pq)
        for kind in ("thing", "stuff")
    ]
    height = 1.2 + 0.17 * max(5, *map(len, columns))
    figure = Figure(figsize=(11, height), dpi=_DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(title, weight="bold")
    means = {row.name: row.pq for row in rows if row.kind == "mean"}
    groups = (("things", "tab:blue"), ("stuff", "tab:green"))
    for axes, column, (group, color) in zip(figure.subplots(1, 2), columns, groups, strict=True):
        kind = group.removesuffix("s")
        absent = sum(r.kind == kind and r.pq != r.pq for r in rows)
        _draw_bars(axes, column, means.get(group, math.nan), color)
        without = f", {absent} without" if absent else ""
        axes.set_title(f"{group}: {len(column)} classes{without}", fontsize="medium")
    _save(canvas, path)


def _draw_bars(axes: Axes, rows: Sequence[ClassQuality], mean: float, color: str) -> None:
    """Horizontal bars of PQ, the last row on top, and a line at the mean."""
    positions = range(len(rows))
    axes.barh(positions, [row.pq for row in rows], color=color, alpha=0.75, height=0.8)
    names = [row.name if len(row.name) <= 28 else f"{row.name[:27]}…" for row in rows]
    axes.set_yticks(positions, names, fontsize=7)
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


def _loss_curves(records: dict[int, dict[str, float]]) -> Curves:
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


def _quality_curves(records: dict[int, dict[str, float]]) -> Curves:
    """PQ, PQ_th and PQ_st; Detectron2 puts the data set's name in front where there are several."""
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
        smooth = _running_mean(values, window)
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


def _running_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Mean over the window around each value, cut at the ends."""
    sums = np.concatenate([[0.0], values.cumsum()])
    index = np.arange(len(values))
    # As far to the left as to the right, or the ends would lag behind.
    half = np.minimum(np.minimum(index, len(values) - 1 - index), window // 2)
    return (sums[index + half + 1] - sums[index - half]) / (2 * half + 1)
