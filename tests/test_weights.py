import logging
import math
import re
from collections import OrderedDict

import convert_checkpoint
import pytest
import torch
from detectron2.modeling import build_model
from random_input import make_input

from psf import checkpoint
from psf.predictor import Predictor
from psf.trainer import Trainer
from psf.weights import Checkpointer

DROPPED = {
    "bbox_head.reg_branches2.0.0.weight": torch.zeros(64, 64),
    "backbone.bn1.num_batches_tracked": torch.tensor(0),
}


@pytest.fixture
def released_cfg(tiny_cfg):
    """The tiny model with the released one's mask decoder and levels."""
    tiny_cfg.merge_from_list(
        [
            *("MODEL.PSF.MASK_DECODER.NAME", "decoupled"),
            *("MODEL.PSF.MASK_DECODER.THING_LAYERS", 1),
            *("MODEL.PSF.MASK_DECODER.STUFF_LAYERS", 2),
            *("MODEL.PSF.NUM_FEATURE_LEVELS", 4),
            *("MODEL.PSF.HIDDEN_DIM", 64),
            *("MODEL.RESNETS.NORM", "FrozenBN"),
        ]
    )
    return tiny_cfg


@pytest.fixture
def model(released_cfg):
    torch.manual_seed(0)
    return build_model(released_cfg)


def early_names(weights):
    """As the authors' first checkpoints, of a wrapped model."""
    renamed = {}
    for name, value in weights.items():
        for early, present in checkpoint.OLD_NAMES.items():
            name = name.replace(present, early)
        renamed[f"module.{name}"] = value
    return renamed


@pytest.fixture
def authors_file(model, tmp_path):
    """A stand-in for a released file: names, extra entries and optimizer state as there."""
    weights = {**checkpoint.to_authors(model.state_dict()), **DROPPED}
    content = {
        "meta": {"epoch": 24, "CLASSES": ("person",)},
        "state_dict": early_names(weights),
        "optimizer": {"state": {0: {"step": 5, "exp_avg": torch.zeros(2)}}, "param_groups": []},
    }
    torch.save(content, tmp_path / "authors.pth")
    return str(tmp_path / "authors.pth")


def load_and_compare(cfg, model, path, caplog):
    """Load a file into another model, which then has the same weights."""
    other = build_model(cfg)
    with caplog.at_level(logging.INFO, logger="psf.weights"):
        Checkpointer(other).load(str(path))
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_the_authors_file_is_recognised_and_converted(released_cfg, model, authors_file, caplog):
    load_and_compare(released_cfg, model, authors_file, caplog)
    (line,) = [r.getMessage() for r in caplog.records if r.name == "psf.weights"]
    assert "of the authors' released Panoptic SegFormer on ResNet" in line
    assert "1 dropped (its loss is multiplied by zero" in line


def convert(source, target):
    convert_checkpoint.main([str(source), str(target)])
    return str(target)


def test_a_converted_file_is_loaded_as_strictly(
    released_cfg, model, authors_file, tmp_path, caplog
):
    converted = convert(authors_file, tmp_path / "converted.pth")
    load_and_compare(released_cfg, model, converted, caplog)
    (line,) = [r.getMessage() for r in caplog.records if r.name == "psf.weights"]
    assert "of the authors' released Panoptic SegFormer on ResNet" in line
    weights = checkpoint.to_authors(model.state_dict())
    del weights["bbox_head.stuff_query.weight"]
    torch.save({"state_dict": weights}, tmp_path / "incomplete.pth")
    incomplete = convert(tmp_path / "incomplete.pth", tmp_path / "converted.pth")
    with pytest.raises(ValueError, match=r"Missing: mask_decoder\.stuff_query\.weight\. Use"):
        Checkpointer(model).load(incomplete)


def test_a_converted_file_of_other_classes(released_cfg, model, authors_file, tmp_path):
    weights = checkpoint.to_authors(model.state_dict())
    weights["bbox_head.cls_branches.0.weight"] = torch.zeros(9, 64)
    torch.save({"state_dict": weights}, tmp_path / "theirs.pth")
    converted = convert(tmp_path / "theirs.pth", tmp_path / "converted.pth")
    with pytest.raises(ValueError, match=r"class_heads\.0\.weight \[9, 64\] .*WEIGHTS_DATASET"):
        Checkpointer(model).load(converted)


def test_a_file_converted_from_something_unknown(model, tmp_path):
    content = {"model": model.state_dict(), "converted_from": "the moon"}
    torch.save(content, tmp_path / "converted.pth")
    with pytest.raises(ValueError, match="converted from 'the moon', which is not a known format"):
        Checkpointer(model).load(str(tmp_path / "converted.pth"))


def test_the_predictor_takes_it(released_cfg, model, authors_file):
    released_cfg.MODEL.WEIGHTS = authors_file
    predictor = Predictor(released_cfg)
    assert not predictor.model.training
    image = make_input(40, 60, [])["image"].permute(1, 2, 0).numpy()
    panoptic_seg, _ = predictor(image)["panoptic_seg"]
    assert panoptic_seg.shape == (40, 60)


