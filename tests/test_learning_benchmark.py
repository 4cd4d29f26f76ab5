"""The race of benchmarks/learning.py, in seconds; Mask2Former takes part where transformers is."""

import importlib.util
import json
import sys

import learning
import pytest

HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None


@pytest.fixture
def race(shapes_cfg, tmp_path, monkeypatch):
    """Runs a command in a folder of its own, with a small ResNet and few images."""
    shapes_cfg.merge_from_list(
        [
            *("MODEL.BACKBONE.NAME", "build_basic_resnet_backbone", "MODEL.RESNETS.DEPTH", 18),
            *("MODEL.PSF.NUM_THING_CLASSES", 0, "MODEL.PSF.NUM_STUFF_CLASSES", 0),
        ]
    )
    (tmp_path / "config.yaml").write_text(shapes_cfg.dump())
    monkeypatch.setattr(learning, "TUNING", shapes_cfg.DATASETS.TRAIN[0])
    results = tmp_path / "learning.jsonl"

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["learning.py", "--results", str(results), *arguments])
        learning.main()
        return learning.read(results)

    def run(model):
        options = ["--seconds", "0.2", "--points", "2", "--dataset", shapes_cfg.DATASETS.TEST[0]]
        config = ["--config-file", str(tmp_path / "config.yaml")]
        return call("run", "--model", model, "--lr", "1e-3", *config, *options)

    return call, run


@pytest.mark.parametrize(
    "model",
    [
        "psf",
        "panoptic_fpn",
        pytest.param(
            "mask2former", marks=pytest.mark.skipif(not HAS_TRANSFORMERS, reason="needs it")
        ),
    ],
)
def test_a_run_is_recorded_once(race, model):
    _, run = race
    (row,) = run(model)
    assert [point["fraction"] for point in row["curve"]] == [0.5, 1.0]
    assert row["curve"][-1]["cpu_seconds"] >= 0.2
    assert row["curve"][-1].keys() >= {"PQ", "PQ_th", "PQ_st", "iterations", "loss"}
    assert row["machine"]["commit"]
    assert run(model) == [row]


def test_the_tuned_rate_is_reported_and_drawn(race, tmp_path, capsys):
    call, _ = race
    val = learning.REPORTED
    rows = [
        ("ours", 1e-3, 1, learning.TUNING, 50),
        ("ours", 2e-3, 1, learning.TUNING, 60),
        ("ours", 2e-3, 2, learning.TUNING, 30),
        ("ours", 1e-3, 1, val, 41),
        ("ours", 1e-3, 2, val, 43),
        ("ours", 2e-3, 1, val, 99),
        ("another", 1e-3, 1, val, 20),
    ]
    with (tmp_path / "learning.jsonl").open("w") as file:
        for label, lr, seed, dataset, pq in rows:
            curve = [
                {"fraction": f, "cpu_seconds": 8 * f, "iterations": 80 * f}
                | {"PQ": f * pq, "PQ_th": f * pq, "PQ_st": f * pq}
                for f in (0.25, 0.5, 1.0)
            ]
            row = {"label": label, "lr": lr, "seed": seed, "dataset": dataset, "seconds": 8}
            file.write(json.dumps({**row, "curve": curve}) + "\n")
    call("show")
    printed = capsys.readouterr().out
    table = [[cell.strip() for cell in line.split("|")] for line in printed.splitlines()]
    assert ["", "ours", "50% of 8 s", "40", "21.0", "21.0", "21.0", "1.0", "2", ""] in table
    assert ["", "another", "100% of 8 s", "80", "20.0", "20.0", "20.0", "0.0", "1", ""] in table
    assert "99" not in printed, "50 of one seed are better than 60 and 30"
    call("draw", str(tmp_path / "drawn" / "curves.png"))
    assert (tmp_path / "drawn" / "curves.png").stat().st_size > 10_000
