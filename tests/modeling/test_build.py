"""From a config to a model: what is built, and what is refused."""

import pytest
from detectron2.modeling import build_model

from psf.modeling.mask_decoder import JointMaskDecoder
from psf.modeling.release_decoder import DecoupledMaskDecoder


def test_the_config_names_the_mask_decoder(tiny_cfg):
    assert isinstance(build_model(tiny_cfg).mask_decoder, JointMaskDecoder)
    tiny_cfg.MODEL.PSF.MASK_DECODER.NAME = "decoupled"
    assert isinstance(build_model(tiny_cfg).mask_decoder, DecoupledMaskDecoder)


def test_numbers_of_classes_are_the_data_sets(tiny_cfg):
    """0 takes them from the metadata; building changes no config."""
    tiny_cfg.MODEL.PSF.NUM_THING_CLASSES = tiny_cfg.MODEL.PSF.NUM_STUFF_CLASSES = 0
    before = tiny_cfg.clone()
    model = build_model(tiny_cfg)
    assert model.location_decoder.class_heads[0].out_features == 3
    assert model.mask_decoder.stuff_query.num_embeddings == 2
    assert tiny_cfg == before


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("NUM_THING_CLASSES", 7, r"7 thing and 2 stuff .*'tiny_interleaved' has 3 and 2"),
        ("IN_FEATURES", ["res3", "p6"], r"has \['p6'\], but the backbone .* \['res3', 'res4', 'r"),
        ("IN_FEATURES", ["res5", "res4", "res3"], r"strides \[32, 16, 8\]; .* fine to coarse"),
        ("IN_FEATURES", [], "fine to coarse"),
        ("NUM_FEATURE_LEVELS", 2, r"it must be in 3\.\.4"),
        ("NUM_FEATURE_LEVELS", 6, r"it must be in 3\.\.4"),
        ("TEST.MERGING", "magic", r"MERGING is 'magic'; known: .*mask_wise"),
        ("TEST.MASK_DECODER_LAYERS", 3, "is 3, but the mask decoder has 2 layers"),
        ("MASK_DECODER.NAME", "other", "NAME is 'other'; known: .'decoupled', 'joint'"),
    ],
)
def test_config_errors_name_the_key_and_the_mend(tiny_cfg, key, value, message):
    tiny_cfg.merge_from_list([f"MODEL.PSF.{key}", value])
    with pytest.raises(ValueError, match=message):
        build_model(tiny_cfg)


def test_backbones_that_do_not_fit(tiny_cfg):
    tiny_cfg.merge_from_list(["MODEL.RESNETS.RES5_DILATION", 2, "MODEL.PSF.TEST.PAD_TO", 64])
    with pytest.raises(ValueError, match=r"PAD_TO needs maps of .*\[8, 16, 16\]"):
        build_model(tiny_cfg)
    tiny_cfg.MODEL.BACKBONE.NAME = "resnet50"
    with pytest.raises(ValueError, match=r"NAME is 'resnet50'; known: .*'build_resnet_backbone'"):
        build_model(tiny_cfg)


def test_unregistered_data_set(tiny_cfg):
    tiny_cfg.DATASETS.TRAIN = ("no_such_data",)
    with pytest.raises(ValueError, match=r"'no_such_data' has no 'thing_dataset_id.*registered"):
        build_model(tiny_cfg)
