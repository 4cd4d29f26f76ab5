"""What a training and an evaluation show, as processes of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from detectron2.engine import TrainerBase
from detectron2.utils.events import EventStorage

from psf.console import ProgressHook

ROOT = Path(__file__).parent.parent


def run(*arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "train_net.py"), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )


def test_a_training_and_an_evaluation(config_file, shapes_cfg, tmp_path):
    (name,) = shapes_cfg.DATASETS.TRAIN
    metadata, output = "registered_shapes", tmp_path / "output"
    options = ["--config-file", config_file, "DATASETS.TEST", f"('{metadata}',)"]
    training = run(*options, "TEST.EVAL_PERIOD", "2", "SOLVER.WARMUP_ITERS", "4")
    assert training.stderr == "", "no warnings of Python's"
    lines = training.stdout.splitlines()
    assert len(lines) < 12
    assert "log.txt" in lines[0]
    assert re.search(r"\] WARNING: SOLVER\.WARMUP_ITERS is 4 of 4", training.stdout)
    (first, last) = [line for line in lines if "iteration " in line]
    assert re.search(r"iteration 2/4  loss [\d.]+  PQ [\d.]+ PQ_th [\d.]+ PQ_st [\d.]+", first)
    assert re.search(r"iteration 4/4  loss [\d.]+  PQ [\d.]+(  |$)", last)
    log = (output / "log.txt").read_text()
    for hidden in ("loss_giou_0:", "Environment info", "BASE_LR: 0.001", "Panoptic quality"):
        assert hidden in log
        assert hidden not in training.stdout
    assert name not in training.stdout

    evaluation = run(*options[:2], "--eval-only", "--resume", *options[2:])
    assert evaluation.stderr == ""
    assert "| things" in evaluation.stdout
    assert "BASE_LR" not in evaluation.stdout


@pytest.fixture
def hook(monkeypatch):
    """A hook in a training of 1000 iterations, and the seconds that its clock shows."""
    hook, clock = ProgressHook(), [0.0]
    monkeypatch.setattr("psf.console.time.perf_counter", lambda: clock[0])
    hook.trainer = TrainerBase()
    hook.trainer.max_iter = 1000
    hook.before_train()
    return hook, clock


@pytest.mark.parametrize(
    ("seconds", "number"),
    [(0.01, 1), (0.5, 50), (2, 100), (100, 1000)],
)
def test_lines_are_neither_rare_nor_many(hook, caplog, seconds, number):
    hook, clock = hook
    caplog.set_level("INFO", "psf.console")
    with EventStorage(0) as storage:
        hook.trainer.storage = storage
        for i in range(1000):
            hook.trainer.iter = i
            storage.put_scalars(total_loss=2.0, time=seconds)
            clock[0] += seconds
            hook.after_step()
            storage.step()
    assert number <= len(caplog.messages) <= number + 1
    assert caplog.messages[-1].startswith("iteration 1000/1000  loss 2")


def test_the_line(hook, caplog):
    hook, _ = hook
    caplog.set_level("INFO", "psf.console")
    with EventStorage(899) as storage:
        hook.trainer.storage, hook.trainer.iter = storage, 899
        storage.put_scalars(total_loss=2.5, time=36)
        quality = {"PQ": 50.0, "PQ_th": 40.0, "PQ_st": 60.0}
        for data_set, lower in (("first", 0), ("second", 30)):
            for key, value in quality.items():
                storage.put_scalar(f"{data_set}/panoptic_seg/{key}", value - lower)
                storage.put_scalar(f"{data_set}/boundary_panoptic_seg/{key}", 0.0)
        hook.after_step()
    assert caplog.messages == [
        "iteration 900/1000  loss 2.5  PQ 50.00 PQ_th 40.00 PQ_st 60.00  36 s/iteration  "
        "1:00:00 left"
    ]
