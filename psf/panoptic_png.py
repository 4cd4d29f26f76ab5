"""Panoptic PNGs: the colour of a pixel encodes the segment id R + 256 G + 65536 B.

Shapes: H x W pixels.
"""

import cv2
import numpy as np
from detectron2.utils.file_io import PathManager
from numpy.typing import NDArray

MAX_ID = (1 << 24) - 1


def read_panoptic_ids(path: str) -> NDArray[np.uint32]:
    """
    Read a COCO panoptic PNG.

    Returns:
        (H, W), the segment id at each pixel; 0 is void.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a readable image.
    """
    if not PathManager.isfile(path):
        raise FileNotFoundError(
            f"The panoptic PNG '{path}' does not exist. Complete the data set, or remove the image "
            "from its JSON."
        )
    with PathManager.open(path, "rb") as file:
        content = np.frombuffer(file.read(), dtype=np.uint8)
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        rgb = cv2.imdecode(content, flags) if content.size else None
    except cv2.error:  # the header has more pixels than OpenCV reads
        rgb = None
    if rgb is None:
        raise ValueError(
            f"'{path}' is not a readable image. It may be truncated: copy it again, or remove it "
            "from the data set."
        )
    ids = cv2.cvtColor(rgb, cv2.COLOR_RGB2RGBA).view(np.dtype("<u4"))[:, :, 0]
    ids &= np.uint32(MAX_ID)  # alpha is 255
    return ids


def write_panoptic_ids(path: str, ids: NDArray[np.integer]) -> None:
    """
    Write a COCO panoptic PNG.

    Args:
        path: the file; its folder must exist.
        ids: (H, W), in 0..16777215.
    """
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) <= MAX_ID:
        raise ValueError(
            f"'{path}': ids {int(ids.min())}..{int(ids.max())} do not fit into the colours of a "
            f"PNG. Number the segments with 1..{MAX_ID}."
        )
    rgba = np.ascontiguousarray(ids, dtype="<u4").view(np.uint8).reshape(*ids.shape, 4)
    # Run-length compression is the fastest, and flat images become as small as by the default.
    rle = [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE, cv2.IMWRITE_PNG_COMPRESSION, 1]
    _, png = cv2.imencode(".png", cv2.cvtColor(rgba, cv2.COLOR_RGBA2BGR), rle)
    with PathManager.open(path, "wb") as file:
        file.write(png.tobytes())
