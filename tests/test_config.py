import ast
import json
from pathlib import Path

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import transforms as T

from psf.config import add_psf_config, load_config
from psf.data import PanopticDatasetMapper

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_config_loads(path):
    cfg = load_config(path)
    assert cfg.MODEL.META_ARCHITECTURE == "PanopticSegFormer"
    assert cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE == "full_model"


def test_the_paper_recipe():
    cfg = load_config("coco/panoptic_segformer_R50_24ep.yaml")
    psf, solver = cfg.MODEL.PSF, cfg.SOLVER
    assert (psf.HIDDEN_DIM, psf.ENC_LAYERS, psf.NUM_OBJECT_QUERIES) == (256, 6, 300)
    assert (psf.LOCATION_DECODER.DEC_LAYERS, psf.MASK_DECODER.DEC_LAYERS) == (6, 6)
    assert (solver.BASE_LR, solver.WEIGHT_DECAY, solver.IMS_PER_BATCH) == (1.4e-4, 1e-4, 8)
    epoch = 118287 / solver.IMS_PER_BATCH
    assert solver.MAX_ITER / epoch == pytest.approx(24, abs=0.01)
    assert solver.STEPS[0] / epoch == pytest.approx(18, abs=0.01)


RELEASED = sorted((ROOT / "configs/coco/release").glob("panoptic*.yaml"))


@pytest.mark.parametrize("path", RELEASED, ids=lambda p: p.stem)
def test_the_released_recipes(path):
    """MODEL.md, 2.1 and 2.5 to 2.7: batches, schedule, thresholds, frozen stages, drop path."""
    cfg = load_config(path)
    psf, solver = cfg.MODEL.PSF, cfg.SOLVER
    assert (psf.MASK_DECODER.NAME, psf.NUM_FEATURE_LEVELS) == ("decoupled", 4)
    assert (psf.MASK_DECODER.THING_LAYERS, psf.MASK_DECODER.STUFF_LAYERS) == (4, 6)
    assert psf.STUFF_CLASS_WEIGHT == 2 * psf.CLASS_WEIGHT
    assert (solver.BASE_LR, solver.WEIGHT_DECAY, solver.WEIGHT_DECAY_NORM) == (1.4e-4, 1e-4, 1e-4)
    assert (solver.IMS_PER_BATCH, solver.REFERENCE_BATCH_SIZE, solver.WARMUP_ITERS) == (8, 8, 0)
    assert solver.CLIP_GRADIENTS.CLIP_VALUE == 0.1
    epoch = 118287 / 8
    epochs, step = (12, 8) if "12ep" in path.stem else (24, 18)
    assert solver.MAX_ITER / epoch == pytest.approx(epochs, abs=0.01)
    assert solver.STEPS[0] / epoch == pytest.approx(step, abs=0.01)
    is_resnet = "_R" in path.stem
    assert (0.25 if is_resnet else 0.3) == psf.TEST.SCORE_THRESHOLD
    assert (2 if is_resnet else 0) == cfg.MODEL.BACKBONE.FREEZE_AT
    assert (cfg.MODEL.SWIN.DROP_PATH_RATE, cfg.MODEL.TIMM.DROP_PATH_RATE) == (0.3, 0.1)
    assert cfg.INPUT.CROP.SIZE == [384, 600]
    assert cfg.INPUT.RESIZE_LIBRARY == "opencv"
    assert (min(cfg.INPUT.MIN_SIZE_TRAIN), max(cfg.INPUT.MIN_SIZE_TRAIN)) == (480, 800)


def test_no_file_and_no_options():
    cfg = get_cfg()
    add_psf_config(cfg)
    assert load_config() == cfg


def test_options_come_after_the_file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("SEED: 3\nMODEL:\n  PSF:\n    ENC_LAYERS: 2\n")
    cfg = load_config(path, ["SEED", "4", "SOLVER.STEPS", (1, 2)])
    assert (cfg.SEED, cfg.MODEL.PSF.ENC_LAYERS, cfg.SOLVER.STEPS) == (4, 2, (1, 2))


