"""Geometric augmentations with the bits of their transforms, but only where they are kept.

Detectron2 resizes the whole image and then crops it. Here a resize that is followed by a crop makes
the crop's pixels only; enlarging runs in ``psf._image``, which has the bits of Pillow's filter.
Reducing is left to Pillow: versions of it differ in whether rows or columns are filtered first.
What OpenCV resizes (:class:`.OpenCVResizeTransform`) is cropped afterwards.

Shapes: H x W the image file, h x w the result.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from detectron2.data import transforms as T
from numpy.typing import NDArray
from PIL import Image

from psf.panoptic_png import image_extension


class _Step(NamedTuple):
    """A transform, and the part of its result that is kept."""

    transform: Any
    rows: slice
    columns: slice


def image_exactly(image: NDArray[np.uint8], transforms: Sequence[Any]) -> NDArray[np.uint8]:
    """
    Args:
        image: (H, W, 3).
        transforms: Detectron2's, to be applied one after the other.

    Returns:
        (h, w, 3), as they give.
    """
    for transform, rows, columns in _merge_crops(transforms):
        if type(transform) is T.ResizeTransform:
            image = _resize(image, transform, rows, columns)
        else:
            image = transform.apply_image(image)[rows, columns]
    return image


def index_map_exactly(
    index_map: NDArray[np.integer], transforms: Sequence[Any]
) -> NDArray[np.integer]:
    """
    Args:
        index_map: (H, W), of any integer type.
        transforms: Detectron2's, to be applied one after the other.

    Returns:
        (h, w), what their ``apply_segmentation`` gives for a segmentation of bytes.
    """
    for transform, rows, columns in _merge_crops(transforms):
        if type(transform) is T.ResizeTransform:
            y = _nearest(transform.h, transform.new_h)[rows]
            x = _nearest(transform.w, transform.new_w)[columns]
            # Rows are copied as a whole: leave as few as possible to the copy pixel by pixel.
            if len(y) < len(index_map):
                index_map = index_map[y].take(x, axis=1)
            else:
                index_map = index_map.take(x, axis=1)[y]
        else:
            index_map = _apply_segmentation(index_map, transform)[rows, columns]
    return index_map


def _merge_crops(transforms: Sequence[Any]) -> list[_Step]:
    """Make each crop a part of what comes before it."""
    steps: list[_Step] = []
    for transform in transforms:
        if isinstance(transform, T.CropTransform) and steps:
            before = steps.pop()
            rows = _within(before.rows, transform.y0, transform.h)
            columns = _within(before.columns, transform.x0, transform.w)
            steps.append(_Step(before.transform, rows, columns))
        else:
            steps.append(_Step(transform, slice(None), slice(None)))
    return steps


def _within(outer: slice, offset: int, size: int) -> slice:
    """[offset, offset + size) of a slice, or less at its end."""
    start = (outer.start or 0) + offset
    stop = start + size
    return slice(start, stop if outer.stop is None else min(stop, outer.stop))


def _resize(
    image: NDArray[np.uint8], transform: Any, rows: slice, columns: slice
) -> NDArray[np.uint8]:
    new_h, new_w = transform.new_h, transform.new_w
    enlarges = new_h >= transform.h and new_w >= transform.w
    if image_extension is None or not enlarges or transform.interp != Image.Resampling.BILINEAR:
        return transform.apply_image(image)[rows, columns]
    y, y_stop, _ = rows.indices(new_h)
    x, x_stop, _ = columns.indices(new_w)
    result = np.empty((y_stop - y, x_stop - x, 3), dtype=np.uint8)
    image_extension.resize_bilinear(
        np.ascontiguousarray(image),
        (transform.h, transform.w),
        (new_h, new_w),
        (y, x, y_stop - y, x_stop - x),
        result,
    )
    return result


def _nearest(size: int, new_size: int) -> NDArray[np.intp]:
    """The source pixels of Pillow's nearest filter, which adds up steps of size / new_size."""
    step = size / new_size
    steps = np.full(new_size, step)
    steps[0] = step * 0.5
    return steps.cumsum().astype(np.intp)


def _apply_segmentation(index_map: NDArray[np.integer], transform: Any) -> NDArray[np.integer]:
    """Byte by byte: only for uint8 are all of Detectron2's transforms exact."""
    result = transform.apply_segmentation(index_map.astype(np.uint8))
    if index_map.dtype == np.uint8:
        return result
    high_byte = transform.apply_segmentation((index_map >> 8).astype(np.uint8))
    return result.astype(np.int32) + 256 * high_byte.astype(np.int32)
