"""Reading images of any mode."""

import io

import cv2
import numpy as np
from detectron2.utils.file_io import PathManager
from numpy.typing import NDArray
from PIL import Image, ImageOps

# What Pillow raises on files that are not images, truncated or damaged.
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

_JPEG_END = b"\xff\xd9"  # without it the file is truncated, which OpenCV accepts


def read_image(path: str, image_format: str = "BGR") -> NDArray[np.uint8]:
    """
    Read an image file of any mode as 8-bit colours and apply its EXIF orientation.

    Grayscale, palette and CMYK images are converted to colours, an alpha channel is dropped (as
    ``detectron2.data.detection_utils.read_image`` does), and 16-bit grayscale is scaled to 8 bits
    (0..65535 to 0..255; Detectron2 clips it at 255).

    Args:
        path: the image file.
        image_format: the order of channels, "RGB" or "BGR" (``cfg.INPUT.FORMAT``).

    Returns:
        (H, W, 3).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a readable image.
    """
    if image_format not in ("RGB", "BGR"):
        raise ValueError(f"INPUT.FORMAT must be 'RGB' or 'BGR', not '{image_format}'.")
    if not PathManager.isfile(path):
        raise FileNotFoundError(
            f"'{path}' does not exist. Complete the data set, or remove the image from its JSON."
        )
    with PathManager.open(path, "rb") as file:
        content = file.read()
    try:
        image: Image.Image = Image.open(io.BytesIO(content))
        if image.format == "JPEG" and image.mode == "RGB" and content.endswith(_JPEG_END):
            pixels = _decode_jpeg(content, image_format)
            if pixels is not None:
                return pixels
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
    except _UNREADABLE as error:
        raise ValueError(
            f"'{path}' is not a readable image ({error}). It may be truncated: copy it again, or "
            "remove it from the data set."
        ) from error
    image = _to_8_bits(image, path)
    rgb = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    return rgb if image_format == "RGB" else np.ascontiguousarray(rgb[:, :, ::-1])


def _decode_jpeg(content: bytes, image_format: str) -> NDArray[np.uint8] | None:
    """Decode with OpenCV: the same pixels as Pillow in 4/5 of the time. None if it fails."""
    flag = cv2.IMREAD_COLOR_RGB if image_format == "RGB" else cv2.IMREAD_COLOR_BGR
    pixels = cv2.imdecode(np.frombuffer(content, dtype=np.uint8), flag)
    return None if pixels is None else np.asarray(pixels, dtype=np.uint8)


def _to_8_bits(image: Image.Image, path: str) -> Image.Image:
    if image.mode == "F":
        raise ValueError(f"'{path}' has floating-point pixels. Convert it to 8 or 16 bits.")
    if image.mode.startswith("I"):  # 16-bit grayscale: "I;16" and its byte orders, or "I"
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError(
                f"'{path}' has more than 16 bits per pixel. Convert it to 8 or 16 bits."
            )
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")  # Pillow warns when transparency is dropped in one step
    return image
