import pytest
import timm
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


@pytest.fixture(params=["swin", "timm"])
def any_cfg(request, tiny_cfg):
    """A small Swin, and PVTv2-B0 by timm."""
    tiny_cfg.merge_from_list(
        [
            *("MODEL.BACKBONE.NAME", f"build_{request.param}_backbone"),
            *("MODEL.SWIN.EMBED_DIM", 24),
            *("MODEL.SWIN.DEPTHS", [1, 1, 2, 1]),
            *("MODEL.SWIN.NUM_HEADS", [2, 4, 8, 8]),
            *("MODEL.TIMM.NAME", "pvt_v2_b0"),
        ]
    )
    return tiny_cfg


def test_any_size_of_image(any_cfg):
    backbone = build_backbone(any_cfg).eval()
    assert backbone.size_divisibility == 0
    maps = backbone(torch.zeros(1, 3, 75, 109))
    assert {k: v.shape[2:] for k, v in maps.items()} == {
        "res3": (10, 14),
        "res4": (5, 7),
        "res5": (3, 4),
    }
    shapes = backbone.output_shape()
    assert all(shapes[k].channels == v.shape[1] for k, v in maps.items())
    assert [shapes[k].stride for k in maps] == [8, 16, 32]


def test_every_parameter_is_used(any_cfg):
    backbone = build_backbone(any_cfg)
    sum(m.square().sum() for m in backbone(torch.randn(2, 3, 64, 96)).values()).backward()
    unused = [n for n, p in backbone.named_parameters() if p.grad is None]
    assert unused == [], "DDP would hang"


def test_frozen_stages_stay_in_evaluation_mode(any_cfg):
    any_cfg.MODEL.BACKBONE.FREEZE_AT = 2
    backbone = build_backbone(any_cfg).train()
    trained = [n for n, p in backbone.named_parameters() if p.requires_grad]
    frozen = [n for n, p in backbone.named_parameters() if not p.requires_grad]
    assert any("patch_embed" in n for n in frozen)
    assert all(
        n.startswith(("patch_embed", "layers.0", "net.patch", "net.stages_0")) for n in frozen
    )
    assert not any(n.startswith(("patch_embed", "layers.0", "net.stages_0")) for n in trained)
    modes = {n: m.training for n, m in backbone.named_modules() if n.count(".") == 2}
    assert set(modes.values()) == {True, False}


def test_drop_path_grows_with_depth(any_cfg):
    any_cfg.MODEL.SWIN.DROP_PATH_RATE = any_cfg.MODEL.TIMM.DROP_PATH_RATE = 0.2
    rates = [
        m.drop_prob for m in build_backbone(any_cfg).modules() if type(m).__name__ == "DropPath"
    ]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.2)


@pytest.mark.parametrize("freeze_at", [0, 1])
def test_recomputed_activations_give_the_same_gradients(any_cfg, freeze_at):
    any_cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    any_cfg.MODEL.SWIN.DROP_PATH_RATE = any_cfg.MODEL.TIMM.DROP_PATH_RATE = 0.0
    image, gradients = torch.randn(1, 3, 64, 64), []
    for use_checkpoint in (False, True):
        any_cfg.MODEL.SWIN.USE_CHECKPOINT = any_cfg.MODEL.TIMM.USE_CHECKPOINT = use_checkpoint
        torch.manual_seed(0)
        backbone = build_backbone(any_cfg)
        sum(m.square().sum() for m in backbone(image).values()).backward()
        gradients.append([p.grad for p in backbone.parameters() if p.requires_grad])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("name", "drop_path"),
    [("convnext_atto", 0.1), ("efficientnet_b0", 0.1), ("mobilenetv3_small_100", 0.0)],
)
def test_other_networks_of_timm(tiny_cfg, name, drop_path):
    tiny_cfg.MODEL.BACKBONE.NAME = "build_timm_backbone"
    tiny_cfg.MODEL.TIMM.NAME = name
    tiny_cfg.MODEL.TIMM.DROP_PATH_RATE = drop_path
    backbone = build_backbone(tiny_cfg).train()
    assert backbone.size_divisibility == 32
    maps = backbone(torch.zeros(1, 3, 64, 96))
    assert [tuple(m.shape[2:]) for m in maps.values()] == [(8, 12), (4, 6), (2, 3)]
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in backbone.modules())


def test_weights_that_cannot_be_fetched(tiny_cfg, monkeypatch):
    def create_model(name, *, pretrained, **kwargs):
        assert pretrained
        raise FileNotFoundError("no connection")

    monkeypatch.setattr(timm, "create_model", create_model)
    tiny_cfg.MODEL.BACKBONE.NAME = "build_timm_backbone"
    tiny_cfg.MODEL.TIMM.PRETRAINED = True
    with pytest.raises(OSError, match=r"PRETRAINED: .*'pvt_v2_b2' cannot .*no connection.*WEIGHTS"):
        build_backbone(tiny_cfg)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_networks_without_such_maps_are_refused(tiny_cfg, name):
    tiny_cfg.MODEL.BACKBONE.NAME = "build_timm_backbone"
    tiny_cfg.MODEL.TIMM.NAME = name
    with pytest.raises(ValueError, match=f"MODEL.TIMM.NAME: .*'{name}' have strides"):
        build_backbone(tiny_cfg)
