"""The authors' code's recorded numbers, and models with the weights they were recorded with.

The small ones are shipped in ``tests/release/cases``; all of them are used where they lie beside
the project. Names of arrays are the official code's. Weights are not stored: they follow from a
seed and their names.
"""

import functools
import gzip
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from torch import Tensor, nn

from psf import checkpoint
from psf.config import load_config
from psf.modeling.criterion import matched_queries
from psf.modeling.mask_decoder import MaskPredictions
from psf.modeling.runtime import valid_sizes

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT.parent / "shared/reference"
SHIPPED = Path(__file__).parent / "release/cases"
# All the recorded cases where they are, else what is shipped.
SOURCES = {"shipped": SHIPPED, **({"reference": REFERENCE} if REFERENCE.is_dir() else {})}

SMALL_SEED, FULL_SEED = 11, 51
SMALL = [
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 32),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 8),
    *("MODEL.PSF.HIDDEN_DIM", 64),
    *("MODEL.PSF.DIM_FEEDFORWARD", 256),
    *("MODEL.PSF.ENC_LAYERS", 2),
    *("MODEL.PSF.NUM_OBJECT_QUERIES", 20),
    *("MODEL.PSF.LOCATION_DECODER.DEC_LAYERS", 3),
    *("MODEL.PSF.MASK_DECODER.THING_LAYERS", 2),
    *("MODEL.PSF.MASK_DECODER.STUFF_LAYERS", 3),
]


