"""Backbones that Detectron2 does not build from a config: small ResNets, Swin, and timm's."""

from functools import partial
from typing import Any

import timm
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem
from detectron2.modeling.backbone.swin import SwinTransformer
from timm.utils.model import freeze_batch_norm_2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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


class Swin(SwinTransformer):
    """
    Detectron2's Swin, with its maps named and frozen as those of ResNet.

    Detectron2 0.7.2's own cannot be asked for its ``size_divisibility``, its frozen stages go back
    to training mode with the rest of the model, and it recomputes activations in a way that loses
    the gradients of a stage after a frozen one.
    """

    def __init__(self, *, freeze_at: int, use_checkpoint: bool, **kwargs: Any) -> None:
        """
        Args:
            freeze_at: 0 trains everything, 1 freezes the patch embedding, 2 also the first stage,
                and so on.
            use_checkpoint: recompute activations in the backward pass instead of storing them.
            **kwargs: as ``SwinTransformer``, without ``out_indices`` and ``frozen_stages``.
        """
        stages = (1, 2, 3)
        super().__init__(out_indices=stages, frozen_stages=-1, **kwargs)
        self._frozen = [self.patch_embed, *self.layers][:freeze_at]
        for module in self._frozen:
            module.requires_grad_(False)
        if use_checkpoint:
            for block in (block for layer in self.layers for block in layer.blocks):
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        self._names = {f"p{stage}": f"res{stage + 2}" for stage in stages}
        self._out_features = list(self._names.values())
        self._out_feature_channels = {f"res{i + 2}": self.num_features[i] for i in stages}
        self._out_feature_strides = {f"res{i + 2}": 2 ** (i + 2) for i in stages}

    @property
    def size_divisibility(self) -> int:
        """0: images of any size; maps are rounded up, and windows padded."""
        return 0

    def train(self, mode: bool = True) -> "Swin":
        """As ``nn.Module``'s; frozen stages stay in evaluation mode (drop path)."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) to the maps res3, res4, res5."""
        return {self._names[name]: value for name, value in super().forward(x).items()}


@BACKBONE_REGISTRY.register()
def build_swin_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Swin:
    """Build Swin (arXiv 2103.14030) from ``MODEL.SWIN`` and ``MODEL.BACKBONE.FREEZE_AT``."""
    swin = cfg.MODEL.SWIN
    return Swin(
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        in_chans=input_shape.channels,
        embed_dim=swin.EMBED_DIM,
        depths=swin.DEPTHS,
        num_heads=swin.NUM_HEADS,
        window_size=swin.WINDOW_SIZE,
        drop_path_rate=swin.DROP_PATH_RATE,
        use_checkpoint=swin.USE_CHECKPOINT,
    )


class TimmBackbone(Backbone):
    """The maps of strides 8, 16 and 32 of one of timm's networks, as res3, res4 and res5."""

    def __init__(
        self,
        *,
        name: str,
        in_channels: int,
        pretrained: bool,
        use_checkpoint: bool,
        freeze_at: int,
        freeze_batch_norm: bool,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            name: timm's name of the network.
            in_channels: of the images.
            pretrained: fetch the weights that timm has for it.
            use_checkpoint: recompute activations in the backward pass instead of storing them.
            freeze_at: so many of the network's first modules are frozen (of PVTv2: the patch
                embedding, the first stage, ...).
            freeze_batch_norm: keep the statistics and weights of batch normalisations.
            **kwargs: the network's own arguments.
        """
        super().__init__()
        if ":" not in name and not timm.is_model(name):
            raise ValueError(f"MODEL.TIMM.NAME: timm has no network '{name}' (timm.list_models)")
        try:
            net: Any = timm.create_model(
                name,
                pretrained=pretrained,
                features_only=True,
                out_indices=(-3, -2, -1),
                in_chans=in_channels,
                **kwargs,
            )
        except OSError as error:
            raise OSError(
                f"MODEL.TIMM.PRETRAINED: timm's weights of '{name}' cannot be fetched ({error}). "
                "Name a file of weights in MODEL.WEIGHTS, or set MODEL.TIMM.PRETRAINED False to "
                "start from random ones."
            ) from error
        strides = net.feature_info.reduction()
        if strides != [8, 16, 32] or getattr(net, "output_fmt", "NCHW") != "NCHW":
            raise ValueError(
                f"MODEL.TIMM.NAME: the last three maps of '{name}' have strides {strides} (wanted: "
                "8, 16, 32) or their channels last; choose another network"
            )
        if use_checkpoint:
            net.set_grad_checkpointing(True)
        self.net: nn.Module = freeze_batch_norm_2d(net) if freeze_batch_norm else net
        self._frozen = list(self.net.children())[:freeze_at]
        for module in self._frozen:
            module.requires_grad_(False)
        self._out_features = ["res3", "res4", "res5"]
        self._out_feature_strides = dict(zip(self._out_features, strides, strict=True))
        channels = net.feature_info.channels()
        self._out_feature_channels = dict(zip(self._out_features, channels, strict=True))
        # Some networks cut what is left of a division by the stride, so images are padded to a
        # multiple of it. PVTv2 rounds up, and its released models saw no padding.
        self._size_divisibility = 0 if name.startswith("pvt_v2") else max(strides)

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility

    def train(self, mode: bool = True) -> "TimmBackbone":
        """As ``nn.Module``'s; frozen modules stay in evaluation mode (drop path)."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) to the maps res3, res4, res5."""
        return dict(zip(self._out_features, self.net(x), strict=True))


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """Build any network of timm that gives maps, from ``MODEL.TIMM`` and ``BACKBONE.FREEZE_AT``."""
    options = cfg.MODEL.TIMM
    # Not every network knows drop path.
    rate = {"drop_path_rate": options.DROP_PATH_RATE} if options.DROP_PATH_RATE else {}
    return TimmBackbone(
        name=options.NAME,
        in_channels=input_shape.channels,
        pretrained=options.PRETRAINED and not cfg.MODEL.WEIGHTS,
        use_checkpoint=options.USE_CHECKPOINT,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        freeze_batch_norm=options.FREEZE_BATCH_NORM,
        **rate,
    )
