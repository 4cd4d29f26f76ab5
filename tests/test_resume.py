"""``--resume`` continues exactly, or says what starts afresh, or refuses."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from psf.data import register_panoptic
from psf.trainer import Trainer


def resumed(cfg):
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    return trainer


@pytest.fixture
def finished(shapes_cfg):
    """The config of a run of four iterations, which its folder holds."""
    shapes_cfg.merge_from_list(["MODEL.PSF.NUM_THING_CLASSES", 0, "MODEL.PSF.NUM_STUFF_CLASSES", 0])
    shapes_cfg.SOLVER.EMA_DECAY = 0.5
    test, shapes_cfg.DATASETS.TEST = shapes_cfg.DATASETS.TEST, ()
    trainer = Trainer(shapes_cfg)
    trainer.train()
    shapes_cfg.SOLVER.MAX_ITER = 6
    shapes_cfg.DATASETS.TEST = test
    return shapes_cfg


def moments(trainer):
    states = trainer.optimizer.state
    return {i: s["exp_avg"] for i, s in enumerate(states.values())}


def test_the_same_run_continues_exactly(finished, caplog):
    saved = torch.load(Path(finished.OUTPUT_DIR, "model_final.pth"), weights_only=False)
    trainer = resumed(finished)
    expected = saved["trainer"]["_trainer"]["optimizer"]["state"]
    assert len(expected) > 100
    for i, value in moments(trainer).items():
        assert torch.equal(value, expected[i]["exp_avg"])
    assert trainer.start_iter == 4
    assert not [r for r in caplog.records if r.name.startswith("psf") and r.levelname == "WARNING"]


@pytest.fixture(params=["one more", "another order", "renamed"])
def other_classes(finished, tmp_path, request):
    (name,) = finished.DATASETS.TRAIN
    metadata = MetadataCatalog.get(name)
    data = json.loads(Path(metadata.panoptic_json).read_text())
    if request.param == "one more":
        data["categories"].append({"id": 77, "name": "extra", "isthing": 1})
    elif request.param == "another order":
        data["categories"].reverse()
    else:
        data["categories"][0]["name"] = "renamed"
    (tmp_path / "other.json").write_text(json.dumps(data))
    register_panoptic(
        "resumed_classes",
        image_root=metadata.image_root,
        panoptic_root=metadata.panoptic_root,
        panoptic_json=str(tmp_path / "other.json"),
    )
    yield "resumed_classes"
    DatasetCatalog.remove("resumed_classes")
    MetadataCatalog.remove("resumed_classes")


def test_other_classes_start_the_optimizer_afresh(finished, other_classes, caplog):
    finished.DATASETS.TRAIN, finished.DATASETS.TEST = (other_classes,), ()
    trainer = resumed(finished)
    assert "optimizer starts afresh" in caplog.text
    assert "of other classes" in caplog.text
    assert not moments(trainer)
    assert trainer.ema.updates == 0
    trainer.train()
    assert trainer.iter == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["MODEL.PSF.HIDDEN_DIM", 64], "of another shape: .*encoder"),
        (["MODEL.RESNETS.RES2_OUT_CHANNELS", 64], r"of another shape: backbone\.res2"),
        (["MODEL.RESNETS.DEPTH", 101], r"Missing or of .*backbone\.res4\.6\."),
        (["SOLVER.IMS_PER_BATCH", 4], "batches of 2 images, and now they have 4"),
        # One process of the two that the schedule is written for.
        (["SOLVER.REFERENCE_WORLD_SIZE", 2], "batches of 2 images, and now they have 1"),
    ],
)
def test_what_cannot_be_continued_is_refused(finished, options, message):
    finished.merge_from_list(options)
    with pytest.raises(ValueError, match=message):
        resumed(finished)


def test_another_set_of_parameters_starts_the_optimizer_afresh(finished, caplog):
    finished.MODEL.BACKBONE.FREEZE_AT = 2
    trainer = resumed(finished)
    assert "optimizer starts afresh" in caplog.text
    trainer.train()


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        (["SOLVER.BASE_LR", 3e-4], 3e-4),
        (["SOLVER.REFERENCE_BATCH_SIZE", 4], 5e-4),  # half of the images: half the rate
    ],
)
def test_the_learning_rate_is_the_configs(finished, options, rate, caplog):
    finished.merge_from_list([*options, "SOLVER.WEIGHT_DECAY", 0.03])
    trainer = resumed(finished)
    assert f"The learning rate is the config's, {rate:g}; it was 0.001" in caplog.text
    groups = trainer.optimizer.param_groups
    assert max(group["lr"] for group in groups) == pytest.approx(rate)
    assert max(group["weight_decay"] for group in groups) == 0.03
    trainer.scheduler.step()
    assert max(group["lr"] for group in groups) == pytest.approx(rate)


def test_past_the_last_iteration(finished, caplog):
    finished.SOLVER.MAX_ITER = 3
    resumed(finished).train()
    assert (
        "Nothing is trained: the checkpoint has 4 iterations, SOLVER.MAX_ITER is 3" in caplog.text
    )


def test_weights_alone_are_a_start(finished, caplog):
    folder = Path(finished.OUTPUT_DIR)
    saved = torch.load(folder / "model_final.pth", weights_only=False)
    torch.save({"model": saved["model"]}, folder / "model_final.pth")
    assert resumed(finished).start_iter == 0
    assert "holds weights alone" in caplog.text
