"""Resizing with Pillow (as Detectron2) or with OpenCV (as mmdetection).

When reducing, Pillow averages over the area of a pixel, OpenCV interpolates between neighbours.
When enlarging, they differ by a grey level. OpenCV's nearest pixel is the one at the corner.
"""

from typing import Any

import cv2
import numpy as np
from detectron2.data import transforms as T
from numpy.typing import NDArray


class OpenCVResizeTransform(T.ResizeTransform):
    """Detectron2's resize, with OpenCV's bilinear filter for images, its nearest for masks."""

    def apply_image(self, img: NDArray[Any], interp: Any = None) -> NDArray[Any]:
        """
        Args:
            img: (H, W) or (H, W, 3) of bytes.
            interp: ignored.

        Returns:
            (h, w) or (h, w, 3).
        """
        return self._resize(img, cv2.INTER_LINEAR)

    def apply_segmentation(self, segmentation: NDArray[Any]) -> NDArray[Any]:
        """(H, W) -> (h, w), of bytes."""
        return self._resize(segmentation, cv2.INTER_NEAREST)

    def _resize(self, array: NDArray[Any], interpolation: int) -> NDArray[Any]:
        contiguous = np.ascontiguousarray(array)  # BGR may be a mirrored view of RGB
        size = (self.new_w, self.new_h)
        return np.asarray(cv2.resize(contiguous, size, interpolation=interpolation))


class Resize(T.Augmentation):
    """Another augmentation's resize, by a chosen library, and with sides of at least 1 pixel."""

    def __init__(self, augmentation: T.Augmentation, library: str) -> None:
        """
        Args:
            augmentation: one of Detectron2's that returns a ``ResizeTransform``. It makes a side of
                0 pixels of an image that is narrow enough.
            library: "pillow" or "opencv".
        """
        super().__init__()
        self.augmentation = augmentation
        self.transform_class = LIBRARIES[library]

    def get_transform(self, image: NDArray[Any]) -> Any:
        """For an image (H, W, 3)."""
        chosen = self.augmentation.get_transform(image)
        if not isinstance(chosen, T.ResizeTransform):  # no resize: the shorter side is 0
            return chosen
        size = (max(1, chosen.new_h), max(1, chosen.new_w))
        return self.transform_class(chosen.h, chosen.w, *size)


class RandomCrop(T.RandomCrop):
    """Detectron2's, with sides of at least 1 pixel."""

    def get_crop_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the crop, of those of the image."""
        height, width = super().get_crop_size(image_size)
        return max(1, height), max(1, width)


LIBRARIES = {"pillow": T.ResizeTransform, "opencv": OpenCVResizeTransform}
