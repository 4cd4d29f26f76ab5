"""Panoptic FPN and Mask2Former for small images, with the interface of this project's model.

Both get the backbone of configs/shapes, its width of 96 channels and its number of layers. They
take what PanopticDatasetMapper makes, and return losses, or ``panoptic_seg`` for the evaluators.

Shapes: N images of H x W pixels (one size), K thing and T stuff classes, G targets of an image.
"""

import types
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone, build_model
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from detectron2.structures import BitMasks, Boxes, Instances
from torch import Tensor, nn

from psf.data import ClassMap
from psf.modeling.backbone import build_basic_resnet_backbone

LEVELS = ["res2", "res3", "res4", "res5"]
IGNORED = 255

# Detectron2's own values are for images of 800 pixels and classes of COCO; ours have 128.
FPN_OPTIONS = [
    *("MODEL.META_ARCHITECTURE", "PanopticFPN", "MODEL.MASK_ON", True),
    *("MODEL.BACKBONE.NAME", "build_basic_resnet_fpn_backbone", "MODEL.BACKBONE.FREEZE_AT", 0),
    *("MODEL.RESNETS.OUT_FEATURES", LEVELS, "MODEL.FPN.IN_FEATURES", LEVELS),
    *("MODEL.FPN.OUT_CHANNELS", 96, "MODEL.FPN.NORM", "GN"),
    *("MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [32], [64], [128]]),
    *("MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"]),
    *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 500, "MODEL.RPN.PRE_NMS_TOPK_TEST", 500),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", 250, "MODEL.RPN.POST_NMS_TOPK_TEST", 250),
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 128),
    # Six things at most: fewer regions cost little quality and save most of the heads' time.
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 32, "MODEL.ROI_HEADS.POSITIVE_FRACTION", 0.5),
    *("MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
    *("MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"]),
    *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 2),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 256, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7),
    *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead", "MODEL.ROI_MASK_HEAD.NUM_CONV", 2),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", 96, "MODEL.ROI_MASK_HEAD.NORM", "GN"),
    *("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 14),
    *("MODEL.SEM_SEG_HEAD.NAME", "SemSegFPNHead", "MODEL.SEM_SEG_HEAD.CONVS_DIM", 96),
    *("MODEL.SEM_SEG_HEAD.IN_FEATURES", ["p2", "p3", "p4", "p5"]),
    *("MODEL.SEM_SEG_HEAD.LOSS_WEIGHT", 0.5),  # its configs for COCO
    *("MODEL.SEM_SEG_HEAD.IGNORE_VALUE", IGNORED),
    # 4096 pixels of a COCO image of 640 x 480.
    *("MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT", 218),
]


