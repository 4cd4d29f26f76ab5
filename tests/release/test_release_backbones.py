"""PVTv2 and Swin in small against the authors' code. Reached: 8.9e-7."""

import pytest
import torch
from release_cases import arrays, difference, nested, seeded

from psf import checkpoint
from psf.modeling.backbone import Swin, TimmBackbone

MEAN = torch.tensor([123.675, 116.28, 103.53]).view(-1, 1, 1)
STD = torch.tensor([58.395, 57.12, 57.375]).view(-1, 1, 1)


def swin():
    return Swin(
        freeze_at=0,
        use_checkpoint=False,
        embed_dim=24,
        depths=[2, 2, 4, 2],
        num_heads=[2, 4, 8, 8],
        window_size=7,
        drop_path_rate=0.3,
    )


def pvt_v2():
    return TimmBackbone(
        name="pvt_v2_b0",
        in_channels=3,
        pretrained=False,
        use_checkpoint=False,
        freeze_at=0,
        freeze_batch_norm=True,
        embed_dims=(16, 32, 80, 128),
        depths=(2, 1, 2, 1),
        num_heads=(1, 2, 5, 8),
        mlp_ratios=(8, 8, 4, 4),
        drop_path_rate=0.1,
    )


@pytest.mark.parametrize(
    ("name", "build", "seed", "source_format"),
    [
        ("swin_micro", swin, 35, checkpoint.SWIN),
        ("pvt_v2_tiny", pvt_v2, 31, checkpoint.PVT_V2),
    ],
)
@torch.no_grad()
def test_maps(source, name, build, seed, source_format):
    case, backbone = arrays(source, f"backbones/{name}"), build().eval()
    load_seeded(backbone, seed, source_format)
    for key, pixels in nested(case, "in_uint8/").items():
        maps = backbone(((pixels.permute(2, 0, 1) - MEAN) / STD)[None])
        for i, value in enumerate(maps.values()):
            assert difference(value, case[f"out/{key}/{i}"][:1]) < 1e-5


def load_seeded(backbone, seed, source_format):
    """By the official names, which are those that the backbone of a released model has."""
    own = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    theirs = {
        name.removeprefix("backbone."): value for name, value in checkpoint.to_authors(own).items()
    }
    weights = {
        name: value if value.dtype == torch.int64 else seeded(seed, name, value.shape)
        for name, value in theirs.items()
    }
    converted = checkpoint.convert(weights, source_format).state_dict
    backbone.load_state_dict({k.removeprefix("backbone."): v for k, v in converted.items()})
