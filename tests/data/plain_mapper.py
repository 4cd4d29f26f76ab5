"""The mapper that Detectron2's panoptic projects use, plainly: the reference of the fast one."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Boxes, Instances
from panopticapi.utils import rgb2id


class PlainMapper:
    """Transform the image and the colours of the PNG, then compare with each segment's id."""

    def __init__(self, augmentations: Sequence[T.Augmentation], image_format: str = "RGB") -> None:
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        result = copy.deepcopy(dataset_dict)
        image = utils.read_image(result["file_name"], format=self.image_format)
        utils.check_image_size(result, image)
        aug_input = T.AugInput(image)
        transforms = self.augmentations(aug_input)
        image = aug_input.image
        result["image"] = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        colors = utils.read_image(result.pop("pan_seg_file_name"), "RGB")
        ids = rgb2id(transforms.apply_segmentation(colors))
        classes, masks = [], []
        for segment in result["segments_info"]:
            if not segment["iscrowd"]:
                classes.append(segment["category_id"])
                masks.append(ids == segment["id"])
        instances = Instances(image.shape[:2])
        instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
        if masks:
            stacked = [torch.from_numpy(np.ascontiguousarray(mask.copy())) for mask in masks]
            instances.gt_masks = BitMasks(torch.stack(stacked))
            instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
        else:
            instances.gt_masks = BitMasks(torch.zeros((0, *ids.shape)))
            instances.gt_boxes = Boxes(torch.zeros((0, 4)))
        result["instances"] = instances
        return result
