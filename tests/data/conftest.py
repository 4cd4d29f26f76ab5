"""What several tests of the data share."""

from pathlib import Path

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from psf import add_psf_config
from psf.data import register_panoptic

# Contiguous ids 0, 1 are things; 2, 3 stuff. In the data set they interleave.
CATEGORIES = [
    {"id": 4, "name": "sky", "isthing": 0},
    {"id": 1, "name": "cat", "isthing": 1},
    {"id": 3, "name": "grass", "isthing": 0},
    {"id": 2, "name": "dog", "isthing": 1},
]


@pytest.fixture
def coco_sample():
    """Two annotated COCO photos: panoptic.json, images/ and panoptic/."""
    folder = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "coco_sample"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data/coco_sample")
    return folder


@pytest.fixture
def cfg(tmp_path):
    for name in ("test_mapper", "test_mapper_other"):
        register_panoptic(
            name,
            image_root=str(tmp_path),
            panoptic_root=str(tmp_path),
            panoptic_json=str(tmp_path / "panoptic.json"),
            categories=CATEGORIES if name == "test_mapper" else CATEGORIES[1:],
        )
        MetadataCatalog.get(name).categories = CATEGORIES
    cfg = get_cfg()
    add_psf_config(cfg)
    cfg.DATASETS.TRAIN = ("test_mapper",)
    cfg.DATASETS.TEST = ()
    cfg.INPUT.MIN_SIZE_TRAIN = (64,)
    cfg.INPUT.MIN_SIZE_TEST = 48
    cfg.INPUT.CROP.TYPE = "absolute_range"
    cfg.INPUT.CROP.SIZE = [384, 600]
    yield cfg
    for name in ("test_mapper", "test_mapper_other"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
