"""``--resume`` continues exactly, or says what starts afresh, or refuses."""

import re
from pathlib import Path

import pytest
import torch

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


CHANGES = {
    "one more": lambda c: c.append({"id": 77, "name": "extra", "isthing": 1}),
    "another order": lambda c: c.reverse(),
    "renamed": lambda c: c[0].update(name="renamed"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_other_classes_start_the_optimizer_afresh(finished, register_changed, caplog, change):
    name = register_changed("resumed_classes", lambda data: change(data["categories"]))
    finished.DATASETS.TRAIN, finished.DATASETS.TEST = (name,), ()
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


def put(content, path, value):
    """Replace a value deep in a checkpoint; a function is applied to it."""
    *folders, key = path.split("/")
    for folder in folders:
        content = content[int(folder) if folder.isdecimal() else folder]
    content[key] = value(content[key]) if callable(value) else value


STATE = "trainer/_trainer/optimizer"
WEIGHT = "model/backbone.stem.conv1.weight"
REFUSED = [
    ("trainer", [1], r"is \[1\] instead of an object"),
    ("trainer/iteration", "x", "iteration is 'x' instead of an integer"),
    ("trainer/_trainer", None, "_trainer is None instead of an object"),
    ("classes", 3, "'classes' in the checkpoint: is 3 instead of an object"),
    ("classes/things", [3], r"'classes' in the checkpoint: things is \[3\] instead of a list of"),
    ("classes/things", lambda v: [*v, "x", "y"][::-1], "names 7 classes, but the checkpoint has 5"),
    (WEIGHT, lambda v: v * float("nan"), r"conv1\.weight has values that are not finite"),
    (WEIGHT, lambda v: v.int(), r"conv1\.weight is torch\.int32"),
    (WEIGHT, lambda v: v.to_sparse(), r"conv1\.weight is .*torch\.sparse_coo"),
]
AFRESH = [
    ("", {}, "lacks param_groups, state"),
    ("/state", [], r"state is \[\] instead of an object"),
    ("/param_groups", lambda v: [None, *v[1:]], r"groups of \[.*\] parameters instead of"),
    ("/state", lambda v: {**v, 3: None, 4: 3}, "parameter 4: no exp_avg, exp_avg_sq, step"),
    ("/state", lambda v: {**v, 4: {**v[4], "step": "x"}}, "4: 'step' is not a tensor of floating"),
    ("/state/3/exp_avg", torch.zeros(1), r"3: 'exp_avg' \[1\] instead of \["),
    ("/state/3/exp_avg", lambda v: v / 0, "3: 'exp_avg' is not finite"),
]


def test_damaged_states_of_a_run(finished, caplog):
    """What cannot be continued is refused; without its optimizer's state a run goes on."""
    path = Path(finished.OUTPUT_DIR, "model_final.pth")
    for place, value, message in REFUSED:
        saved = torch.load(path, weights_only=False)
        put(saved, place, value)
        torch.save(saved, path.with_name("damaged.pth"))
        path.with_name("last_checkpoint").write_text("damaged.pth")
        with pytest.raises(ValueError, match=rf"damaged\.pth': .*{message}"):
            resumed(finished)
    for place, value, message in AFRESH:
        saved = torch.load(path, weights_only=False)
        put(saved, STATE + place, value)
        torch.save(saved, path.with_name("damaged.pth"))
        caplog.clear()
        trainer = resumed(finished)
        assert re.search(f"optimizer starts afresh, .*{message}", caplog.text), place
        assert trainer.start_iter == 4
        assert not moments(trainer)
