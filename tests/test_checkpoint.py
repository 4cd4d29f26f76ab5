import pickle

import convert_checkpoint
import pytest
import torch

from psf import checkpoint, checkpoint_files

RESNET = {
    "conv1.weight": "backbone.stem.conv1.weight",
    "bn1.running_var": "backbone.stem.conv1.norm.running_var",
    "layer1.0.conv1.weight": "backbone.res2.0.conv1.weight",
    "layer3.11.bn2.bias": "backbone.res4.11.conv2.norm.bias",
    "layer4.0.downsample.0.weight": "backbone.res5.0.shortcut.weight",
    "layer4.0.downsample.1.running_mean": "backbone.res5.0.shortcut.norm.running_mean",
}
HEADS = {
    "neck.convs.2.gn.weight": "input_proj.2.1.weight",
    "neck.extra_convs.0.conv.weight": "input_proj.3.0.weight",
    "bbox_head.transformer.level_embeds": "encoder.level_embed",
    "bbox_head.transformer.encoder.layers.5.ffns.0.layers.0.0.bias": (
        "encoder.layers.5.ffn.0.bias"
    ),
    "bbox_head.transformer.decoder.layers.1.attentions.0.attn.in_proj_weight": (
        "location_decoder.layers.1.self_attn.in_proj_weight"
    ),
    "bbox_head.transformer.decoder.layers.1.attentions.1.sampling_offsets.bias": (
        "location_decoder.layers.1.cross_attn.sampling_offsets.bias"
    ),
    "bbox_head.query_embedding.weight": "location_decoder.query_embed.weight",
    "bbox_head.reg_branches.0.4.bias": "location_decoder.box_heads.0.4.bias",
    "bbox_head.cls_stuff_branches.5.weight": "mask_decoder.stuff_heads.5.weight",
    "bbox_head.things_mask_head.blocks.3.attn.linear_l2.0.weight": (
        "mask_decoder.things.layers.3.cross_attn.mask_head.level_projs.1.weight"
    ),
    "bbox_head.stuff_mask_head.blocks.0.self_attention.qkv.bias": (
        "mask_decoder.stuff.layers.0.self_attn.in_proj_bias"
    ),
    "bbox_head.stuff_mask_head.attnen.linear.0.weight": (
        "mask_decoder.stuff.tail.mask_head.mask_proj.weight"
    ),
}
NAMES = {
    "ResNet": RESNET,
    "official Swin": {
        "patch_embed.proj.weight": "backbone.patch_embed.proj.weight",
        "layers.0.blocks.0.attn.relative_position_bias_table": (
            "backbone.layers.0.blocks.0.attn.relative_position_bias_table"
        ),
        "layers.2.downsample.norm.bias": "backbone.layers.2.downsample.norm.bias",
    },
    "official PVTv2": {
        "patch_embed1.proj.weight": "backbone.net.patch_embed.proj.weight",
        "patch_embed4.norm.bias": "backbone.net.stages_3.downsample.norm.bias",
        "block1.0.attn.q.weight": "backbone.net.stages_0.blocks.0.attn.q.weight",
        "block3.39.mlp.dwconv.dwconv.bias": "backbone.net.stages_2.blocks.39.mlp.dwconv.bias",
        "norm4.weight": "backbone.net.stages_3.norm.weight",
    },
    "timm's PVTv2": {
        "patch_embed.proj.weight": "backbone.net.patch_embed.proj.weight",
        "stages.0.blocks.0.attn.kv.weight": "backbone.net.stages_0.blocks.0.attn.kv.weight",
        "stages.3.norm.weight": "backbone.net.stages_3.norm.weight",
    },
    "released Panoptic SegFormer on ResNet": {
        **{f"backbone.{theirs}": ours for theirs, ours in RESNET.items()},
        **HEADS,
    },
}


def weights(*names: str) -> dict[str, torch.Tensor]:
    """Tensors that can be told apart, by name."""
    return {name: torch.tensor([float(i)]) for i, name in enumerate(names)}


def test_no_weights():
    with pytest.raises(ValueError, match="holds no weights"):
        checkpoint.find_state_dict({"state_dict": {}})
    assert checkpoint.recognise({}) is None


@pytest.mark.parametrize("name", NAMES)
def test_formats_are_recognised_and_renamed(name):
    theirs = weights(*NAMES[name])
    source = checkpoint.recognise(theirs)
    assert name in source.name
    conversion = checkpoint.convert(theirs, source)
    assert conversion.dropped == {}
    for key, value in theirs.items():
        assert conversion.state_dict[NAMES[name][key]] is value


def test_the_authors_names_come_back():
    names = NAMES["released Panoptic SegFormer on ResNet"]
    back = checkpoint.to_authors(weights(*names.values()))
    assert back == weights(*names)


def test_what_is_dropped_is_listed_with_its_reason():
    source = checkpoint.AUTHORS[0]
    entries = weights("bbox_head.reg_branches2.0.4.bias", "backbone.bn1.num_batches_tracked")
    conversion = checkpoint.convert(entries, source)
    assert conversion.state_dict == {}
    assert "multiplied by zero" in conversion.dropped["bbox_head.reg_branches2.0.4.bias"]
    assert "batches" in conversion.dropped["backbone.bn1.num_batches_tracked"]


