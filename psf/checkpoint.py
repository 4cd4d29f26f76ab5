"""Third-party checkpoints: the authors' released models and ImageNet backbones, to and from ours.

A format is a table of names. In a name ``*`` matches a number, and a name that ends in a dot is a
prefix. Every entry of a checkpoint must be in the table or in the list of dropped entries: nothing
is skipped silently.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor


class Format(NamedTuple):
    """The names of a third-party state dict and of this project's model."""

    name: str
    signs: tuple[str, ...]  # entries that identify the format, all of them together
    names: dict[str, str]  # their names to ours
    dropped: dict[str, str]  # their names to the reason
    lacks: tuple[str, ...] = ()  # prefixes of our names that the format does not have


class Conversion(NamedTuple):
    """A converted state dict."""

    state_dict: dict[str, Tensor]
    dropped: dict[str, str]  # dropped entries and the reasons


def _inside(theirs: str, ours: str, names: Mapping[str, str]) -> dict[str, str]:
    """Prepend the names of a module to those of its entries."""
    return {theirs + key: ours + value for key, value in names.items()}


_NO_TRAINING = "counts training batches; batch normalization is frozen"
_CLASSIFIER = "the ImageNet classifier"

# torchvision's ResNet (also mmdet's "pytorch" style) to Detectron2's.
_RESNET = {
    "conv1.": "stem.conv1.",
    "bn1.": "stem.conv1.norm.",
    **{
        f"layer{stage}.*.{theirs}": f"res{stage + 1}.*.{ours}"
        for stage in (1, 2, 3, 4)
        for theirs, ours in {
            **{f"conv{i}.": f"conv{i}." for i in (1, 2, 3)},
            **{f"bn{i}.": f"conv{i}.norm." for i in (1, 2, 3)},
            "downsample.0.": "shortcut.",
            "downsample.1.": "shortcut.norm.",
        }.items()
    },
}
_RESNET_DROPPED = {
    "bn1.num_batches_tracked": _NO_TRAINING,
    **{f"layer{s}.*.bn*.num_batches_tracked": _NO_TRAINING for s in (1, 2, 3, 4)},
    **{f"layer{s}.*.downsample.1.num_batches_tracked": _NO_TRAINING for s in (1, 2, 3, 4)},
}
# The Swin authors' names are Detectron2's.
_SWIN = {name: name for name in ("patch_embed.", "layers.", "norm1.", "norm2.", "norm3.")}
# The PVTv2 authors' names to those of timm's feature extractor.
_PVT_V2 = {
    "patch_embed1.": "net.patch_embed.",
    **{f"patch_embed{i}.": f"net.stages_{i - 1}.downsample." for i in (2, 3, 4)},
    **{f"block{i}.*.": f"net.stages_{i - 1}.blocks.*." for i in (1, 2, 3, 4)},
    **{
        f"block{i}.*.mlp.dwconv.dwconv.": f"net.stages_{i - 1}.blocks.*.mlp.dwconv."
        for i in (1, 2, 3, 4)
    },
    **{f"norm{i}.": f"net.stages_{i - 1}.norm." for i in (1, 2, 3, 4)},
}
_TIMM_PVT_V2 = {
    "patch_embed.": "net.patch_embed.",
    **{f"stages.{i}.": f"net.stages_{i}." for i in (0, 1, 2, 3)},
}

_FEEDFORWARD = {"ffns.0.layers.0.0.": "ffn.0.", "ffns.0.layers.1.": "ffn.3."}
_ENCODER_LAYER = {
    "attentions.0.": "self_attn.",
    **_FEEDFORWARD,
    "norms.0.": "norm1.",
    "norms.1.": "norm2.",
}
_LOCATION_LAYER = {
    "attentions.0.attn.": "self_attn.",
    "attentions.1.": "cross_attn.",
    **_FEEDFORWARD,
    "norms.0.": "norm1.",
    "norms.1.": "norm2.",
    "norms.2.": "norm3.",
}
_ATTENTION_MAPS = {
    "q.": "q_proj.",
    "k.": "k_proj.",
    **{f"linear_l{level + 1}.0.": f"mask_head.level_projs.{level}." for level in (0, 1, 2)},
    "linear.0.": "mask_head.mask_proj.",
}
_MASK_LAYER = {
    **_inside("attn.", "cross_attn.", {**_ATTENTION_MAPS, "v.": "v_proj.", "proj.": "out_proj."}),
    "head_norm1.": "norm1.",
    "head_norm2.": "norm2.",
    "mlp.fc1.": "ffn.0.",
    "mlp.fc2.": "ffn.3.",
    # Only in the stuff stack.
    "self_attention.qkv.weight": "self_attn.in_proj_weight",
    "self_attention.qkv.bias": "self_attn.in_proj_bias",
    "self_attention.proj.": "self_attn.out_proj.",
    "norm3.": "norm3.",
}
_MASK_STACK = {
    **_inside("blocks.*.", "layers.*.", _MASK_LAYER),
    **_inside("attnen.", "tail.", _ATTENTION_MAPS),
}
_NOT_TRAINED = "its loss is multiplied by zero, and inference does not use it"

