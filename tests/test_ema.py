import contextlib
import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from psf.config import load_config
from psf.ema import ModelEma, ema_decay
from psf.trainer import Trainer


def test_the_decay_grows_to_its_value():
    assert [ema_decay(i, 0.9) for i in (0, 1, 10, 1000)] == pytest.approx([0.1, 2 / 11, 0.55, 0.9])


def test_an_average_by_hand():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1, affine=False))
    weight, variance = model[0].weight.data, model[1].running_var
    weight.fill_(10)
    ema = ModelEma(model, decay=0.15)
    for value in (20.0, 0.0):
        weight.fill_(value)
        variance.fill_(value)
        model[1].num_batches_tracked += 1
        ema.update()  # keeps 0.1, then 0.15
    state = ema.state_dict()
    assert state["0.weight"].item() == pytest.approx(0.15 * 19)
    assert state["1.running_var"].item() == pytest.approx(0.15 * (0.1 + 0.9 * 20))
    assert state["1.num_batches_tracked"] == 2
    with contextlib.suppress(KeyboardInterrupt), ema.applied():
        assert weight.item() == pytest.approx(0.15 * 19)
        raise KeyboardInterrupt
    assert weight.item() == 0
    assert variance.item() == 0


def run(cfg, batches, *, until, resume=False):
    """Train with some batches, until there are so many iterations."""
    torch.manual_seed(0)
    cfg.SOLVER.MAX_ITER = until
    trainer = Trainer(cfg)
    trainer.data_loader = batches
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return torch.load(Path(cfg.OUTPUT_DIR, "model_final.pth"), weights_only=True)


@pytest.fixture
def ema_cfg(shapes_cfg):
    shapes_cfg.SOLVER.EMA_DECAY = 0.6
    shapes_cfg.DATASETS.TEST = ()
    return shapes_cfg


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    "options", [[], ["SOLVER.AMP.ENABLED", True], ["SOLVER.ACCUMULATE_STEPS", 2]]
)
def test_resuming_is_exact(ema_cfg, tmp_path, options):
    ema_cfg.merge_from_list(options)
    batches = list(islice(Trainer.build_train_loader(ema_cfg), 4))
    expected = run(ema_cfg, batches, until=4)
    ema_cfg.OUTPUT_DIR = str(tmp_path / "resumed")
    run(ema_cfg, batches[:2], until=2)
    resumed = run(ema_cfg, batches[2:], until=4, resume=True)
    for saved in (expected, resumed):
        assert saved["trainer"]["_trainer"]["ema"]["updates"] == 4
    trained = expected["trainer"]["_trainer"]["ema"]["trained"]
    assert not same(expected["model"], trained)
    assert same(resumed["model"], expected["model"])
    assert same(resumed["trainer"]["_trainer"]["ema"]["trained"], trained)


def test_the_training_is_that_without_an_average(ema_cfg, tmp_path):
    batches = list(islice(Trainer.build_train_loader(ema_cfg), 2))
    averaged = run(ema_cfg, batches, until=2)
    ema_cfg.SOLVER.EMA_DECAY, ema_cfg.OUTPUT_DIR = 0.0, str(tmp_path / "plain")
    plain = run(ema_cfg, batches, until=2)
    assert same(averaged["trainer"]["_trainer"]["ema"]["trained"], plain["model"])

    ema_cfg.OUTPUT_DIR = str(tmp_path / "output")
    without = Trainer(ema_cfg)
    without.resume_or_load(resume=True)
    assert same(without.model.state_dict(), plain["model"]), "resumed without an average"
    ema_cfg.SOLVER.EMA_DECAY, ema_cfg.OUTPUT_DIR = 0.6, str(tmp_path / "plain")
    with_one = Trainer(ema_cfg)
    with_one.resume_or_load(resume=True)
    assert same(with_one.ema.state_dict(), plain["model"]), "resumed with a new average"


def test_the_average_is_evaluated_and_loaded(ema_cfg, tmp_path, monkeypatch):
    ema_cfg.DATASETS.TEST = (ema_cfg.DATASETS.TRAIN[0],)
    ema_cfg.TEST.EVAL_PERIOD = 2
    ema_cfg.MODEL.PSF.TEST.SEMANTIC_ON = True  # a PQ of 0 would hide differences
    test, evaluated = Trainer.test, []

    def observe(cfg, model):
        evaluated.append({name: value.clone() for name, value in model.state_dict().items()})
        return test(cfg, model)

    monkeypatch.setattr(Trainer, "test", staticmethod(observe))
    trainer = Trainer(ema_cfg)
    trainer.train()
    saved = torch.load(Path(ema_cfg.OUTPUT_DIR, "model_final.pth"), weights_only=True)
    assert len(evaluated) == 2
    assert same(evaluated[-1], saved["model"])
    assert same(trainer.model.state_dict(), saved["trainer"]["_trainer"]["ema"]["trained"])
    assert (tmp_path / "output" / "contact_sheet.png").is_file()

    model = build_model(ema_cfg)
    model.load_state_dict(saved["model"])
    results = test(ema_cfg, model)
    assert results["sem_seg"]["pACC"] > 0
    for task in ("panoptic_seg", "sem_seg"):
        assert json.dumps(results[task]) == json.dumps(trainer.last_results[task])


def test_a_new_training_averages_from_the_weights_that_it_loads(ema_cfg, tmp_path):
    saved = run(ema_cfg, list(islice(Trainer.build_train_loader(ema_cfg), 2)), until=2)
    ema_cfg.MODEL.WEIGHTS = str(tmp_path / "output" / "model_final.pth")
    trainer = Trainer(ema_cfg)
    trainer.resume_or_load(resume=False)
    assert same(trainer.ema.state_dict(), saved["model"])
    assert same(trainer.model.state_dict(), saved["model"])


@pytest.mark.parametrize(
    "options",
    [
        ["SOLVER.EMA_DECAY", 1.0],
        ["SOLVER.EMA_DECAY", -0.1],
        ["SOLVER.EMA_DECAY", 0.9, "TEST.PRECISE_BN.ENABLED", True],
    ],
)
def test_options_without_sense_are_refused(options):
    with pytest.raises(ValueError, match=r"SOLVER\.EMA_DECAY"):
        load_config(opts=options)
