"""What a training leaves in its folder: whole files of one run, whatever ends it."""

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from psf.files import write_beside
from psf.train_step import TrainStep
from psf.trainer import Trainer
from psf.weights import Checkpointer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import train_net  # noqa: E402  a script, not a module of the package


def run(*options):
    return train_net.main(
        train_net.default_argument_parser().parse_args(["--config-file", *options])
    )


@pytest.mark.parametrize("failure", [OSError("no space"), KeyboardInterrupt(), MemoryError()])
def test_a_failed_write_leaves_the_old_file(tmp_path, failure):
    path = tmp_path / "a.json"
    path.write_text("old")
    with contextlib.suppress(type(failure)), write_beside(path) as partial:
        partial.write_text("ne")
        raise failure
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text() == "old"


def test_a_full_disk_leaves_the_old_checkpoint(tiny_cfg, tmp_path):
    checkpointer = Checkpointer(build_model(tiny_cfg), str(tmp_path))
    checkpointer.save("model_final")
    before = (tmp_path / "model_final.pth").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises((OSError, RuntimeError)):
            checkpointer.save("model_final")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {p.name for p in tmp_path.iterdir()} == {"model_final.pth", "last_checkpoint"}
    assert (tmp_path / "model_final.pth").read_bytes() == before


def test_a_finished_run_is_continued_or_left_alone(config_file, tmp_path, caplog):
    output = tmp_path / "output"
    run(config_file)
    before = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}
    # Also the natural config for fine-tuning, whose base names the folder of its weights.
    for options in ([], ["MODEL.WEIGHTS", str(output / "model_final.pth"), "SEED", "3"]):
        with pytest.raises(SystemExit, match=r"OUTPUT_DIR '.*output' .*--resume .*another folder"):
            run(config_file, *options)
    assert {p: p.read_bytes() for p in output.rglob("*") if p.is_file()} == before

    weights = ["MODEL.WEIGHTS", str(output / "model_final.pth")]
    run(config_file, "--eval-only", *weights, "DATASETS.TEST", "('registered_shapes',)")
    for name in ("config.yaml", "last_checkpoint", "model_final.pth", "metrics.json"):
        assert (output / name).read_bytes() == before[output / name], name

    run(config_file, "--resume", "SOLVER.MAX_ITER", "6")
    assert torch.load(output / "model_final.pth", weights_only=False)["iteration"] == 5
    (output / "last_checkpoint").unlink()
    with pytest.raises(SystemExit, match=r"has checkpoints \(model_final\.pth\) but no 'last_ch"):
        run(config_file, "--resume")


def test_curves_are_of_one_run(shapes_cfg, tmp_path):
    """Lines of iterations that are trained again, and torn ones, are cut off."""
    shapes_cfg.DATASETS.TEST = ()
    metrics = tmp_path / "output" / "metrics.json"
    metrics.parent.mkdir()
    metrics.write_text('{"iteration": 19, "total_loss": 9}\n{"iteration": 39, "tot')

    def train(resume):
        trainer = Trainer(shapes_cfg)
        trainer.resume_or_load(resume=resume)
        trainer.train()
        return [json.loads(line)["iteration"] for line in metrics.read_text().splitlines()]

    assert train(resume=False) == [3]
    with metrics.open("a") as file:
        file.write('{"iteration": 19, "total_loss": 9}\n{"iterat')
    shapes_cfg.SOLVER.MAX_ITER = 6
    assert train(resume=True) == [3, 5]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["iteration", "evaluation"])
def test_a_signal_saves_the_iteration(shapes_cfg, tmp_path, monkeypatch, caplog, number, moment):
    shapes_cfg.SOLVER.CHECKPOINT_PERIOD, shapes_cfg.TEST.EVAL_PERIOD = 1000, 2
    step, test = TrainStep.run_step, Trainer.test
    before = signal.getsignal(number)

    def run_step(self):
        step(self)
        if moment == "iteration" and self.iter == 1:
            signal.raise_signal(number)

    def evaluate(cfg, model):
        if moment == "evaluation":
            signal.raise_signal(number)
        return test(cfg, model)

    monkeypatch.setattr(TrainStep, "run_step", run_step)
    monkeypatch.setattr(Trainer, "test", staticmethod(evaluate))
    trainer = Trainer(shapes_cfg)
    with pytest.raises(SystemExit) as stopped:
        trainer.train()
    assert stopped.value.code == 128 + number
    assert f"{number.name}: stopped after iteration 1, 'model_0000001.pth' is" in caplog.text
    assert signal.getsignal(number) == before
    assert (tmp_path / "output" / "last_checkpoint").read_text() == "model_0000001.pth"

    monkeypatch.undo()
    trainer = Trainer(shapes_cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2


def test_ctrl_c_and_a_second_training(config_file, tmp_path):
    """A real process with workers; while it runs, its folder is taken."""
    output = tmp_path / "output"
    options = [*("SOLVER.MAX_ITER", "100000"), *("SOLVER.CHECKPOINT_PERIOD", "100000")]
    options += ["DATALOADER.NUM_WORKERS", "1"]
    process = subprocess.Popen(
        [sys.executable, "train_net.py", "--config-file", config_file, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    log = output / "log.txt"
    deadline = time.time() + 300
    while not (log.is_file() and "total_loss" in log.read_text()) and time.time() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.1)
    before = (output / "config.yaml").read_bytes()
    with pytest.raises(SystemExit, match=rf"Another training \(process {process.pid} on .*'.*outp"):
        run(config_file)
    assert (output / "config.yaml").read_bytes() == before
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers too
    assert process.wait(60) == 130, log.read_text()[-3000:]
    (iteration,) = re.findall(r"SIGINT: stopped after iteration (\d+)", log.read_text())
    assert (output / "last_checkpoint").read_text() == f"model_{int(iteration):07d}.pth"
