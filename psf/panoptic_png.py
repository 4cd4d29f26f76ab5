"""Panoptic PNGs: the colour of a pixel encodes the segment id R + 256 G + 65536 B.

Shapes: H x W pixels.
"""

import struct
from collections.abc import Iterable

import cv2
import numpy as np
from detectron2.utils.file_io import PathManager
from numpy.typing import NDArray

from .files import named
from .images import damaged, decode, read_bytes, require_few_pixels

MAX_ID = (1 << 24) - 1

PNG_END = b"IEND\xaeB`\x82"  # of a whole file
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GRAY = 0x010101  # ids of gray pixels are its multiples


def read_panoptic_ids(path: str) -> NDArray[np.uint32]:
    """
    Read a COCO panoptic PNG.

    Returns:
        (H, W), the segment id at each pixel; 0 is void.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a readable PNG with 8 bits per channel, or is too large.
    """
    content = read_bytes(path)
    if not content.startswith(_SIGNATURE) or content[12:16] != b"IHDR" or not _is_whole(content):
        raise ValueError(
            f"'{path}' is not a readable image: it is no PNG, or a truncated one. Copy it again; "
            "other formats, such as JPEG, do not keep segment ids exactly."
        )
    width, height, bits = struct.unpack(">IIB", content[16:25])
    require_few_pixels(path, width, height)
    if bits == 16:
        raise ValueError(
            f"'{path}' has 16 bits per channel, so it is not a panoptic PNG, whose 8-bit colours "
            "encode segment ids. Convert label maps first (tools/convert_to_panoptic.py)."
        )
    rgb = decode(content, cv2.IMREAD_COLOR_RGB)
    if rgb is None:
        raise damaged(path)
    ids = cv2.cvtColor(rgb, cv2.COLOR_RGB2RGBA).view(np.dtype("<u4"))[:, :, 0]
    ids &= np.uint32(MAX_ID)  # alpha is 255
    return ids


def _is_whole(content: bytes) -> bool:
    """Whether all chunks of a PNG are there; OpenCV allocates the size that they declare."""
    start = len(_SIGNATURE)
    while start + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, start)
        start += 12 + length  # with length, type and checksum
        if content[start - 8 - length : start - 4 - length] == b"IEND":
            return start <= len(content)
    return False


def unknown_ids(path: str, unknown: Iterable[int], known: Iterable[int]) -> str:
    """Say why a PNG probably has unknown ids, besides those that its JSON lists."""
    wrong, right = sorted(unknown), set(known)
    found = f"'{path}' has segment ids {wrong[:5]} that its JSON does not list. "
    if right.issuperset(_swap_red_and_blue(i) for i in wrong):
        return (
            f"{found}With red and blue swapped it has: it was written as BGR. Write R + 256 G + "
            "65536 B as RGB."
        )
    if all(i % _GRAY == 0 for i in wrong):
        return (
            f"{found}All these pixels are gray: it is a map of one channel, not a panoptic PNG, "
            "whose colours encode the ids as R + 256 G + 65536 B. Convert it."
        )
    return f"{found}PNG and JSON are of different versions: copy both again."


def _swap_red_and_blue(segment_id: int) -> int:
    return (segment_id & 0xFF) << 16 | segment_id & 0xFF00 | segment_id >> 16


def write_panoptic_ids(path: str, ids: NDArray[np.integer]) -> None:
    """Write a COCO panoptic PNG of ids (H, W) in 0..16777215 into a folder that exists."""
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) <= MAX_ID:
        raise ValueError(
            f"'{path}': ids {int(ids.min())}..{int(ids.max())} do not fit into the colours of a "
            f"PNG. Number the segments with 1..{MAX_ID}."
        )
    rgba = np.ascontiguousarray(ids, dtype="<u4").view(np.uint8).reshape(*ids.shape, 4)
    # Run-length compression is the fastest, and flat images become as small as by the default.
    rle = [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE, cv2.IMWRITE_PNG_COMPRESSION, 1]
    _, png = cv2.imencode(".png", cv2.cvtColor(rgba, cv2.COLOR_RGBA2BGR), rle)
    with named(path), PathManager.open(path, "wb") as file:
        file.write(png.tobytes())