_HEADS = {
    **{f"neck.convs.{level}.conv.": f"input_proj.{level}.0." for level in (0, 1, 2)},
    **{f"neck.convs.{level}.gn.": f"input_proj.{level}.1." for level in (0, 1, 2)},
    "neck.extra_convs.0.conv.": "input_proj.3.0.",
    "neck.extra_convs.0.gn.": "input_proj.3.1.",
    "bbox_head.transformer.level_embeds": "encoder.level_embed",
    **_inside("bbox_head.transformer.encoder.layers.*.", "encoder.layers.*.", _ENCODER_LAYER),
    **_inside(
        "bbox_head.transformer.decoder.layers.*.", "location_decoder.layers.*.", _LOCATION_LAYER
    ),
    "bbox_head.transformer.reference_points.": "location_decoder.reference_points.",
    "bbox_head.query_embedding.": "location_decoder.query_embed.",
    "bbox_head.cls_branches.": "location_decoder.class_heads.",
    "bbox_head.reg_branches.": "location_decoder.box_heads.",
    "bbox_head.stuff_query.": "mask_decoder.stuff_query.",
    "bbox_head.cls_stuff_branches.": "mask_decoder.stuff_heads.",
    **_inside("bbox_head.things_mask_head.", "mask_decoder.things.", _MASK_STACK),
    **_inside("bbox_head.stuff_mask_head.", "mask_decoder.stuff.", _MASK_STACK),
}
_HEADS_DROPPED = {
    "bbox_head.cls_thing_branches.": _NOT_TRAINED,
    "bbox_head.reg_branches2.": _NOT_TRAINED,
}


def _authors(
    backbone: str, sign: str, names: Mapping[str, str], dropped: Mapping[str, str]
) -> Format:
    return Format(
        name=f"the authors' released Panoptic SegFormer on {backbone}",
        signs=("bbox_head.query_embedding.weight", f"backbone.{sign}"),
        names={**_inside("backbone.", "backbone.", names), **_HEADS},
        dropped={**_inside("backbone.", "", dropped), **_HEADS_DROPPED},
    )


AUTHORS = (
    _authors("ResNet", "layer1.0.conv1.weight", _RESNET, _RESNET_DROPPED),
    _authors("PVTv2", "patch_embed1.proj.weight", _PVT_V2, {}),
    _authors("Swin", "patch_embed.proj.weight", _SWIN, {}),
)
TORCHVISION_RESNET = Format(
    name="torchvision's ResNet",
    signs=("conv1.weight", "layer1.0.conv1.weight"),
    names=_inside("", "backbone.", _RESNET),
    dropped={**_RESNET_DROPPED, "fc.": _CLASSIFIER},
)
SWIN = Format(
    name="the official Swin Transformer",
    signs=("patch_embed.proj.weight", "layers.0.blocks.0.attn.relative_position_bias_table"),
    names=_inside("", "backbone.", _SWIN),
    dropped={
        "norm.": "belongs to the classifier; each feature map has its own",
        "head.": _CLASSIFIER,
        "layers.*.blocks.*.attn_mask": "depends on the image size",
    },
    lacks=("backbone.norm",),
)
PVT_V2 = Format(
    name="the official PVTv2",
    signs=("patch_embed1.proj.weight", "block1.0.attn.q.weight"),
    names=_inside("", "backbone.", _PVT_V2),
    dropped={"head.": _CLASSIFIER},
)
TIMM_PVT_V2 = Format(
    name="timm's PVTv2",
    signs=("patch_embed.proj.weight", "stages.0.blocks.0.attn.kv.weight"),
    names=_inside("", "backbone.", _TIMM_PVT_V2),
    dropped={"head.": _CLASSIFIER},
)
FORMATS = (*AUTHORS, TORCHVISION_RESNET, SWIN, PVT_V2, TIMM_PVT_V2)