@BACKBONE_REGISTRY.register()
def build_basic_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """This project's small ResNet with a feature pyramid; Detectron2's is 64 channels wide."""
    return FPN(
        bottom_up=build_basic_resnet_backbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


class PanopticFpn(nn.Module):
    """Detectron2's Panoptic FPN."""

    def __init__(self, cfg: CfgNode, class_map: ClassMap) -> None:
        """
        Args:
            cfg: the project's, for the backbone and the normalization of pixels.
            class_map: of the data set.
        """
        super().__init__()
        self.class_map = class_map
        self.num_things = len(class_map.thing_ids)
        own = get_cfg()
        own.merge_from_list(FPN_OPTIONS)
        for key in ("DEVICE", "PIXEL_MEAN", "PIXEL_STD"):
            own.MODEL[key] = cfg.MODEL[key]
        for key in ("DEPTH", "NORM", "RES2_OUT_CHANNELS"):
            own.MODEL.RESNETS[key] = cfg.MODEL.RESNETS[key]
        own.MODEL.ROI_HEADS.NUM_CLASSES = self.num_things
        own.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 1 + len(class_map.stuff_ids)
        self.model = build_model(own)

    def forward(self, inputs: list[dict[str, Any]]) -> Any:
        """Losses in training, else ``panoptic_seg`` of each image."""
        if self.training:
            return self.model([self._targets(x) for x in inputs])
        return [self._prediction(*output["panoptic_seg"]) for output in self.model(inputs)]

    def _targets(self, x: dict[str, Any]) -> dict[str, Any]:
        """Instances of things, and a map (H, W) of stuff: 0 is things, 1..T stuff."""
        masks, labels = x["instances"].gt_masks.tensor, x["instances"].gt_classes
        sem_seg = torch.full(masks.shape[1:], IGNORED)
        for mask, label in zip(masks, labels.tolist(), strict=True):
            sem_seg[mask] = max(0, label - self.num_things + 1)
        is_thing = labels < self.num_things
        things = Instances(x["instances"].image_size)
        things.gt_classes = labels[is_thing]
        things.gt_boxes = Boxes(x["instances"].gt_boxes.tensor[is_thing])
        things.gt_masks = BitMasks(masks[is_thing])
        return {"image": x["image"], "instances": things, "sem_seg": sem_seg}

    def _prediction(self, ids: Tensor, infos: list[dict[str, Any]]) -> dict[str, Any]:
        """With the data set's contiguous ids instead of the heads'."""
        segments = []
        for info in infos:
            label = info["category_id"]
            if not info["isthing"]:
                label += self.num_things - 1
            segments.append(segment(self.class_map, info["id"], label))
        return {"panoptic_seg": (ids, segments)}


class Mask2Former(nn.Module):
    """Hugging Face's Mask2Former with Detectron2's ResNet."""

    def __init__(self, cfg: CfgNode, class_map: ClassMap) -> None:
        """As :class:`PanopticFpn`; the transformer's size is that of the project's config."""
        from transformers import (
            Mask2FormerConfig,
            Mask2FormerForUniversalSegmentation,
            Mask2FormerImageProcessor,
            ResNetConfig,
        )

        super().__init__()
        self.class_map = class_map
        psf = cfg.MODEL.PSF
        own = cfg.clone()
        own.MODEL.RESNETS.OUT_FEATURES = LEVELS
        backbone = build_backbone(own)
        channels = [backbone.output_shape()[name].channels for name in LEVELS]
        config = Mask2FormerConfig(
            backbone_config=ResNetConfig(
                embedding_size=channels[0],
                hidden_sizes=channels,
                layer_type="basic",
                depths=[2, 2, 2, 2],
                out_features=["stage1", "stage2", "stage3", "stage4"],
            ),
            num_labels=len(class_map.thing_ids) + len(class_map.stuff_ids),
            num_queries=psf.NUM_OBJECT_QUERIES,
            feature_size=psf.HIDDEN_DIM,
            mask_feature_size=psf.HIDDEN_DIM,
            hidden_dim=psf.HIDDEN_DIM,
            num_attention_heads=psf.NHEADS,
            encoder_layers=psf.ENC_LAYERS,
            decoder_layers=psf.MASK_DECODER.DEC_LAYERS + 1,  # it counts the first prediction
            encoder_feedforward_dim=psf.DIM_FEEDFORWARD,
            dim_feedforward=psf.DIM_FEEDFORWARD,
            train_num_points=1024,  # 12544 at 1024 x 1024; masks here have 32 x 32 cells
        )
        self.model = Mask2FormerForUniversalSegmentation(config)
        self.model.model.pixel_level_module.encoder = FeatureMaps(backbone)
        self.processor = Mask2FormerImageProcessor()
        self.register_buffer("mean", torch.tensor(cfg.MODEL.PIXEL_MEAN).view(-1, 1, 1), False)
        self.register_buffer("std", torch.tensor(cfg.MODEL.PIXEL_STD).view(-1, 1, 1), False)

    def forward(self, inputs: list[dict[str, Any]]) -> Any:
        """The loss in training, else ``panoptic_seg`` of each image."""
        pixels = (torch.stack([x["image"] for x in inputs]) - self.mean) / self.std
        if self.training:
            instances = [x["instances"] for x in inputs]
            output = self.model(
                pixel_values=pixels,
                mask_labels=[i.gt_masks.tensor.float() for i in instances],
                class_labels=[i.gt_classes for i in instances],
            )
            return {"loss": output.loss.sum()}
        # Stuff is fused below: transformers 5.24 numbers segments twice after fusing two.
        results = self.processor.post_process_panoptic_segmentation(
            self.model(pixel_values=pixels),
            label_ids_to_fuse=set(),
            target_sizes=[(x["height"], x["width"]) for x in inputs],
        )
        return [self._prediction(r["segmentation"], r["segments_info"]) for r in results]

    def _prediction(self, ids: Tensor, infos: list[dict[str, Any]]) -> dict[str, Any]:
        """Unite the segments of a stuff class; leave out those without a pixel."""
        ids = ids.int().clamp(min=0)  # -1: nothing was found
        present = set(ids.unique().tolist())
        owners: dict[int, int] = {}  # by stuff class
        segments = []
        for info in infos:
            label, number = info["label_id"], info["id"]
            if number not in present:
                continue
            if label >= len(self.class_map.thing_ids) and owners.setdefault(label, number) < number:
                ids[ids == number] = owners[label]
                continue
            segments.append(segment(self.class_map, number, label))
        return {"panoptic_seg": (ids, segments)}


class FeatureMaps(nn.Module):
    """One of Detectron2's backbones as transformers' Mask2Former calls its own."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, pixels: Tensor) -> types.SimpleNamespace:
        """(N, 3, H, W) to maps of strides 4 to 32."""
        maps = self.backbone(pixels)
        return types.SimpleNamespace(feature_maps=[maps[name] for name in LEVELS])


def segment(class_map: ClassMap, number: int, label: int) -> dict[str, Any]:
    """Detectron2's description of a segment of a class of the model."""
    category_id, is_thing = class_map.to_contiguous(label)
    return {"id": number, "category_id": category_id, "isthing": is_thing}
