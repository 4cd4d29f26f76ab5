"""Applies augmentations bit for bit as Detectron2, but resizes only what the crop behind it keeps.

Detectron2 resizes the whole image and then crops it. :func:`augment` chooses the transforms first,
by the size of the image, and joins each crop with the resize before it.

Shapes: H x W the image file, h x w the result.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from detectron2.data import transforms as T
from fvcore.transforms.transform import NoOpTransform
from numpy.typing import NDArray
from PIL import Image

from .resize import RandomCrop, Resize


class Augmented(NamedTuple):
    """An augmented image, and the transforms that were applied to it."""

    image: NDArray[np.uint8]  # (h, w, 3)
    transforms: Sequence[Any]  # Detectron2's, without lists


def augment(image: NDArray[np.uint8], augmentations: T.AugmentationList) -> Augmented:
    """Apply augmentations of Detectron2 to an image (H, W, 3)."""
    if not _depends_on_size_only(augmentations):
        aug_input = T.AugInput(image)
        transforms = augmentations(aug_input).transforms
        return Augmented(aug_input.image, transforms)
    size = SizeInput(image.shape[0], image.shape[1])
    augmentations(size)
    return Augmented(transform_image(image, size.transforms), size.transforms)


_SIZE_ONLY = (
    T.FixedSizeCrop,
    RandomCrop,
    T.RandomCrop,
    T.RandomFlip,
    T.Resize,
    T.ResizeScale,
    T.ResizeShortestEdge,
)


def _depends_on_size_only(augmentation: T.Augmentation) -> bool:
    if isinstance(augmentation, T.AugmentationList):
        return all(_depends_on_size_only(each) for each in augmentation.augs)
    if isinstance(augmentation, T.RandomApply):
        return _depends_on_size_only(augmentation.aug)
    if isinstance(augmentation, Resize):
        return _depends_on_size_only(augmentation.augmentation)
    return type(augmentation) in _SIZE_ONLY


class SizeInput:
    """
    The input of augmentations that depend on the size of the image only.

    ``image`` has the right shape but takes no memory; the chosen transforms are collected.
    """

    def __init__(self, height: int, width: int) -> None:
        self.image = np.broadcast_to(np.uint8(0), (height, width, 3))
        self.transforms: list[Any] = []  # without lists

    def transform(self, transform: Any) -> None:
        """Called by Detectron2's augmentations with what they have chosen."""
        if isinstance(transform, T.TransformList):
            for each in transform.transforms:
                self.transform(each)
            return
        height, width = self.image.shape[:2]
        if isinstance(transform, T.ResizeTransform):
            height, width = transform.new_h, transform.new_w
        elif isinstance(transform, T.CropTransform):
            height = min(transform.h, height - transform.y0)
            width = min(transform.w, width - transform.x0)
        elif isinstance(transform, T.PadTransform):
            height += transform.y0 + transform.y1
            width += transform.x0 + transform.x1
        self.image = np.broadcast_to(np.uint8(0), (height, width, 3))
        if not isinstance(transform, NoOpTransform):
            self.transforms.append(transform)


class _Step(NamedTuple):
    """A transform, and the part of its result that is kept."""

    transform: Any
    rows: slice
    columns: slice


def transform_image(image: NDArray[np.uint8], transforms: Sequence[Any]) -> NDArray[np.uint8]:
    """
    Args:
        image: (H, W, 3).
        transforms: Detectron2's, in this order.

    Returns:
        (h, w, 3), equal to their ``apply_image``.
    """
    for transform, rows, columns in _join_crops(transforms):
        if type(transform) is T.ResizeTransform:
            image = _resize(image, transform, rows, columns)
        else:
            image = transform.apply_image(image)[rows, columns]
    return image


def transform_index_map(
    index_map: NDArray[np.integer], transforms: Sequence[Any]
) -> NDArray[np.integer]:
    """
    Args:
        index_map: (H, W), of any integer type.
        transforms: Detectron2's, in this order.

    Returns:
        (h, w), equal to their ``apply_segmentation`` for a segmentation of bytes.
    """
    for transform, rows, columns in _join_crops(transforms):
        if type(transform) is T.ResizeTransform:
            y = _nearest(transform.h, transform.new_h)[rows]
            x = _nearest(transform.w, transform.new_w)[columns]
            # Rows are copied as a whole, so the fewer of them go through the copy by pixels.
            if len(y) < len(index_map):
                index_map = index_map[y].take(x, axis=1)
            else:
                index_map = index_map.take(x, axis=1)[y]
        else:
            index_map = _apply_segmentation(index_map, transform)[rows, columns]
    return index_map


def _join_crops(transforms: Sequence[Any]) -> list[_Step]:
    """Make each crop a part of the transform before it."""
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
    """
    The window ``rows, columns`` of the resized image.

    Pillow filters along the rows, rounds to bytes, then filters along the columns. The first needs
    only the rows around the window, the second only the columns of the window.
    """
    image = _contiguous(image)
    height, new_height, new_width = transform.h, transform.new_h, transform.new_w
    # Versions of Pillow differ in which axis they reduce first.
    enlarges = new_height >= height and new_width >= transform.w
    top, bottom, _ = rows.indices(new_height)
    left, right, _ = columns.indices(new_width)
    is_all = (bottom - top, right - left) == (new_height, new_width)
    if not enlarges or is_all or transform.interp != Image.Resampling.BILINEAR:
        return transform.apply_image(image)[rows, columns]
    # A row is interpolated between two source rows; take one more on either side.
    first = max(0, int(top * height / new_height) - 2)
    stop = min(height, int(bottom * height / new_height) + 3)
    wide = Image.fromarray(image[first:stop]).resize((new_width, stop - first), transform.interp)
    # The rows that the window does not need become black.
    window = wide.crop((left, -first, right, height - first))
    tall = window.resize((right - left, new_height), transform.interp)
    return np.asarray(tall.crop((0, top, right - left, bottom)))


def _contiguous(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """``np.ascontiguousarray``, but ten times faster for an image that is flipped horizontally."""
    if image.strides[1] < 0:
        return np.asarray(cv2.flip(image[:, ::-1], 1), dtype=np.uint8)
    return np.ascontiguousarray(image)


def _nearest(size: int, new_size: int) -> NDArray[np.intp]:
    """The source pixels of Pillow's nearest filter, which adds up steps of size / new_size."""
    step = size / new_size
    steps = np.full(new_size, step)
    steps[0] = step * 0.5
    return steps.cumsum().astype(np.intp)


def _apply_segmentation(index_map: NDArray[np.integer], transform: Any) -> NDArray[np.integer]:
    """Byte by byte: not all of Detectron2's transforms are exact for larger integers."""
    result = transform.apply_segmentation(index_map.astype(np.uint8))
    if index_map.dtype == np.uint8:
        return result
    high_byte = transform.apply_segmentation((index_map >> 8).astype(np.uint8))
    return result.astype(np.int32) + 256 * high_byte.astype(np.int32)
