"""Reading images of any mode."""

import contextlib
import io
from collections.abc import Iterator

import cv2
import numpy as np
from detectron2.utils.file_io import PathManager
from numpy.typing import NDArray
from PIL import Image, ImageOps

from psf.panoptic_png import image_extension, rgb_png_size

# What Pillow raises on files that are no images, truncated or damaged.
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

# Markers of a JPEG (ITU T.81, annex B): its ends, and the frames that say how many components.
_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_JPEG_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive


def read_image(path: str, image_format: str = "BGR", *, fast: bool = False) -> NDArray[np.uint8]:
    """
    Read an image file of any mode as 8-bit colours, upright by its EXIF orientation.

    Grayscale, palette and CMYK images are converted to colours, an alpha channel is dropped (as
    ``detectron2.data.detection_utils.read_image`` does), and 16-bit grayscale is scaled to 8 bits
    (0..65535 to 0..255; Detectron2's reader clips it at 255). Plain PNGs are decoded by
    ``psf._image`` where it is in use, to the same pixels as by Pillow.

    Args:
        path: the image file.
        image_format: the order of channels, "RGB" or "BGR" (``cfg.INPUT.FORMAT``).
        fast: decode complete colour JPEGs with OpenCV, whose last bits may differ from Pillow's.

    Returns:
        (H, W, 3).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a readable image.
    """
    if image_format not in ("RGB", "BGR"):
        raise ValueError(f"INPUT.FORMAT must be 'RGB' or 'BGR', not '{image_format}'.")
    content = _read(path)
    if fast and _is_whole_color_jpeg(content):
        flag = cv2.IMREAD_COLOR_RGB if image_format == "RGB" else cv2.IMREAD_COLOR_BGR
        pixels = cv2.imdecode(np.frombuffer(content, dtype=np.uint8), flag)
        if pixels is not None:  # else Pillow says what is wrong
            return np.asarray(pixels, dtype=np.uint8)
    plain = _decode_plain_png(content, image_format)
    if plain is not None:
        return plain
    with _name_damaged(path):
        image: Image.Image = Image.open(io.BytesIO(content))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
    image = _to_8bit(image, path)
    rgb = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    return rgb if image_format == "RGB" else rgb[:, :, ::-1]


def _read(path: str) -> bytes:
    if not PathManager.isfile(path):
        raise FileNotFoundError(
            f"'{path}' does not exist. Complete the data set, or take the image out of its JSON."
        )
    with PathManager.open(path, "rb") as file:
        return file.read()


def _decode_plain_png(content: bytes, image_format: str) -> NDArray[np.uint8] | None:
    """Its pixels (H, W, 3), or None if it is no plain PNG, or damaged, or very large."""
    size = rgb_png_size(content)
    if image_extension is None or size is None:
        return None
    if Image.MAX_IMAGE_PIXELS is not None and size[0] * size[1] > Image.MAX_IMAGE_PIXELS:
        return None  # Pillow warns, or refuses it
    pixels = np.empty((*size, 3), dtype=np.uint8)
    try:
        image_extension.decode_pixels(content, pixels, *size, image_format == "BGR")
    except ValueError:
        return None  # Pillow says what is wrong, or takes what chunks say into account
    return pixels


def _is_whole_color_jpeg(content: bytes) -> bool:
    """Whether it has three components, and an end: what was cut off OpenCV would fill with gray."""
    if not (content.startswith(_JPEG_START) and content.endswith(_JPEG_END)):
        return False
    at = 2
    while at + 10 <= len(content) and content[at] == 0xFF:
        if content[at + 1] in _JPEG_FRAMES:
            return content[at + 9] == 3
        at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return False


@contextlib.contextmanager
def _name_damaged(path: str) -> Iterator[None]:
    try:
        yield
    except _UNREADABLE as error:
        raise ValueError(
            f"'{path}' is not a readable image ({error}). It may be truncated: copy it again, or "
            "take it out of the data set."
        ) from error


def _to_8bit(image: Image.Image, path: str) -> Image.Image:
    if image.mode == "F":
        raise ValueError(f"'{path}' has floating-point pixels. Convert it to 8 or 16 bits.")
    if image.mode.startswith("I"):  # 16-bit grayscale: "I;16" and its byte orders, or "I"
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError(f"'{path}' has more than 16 bits a pixel. Convert it to 8 or 16 bits.")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")  # Pillow warns when transparency is dropped in one step
    return image
