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

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

import train_net
from psf.evaluation.charts import write_curves, write_quality_bars
from psf.evaluation.pictures import SheetRow, write_sheet
from psf.files import write_beside, write_text
from psf.run_folder import claimed
from psf.train_step import TrainStep
from psf.trainer import Trainer
from psf.weights import Checkpointer

ROOT = Path(__file__).parent.parent


def run(*options):
    return train_net.main(
        train_net.default_argument_parser().parse_args(["--config-file", *options])
    )


@contextlib.contextmanager
def full_disk(size=10_000):
    """Files cannot become larger than this."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


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
    message = r"model_final\.pth' cannot be written. Is the disk full"
    with full_disk(), pytest.raises(OSError, match=message):
        checkpointer.save("model_final")
    assert {p.name for p in tmp_path.iterdir()} == {"model_final.pth", "last_checkpoint"}
    assert (tmp_path / "model_final.pth").read_bytes() == before


def write_noise(path):
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    write_sheet([SheetRow("a", [noise])], ("noise",), 300, path)


WRITERS = {
    "text": lambda path: write_text(path, "x" * 20_000),
    "sheet": write_noise,
    "curves": lambda path: write_curves(path.with_name("metrics.json"), path),
    "bars": lambda path: write_quality_bars([], path, title="title"),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_leaves_the_old_text_or_picture(tmp_path, kind):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    (tmp_path / "metrics.json").write_text('{"iteration": 1, "total_loss": 2}\n')
    with full_disk(3000), pytest.raises(OSError, match=r"File too large: '.*a\.png'"):
        WRITERS[kind](path)
    assert path.read_bytes() == b"old"
    assert {p.name for p in tmp_path.iterdir()} == {"a.png", "metrics.json"}


def test_a_full_disk_ends_an_evaluation_without_a_json_of_other_predictions(shapes_cfg, tmp_path):
    """The PNGs of the evaluation before are overwritten one by one, so its JSON goes first."""
    shapes_cfg.MODEL.PSF.TEST.SAVE_PREDICTIONS = True
    model = Trainer.build_model(shapes_cfg)
    Trainer.test(shapes_cfg, model)
    (folder,) = (tmp_path / "output" / "inference").iterdir()
    assert (folder / "predictions.json").is_file()
    with full_disk(100), pytest.raises(OSError, match=r"File too large: '.*predictions/.*png'"):
        Trainer.test(shapes_cfg, model)
    assert not (folder / "predictions.json").exists()
    with full_disk(800), pytest.raises(OSError, match=r"File too large: '.*predictions\.json'"):
        Trainer.test(shapes_cfg, model)
    assert not list(folder.glob("predictions*.json"))


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("file", "OUTPUT_DIR '.*file' is not a folder that can be written"),
        ("file/below", "OUTPUT_DIR '.*file/below' is not a folder that can be written"),
        ("", "OUTPUT_DIR '' is not a folder that can be written"),
        ("mine", r"mine/config\.yaml' would be overwritten"),
        ("mine", r"mine/log\.txt"),
    ],
)
def test_folders_that_cannot_be_written(config_file, tmp_path, folder, message):
    """A file, nothing, a user's own config in it, or a folder in the place of a file."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "mine" / "log.txt").mkdir(parents=True)
    output = str(tmp_path / folder) if folder else ""
    own = tmp_path / "mine" / "config.yaml"
    if "config" in message:
        own.write_text(f"# mine\n_BASE_: {config_file}\n")
    with pytest.raises(SystemExit, match=message):
        run(config_file, "OUTPUT_DIR", output)
    if folder.startswith("file"):
        weights = ["MODEL.WEIGHTS", config_file, "DATASETS.TEST", "('registered_shapes',)"]
        with pytest.raises(SystemExit, match=message):
            run(config_file, "--eval-only", *weights, "OUTPUT_DIR", output)
    assert "config" not in message or own.read_text().startswith("# mine")


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


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGTERM, "iteration"),
        (signal.SIGTERM, "evaluation"),
        (signal.SIGINT, "evaluation"),
        (signal.SIGHUP, "iteration"),
    ],
)
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


def test_a_signal_that_is_ignored_stays_ignored(shapes_cfg, tmp_path, monkeypatch):
    """SIGHUP under nohup, SIGINT of a script's background process."""
    shapes_cfg.DATASETS.TEST, step = (), TrainStep.run_step
    monkeypatch.setattr(TrainStep, "run_step", lambda s: (step(s), signal.raise_signal(1)))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        Trainer(shapes_cfg).train()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (tmp_path / "output" / "model_final.pth").is_file()


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


def test_where_folders_cannot_be_locked(tmp_path, monkeypatch, caplog):
    """As on Windows, which has no ``fcntl``."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with claimed(str(tmp_path)):
        assert "cannot be locked against other trainings: import of fcntl" in caplog.text
