"""Masks that do not overlap, stored as one index map.

Shapes: G masks of h x w pixels.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, Instances
from numpy.typing import NDArray
from torch import Tensor


class IndexMasks(BitMasks):
    """
    ``BitMasks`` stored as the index of the mask that owns each pixel.

    A pixel takes one byte instead of G. Reading ``tensor`` creates the dense masks, on the device
    of the map.
    """

    def __init__(self, index_map: Tensor, values: tuple[int, ...]) -> None:
        """
        Args:
            index_map: (h, w) integers.
            values: the value in the map of each of the G masks.
        """
        self.index_map = index_map
        self.values = values
        self.image_size = index_map.shape

    @property
    def tensor(self) -> Tensor:
        """(G, h, w) bool, a new tensor at each call."""
        values = torch.tensor(self.values, dtype=self.index_map.dtype, device=self.device)
        return self.index_map == values[:, None, None]

    def to(self, *args: Any, **kwargs: Any) -> "IndexMasks":
        return IndexMasks(self.index_map.to(*args, **kwargs), self.values)

    @property
    def device(self) -> torch.device:
        return self.index_map.device

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, item: int | slice | Tensor) -> "IndexMasks":
        """Some of the masks; they share the index map."""
        chosen = torch.arange(len(self))[item.cpu() if isinstance(item, Tensor) else item]
        return IndexMasks(self.index_map, tuple(self.values[i] for i in chosen.view(-1).tolist()))

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.tensor

    def __repr__(self) -> str:
        return f"IndexMasks(num_instances={len(self)})"

    @staticmethod
    def cat(bitmasks_list: Sequence[BitMasks]) -> BitMasks:
        """Dense, as masks of several maps may overlap."""
        return BitMasks(torch.cat([masks.tensor for masks in bitmasks_list]))


class TargetInstances(Instances):
    """
    ``Instances`` with classes, boxes and masks that pickles classes and boxes by value.

    Each tensor that a worker sends takes a file in shared memory and a connection, half a
    millisecond.
    """

    def __reduce__(self) -> Any:
        return _rebuild, (
            self.image_size,
            self.gt_classes.numpy(),
            self.gt_boxes.tensor.numpy(),
            self.gt_masks,
        )


def _rebuild(
    image_size: tuple[int, int],
    gt_classes: NDArray[Any],
    gt_boxes: NDArray[Any],
    gt_masks: IndexMasks,
) -> TargetInstances:
    return TargetInstances(
        image_size,
        gt_classes=torch.from_numpy(gt_classes),
        gt_boxes=Boxes(torch.from_numpy(gt_boxes)),
        gt_masks=gt_masks,
    )


def tight_boxes(index_map: NDArray[np.integer], count: int) -> NDArray[np.int64]:
    """
    The box around the pixels of each index, from runs of equal pixels.

    Args:
        index_map: (h, w), in 0..count; 0 is none.
        count: the number of indices G.

    Returns:
        (G, 4), x0, y0, x1, y1, ends excluded; index i + 1 in row i, zeros if it is absent.
    """
    height, width = index_map.shape
    flat = np.ascontiguousarray(index_map).ravel()
    is_start = np.empty(flat.size, dtype=bool)
    np.not_equal(flat[1:], flat[:-1], out=is_start[1:])
    is_start[::width] = True  # runs end with their row
    starts = np.flatnonzero(is_start)
    rows, columns = np.divmod(starts, width)
    ends = columns + np.diff(starts, append=flat.size)
    indices = flat[starts]
    boxes = np.zeros((count + 1, 4), dtype=np.int64)
    boxes[:, :2] = [width, height]
    np.minimum.at(boxes[:, 0], indices, columns)
    np.minimum.at(boxes[:, 1], indices, rows)
    np.maximum.at(boxes[:, 2], indices, ends)
    np.maximum.at(boxes[:, 3], indices, rows + 1)
    boxes[boxes[:, 2] == 0] = 0
    return boxes[1:]