def test_configs_of_the_project_are_found_from_anywhere(tmp_path, monkeypatch):
    name = "shapes/panoptic_segformer_shapes.yaml"
    expected = load_config(ROOT / "configs" / name)
    monkeypatch.chdir(tmp_path)
    assert load_config(name) == load_config(f"configs/{name}") == expected
    # A file goes before a config of the project.
    (tmp_path / "shapes").mkdir()
    (tmp_path / name).write_text("SEED: 77\n")
    assert load_config(name).SEED == 77
    with pytest.raises(FileNotFoundError, match=r"'configs/a\.yaml': .*'/.*/configs/a\.yaml'"):
        load_config("configs/a.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "MODEL:\n  PSF:\n    ENC_LAYER: 3\n",
            r"MODEL\.PSF\.ENC_LAYER\. Did .* MODEL\.PSF\.ENC_LA",
        ),
        ("NO_SUCH_THING: 3\n", r"Non-existent config key: NO_SUCH_THING$"),
        ("SEED: many\n", "SEED"),
        ("SEED: [\n", "while parsing a flow"),
    ],
    ids=["misspelt", "unknown", "type", "syntax"],
)
def test_errors_are_one_line_that_names_the_file(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"^Config error in '/.*bad\.yaml': .*{message}") as error:
        load_config(tmp_path / "bad.yaml")
    assert "\n" not in str(error.value)


def test_errors_in_options_name_the_key():
    with pytest.raises(ValueError, match=r"^Config error in KEY VALUE pairs: .*MODEL\.NO_KEY"):
        load_config(opts=["MODEL.NO_KEY", 1])


def test_every_key_is_used():
    """A key that no code reads is a promise that nothing keeps."""
    source = "".join(
        path.read_text(encoding="utf-8")
        for path in (ROOT / "psf").rglob("*.py")
        if path.name != "config.py"
    )
    attributes = {n.attr for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Attribute)}

    def unused(node, prefix=""):
        for key, value in node.items():
            if isinstance(value, dict):
                yield from unused(value, f"{prefix}{key}.")
            elif key not in attributes:
                yield prefix + key

    assert list(unused(load_config().MODEL.PSF)) == []
    assert {"BACKBONE_MULTIPLIER", "SAMPLING_MULTIPLIER"} <= attributes


@pytest.mark.parametrize(
    ("name", "num_images", "epochs"),
    [
        ("ade20k/panoptic_segformer_R50_160k", 20_210, 127),
        ("cityscapes/panoptic_segformer_R50_90k", 2_975, 484),
        ("coco/panoptic_segformer_R50_lsj_50ep", 118_287, 50),
    ],
)
def test_schedules_and_augmentations(name, num_images, epochs):
    cfg = load_config(f"{name}.yaml")
    seen = cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH
    assert seen / num_images == pytest.approx(epochs, abs=0.5)
    assert all(step < cfg.SOLVER.MAX_ITER for step in cfg.SOLVER.STEPS) or "Cosine" in (
        cfg.SOLVER.LR_SCHEDULER_NAME
    )
    mapper = PanopticDatasetMapper(cfg)
    assert len(mapper.class_map.thing_ids) in (100, 8, 80)
    image = np.zeros((480, 640, 3), dtype=np.uint8)
    result = T.AugInput(image)
    mapper.augmentations(result)
    expected = [1024, 1024] if "lsj" in name else cfg.INPUT.CROP.SIZE
    assert list(result.image.shape[:2]) == expected


def test_the_home_folder(tmp_path, monkeypatch):
    """No shell sees the values in a file, nor those behind a key."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    entry = ["own", "~/images", "~/pngs", "~/a.json"]
    text = f"DATASETS:\n  REGISTER: {json.dumps([entry])}\n"
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8-sig")
    opts = ["OUTPUT_DIR", "~/out", "MODEL.WEIGHTS", "~/model.pth"]
    cfg = load_config("~/c.yaml", opts)
    assert str(tmp_path / "out") == cfg.OUTPUT_DIR
    assert str(tmp_path / "model.pth") == cfg.MODEL.WEIGHTS
    expected = [str(tmp_path / name) for name in ("images", "pngs", "a.json")]
    assert [["own", *expected]] == cfg.DATASETS.REGISTER
