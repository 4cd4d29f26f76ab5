"""Random inputs of the model with their ground truth."""

from typing import Any

import torch
from detectron2.structures import BitMasks, Instances


def make_input(
    height: int, width: int, classes: list[int], /, seed: int = 0, **extra: Any
) -> dict[str, Any]:
    """A random image whose segments of the given model classes are random rectangles."""
    generator = torch.Generator().manual_seed(seed)
    instances = Instances((height, width))
    masks = torch.zeros(len(classes), height, width, dtype=torch.bool)
    for mask in masks:
        y = torch.randint(0, height, (2,), generator=generator).sort().values
        x = torch.randint(0, width, (2,), generator=generator).sort().values
        mask[y[0] : y[1] + 1, x[0] : x[1] + 1] = True
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    instances.gt_masks = BitMasks(masks)
    instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
    image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    return {"image": image, "instances": instances, **extra}
