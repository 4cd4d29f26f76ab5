"""The same draws on every machine, and fixtures that several test files share."""

import json
import random
import signal
from pathlib import Path

import psf.threads  # isort: skip  # noqa: F401  before torch is loaded

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from hypothesis import HealthCheck, settings

from psf.config import load_config
from psf.data import register_panoptic, register_shapes

# The same examples in every run, however slow the machine is: what fails, fails for everybody.
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")


# A shell's background job ignores Ctrl-C, and so would the trainings that the tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Tests that seed nothing draw the same whichever tests ran before them."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


# Interleaved on purpose: no code may assume that things come first.
THING_IDS, STUFF_IDS = {10: 1, 30: 3, 50: 4}, {20: 0, 40: 2}


@pytest.fixture
def tiny_cfg() -> CfgNode:
    """A model of 0.3 M parameters with every part of the real one; 3 thing, 2 stuff classes."""
    metadata = MetadataCatalog.get("tiny_interleaved")
    metadata.thing_dataset_id_to_contiguous_id = THING_IDS
    metadata.stuff_dataset_id_to_contiguous_id = STUFF_IDS
    names = ["grass", "circle", "water", "square", "star"]
    metadata.thing_classes = metadata.stuff_classes = names
    return load_config(
        opts=[
            *("MODEL.DEVICE", "cpu"),
            *("MODEL.BACKBONE.NAME", "build_resnet_backbone"),
            *("MODEL.BACKBONE.FREEZE_AT", 0),
            *("MODEL.RESNETS.NORM", "GN"),
            *("MODEL.RESNETS.STEM_OUT_CHANNELS", 32),
            *("MODEL.RESNETS.RES2_OUT_CHANNELS", 32),
            *("MODEL.RESNETS.WIDTH_PER_GROUP", 32),
            *("MODEL.RESNETS.STRIDE_IN_1X1", False),
            *("MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"]),
            *("MODEL.PIXEL_MEAN", [120.0, 120.0, 120.0]),
            *("MODEL.PIXEL_STD", [60.0, 60.0, 60.0]),
            *("MODEL.PSF.NUM_THING_CLASSES", 3),
            *("MODEL.PSF.NUM_STUFF_CLASSES", 2),
            *("MODEL.PSF.HIDDEN_DIM", 32),
            *("MODEL.PSF.NHEADS", 4),
            *("MODEL.PSF.NUM_POINTS", 2),
            *("MODEL.PSF.DIM_FEEDFORWARD", 32),
            *("MODEL.PSF.DROPOUT", 0.0),
            *("MODEL.PSF.ENC_LAYERS", 1),
            *("MODEL.PSF.NUM_OBJECT_QUERIES", 6),
            *("MODEL.PSF.LOCATION_DECODER.DEC_LAYERS", 2),
            *("MODEL.PSF.MASK_DECODER.DEC_LAYERS", 2),
            *("MODEL.PSF.TEST.SCORE_THRESHOLD", 0.0),
            *("DATASETS.TRAIN", ("tiny_interleaved",)),
            *("DATASETS.TEST", ("tiny_interleaved",)),
            *("INPUT.FORMAT", "RGB"),
            *("INPUT.MASK_FORMAT", "bitmask"),
            *("SEED", 7),
        ]
    )


@pytest.fixture
def shapes_cfg(tiny_cfg, tmp_path):
    """The tiny model on eight images of 64 x 64 pixels."""
    prefix = f"tiny_{tmp_path.name}"
    register_shapes(str(tmp_path / "shapes"), prefix=prefix, num_train=8, num_val=4, size=64)
    names = [f"{prefix}_train", f"{prefix}_val"]
    tiny_cfg.merge_from_list(
        [
            *("DATASETS.TRAIN", (names[0],)),
            *("DATASETS.TEST", (names[1],)),
            *("MODEL.PSF.NUM_THING_CLASSES", 5),
            *("MODEL.PSF.NUM_STUFF_CLASSES", 5),
            *("MODEL.PSF.TEST.SCORE_THRESHOLD", 0.05),
            *("DATALOADER.NUM_WORKERS", 0),
            *("DATALOADER.FILTER_EMPTY_ANNOTATIONS", False),
            *("INPUT.MIN_SIZE_TRAIN", (64,)),
            *("INPUT.MIN_SIZE_TEST", 64),
            *("SOLVER.IMS_PER_BATCH", 2),
            *("SOLVER.BASE_LR", 1e-3),
            *("SOLVER.WARMUP_ITERS", 0),
            *("SOLVER.MAX_ITER", 4),
            *("SOLVER.STEPS", ()),
            *("SOLVER.CHECKPOINT_PERIOD", 2),
            *("SOLVER.CLIP_GRADIENTS.ENABLED", True),
            *("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model"),
            *("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.1),
            *("OUTPUT_DIR", str(tmp_path / "output")),
        ]
    )
    yield tiny_cfg
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def config_file(shapes_cfg, tmp_path):
    """A config of the tiny model and data set that other processes can read."""
    (name,) = shapes_cfg.DATASETS.TRAIN
    DatasetCatalog.get(name)  # makes it
    metadata = MetadataCatalog.get(name)
    paths = (metadata.image_root, metadata.panoptic_root, metadata.panoptic_json)
    shapes_cfg.DATASETS.REGISTER = [["registered_shapes", *paths]]
    shapes_cfg.DATASETS.TRAIN, shapes_cfg.DATASETS.TEST = ("registered_shapes",), ()
    (tmp_path / "config.yaml").write_text(shapes_cfg.dump())
    yield str(tmp_path / "config.yaml")
    if "registered_shapes" in DatasetCatalog.list():
        DatasetCatalog.remove("registered_shapes")
        MetadataCatalog.remove("registered_shapes")


@pytest.fixture
def register_changed(shapes_cfg, tmp_path):
    """Register the training images of the tiny data set under a name, with a changed JSON."""
    names = []

    def register(name, change):
        original = shapes_cfg.DATASETS.TRAIN[0]
        DatasetCatalog.get(original)  # makes it
        metadata = MetadataCatalog.get(original)
        data = json.loads(Path(metadata.panoptic_json).read_text())
        change(data)
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(data))
        files = {"image_root": metadata.image_root, "panoptic_root": metadata.panoptic_root}
        register_panoptic(name, **files, panoptic_json=str(path))
        names.append(name)
        return name

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