def test_our_own_checkpoints_are_left_alone(released_cfg, model, tmp_path, caplog):
    torch.save({"model": model.state_dict(), "iteration": 7}, tmp_path / "own.pth")
    with caplog.at_level(logging.INFO, logger="psf.weights"):
        rest = Checkpointer(build_model(released_cfg)).load(str(tmp_path / "own.pth"))
    assert rest == {"iteration": 7}
    assert not [r for r in caplog.records if r.name == "psf.weights"]


def test_a_file_of_another_model(released_cfg, authors_file):
    released_cfg.MODEL.PSF.NUM_OBJECT_QUERIES = 9
    released_cfg.MODEL.PSF.MASK_DECODER.STUFF_LAYERS = 1
    with pytest.raises(
        ValueError,
        match=r"Not in this model: .*stuff\.layers\.1.*query_embed\.weight \[6, 128\] instead of",
    ):
        Checkpointer(build_model(released_cfg)).load(authors_file)


def test_a_file_with_something_unknown(model, tmp_path):
    weights = {**checkpoint.to_authors(model.state_dict()), "bbox_head.new": torch.zeros(1)}
    torch.save({"state_dict": weights}, tmp_path / "unknown.pth")
    with pytest.raises(ValueError, match=r"are not in the table of .*: bbox_head\.new"):
        Checkpointer(model).load(str(tmp_path / "unknown.pth"))


def test_a_kill_leaves_the_tag_of_the_last_whole_file(model, tmp_path, monkeypatch):
    checkpointer = Checkpointer(model, str(tmp_path))
    checkpointer.save("first")
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "first.pth")

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpointer.save("second")
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "first.pth")


def test_an_address_that_cannot_be_reached(model, tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")  # a proxy would answer for it
    with pytest.raises(
        OSError, match=r"MODEL\.WEIGHTS: 'http://localhost:1/a\.pth' cannot be down"
    ):
        Checkpointer(model).load("http://localhost:1/a.pth")


@pytest.mark.parametrize("key", ["state_dict", "model", None])
def test_weights_of_something_else(model, tmp_path, key):
    weights = {"decode_head.conv.weight": torch.zeros(1)}
    torch.save({key: weights} if key else weights, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"not of this architecture.*decode_head\.conv\.weight"):
        Checkpointer(model).load(str(tmp_path / "other.pth"))


@pytest.mark.parametrize(
    "content",
    [{"a\nb": 3}, {"model": {}}, {"model": {"a": "b"}}, {"model": {1: torch.zeros(2), "a": 3}}],
)
def test_the_error_is_one_line_with_the_file(model, tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"^MODEL\.WEIGHTS: '.*other\.pth': .*weights") as error:
        Checkpointer(model).load(str(tmp_path / "other.pth"))
    assert "\n" not in str(error.value)


def without(weights, part):
    return {name: value for name, value in weights.items() if part not in name}


@pytest.mark.parametrize("start", ["whole", "backbone"])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: without(w, "backbone.res3.0.conv2"), r"backbone\.res3\.0\.conv2\.weight"),
        (lambda w: without(w, "running_var"), r"backbone\.stem.*running_var"),
        (lambda w: {**w, "backbone.stem.conv1.weight": torch.zeros(3)}, r"backbone\.stem\.conv1"),
    ],
    ids=["missing", "buffers", "misshapen"],
)
def test_a_backbone_that_is_not_whole(released_cfg, model, tmp_path, caplog, start, change, named):
    weights = change(model.state_dict())
    if start == "backbone":
        weights = {n: v for n, v in weights.items() if n.startswith("backbone.")}
    saved = OrderedDict(weights)
    saved._metadata = model.state_dict()._metadata  # as torch.save keeps it
    torch.save({"model": saved}, tmp_path / "partial.pth")
    path = released_cfg.MODEL.WEIGHTS = str(tmp_path / "partial.pth")
    with pytest.raises(ValueError, match=rf"Missing or of another shape: {named}.*ALLOW_PARTIAL"):
        Checkpointer(build_model(released_cfg)).load(path)
    with pytest.raises(ValueError, match=r"Missing or of another shape"):
        Predictor(released_cfg)
    released_cfg.MODEL.PSF.ALLOW_PARTIAL_WEIGHTS = True
    Checkpointer(Trainer.build_model(released_cfg)).load(path)
    assert re.search(rf"start from random values: {named}", caplog.text)


