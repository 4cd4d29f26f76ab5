import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

import train_net
from psf.inference import ChunkedFeedForward
from psf.trainer import Trainer

ROOT = Path(__file__).parent.parent

CONFIG = str(ROOT / "configs/shapes/panoptic_segformer_shapes.yaml")


def arguments(*arguments: str, config: str = CONFIG):
    return train_net.default_argument_parser().parse_args(["--config-file", config, *arguments])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["MODEL.PSF.NUM_OBJECT_QUERY", "7"], "NUM_OBJECT_QUERY.*MODEL.PSF.NUM_OBJECT_QUERIES"),
        (["SEED"], r"Config error in KEY VALUE pairs: .*odd length"),
        (["SEED", "3", "--resume"], "--resume comes after KEY VALUE pairs"),
        (["MODEL.WEIGHTS", "no/such.pth"], "MODEL.WEIGHTS: there is no file 'no/such.pth'"),
    ],
)
def test_bad_command_lines(given, message):
    with pytest.raises(SystemExit) as error:
        train_net.setup(arguments(*given))
    assert re.search(message, str(error.value), re.DOTALL)


@pytest.mark.skipif(torch.cuda.device_count() > 63, reason="has that many GPUs")
def test_more_gpus_than_there_are():
    with pytest.raises(SystemExit, match=r"--num-gpus 64.*torchrun"):
        train_net.run(arguments("--num-gpus", "64"))


def command(*options, launcher=()):
    return {
        "args": [sys.executable, *launcher, str(ROOT / "train_net.py"), *options],
        "env": {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        "cwd": ROOT,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }


def test_resume_after_kill(config_file, tmp_path):
    """SIGKILL while a checkpoint is written: the training resumes from the one before."""
    options = ["--config-file", config_file]
    output = tmp_path / "output"
    checkpoint = output / "last_checkpoint"
    endless = command(*options, "SOLVER.MAX_ITER", "100000", "SOLVER.CHECKPOINT_PERIOD", "1")
    log = tmp_path / "printed.txt"  # a pipe that nobody reads would fill up and block it
    with log.open("w") as file, subprocess.Popen(**{**endless, "stdout": file}) as process:
        deadline = time.time() + 600  # for a machine on which everything takes ten times as long
        while process.poll() is None and time.time() < deadline:
            if checkpoint.is_file() and any(output.glob("model_*.partial.pth")):
                break
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert checkpoint.is_file(), log.read_text()[-3000:]
    for path in output.glob("model_*.pth"):
        if ".partial" not in path.name:
            torch.load(path, weights_only=False)  # is whole
    iteration = int(re.search(r"model_(\d+)", checkpoint.read_text()).group(1))
    options += ["--resume", "SOLVER.MAX_ITER", str(iteration + 3)]
    train_net.main(train_net.default_argument_parser().parse_args(options))
    assert not list(output.glob("*.partial*"))
    printed = (tmp_path / "output" / "log.txt").read_text()
    assert f"Starting training from iteration {iteration + 1}" in printed
    final = torch.load(tmp_path / "output" / "model_final.pth", weights_only=False)
    assert final["iteration"] == iteration + 2


def test_two_cpu_processes_with_torchrun(config_file, tmp_path):
    # By default the processes find each other by the machine's name, which need not resolve.
    options = ["--standalone", "--local-addr=localhost", "--nproc-per-node=2"]
    result = subprocess.run(
        **command(
            *("--config-file", config_file, "SOLVER.MAX_ITER", "2", "SOLVER.EMA_DECAY", "0.9"),
            launcher=["-m", "torch.distributed.run", *options],
        ),
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert "processes: 2" in result.stdout
    final = torch.load(tmp_path / "output" / "model_final.pth", weights_only=True)
    assert final["trainer"]["_trainer"]["ema"]["updates"] == 2


def test_evaluation_of_a_checkpoint(shapes_cfg, tmp_path, monkeypatch):
    """``--eval-only`` makes the model faster, and repeats the numbers of the plain one."""
    shapes_cfg.MODEL.PSF.TEST.SEMANTIC_ON = True  # a random model has a PQ of 0, but some accuracy
    torch.manual_seed(0)
    model = build_model(shapes_cfg)
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    expected = Trainer.test(shapes_cfg, model)
    assert expected["sem_seg"]["pACC"] > 0
    (tmp_path / "shapes.yaml").write_text(shapes_cfg.dump())
    evaluated = []
    test = Trainer.test
    monkeypatch.setattr(Trainer, "test", lambda cfg, m: evaluated.append(m) or test(cfg, m))
    weights = ["MODEL.WEIGHTS", str(tmp_path / "model.pth")]
    config = str(tmp_path / "shapes.yaml")
    results = train_net.main(arguments("--eval-only", *weights, config=config))
    (model,) = evaluated
    assert any(isinstance(module, ChunkedFeedForward) for module in model.modules())
    for kind, numbers in expected.items():
        assert results[kind] == pytest.approx(numbers, abs=0.1, nan_ok=True), kind


COCO_SAMPLE = ROOT.parent / "shared" / "data" / "coco_sample"


@pytest.mark.skipif(not COCO_SAMPLE.is_dir(), reason="needs ../shared/data/coco_sample")
def test_own_data_without_python(tmp_path, tiny_cfg):
    """Two COCO photos, registered in a YAML file: trained on, evaluated, their classes counted."""
    name = "own_coco_photos"
    entry = [name, *(str(COCO_SAMPLE / part) for part in ("images", "panoptic", "panoptic.json"))]
    tiny_cfg.merge_from_list(
        [
            *("DATASETS.REGISTER", [entry], "DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,)),
            *("MODEL.PSF.NUM_THING_CLASSES", 0, "MODEL.PSF.NUM_STUFF_CLASSES", 0),
            *("MODEL.PSF.TEST.SAVE_PREDICTIONS", True, "MODEL.PSF.TEST.BOUNDARY_PQ", True),
            *("INPUT.AUGMENTATION", "large_scale_jitter", "INPUT.IMAGE_SIZE", 96),
            *("INPUT.MIN_SIZE_TRAIN", (96,), "INPUT.MIN_SIZE_TEST", 96),
            *("INPUT.COLOR_AUG_SSD", True),
            *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", ()),
            *("DATALOADER.NUM_WORKERS", 0, "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False),
            *("OUTPUT_DIR", str(tmp_path / "output")),
        ]
    )
    (tmp_path / "own.yaml").write_text(tiny_cfg.dump())
    try:
        results = train_net.main(arguments(config=str(tmp_path / "own.yaml")))
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    assert {"panoptic_seg", "boundary_panoptic_seg"} <= results.keys()
    inference = tmp_path / "output" / "inference" / name
    names = {path.name for path in inference.iterdir()}
    assert {"pq.txt", "pq.png", "boundary_pq.txt", "predictions.json", "predictions"} <= names
    assert len(list((inference / "predictions").iterdir())) == 2
