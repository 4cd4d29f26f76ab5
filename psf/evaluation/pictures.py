"""Pictures of panoptic segmentations.

Shapes: H x W pixels of an image.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.data import Metadata
from detectron2.utils.visualizer import Visualizer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from psf.images import read_image

from .ground_truth import PanopticSegmentation

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


class SheetRow(NamedTuple):
    """A row of pictures of one size, one per column."""

    caption: str
    pictures: list[NDArray[np.uint8]]  # (h, w, 3)


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

    The colours are repeatable, and NumPy's random state is restored.

    Args:
        image_rgb: (H, W, 3).
        panoptic_seg: (H, W) int32, the id of the segment at each pixel.
        segments_info: id, category_id (contiguous), isthing and possibly score and iscrowd of each
            segment. Other ids are not drawn.
        metadata: of the data set, with names and colours of the classes.
        scale: size of the picture relative to the image; the size of the text is fixed.

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
    """Detectron2 draws the colours of instances from NumPy's global generator."""
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
        path: the PNG to write; its folder is created.
    """
    images = [read_image(sample.dataset_dict["file_name"], "RGB") for sample in samples]
    cell = cell_size(images)
    rows = []
    for image, (record, ground_truth, prediction) in zip(images, samples, strict=True):
        scale = cell / max(image.shape[:2])
        pictures = [
            resize_picture(image, scale),
            draw_panoptic(image, *ground_truth, metadata, scale=scale),
            draw_panoptic(image, *prediction, metadata, scale=scale),
        ]
        rows.append(SheetRow(Path(record["file_name"]).name, pictures))
    write_sheet(rows, ("image", "ground truth", "prediction"), cell, path)


def cell_size(images: Sequence[NDArray[np.uint8]]) -> int:
    """The longest side of pictures of these images on a sheet, in pixels."""
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
        path: the PNG to write; its folder is created.
    """
    width = len(titles) * (cell + _GAP) + _GAP
    height = _CAPTION + sum(_CAPTION + row.pictures[0].shape[0] + _GAP for row in rows)
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
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
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(os.fspath(path))


def _write(figure: Figure, text: str, x: float, y: float, **style: Any) -> None:
    """Write text at pixel (x, y) from the top left corner."""
    width, height = figure.get_size_inches() * figure.dpi
    figure.text(x / width, 1 - y / height, text, va="center", **style)
