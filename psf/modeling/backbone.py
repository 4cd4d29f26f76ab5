"""Backbones that Detectron2 does not build itself, from its own parts."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem

# Basic blocks of each stage (ResNet paper, arXiv 1512.03385, table 1).
NUM_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


@BACKBONE_REGISTRY.register()
def build_basic_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """
    ResNet-18 or -34 of any width; Detectron2's own builder has them with 64 channels only.

    Reads ``MODEL.RESNETS``: ``DEPTH``, ``NORM``, ``RES2_OUT_CHANNELS`` (of stem and first stage;
    every later stage has twice as many), ``OUT_FEATURES``; and ``MODEL.BACKBONE.FREEZE_AT``.
    """
    resnets = cfg.MODEL.RESNETS
    if resnets.DEPTH not in NUM_BLOCKS:
        raise ValueError(
            f"MODEL.RESNETS.DEPTH is {resnets.DEPTH}, but ResNets of basic blocks have "
            f"{sorted(NUM_BLOCKS)} layers. Deeper ones: MODEL.BACKBONE.NAME build_resnet_backbone."
        )
    last = max(int(name.removeprefix("res")) for name in resnets.OUT_FEATURES)
    channels = resnets.RES2_OUT_CHANNELS
    stem = BasicStem(input_shape.channels, channels, norm=resnets.NORM)
    stages = []
    for stage, num_blocks in enumerate(NUM_BLOCKS[resnets.DEPTH][: last - 1]):
        out_channels = resnets.RES2_OUT_CHANNELS * 2**stage
        stages.append(
            ResNet.make_stage(
                BasicBlock,
                num_blocks,
                stride_per_block=[1 if stage == 0 else 2] + [1] * (num_blocks - 1),
                in_channels=channels,
                out_channels=out_channels,
                norm=resnets.NORM,
            )
        )
        channels = out_channels
    backbone = ResNet(stem, stages, out_features=resnets.OUT_FEATURES)
    return backbone.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)
