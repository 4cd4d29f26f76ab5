"""The augmentations of the config (``INPUT.AUGMENTATION``), made of Detectron2's."""

from collections.abc import Callable

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from numpy.typing import NDArray

from .resize import LIBRARIES, RandomCrop, Resize

# DETR's crop (datasets/coco.py): half of the images, after a resize to one of these.
_CROP_PROBABILITY = 0.5
_SHORT_SIDE_BEFORE_CROP = [400, 500, 600]
_LONG_SIDE_BEFORE_CROP = 10_000  # so that one row of pixels does not become gigabytes

# SSD's photometric distortion (Liu et al., 2016, section 2.2; SSD's data layer), as in Mask2Former.
_BRIGHTNESS = 32
_CONTRAST = (0.5, 1.5)
_SATURATION = (0.5, 1.5)
_HUE = 18  # degrees of OpenCV: 0..179


def build_augmentations(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """
    The geometric augmentations of ``INPUT.AUGMENTATION``.

    In training, "multi_scale" resizes the shorter side, after a random crop of half of the images
    if ``INPUT.CROP.ENABLED`` (DETR). "large_scale_jitter" scales by a random factor, then crops or
    pads to a square (Ghiasi et al., 2021). "fixed_crop" resizes the shorter side, then crops or
    pads to ``INPUT.CROP.SIZE``. All flip. Padding is void.

    Raises:
        ValueError: ``INPUT.AUGMENTATION`` or ``INPUT.RESIZE_LIBRARY`` is unknown, or a size is not
            positive.
    """
    for key in ("MAX_SIZE_TRAIN", "MAX_SIZE_TEST", "IMAGE_SIZE", "MIN_SCALE", "MAX_SCALE"):
        if cfg.INPUT[key] <= 0:
            raise ValueError(f"INPUT.{key} is {cfg.INPUT[key]}, but must be positive.")
    if not is_train:
        test = T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
        return [_with_resize_library(cfg, test)]
    build = _AUGMENTATIONS.get(cfg.INPUT.AUGMENTATION)
    if build is None:
        raise ValueError(
            f"INPUT.AUGMENTATION is '{cfg.INPUT.AUGMENTATION}'; known: {sorted(_AUGMENTATIONS)}"
        )
    augmentations: list[T.Augmentation] = []
    if cfg.INPUT.RANDOM_FLIP != "none":
        horizontal = cfg.INPUT.RANDOM_FLIP == "horizontal"
        augmentations.append(T.RandomFlip(horizontal=horizontal, vertical=not horizontal))
    return augmentations + build(cfg)


def _multi_scale(cfg: CfgNode) -> list[T.Augmentation]:
    augmentations: list[T.Augmentation] = []
    if cfg.INPUT.CROP.ENABLED:
        before = T.ResizeShortestEdge(_SHORT_SIDE_BEFORE_CROP, _LONG_SIDE_BEFORE_CROP, "choice")
        crop = [
            _with_resize_library(cfg, before),
            RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE),
        ]
        augmentations.append(T.RandomApply(T.AugmentationList(crop), prob=_CROP_PROBABILITY))
    return [*augmentations, _resize_shorter_side(cfg)]


def _large_scale_jitter(cfg: CfgNode) -> list[T.Augmentation]:
    size = cfg.INPUT.IMAGE_SIZE
    scale = T.ResizeScale(cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE, size, size)
    return [_with_resize_library(cfg, scale), _fixed_size((size, size))]


def _fixed_crop(cfg: CfgNode) -> list[T.Augmentation]:
    height, width = (int(side) for side in cfg.INPUT.CROP.SIZE)
    return [_resize_shorter_side(cfg), _fixed_size((height, width))]


_AUGMENTATIONS: dict[str, Callable[[CfgNode], list[T.Augmentation]]] = {
    "multi_scale": _multi_scale,
    "large_scale_jitter": _large_scale_jitter,
    "fixed_crop": _fixed_crop,
}


def _resize_shorter_side(cfg: CfgNode) -> T.Augmentation:
    resize = T.ResizeShortestEdge(
        cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
    )
    return _with_resize_library(cfg, resize)


def _with_resize_library(cfg: CfgNode, resize: T.Augmentation) -> T.Augmentation:
    library = cfg.INPUT.RESIZE_LIBRARY
    if library not in LIBRARIES:
        raise ValueError(f"INPUT.RESIZE_LIBRARY is '{library}'; known: {list(LIBRARIES)}")
    return Resize(resize, library)


def _fixed_size(size: tuple[int, int]) -> T.Augmentation:
    # Void; Detectron2's default, 255, may be the id of a segment.
    return T.FixedSizeCrop(size, pad=True, seg_pad_value=0)


def distort_colors(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """
    SSD's photometric distortion: brightness, contrast, saturation and hue, each at random.

    Args:
        image: (h, w, 3), RGB or BGR.

    Returns:
        (h, w, 3). Random numbers are NumPy's global ones, as in Detectron2's augmentations.
    """
    if _coin():
        image = _scale_and_shift(image, 1.0, np.random.uniform(-_BRIGHTNESS, _BRIGHTNESS))
    contrast_first = _coin()
    if contrast_first:
        image = _random_contrast(image)
    saturation = np.random.uniform(*_SATURATION) if _coin() else 1.0
    hue = np.random.randint(-_HUE, _HUE + 1) if _coin() else 0
    if saturation != 1.0 or hue:
        # The order of channels does not matter: BGR mirrors the hues, and the rotation is random.
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        levels = np.arange(256)
        hues = ((levels + hue) % 180).astype(np.uint8)
        saturations = np.clip(levels * saturation, 0, 255).astype(np.uint8)
        identity = levels.astype(np.uint8)
        tables = np.stack([hues, saturations, identity], axis=-1)[None]  # (1, 256, 3)
        image = np.asarray(cv2.cvtColor(cv2.LUT(hsv, tables), cv2.COLOR_HSV2RGB), dtype=np.uint8)
    return image if contrast_first else _random_contrast(image)


def _coin() -> bool:
    return bool(np.random.randint(2))


def _random_contrast(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return _scale_and_shift(image, np.random.uniform(*_CONTRAST), 0.0) if _coin() else image


def _scale_and_shift(image: NDArray[np.uint8], scale: float, shift: float) -> NDArray[np.uint8]:
    table = np.clip(np.arange(256) * scale + shift, 0, 255).astype(np.uint8)
    return np.asarray(cv2.LUT(image, table), dtype=np.uint8)
