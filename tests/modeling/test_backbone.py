import pytest
import torch
from detectron2.modeling import build_backbone


@pytest.fixture
def backbone_cfg(tiny_cfg):
    tiny_cfg.MODEL.BACKBONE.NAME = "build_basic_resnet_backbone"
    tiny_cfg.MODEL.RESNETS.DEPTH = 18
    return tiny_cfg


def test_maps_and_strides(backbone_cfg):
    backbone = build_backbone(backbone_cfg)
    maps = backbone(torch.zeros(1, 3, 64, 96))
    assert {k: v.shape[1:] for k, v in maps.items()} == {
        "res3": (64, 8, 12),
        "res4": (128, 4, 6),
        "res5": (256, 2, 3),
    }
    assert {k: (v.channels, v.stride) for k, v in backbone.output_shape().items()} == {
        "res3": (64, 8),
        "res4": (128, 16),
        "res5": (256, 32),
    }


def test_stages_after_the_last_wanted_are_not_built(backbone_cfg):
    backbone_cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3"]
    assert not any(
        name.startswith("res4") for name, _ in build_backbone(backbone_cfg).named_modules()
    )


def test_freezing(backbone_cfg):
    backbone_cfg.MODEL.BACKBONE.FREEZE_AT = 2
    trained = {
        n.split(".")[0]
        for n, p in build_backbone(backbone_cfg).named_parameters()
        if p.requires_grad
    }
    assert trained == {"res3", "res4", "res5"}


def test_deeper_ones_are_refused(backbone_cfg):
    backbone_cfg.MODEL.RESNETS.DEPTH = 50
    with pytest.raises(ValueError, match=r"DEPTH is 50.*\[18, 34\].*build_resnet_backbone"):
        build_backbone(backbone_cfg)
