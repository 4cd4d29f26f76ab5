"""The PNGs of panoptic segmentations: a pixel's colours stand for the id R + 256 G + 65536 B.

Reading RGB files goes through ``psf._image``, which is built with the extension and several times
faster than general decoders; files of other kinds (palette, alpha), and all where it is not built
or ``PSF_DISABLE_EXTENSION=1`` is set, are read by Pillow. The ids are the same.

Shapes: H x W pixels.
"""

import importlib
import importlib.util
import io
import os
import struct
from types import ModuleType

import cv2
import numpy as np
from detectron2.utils.file_io import PathManager
from numpy.typing import NDArray
from PIL import Image

# Signature and first chunk up to the interlace method; a decoder of its own needs these values.
_HEADER = struct.Struct(">8s8xIIBB2xB")
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_RGB_8_BIT_NOT_INTERLACED = (8, 2, 0)

# What Pillow raises on files that are no images, truncated or damaged.
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def _find_extension() -> ModuleType | None:
    if os.environ.get("PSF_DISABLE_EXTENSION") == "1":
        return None
    name = "psf._image"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


image_extension = _find_extension()


def has_image_extension() -> bool:
    """Whether ``psf._image`` is in use."""
    return image_extension is not None


def rgb_png_size(content: bytes) -> tuple[int, int] | None:
    """(height, width) by the header of an 8-bit RGB PNG that is not interlaced; None: another."""
    if len(content) < _HEADER.size:
        return None
    signature, width, height, *kind = _HEADER.unpack_from(content)
    if signature != _SIGNATURE or tuple(kind) != _RGB_8_BIT_NOT_INTERLACED:
        return None
    return height, width


def read_panoptic_ids(path: str) -> NDArray[np.uint32]:
    """
    Read a COCO panoptic PNG.

    Returns:
        (H, W), the id R + 256 G + 65536 B of the segment at each pixel; 0 is void.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a readable image.
    """
    if not PathManager.isfile(path):
        raise FileNotFoundError(
            f"The panoptic PNG '{path}' does not exist. Complete the data set, or take the image "
            "out of its JSON."
        )
    with PathManager.open(path, "rb") as file:
        content = file.read()
    try:
        return _decode(content)
    except _UNREADABLE as error:
        raise ValueError(
            f"'{path}' is not a readable image ({error}). It may be truncated: copy it again, or "
            "take it out of the data set."
        ) from error


def _decode(content: bytes) -> NDArray[np.uint32]:
    size = rgb_png_size(content)
    if image_extension is not None and size is not None:
        height, width = size
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and width * height > 2 * limit:  # as Pillow does
            raise ValueError(f"its header says {width} x {height} pixels")
        ids = np.empty(size, dtype=np.uint32)
        image_extension.decode_ids(content, ids, height, width)
        return ids
    with Image.open(io.BytesIO(content)) as image:
        rgba = np.asarray(image.convert("RGBA"))
    return rgba.view(np.dtype("<u4"))[:, :, 0] & np.uint32(0xFFFFFF)


def write_panoptic_ids(path: str, ids: NDArray[np.integer]) -> None:
    """
    Write a COCO panoptic PNG.

    Args:
        path: the file; its folder must exist.
        ids: (H, W), in 0..16777215.
    """
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < 1 << 24:
        raise ValueError(
            f"'{path}': ids {int(ids.min())}..{int(ids.max())} do not fit into the colours of a "
            "PNG. Number the segments with 1..16777215."
        )
    rgba = np.ascontiguousarray(ids, dtype="<u4").view(np.uint8).reshape(*ids.shape, 4)
    # Run-length compression: fastest here, and for flat images as small as the default.
    fast = [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE, cv2.IMWRITE_PNG_COMPRESSION, 1]
    _, png = cv2.imencode(".png", cv2.cvtColor(rgba, cv2.COLOR_RGBA2BGR), fast)
    with PathManager.open(path, "wb") as file:
        file.write(png.tobytes())
