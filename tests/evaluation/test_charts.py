import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import Metadata
from PIL import Image

from psf.evaluation.charts import (
    loss_curves,
    quality_curves,
    read_metrics,
    running_mean,
    write_curves,
    write_quality_bars,
)
from psf.evaluation.panoptic_quality import ClassQuality
from psf.evaluation.pictures import SheetRow, draw_panoptic, write_sheet


def write_log(path: Path, *records: dict[str, float], tail: str = "") -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return path


def test_metrics_of_an_empty_log(tmp_path):
    assert read_metrics(write_log(tmp_path / "metrics.json")) == {}


def test_metrics_of_a_killed_and_resumed_training(tmp_path, caplog):
    """The last values of an iteration count; a line cut off by the kill is skipped and told."""
    records = [
        {"iteration": 19, "total_loss": 9.0},
        {"iteration": 39, "total_loss": 8.0},
        {"iteration": 19, "total_loss": 7.0},
        {"iteration": 19, "panoptic_seg/PQ": 50.0},
    ]
    log = write_log(tmp_path / "metrics.json", *records, tail='{"iteration": 59, "total_l')
    with caplog.at_level(logging.WARNING, logger="psf"):
        assert read_metrics(log) == {
            19: {"iteration": 19, "total_loss": 7.0, "panoptic_seg/PQ": 50.0},
            39: {"iteration": 39, "total_loss": 8.0},
        }
    assert "Skipped 1 damaged lines" in caplog.text


def test_losses_of_all_layers_are_added_up():
    record = {"total_loss": 6.0, "loss_a": 1.0, "loss_a_0": 2.0, "loss_b_10": 3.0, "lr": 0.1}
    assert loss_curves({9: record}) == {
        "total_loss": [(9, 6.0)],
        "loss_a": [(9, 3.0)],
        "loss_b": [(9, 3.0)],
    }


def test_quality_of_one_and_of_several_data_sets():
    nan = float("nan")
    records = {
        9: {"panoptic_seg/PQ": 10.0, "panoptic_seg/PQ_th": nan, "panoptic_seg/PQ-cat": 5.0},
        19: {"val/panoptic_seg/PQ": 20.0, "PQ": 1.0},
    }
    assert quality_curves(records) == {"PQ": [(9, 10.0)], "val/PQ": [(19, 20.0)]}


def test_running_mean_by_hand():
    values = np.array([0.0, 3.0, 6.0, 0.0])
    assert running_mean(values, 3).tolist() == [0, 3, 3, 0]
    assert running_mean(values[:1], 9).tolist() == [0]


@pytest.mark.parametrize(
    "records",
    [
        [],
        [{"iteration": 19, "total_loss": 3.0, "loss_a": -1.0}],
        [{"iteration": 0, "panoptic_seg/PQ": 12.0}],
        [{"iteration": i, "total_loss": 30.0 / (i + 1), "loss_a_0": 0.1} for i in range(50)],
    ],
    ids=["empty", "one", "only PQ", "no PQ"],
)
def test_curves_of_any_log(tmp_path, records, recwarn):
    log = write_log(tmp_path / "metrics.json", *records)
    write_curves(log, tmp_path / "new" / "curves.png")
    assert Image.open(tmp_path / "new" / "curves.png").size == (1200, 450)
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]


@pytest.mark.parametrize("name", ["note $5_$", "$", "a\\frac{$x$", "$^", "line\nbreak"])
def test_any_name_of_a_class_is_drawn(tmp_path, name):
    """Names are text, also where matplotlib would read a formula."""
    row = ClassQuality(name, "thing", 50.0, 50.0, 50.0, 1, 1, 1)
    write_quality_bars([row, row._replace(kind="stuff")], tmp_path / "a.png", title=name)
    image = np.zeros((40, 60, 3), dtype=np.uint8)
    metadata = Metadata(name="m", thing_classes=[name], stuff_classes=[name])
    infos = [{"id": 1, "category_id": 0, "isthing": True, "score": 0.5}]
    picture = draw_panoptic(image, torch.ones(40, 60, dtype=torch.int32), infos, metadata)
    write_sheet([SheetRow(name, [picture])], [name], 384, tmp_path / "b.png")
    assert {p.name for p in tmp_path.iterdir()} == {"a.png", "b.png"}