# Names in early checkpoints of the authors, which their loader renames.
OLD_NAMES = {
    "bbox_head.mask_head.": "bbox_head.things_mask_head.",
    "bbox_head.mask_head2.": "bbox_head.stuff_mask_head.",
    "bbox_head.cls_branches2.": "bbox_head.cls_thing_branches.",
}


def find_state_dict(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """
    Find the weights in a checkpoint; strips ``module.`` of wrapped models, renames early names.

    Args:
        content: weights, or a dict that has them under ``state_dict`` (mmcv) or ``model``; the rest
            of it is ignored.

    Raises:
        ValueError: there are no weights, or an entry is not a tensor.
    """
    for key in ("state_dict", "model"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not content:
        raise ValueError("The checkpoint holds no weights")
    others = [
        str(name)
        for name, value in content.items()
        if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if others:
        raise ValueError(
            f"The checkpoint has no weights under 'state_dict' or 'model', and its entries "
            f"{', '.join(sorted(others)[:5])} are not tensors with names"
        )
    weights = {name.removeprefix("module."): value for name, value in content.items()}
    for old, new in OLD_NAMES.items():
        weights = {
            new + name.removeprefix(old) if name.startswith(old) else name: value
            for name, value in weights.items()
        }
    return weights


def recognise(state_dict: Mapping[str, Tensor]) -> Format | None:
    """Recognize the format of a state dict; None: unknown, or this project's."""
    return next((f for f in FORMATS if all(sign in state_dict for sign in f.signs)), None)


def by_name(name: str) -> Format:
    """
    Find a format by its name.

    Raises:
        ValueError: there is no such format.
    """
    found = next((f for f in FORMATS if f.name == name), None)
    if found is None:
        raise ValueError(f"The weights are converted from '{name}', which is not a known format")
    return found


def convert(state_dict: Mapping[str, Tensor], source: Format) -> Conversion:
    """
    Rename the entries of a third-party state dict to those of this project's model.

    Raises:
        ValueError: an entry is neither in the format's table nor among its dropped entries.
    """
    dropped = _Names(source.dropped)
    reasons = {name: found[0] for name in state_dict if (found := dropped.find(name))}
    kept = [name for name in state_dict if name not in reasons]
    renamed = _Names(source.names).rename_all(kept, source.name)
    return Conversion({renamed[name]: state_dict[name] for name in kept}, reasons)


def to_authors(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """
    Rename the entries of a model with the ``decoupled`` mask decoder to the authors' names.

    Entries that :func:`convert` dropped stay missing; the authors' loader does not need them.

    Raises:
        ValueError: the model has entries that the authors' model does not have.
    """
    tables = [_Names({ours: theirs for theirs, ours in f.names.items()}) for f in AUTHORS]
    # Each of these formats has the names of one backbone.
    table = max(tables, key=lambda t: sum(t.find(name) is not None for name in state_dict))
    renamed = table.rename_all(list(state_dict), "the authors' released Panoptic SegFormer")
    return {renamed[name]: value for name, value in state_dict.items()}


class _Names:
    """A table of names, or of other texts by name, with the regular expressions of its rules."""

    def __init__(self, names: Mapping[str, str]) -> None:
        # Longest first: "stem.conv1.norm." before "stem.conv1.".
        self.rules = [
            (re.compile(_pattern(rule)), names[rule])
            for rule in sorted(names, key=len, reverse=True)
        ]

    def find(self, name: str) -> tuple[str, re.Match[str]] | None:
        """What the table has for a name, and the match of the rule."""
        matches = ((target, pattern.fullmatch(name)) for pattern, target in self.rules)
        return next(((target, match) for target, match in matches if match), None)

    def rename_all(self, names: list[str], table: str) -> dict[str, str]:
        found = {name: self.find(name) for name in names}
        unknown = sorted(name for name, new in found.items() if new is None)
        if unknown:
            raise ValueError(
                f"{len(unknown)} of {len(names)} entries are not in the table of {table}: "
                f"{', '.join(unknown[:10])}{' ...' if len(unknown) > 10 else ''}"
            )
        return {name: _fill_in(*new) for name, new in found.items() if new is not None}


def _fill_in(target: str, match: re.Match[str]) -> str:
    """Put the numbers of a match into a name, and what follows the prefix behind it."""
    *numbers, rest = match.groups()
    for number in numbers:
        target = target.replace("*", number, 1)
    return target + rest


def _pattern(rule: str) -> str:
    """The regular expression of a rule; its last group is what follows the prefix."""
    return re.escape(rule).replace(r"\*", r"(\d+)") + ("(.*)" if rule.endswith(".") else "()")