def arrays(folder: Path, name: str) -> dict[str, Tensor]:
    """The arrays of a case."""
    with np.load(folder / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def numbers(folder: Path, name: str) -> dict[str, Any]:
    """The losses and other single numbers of a case."""
    path = folder / f"{name}.json"
    if path.is_file():
        return json.loads(path.read_text())
    return json.loads(gzip.decompress(path.with_suffix(".json.gz").read_bytes()))


def nested(values: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The arrays below a name, without it."""
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}


def seeded(seed: int, name: str, shape: torch.Size) -> Tensor:
    """The value that an entry of the official model had in the recordings."""
    rng = np.random.RandomState(zlib.crc32(f"{seed}:{name}".encode()))
    *parents, leaf = name.split(".")
    if leaf == "running_var":
        return _float(0.5 + rng.random_sample(shape))
    normal = rng.standard_normal(shape)
    if leaf == "running_mean":
        return _float(0.1 * normal)
    if leaf == "level_embeds" or parents[-1:] in (["query_embedding"], ["stuff_query"]):
        return _float(normal)
    if leaf == "relative_position_bias_table":
        return _float(0.5 * normal)
    if leaf in ("bias", "in_proj_bias"):
        mean, scale = _bias_statistics(name)
        return _float(mean + scale * normal)
    if len(shape) == 1:  # weights of normalisations
        return _float(1 + 0.2 * normal)
    if name.endswith(".linear.0.weight"):  # of the masks, mostly positive
        return _float(0.12 + 0.25 * normal)
    gain = 1.0
    if "cls_stuff_branches" in name:
        gain = 2.0
    elif "reg_branches" in name and name.endswith(".4.weight"):
        gain = 0.5
    elif "mask_head" in name and parents[-1] in ("q", "k"):
        gain = 1.3
    return _float(gain * normal / np.sqrt(int(np.prod(shape[1:]))))


def _float(values: Any) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def _bias_statistics(name: str) -> tuple[float, float]:
    """Mean and standard deviation of the bias of a layer."""
    if "cls_stuff_branches" in name:
        return 0.3, 0.5
    if "cls_branches" in name or "cls_thing_branches" in name:
        return -1.0, 0.5
    if name.endswith(".linear.0.bias"):
        return 0.25, 0.05
    scales = {
        "sampling_offsets": 1.5,
        "attention_weights": 0.5,
        "reference_points": 0.7,
        "linear_l": 0.2,
    }
    if "reg_branches" in name and name.endswith(".4.bias"):
        return 0.0, 0.3
    return 0.0, next((scale for part, scale in scales.items() if part in name), 0.1)


def load_seeded(model: nn.Module, seed: int, overrides: Mapping[str, Tensor]) -> None:
    """Give a model the weights of the recordings, by the authors' names and back."""
    theirs = {
        name: value if value.dtype == torch.int64 else seeded(seed, name, value.shape)
        for name, value in checkpoint.to_authors(model.state_dict()).items()
    }
    load_official(model, {**theirs, **overrides})


def load_official(model: nn.Module, content: Mapping[str, Tensor]) -> None:
    """Load the entries of an official checkpoint, strictly."""
    weights = checkpoint.find_state_dict({"state_dict": content})
    source = checkpoint.recognise(weights)
    assert source is not None
    model.load_state_dict(checkpoint.convert(weights, source).state_dict, strict=True)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained, by the authors' names."""
    return checkpoint.to_authors({n: p for n, p in model.named_parameters() if p.requires_grad})


def release_cfg(config: str, options: list[Any] = []) -> CfgNode:  # noqa: B006  only read
    """The config of a released model, without dropout, to be built with random weights on a CPU."""
    return load_config(
        f"coco/release/panoptic_segformer_{config}.yaml",
        [
            *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.TIMM.PRETRAINED", False),
            *("MODEL.PSF.DROPOUT", 0.0, *options),
        ],
    )


@functools.cache
def small_model() -> nn.Module:
    """The small model of the recordings; tests leave its weights alone."""
    model = build_model(release_cfg("R50_24ep", SMALL)).eval()
    load_seeded(model, SMALL_SEED, arrays(SHIPPED, "small/overrides"))
    return model


def predict_and_match(model: nn.Module, inputs: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    """Location predictions, mask predictions, targets and matchings of a training image."""
    feature_maps, valid_shapes = model.extract_features(model.preprocess_images([inputs]))
    memory, locations, outputs = model.transformer(
        feature_maps, *valid_sizes(feature_maps, valid_shapes)
    )
    targets = model.prepare_targets([inputs])
    matchings = model.criterion.match(locations, targets)
    queries = matched_queries(matchings[-1], targets)
    decoder = model.mask_decoder
    predictions = MaskPredictions(
        *decoder.predict_classes(outputs, locations, last_only=False),
        *decoder.predict_masks(outputs, locations, memory, valid_shapes, queries, last_only=False),
    )
    return locations, predictions, targets, matchings


def training_input(case: Mapping[str, Tensor], image: Tensor) -> dict[str, Any]:
    """An input of the model: an image (H, W, 3) uint8, and the ground truth of a case."""
    instances = Instances(tuple(image.shape[:2]))
    instances.gt_boxes = Boxes(case["gt/0/bboxes"])
    instances.gt_classes = case["gt/0/labels"]
    instances.gt_masks = BitMasks(case["gt/0/masks"].bool())
    return {"image": image.permute(2, 0, 1), "instances": instances}


def official_panoptic(panoptic_seg: tuple[Tensor, list[dict[str, Any]]]) -> Tensor:
    """Detectron2's panoptic output as the official code's: (H, W, 2) category and instance."""
    id_map, infos = panoptic_seg
    metadata = MetadataCatalog.get("coco_2017_val_panoptic")
    things, stuff = (
        {contiguous: category for category, contiguous in ids.items()}
        for ids in (
            metadata.thing_dataset_id_to_contiguous_id,
            metadata.stuff_dataset_id_to_contiguous_id,
        )
    )
    table = torch.zeros(len(infos) + 1, 2, dtype=torch.int32)
    num_things = 0
    for info in infos:
        if info["isthing"]:
            num_things += 1
            table[info["id"]] = torch.tensor([things[info["category_id"]], num_things])
        else:
            table[info["id"], 0] = stuff[info["category_id"]]
    return table[id_map.long()]


def difference(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    actual, expected = actual.detach(), expected.detach()
    assert actual.shape == expected.shape
    scale = expected.double().abs().max().clamp(min=1e-30)
    return float((actual.double() - expected.double()).abs().max() / scale)
