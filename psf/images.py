"""The one reader of image files: which formats and sizes are accepted, and what their pixels mean.

Shapes: H x W pixels, after the rotation that the file asks for.
"""

import contextlib
import io
import os
import struct
from collections.abc import Iterator

import cv2
import numpy as np
from detectron2.utils.file_io import PathManager
from numpy.typing import NDArray
from PIL import Image

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow's names

# The most pixels of an image, checked before it is decoded.
PIXELS_VARIABLE = "PSF_MAX_IMAGE_PIXELS"
MOST_PIXELS = 2**30  # OpenCV's limit
DEFAULT_PIXELS = 2**28

# What Pillow's decoders raise on files that are truncated or damaged, as its ``Image.open``.
_UNREADABLE = (
    Image.DecompressionBombError,  # a tile that is larger than its image
    IndexError,
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
)

_JPEG_END = b"\xff\xd9"  # without it the file is truncated, which OpenCV accepts

_ORIENTATION = 0x0112  # EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(path: str, image_format: str = "BGR") -> NDArray[np.uint8]:
    """
    Read an image file of any mode as 8-bit colours, rotated as its EXIF or XMP data say.

    Grayscale, palette and CMYK images are converted to colours, an alpha channel is dropped (as
    ``detectron2.data.detection_utils.read_image`` does), and 16-bit grayscale is scaled to 8 bits
    (0..65535 to 0..255; Detectron2 clips it at 255). Of several pictures in a file, the first is
    read. EXIF data that are damaged are ignored.

    Args:
        path: the image file.
        image_format: the order of channels, "RGB" or "BGR" (``cfg.INPUT.FORMAT``).

    Returns:
        (H, W, 3).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a readable image of a known format, or is too large.
    """
    require_channel_order(image_format)
    content = read_bytes(path)
    image = _open(content, path)
    with _name_damaged(path):
        if image.format == "JPEG" and image.mode == "RGB" and _orientation(image) not in _TURNS:
            pixels = _decode_jpeg(content, image_format)
            if pixels is not None:
                return pixels
        image.load()
    turn = _TURNS.get(_orientation(image))  # after loading, when Pillow has rotated a TIFF
    image = _to_rgb(image, path)
    rgb = np.array(image if turn is None else image.transpose(turn))
    return rgb if image_format == "RGB" else np.ascontiguousarray(rgb[:, :, ::-1])


def read_values(path: str) -> NDArray[np.integer]:
    """
    Read the stored values of a file, such as labels: of a palette its indices.

    Returns:
        (H, W) or (H, W, C), not rotated.

    Raises:
        As :func:`read_image`.
    """
    image = _open(read_bytes(path), path)
    with _name_damaged(path):
        return np.array(image)


def require_channel_order(image_format: str) -> None:
    """Refuse other values of ``INPUT.FORMAT`` than "RGB" and "BGR"."""
    if image_format not in ("RGB", "BGR"):
        raise ValueError(f"INPUT.FORMAT must be 'RGB' or 'BGR', not '{image_format}'.")


def read_bytes(path: str) -> bytes:
    """The content of a file; raises FileNotFoundError with what to do."""
    if not PathManager.isfile(path):
        raise FileNotFoundError(
            f"'{path}' does not exist. Complete the data set, or remove the image from its JSON."
        )
    with PathManager.open(path, "rb") as file:
        content: bytes = file.read()
    return content


def require_few_pixels(path: str, width: int, height: int) -> None:
    """Refuse an image with more pixels than the limit, by the size in its header."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(
            f"'{path}' declares {width} x {height} pixels, more than the limit of {limit}. "
            f"If it is not damaged, set the environment variable {PIXELS_VARIABLE} to more (at "
            f"most {MOST_PIXELS}), or make the image smaller."
        )


def decode(content: bytes, flags: int) -> NDArray[np.uint8] | None:
    """Decode with OpenCV, without rotation; None if it cannot."""
    try:
        pixels = cv2.imdecode(
            np.frombuffer(content, dtype=np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION
        )
    except cv2.error:  # too large for it
        return None
    return None if pixels is None else np.asarray(pixels, dtype=np.uint8)


def damaged(path: str, reason: object = "") -> ValueError:
    """The error of a file that cannot be decoded."""
    return ValueError(
        f"'{path}' is not a readable image{f' ({reason})' if reason else ''}. It may be truncated: "
        "copy it again, or remove it from the data set."
    )


def _open(content: bytes, path: str) -> Image.Image:
    """Read the header. Unlike ``Image.open``, only known formats, and with this limit."""
    Image.init()
    for name in FORMATS:
        factory, accepts = Image.OPEN[name]
        if accepts is not None and accepts(content[:16]) is True:
            with _name_damaged(path):
                image = factory(io.BytesIO(content), "")
            require_few_pixels(path, *image.size)
            return image
    raise ValueError(
        f"'{path}' is not a readable image: it has none of the formats {', '.join(FORMATS)}. "
        "Convert it, copy it again, or remove it from the data set."
    )


@contextlib.contextmanager
def _name_damaged(path: str) -> Iterator[None]:
    try:
        yield
    except _UNREADABLE as error:
        raise damaged(path, error) from error


def _orientation(image: Image.Image) -> int:
    """1 to 8, of EXIF or XMP; 1 if there is none, or if it is damaged."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except _UNREADABLE:
        return 1
    return value if isinstance(value, int) else 1


def _decode_jpeg(content: bytes, image_format: str) -> NDArray[np.uint8] | None:
    """Decode with OpenCV: the same pixels as Pillow in 4/5 of the time. None if it fails."""
    if not content.endswith(_JPEG_END):
        return None
    return decode(content, cv2.IMREAD_COLOR_RGB if image_format == "RGB" else cv2.IMREAD_COLOR_BGR)


def _to_rgb(image: Image.Image, path: str) -> Image.Image:
    if image.mode == "F":
        raise ValueError(f"'{path}' has floating-point pixels. Convert it to 8 or 16 bits.")
    if image.mode.startswith("I"):  # 16-bit grayscale: "I;16" and its byte orders, or "I"
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError(
                f"'{path}' has more than 16 bits per pixel. Convert it to 8 or 16 bits."
            )
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns when transparency is dropped in one step
    elif image.mode == "LAB":
        raise ValueError(f"'{path}' has colours of the mode LAB. Convert it to RGB.")
    return image if image.mode == "RGB" else image.convert("RGB")


def _pixel_limit() -> int:
    text = os.environ.get(PIXELS_VARIABLE, str(DEFAULT_PIXELS))
    if not text.isdecimal() or not 1 <= int(text) <= MOST_PIXELS:
        raise ValueError(
            f"The environment variable {PIXELS_VARIABLE} is '{text}', not a number of pixels in "
            f"1..{MOST_PIXELS}."
        )
    return int(text)


# Pillow's limit is global, and its readers of TIFF and WebP ask for it.
Image.MAX_IMAGE_PIXELS = _pixel_limit()