@pytest.mark.parametrize("extra", ["backbone.res4.9.conv1.weight", "encoder.layers.9.norm1.bias"])
def test_a_checkpoint_of_a_deeper_model(released_cfg, model, tmp_path, caplog, extra):
    """A part of it would predict something else; of other things in the file a line is enough."""
    weights = {**model.state_dict(), "ema.weight": torch.zeros(1)}
    path = str(tmp_path / "deeper.pth")
    torch.save({"model": weights}, path)
    Checkpointer(model).load(path)
    torch.save({"model": {**weights, extra: torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match=rf"Not in the model: .*{re.escape(extra)}.*ALLOW_PARTIAL"):
        Checkpointer(model).load(path)
    released_cfg.MODEL.PSF.ALLOW_PARTIAL_WEIGHTS = True
    Checkpointer(Trainer.build_model(released_cfg)).load(path)
    assert f"Not in the model: {extra}" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.fill_(math.nan), "has values that are not finite"),
        (lambda w: w.to(torch.int8), r"is torch\.int8 .* not floating-point"),
    ],
)
def test_weights_that_are_no_numbers(model, tmp_path, change, message):
    name = "backbone.res3.0.conv2.weight"
    weights = {**model.state_dict(), name: change(model.state_dict()[name].clone())}
    torch.save({"model": weights}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=rf"{re.escape(name)} {message}"):
        Checkpointer(model).load(str(tmp_path / "model.pth"))


def test_a_backbone_alone_predicts_nothing(released_cfg, model, tmp_path):
    weights = {n: v for n, v in model.state_dict().items() if n.startswith("backbone.")}
    torch.save({"model": weights}, tmp_path / "backbone.pth")
    released_cfg.MODEL.WEIGHTS = str(tmp_path / "backbone.pth")
    Checkpointer(build_model(released_cfg)).load(released_cfg.MODEL.WEIGHTS)
    with pytest.raises(ValueError, match=r"Missing or of another shape: input_proj"):
        Predictor(released_cfg)


def test_counts_of_batches_are_no_weights(released_cfg, tmp_path):
    released_cfg.MODEL.RESNETS.NORM = "BN"
    model = build_model(released_cfg)
    weights = OrderedDict(without(model.state_dict(), "num_batches_tracked"))
    weights._metadata = model.state_dict()._metadata
    torch.save({"model": weights}, tmp_path / "a.pth")
    Checkpointer(build_model(released_cfg)).load(str(tmp_path / "a.pth"))


class TestImageNet:
    def imagenet_file(self, model, path):
        """torchvision's names for the model's backbone, and a classifier."""
        weights = {
            name.removeprefix("backbone."): value + 1
            for name, value in checkpoint.to_authors(model.state_dict()).items()
            if name.startswith("backbone.")
        }
        torch.save({**weights, "fc.weight": torch.zeros(1000, 8)}, path)
        return str(path)

    def test_a_backbone_is_a_start(self, released_cfg, model, tmp_path, caplog):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        path = self.imagenet_file(model, tmp_path / "resnet.pth")
        with caplog.at_level(logging.INFO, logger="psf.weights"):
            Checkpointer(model).load(path)
        for name, value in model.state_dict().items():
            changed = 1 if name.startswith("backbone.") else 0
            assert torch.equal(value, before[name] + changed), name
        assert "1 dropped (the ImageNet classifier)" in caplog.text

    def test_a_backbone_of_another_size(self, released_cfg, model, tmp_path):
        path = self.imagenet_file(model, tmp_path / "resnet.pth")
        released_cfg.MODEL.RESNETS.DEPTH = 101
        released_cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 16
        with pytest.raises(
            ValueError, match=r"stem\.conv1\.weight \[32, 3, 7, 7\] instead.*Missing: .*res4\.10\."
        ):
            Checkpointer(build_model(released_cfg)).load(path)

    def test_what_an_imagenet_swin_lacks_is_named(self, released_cfg, tmp_path, caplog):
        released_cfg.merge_from_list(
            [
                *("MODEL.BACKBONE.NAME", "build_swin_backbone"),
                *("MODEL.SWIN.EMBED_DIM", 24),
                *("MODEL.SWIN.DEPTHS", [1, 1, 1, 1]),
                *("MODEL.SWIN.NUM_HEADS", [2, 4, 8, 8]),
            ]
        )
        model = build_model(released_cfg)
        weights = {
            name: value
            for name, value in model.backbone.state_dict().items()
            if not name.startswith("norm")
        }
        weights |= {"norm.weight": torch.zeros(192), "head.bias": torch.zeros(1000)}
        torch.save({"model": weights}, tmp_path / "swin.pth")
        with caplog.at_level(logging.INFO, logger="psf.weights"):
            Checkpointer(model).load(str(tmp_path / "swin.pth"))
        assert "randomly initialized: backbone.norm1.bias" in caplog.text


def test_safetensors_are_weights_too(tiny_cfg, tmp_path, caplog):
    from safetensors.torch import save_file

    model, path = build_model(tiny_cfg), tmp_path / "a.safetensors"
    save_file({name: value.clone() for name, value in model.state_dict().items()}, path)
    load_and_compare(tiny_cfg, model, path, caplog)
    path.write_bytes(b"\xff" * 99)
    with pytest.raises(ValueError, match=r"a\.safetensors' is no complete safetensors file"):
        Checkpointer(model).load(str(path))


@pytest.mark.parametrize("path", ["foo://x/y.pth", "catalog://ImageNetPretrained/nope"])
def test_urls_of_other_kinds(tiny_cfg, path):
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS: '.*': known are files, and detectron2"):
        Checkpointer(build_model(tiny_cfg)).load(path)
