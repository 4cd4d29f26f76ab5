"""Pictures of panoptic segmentations.

Shapes: H x W pixels of an image.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from detectron2.data import Metadata
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import Visualizer
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from psf.images import read_image

from .charts import plain_text, write_figure
from .ground_truth import PanopticSegmentation

# Longest side of a picture on a contact sheet, in pixels: for small images and for photos.
_CELL_RANGE = (384, 640)
_GAP = 8  # between pictures
_CAPTION = 24  # height of a line of text
_DPI = 100

_ALPHA = 0.7  # of segments over the image, as Detectron2
_SMALL_AREA = 1000  # pixels of a segment's box; a name would hide the segment


class Sample(NamedTuple):
    """One row of a contact sheet."""

    dataset_dict: dict[str, Any]  # with file_name
    ground_truth: PanopticSegmentation
    prediction: PanopticSegmentation


class Drawing(NamedTuple):
    """An image, and the segmentations to draw over it."""

    caption: str
    image: NDArray[np.uint8]  # (H, W, 3), RGB
    segmentations: Sequence[PanopticSegmentation]


class SheetRow(NamedTuple):
    """A row of pictures of one size, one per column."""

    caption: str
    pictures: list[NDArray[np.uint8]]  # (h, w, 3)


@plain_text
def draw_panoptic(
    image_rgb: NDArray[np.uint8],
    panoptic_seg: Tensor,
    segments_info: Sequence[dict[str, Any]],
    metadata: Metadata,
    *,
    scale: float = 1.0,
) -> NDArray[np.uint8]:
    """
    Draw segments and their names over an image.

    Masks are painted pixel by pixel, with their holes and smallest parts. Detectron2's Visualizer,
    which draws polygons, only writes the names.

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
    areas = dict(zip(*np.unique(ids, return_counts=True), strict=True))
    present = sorted((i for i in segments_info if i["id"] in areas), key=lambda i: -areas[i["id"]])
    present.sort(key=lambda info: bool(info["isthing"]))  # stable: stuff first, large ones first
    generator = np.random.default_rng(0)
    painted = image.astype(np.float32)
    texts = []
    for info in present:
        mask = (ids == info["id"]).astype(np.uint8)
        color = _segment_color(info, metadata, generator)
        inside = cv2.erode(mask, np.ones((3, 3), dtype=np.uint8), borderValue=0)
        painted[mask == 1] += _ALPHA * (color - painted[mask == 1])
        painted[mask > inside] = color
        texts.append((_segment_name(info, metadata), _text_position(mask), color))
    # 8 points: many labels fit.
    visualizer = Visualizer(painted.round().astype(np.uint8), metadata, font_size_scale=0.8)
    for name, position, color in texts:
        visualizer.draw_text(name.replace("$", r"\$"), position, color=tuple(color / 510 + 0.5))
    return visualizer.output.get_image()


def _segment_color(
    info: Mapping[str, Any], metadata: Metadata, generator: np.random.Generator
) -> NDArray[np.float32]:
    """The colour of a class, (3,) in 0..255; for things with some variation."""
    kind, category_id = ("thing" if info["isthing"] else "stuff"), info["category_id"]
    colors = metadata.get(f"{kind}_colors", colormap(rgb=True))
    color = np.array(colors[category_id % len(colors)], dtype=np.float32)
    variation = generator.uniform(-64, 64, 3) if info["isthing"] else 0
    return np.clip(color + variation, 0, 255).astype(np.float32)


def _segment_name(info: Mapping[str, Any], metadata: Metadata) -> str:
    kind = "thing" if info["isthing"] else "stuff"
    name = str(metadata.get(f"{kind}_classes")[info["category_id"]])
    score = f" {100 * info['score']:.0f}%" if info["isthing"] and "score" in info else ""
    return f"{name}{score}{'|crowd' if info.get('iscrowd') else ''}"


def _text_position(mask: NDArray[np.uint8]) -> tuple[int, int]:
    """The pixel (x, y) of a mask (H, W) that is farthest from its border; below small masks."""
    rows, columns = mask.nonzero()
    rows, columns = np.unique(rows), np.unique(columns)
    if (rows[-1] - rows[0]) * (columns[-1] - columns[0]) < _SMALL_AREA:
        return int(columns[0]), int(rows[-1]) + 1
    padded = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    depth = cv2.distanceTransform(padded, cv2.DIST_L2, 3)[1:-1, 1:-1]
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    return int(x), int(y)


def resize_picture(array: NDArray[Any], scale: float) -> NDArray[Any]:
    """Scale an image (H, W, 3), or a map (H, W) to its nearest values."""
    if scale == 1:
        return array
    size = [max(1, round(scale * side)) for side in array.shape[:2]]
    smooth = array.ndim == 3 and scale < 1
    resample = Image.Resampling.BOX if smooth else Image.Resampling.NEAREST
    return np.array(Image.fromarray(array).resize(size[::-1], resample))


def write_contact_sheet(
    samples: Sequence[Sample], metadata: Metadata, path: str | os.PathLike[str]
) -> None:
    """
    Write a picture with a row for each sample: image, ground truth, prediction.

    Small images are enlarged and big ones reduced.
    """
    drawings = []
    for record, truth, prediction in samples:
        name = record["file_name"]
        drawings.append(Drawing(Path(name).name, read_image(name, "RGB"), (truth, prediction)))
    write_drawings(drawings, metadata, ("image", "ground truth", "prediction"), path)


def write_drawings(
    drawings: Sequence[Drawing],
    metadata: Metadata,
    titles: Sequence[str],
    path: str | os.PathLike[str],
) -> None:
    """As :func:`write_contact_sheet`, with any number of segmentations of each image."""
    cell = cell_size([drawing.image for drawing in drawings])
    rows = []
    for caption, image, segmentations in drawings:
        scale = cell / max(image.shape[:2])
        drawn = [draw_panoptic(image, *s, metadata, scale=scale) for s in segmentations]
        rows.append(SheetRow(caption, [resize_picture(image, scale), *drawn]))
    write_sheet(rows, titles, cell, path)


def cell_size(images: Sequence[NDArray[np.uint8]]) -> int:
    """The longest side of pictures of these images on a sheet, in pixels."""
    least, most = _CELL_RANGE
    return min(max([least, *(max(image.shape[:2]) for image in images)]), most)


@plain_text
def write_sheet(
    rows: Sequence[SheetRow], titles: Sequence[str], cell: int, path: str | os.PathLike[str]
) -> None:
    """Write rows of pictures below each other, in columns as wide as ``cell``."""
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
    write_figure(figure, path)


def _write(figure: Figure, text: str, x: float, y: float, **style: Any) -> None:
    """Write text at pixel (x, y) from the top left corner."""
    width, height = figure.get_size_inches() * figure.dpi
    figure.text(x / width, 1 - y / height, text, va="center", parse_math=False, **style)