def test_an_unknown_entry_is_an_error():
    entries = weights("backbone.conv1.weight", "bbox_head.something.weight")
    with pytest.raises(ValueError, match=r"1 of 2 entries .*: bbox_head\.something\.weight"):
        checkpoint.convert(entries, checkpoint.AUTHORS[0])
    with pytest.raises(ValueError, match=r"mask_decoder\.layers\.0\.norm1\.weight"):
        checkpoint.to_authors(weights("mask_decoder.layers.0.norm1.weight"))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_early_names_and_prefixes(prefix):
    early = weights(
        f"{prefix}bbox_head.mask_head.blocks.0.attn.q.weight",
        f"{prefix}bbox_head.mask_head2.attnen.k.bias",
        f"{prefix}bbox_head.cls_branches2.1.weight",
        f"{prefix}bbox_head.cls_branches.1.weight",
    )
    found = checkpoint.find_state_dict({"state_dict": early, "optimizer": {"state": {}}})
    assert list(found) == [
        "bbox_head.things_mask_head.blocks.0.attn.q.weight",
        "bbox_head.stuff_mask_head.attnen.k.bias",
        "bbox_head.cls_thing_branches.1.weight",
        "bbox_head.cls_branches.1.weight",
    ]


def test_weights_that_are_not_where_they_should_be():
    with pytest.raises(ValueError, match=r"under 'state_dict' or 'model'.*net are not tensors"):
        checkpoint.find_state_dict({"net": {"weight": torch.zeros(1)}})


def test_a_file_of_something_else(tmp_path):
    torch.save([1, 2], tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"file\.pth' holds a list"):
        checkpoint_files.read(str(tmp_path / "file.pth"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a PyTorch checkpoint: it is empty"),
        (b"<html>404</html>", "not a PyTorch checkpoint: it begins with b'<htm'.*repeat it"),
        (pickle.dumps({"a": 1}), "a pickle of another kind"),
        (b"PK\x03\x04" + bytes(100), "zip file of another kind"),
    ],
    ids=["empty", "web page", "pickle", "zip"],
)
def test_files_of_other_programs(tmp_path, content, message):
    (tmp_path / "file.pth").write_bytes(content)
    with pytest.raises(ValueError, match=rf"file\.pth' is .*{message}"):
        checkpoint_files.read(str(tmp_path / "file.pth"))


@pytest.mark.parametrize("as_zip", [True, False], ids=["present format", "old format"])
def test_truncated_files(tmp_path, as_zip):
    path = tmp_path / "file.pth"
    content = {"state_dict": weights(*(f"layer.{i}.weight" for i in range(20)))}
    torch.save(content, path, _use_new_zipfile_serialization=as_zip)
    assert checkpoint_files.read(str(path))["state_dict"].keys() == content["state_dict"].keys()
    whole = path.read_bytes()
    for kept in (2, 40, len(whole) // 3, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=r"file\.pth' is not a"):
            checkpoint_files.read(str(path))


class TestTool:
    def test_there_and_back(self, tmp_path, capsys):
        names = NAMES["released Panoptic SegFormer on ResNet"]
        dropped = "bbox_head.reg_branches2.0.4.bias"
        torch.save({"state_dict": weights(*names, dropped), "meta": {}}, tmp_path / "theirs.pth")
        theirs, ours, back = (
            str(tmp_path / name) for name in ("theirs.pth", "new/ours.pth", "back.pth")
        )
        convert_checkpoint.main([theirs, ours])
        assert f"{dropped}: its loss is multiplied by zero" in capsys.readouterr().out
        assert torch.load(ours)["model"] == weights(*names.values())
        convert_checkpoint.main(["--to-authors", ours, back])
        assert torch.load(back)["state_dict"] == weights(*names)

    def test_safetensors(self, tmp_path):
        from safetensors.torch import save_file

        names = NAMES["timm's PVTv2"]
        save_file(weights(*names), tmp_path / "timm.safetensors")
        convert_checkpoint.main([str(tmp_path / "timm.safetensors"), str(tmp_path / "out.pth")])
        assert torch.load(tmp_path / "out.pth")["model"] == weights(*names.values())

    def test_to_authors_what_is_theirs(self, tmp_path):
        names = weights(*NAMES["released Panoptic SegFormer on ResNet"])
        torch.save({"state_dict": names}, tmp_path / "in.pth")
        with pytest.raises(SystemExit, match="already has the authors' names"):
            convert_checkpoint.main(
                ["--to-authors", str(tmp_path / "in.pth"), str(tmp_path / "out.pth")]
            )

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"model": {"fc.weight": torch.zeros(1)}}, "none of the known formats: .*Swin"),
            ({"epoch": 3}, "epoch are not tensors"),
        ],
    )
    def test_errors_are_one_line(self, tmp_path, content, message):
        torch.save(content, tmp_path / "in.pth")
        with pytest.raises(SystemExit, match=message):
            convert_checkpoint.main([str(tmp_path / "in.pth"), str(tmp_path / "out.pth")])
        with pytest.raises(SystemExit, match="is a folder"):
            convert_checkpoint.main([str(tmp_path / "in.pth"), str(tmp_path)])
        with pytest.raises(SystemExit, match="no file"):
            convert_checkpoint.main(["missing.pth", str(tmp_path / "out.pth")])
        with pytest.raises(SystemExit, match="would overwrite"):
            convert_checkpoint.main([str(tmp_path / "in.pth")] * 2)
