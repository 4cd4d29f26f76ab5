"""Geometric augmentations in one step: only the part of the image that is kept is resampled, once.

Detectron2 applies its transforms one after the other, each to the whole image. The transforms that
scale, crop, pad and flip can be composed beforehand: what stays is a window of the image file, to
be scaled, perhaps mirrored, and placed on a canvas.

Shapes: H x W the image file, h x w the result.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from detectron2.data import transforms as T
from fvcore.transforms.transform import NoOpTransform
from numpy.typing import NDArray


class Axis(NamedTuple):
    """Where the content of one axis (y or x) comes from and goes to."""

    start: float  # of the window, in pixels of the file
    stop: float
    mirrored: bool
    placed_start: float  # of the window on the canvas
    placed_stop: float
    size: int  # of the canvas

    def scale(self, new_size: int) -> "Axis":
        factor = new_size / self.size
        placed = (self.placed_start * factor, self.placed_stop * factor)
        return Axis(self.start, self.stop, self.mirrored, *placed, new_size)

    def crop(self, offset: int, size: int) -> "Axis":
        """Keep [offset, offset + size) of the canvas, or less at its end."""
        size = min(size, self.size - offset)
        low = max(self.placed_start, offset)
        high = max(low, min(self.placed_stop, offset + size))
        extent = self.placed_stop - self.placed_start
        ratio = (self.stop - self.start) / extent if extent else 0.0
        cut = ((low - self.placed_start) * ratio, (self.placed_stop - high) * ratio)
        from_start, from_stop = reversed(cut) if self.mirrored else cut
        return Axis(
            self.start + from_start,
            self.stop - from_stop,
            self.mirrored,
            low - offset,
            high - offset,
            size,
        )

    def pad(self, before: int, after: int) -> "Axis":
        return self._replace(
            placed_start=self.placed_start + before,
            placed_stop=self.placed_stop + before,
            size=self.size + before + after,
        )

    def flip(self) -> "Axis":
        placed = (self.size - self.placed_stop, self.size - self.placed_start)
        return Axis(self.start, self.stop, not self.mirrored, *placed, self.size)

    def window(self, file_size: int) -> slice:
        """The window in whole pixels, at least one."""
        start = min(max(0, round(self.start)), file_size - 1)
        return slice(start, min(file_size, max(start + 1, round(self.stop))))

    def placement(self) -> slice:
        start = min(max(0, round(self.placed_start)), self.size - 1)
        return slice(start, min(self.size, max(start + 1, round(self.placed_stop))))


class Geometry(NamedTuple):
    """What geometric augmentations do to an image."""

    y: Axis
    x: Axis
    pad_value: float  # of the image; that of an index map is 0, void


def compose(height: int, width: int, transforms: Sequence[Any]) -> Geometry:
    """
    What transforms do to an image of H x W.

    Raises:
        TypeError: a transform does not only scale, crop, pad or flip.
    """
    y, x = (Axis(0.0, float(side), False, 0.0, float(side), side) for side in (height, width))
    pad_value = 0.0
    for transform in transforms:
        if isinstance(transform, T.ResizeTransform):
            y, x = y.scale(transform.new_h), x.scale(transform.new_w)
        elif isinstance(transform, T.CropTransform):
            y, x = y.crop(transform.y0, transform.h), x.crop(transform.x0, transform.w)
        elif isinstance(transform, T.PadTransform):
            y, x = y.pad(transform.y0, transform.y1), x.pad(transform.x0, transform.x1)
            pad_value = transform.pad_value
        elif isinstance(transform, T.HFlipTransform):
            x = x.flip()
        elif isinstance(transform, T.VFlipTransform):
            y = y.flip()
        elif not isinstance(transform, NoOpTransform):
            raise TypeError(
                f"INPUT.RESAMPLING 'fast' cannot compose {type(transform).__name__}. Use 'exact'."
            )
    return Geometry(y, x, pad_value)


def resample_image(image: NDArray[np.uint8], geometry: Geometry) -> NDArray[np.uint8]:
    """
    Args:
        image: (H, W, 3).
        geometry: composed for H x W.

    Returns:
        (h, w, 3): bilinear where enlarged, averages over areas where reduced.
    """
    y, x = geometry.y, geometry.x
    rows, columns = y.placement(), x.placement()
    size = (columns.stop - columns.start, rows.stop - rows.start)
    window = image[y.window(image.shape[0]), x.window(image.shape[1])]
    reduces = size[0] * size[1] < window.shape[0] * window.shape[1]
    resized = _flip(window, geometry)
    if size != (window.shape[1], window.shape[0]):
        method = cv2.INTER_AREA if reduces else cv2.INTER_LINEAR
        resized = np.asarray(cv2.resize(resized, size, interpolation=method), dtype=np.uint8)
    return _place(resized, geometry, rows, columns, geometry.pad_value)


def resample_indices(index_map: NDArray[np.integer], geometry: Geometry) -> NDArray[np.integer]:
    """
    Args:
        index_map: (H, W), 0 is void.
        geometry: composed for H x W.

    Returns:
        (h, w), the nearest pixel of the same window as the image's.
    """
    y, x = geometry.y, geometry.x
    rows, columns = y.placement(), x.placement()
    window = index_map[y.window(index_map.shape[0]), x.window(index_map.shape[1])]
    nearest_y = _nearest(rows.stop - rows.start, window.shape[0], y.mirrored)
    nearest_x = _nearest(columns.stop - columns.start, window.shape[1], x.mirrored)
    resized = window.take(nearest_y, axis=0).take(nearest_x, axis=1)
    return _place(resized, geometry, rows, columns, 0)


def _nearest(size: int, source_size: int, mirrored: bool) -> NDArray[np.intp]:
    """For every pixel the source pixel that its centre lies in."""
    index = ((np.arange(size) + 0.5) * (source_size / size)).astype(np.intp)
    return index[::-1] if mirrored else index


def _flip(image: NDArray[np.uint8], geometry: Geometry) -> NDArray[np.uint8]:
    mirrored = (geometry.y.mirrored, geometry.x.mirrored)
    code = {(True, False): 0, (False, True): 1, (True, True): -1}.get(mirrored)
    return image if code is None else np.asarray(cv2.flip(image, code), dtype=np.uint8)


def _place(
    content: NDArray[Any], geometry: Geometry, rows: slice, columns: slice, pad_value: float
) -> NDArray[Any]:
    """Put the content on the canvas, which it usually fills."""
    size = (geometry.y.size, geometry.x.size)
    if content.shape[:2] == size:
        return content
    canvas = np.full((*size, *content.shape[2:]), pad_value, dtype=content.dtype)
    canvas[rows, columns] = content
    return canvas
