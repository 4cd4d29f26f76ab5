"""Offline evaluation, and pictures of the mapper's output."""

import json
from collections import Counter
from pathlib import Path

import check_dataset
import evaluate_predictions
import numpy as np
import pytest
import visualize_data
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from tiny_panoptic import ANT, CAT, GRASS, SKY, Maker, panoptic_output

from psf.evaluation import PanopticEvaluator
from psf.evaluation.offline import INVENTED, MISSED, score_predictions

ROOT = Path(__file__).resolve().parents[1]

COCO_SAMPLE = ROOT.parent / "shared" / "data" / "coco_sample"

TRUTH = [
    ([[1] * 60] * 20 + [[2] * 30 + [3] * 30] * 20, {1: (GRASS, 0), 2: (CAT, 0), 3: (CAT, 0)}),
    ([[1] * 60] * 40, {1: (SKY, 0)}),
]
# The first cat is called ant, the second is missed, a sky is invented where grass was.
PREDICTED = [
    (
        [[1] * 60] * 12 + [[9] * 60] * 8 + [[2] * 30 + [0] * 30] * 20,
        {1: (GRASS, 0), 9: (SKY, 0), 2: (ANT, 0)},
    ),
    ([[1] * 60] * 40, {1: (SKY, 0)}),
]


@pytest.fixture
def saved(tmp_path):
    """The name of a data set, and predictions for it as the evaluator saves them."""
    maker = Maker(tmp_path)
    name = maker(TRUTH)
    evaluator = PanopticEvaluator(name, str(tmp_path / "out"), save_predictions=True)
    evaluator.process(DatasetCatalog.get(name), [panoptic_output(p) for p in PREDICTED])
    results = evaluator.evaluate()["panoptic_seg"]
    metadata = MetadataCatalog.get(name)
    # Images lie in a folder of the data set, by full path in its JSON.
    metadata.image_root = "/"
    yield name, tmp_path / "out" / "predictions.json", results
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def evaluate(saved, output, *options):
    """Run the tool on saved predictions."""
    arguments = ["--name", saved[0], "--predictions", str(saved[1]), "--output", str(output)]
    evaluate_predictions.main([*arguments, *options])


def test_offline_scores_are_those_of_the_evaluator(saved):
    name, predictions, results = saved
    metadata = MetadataCatalog.get(name)
    truth = (Path(metadata.panoptic_json), Path(metadata.panoptic_root))
    scores = score_predictions(*truth, predictions, predictions.with_suffix(""))
    assert scores.rows[0].pq == results["PQ"]
    assert {f"PQ-{r.name}": r.pq for r in scores.rows[3:]}.items() <= results.items()
    assert scores.confusion == Counter(
        {
            ("grass", "grass"): 1,
            ("cat", "ant"): 1,
            ("cat", MISSED): 1,
            (INVENTED, "sky"): 1,
            ("sky", "sky"): 1,
        }
    )
    assert [(s.image_id, s.pq < 100) for s in scores.images] == [(100, True), (101, False)]


def test_evaluate_predictions(saved, tmp_path, capsys):
    output = tmp_path / "scores"
    evaluate(saved, output)
    printed = capsys.readouterr().out
    assert "| cat" in printed
    assert "ant" in printed.split("predicted class")[1]
    assert {p.name for p in output.iterdir()} == {
        *("pq.txt", "confusion.txt", "images.txt", "pq.png", "worst.png")
    }
    assert Image.open(output / "worst.png").size[0] > 1000
    evaluate(saved, output, "--boundary")
    assert (output / "pq.txt").read_text() != printed


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data["annotations"].pop(), "no prediction for 1 of the 2 images"),
        (
            lambda data: data["annotations"][0]["segments_info"].pop(),
            r"predictions\.json': .* segment ids \[\d+\] that segments_info does not list",
        ),
        (
            lambda data: data["annotations"][0]["segments_info"][0].update(category_id=77),
            "segment 1: category_id 77 is not among the categories",
        ),
    ],
)
def test_damaged_predictions(saved, tmp_path, spoil, message):
    data = json.loads(saved[1].read_text())
    spoil(data)
    saved[1].write_text(json.dumps(data))
    with pytest.raises(SystemExit, match=message):
        evaluate(saved, tmp_path / "s")


def write_json(key, value):
    def spoil(root):
        content = json.loads((root / "panoptic.json").read_text())
        content[key] = value
        (root / "panoptic.json").write_text(json.dumps(content))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "panoptic.json").write_text(""), "not valid JSON"),
        (write_json("annotations", []), "panoptic.json' has no annotations"),
        (write_json("categories", []), "categories: there are none"),
        (write_json("images", []), "annotation of image 100: is not among the images"),
        (lambda root: (root / "panoptic" / "0.png").write_bytes(b"x"), r"0\.png' is not a"),
        (lambda root: (root / "images" / "0.jpg").write_bytes(b"x"), r"0\.jpg"),
    ],
)
def test_a_broken_ground_truth_is_said_in_one_line(saved, tmp_path, spoil, message):
    spoil(Path(MetadataCatalog.get(saved[0]).panoptic_json).parent)
    with pytest.raises(SystemExit, match=message) as error:
        evaluate(saved, tmp_path / "s")
    assert str(error.value).count("\n") == 0
    assert (tmp_path / "s" / "pq.txt").is_file() == ("jpg" in message)


def test_a_test_set_and_a_data_set_of_another_kind(saved, tmp_path):
    path = Path(MetadataCatalog.get(saved[0]).panoptic_json)
    content = json.loads(path.read_text())
    del content["annotations"]
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="has no annotations, as the test sets"):
        evaluate(saved, tmp_path / "s")
    with pytest.raises(SystemExit, match="'coco_2017_val' is no panoptic data set"):
        evaluate(("coco_2017_val", saved[1]), tmp_path / "s")


@pytest.mark.skipif(not COCO_SAMPLE.is_dir(), reason="needs ../shared/data/coco_sample")
def test_visualize_data(tmp_path):
    """Registered on the command line, without Python."""
    name = "sample"
    paths = [str(COCO_SAMPLE / part) for part in ("images", "panoptic", "panoptic.json")]
    config = ROOT / "configs" / "coco" / "panoptic_segformer_R50_24ep.yaml"
    output = tmp_path / "data.png"
    options = ["--config-file", str(config), "--output", str(output), "--repeats", "2"]
    entry = json.dumps([[name, *paths]])
    config_options = ["DATASETS.REGISTER", entry, "DATASETS.TRAIN", f"('{name}',)"]
    visualize_data.main([*options, *config_options])
    sheet = np.asarray(Image.open(output))
    assert sheet.shape[1] == 2 * 640 + 3 * 8
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["INPUT.RESAMPLNG", "fast"], "Non-existent key: INPUT.RESAMPLNG"),
        (["DATASETS.TRAIN", "()"], "DATASETS.TRAIN is empty"),
        (["DATASETS.REGISTER", "[['a', 'b']]"], "DATASETS.REGISTER"),
    ],
)
def test_visualize_data_says_what_is_wrong(tmp_path, options, message):
    config = ROOT / "configs" / "coco" / "panoptic_segformer_R50_24ep.yaml"
    with pytest.raises(SystemExit) as error:
        visualize_data.main(
            ["--config-file", str(config), "--output", str(tmp_path / "x.png"), *options]
        )
    assert message in str(error.value)
    with pytest.raises(SystemExit, match=r"no config 'nowhere\.yaml'"):
        visualize_data.main(["--config-file", "nowhere.yaml", "--output", "x.png"])


def test_the_tools_do_not_write_over_what_they_read(saved, tmp_path, capsys):
    """A PNG of the ground truth, and folders where a PNG may have the name of a picture."""
    name, predictions, _ = saved
    metadata = MetadataCatalog.get(name)
    pngs = Path(metadata.panoptic_root)
    before = (pngs / "0.png").read_bytes()
    paths = ["--json", metadata.panoptic_json, "--images", "/", "--pngs", str(pngs)]
    check_dataset.main([*paths, "--sheet", str(pngs / "0.png")])
    assert "No sheet: " in capsys.readouterr().out
    for folder in (pngs, predictions.with_suffix("")):
        with pytest.raises(SystemExit, match=r"pq\.txt' would overwrite the input"):
            evaluate(saved, folder)
    (tmp_path / "own.yaml").write_text(f"DATASETS:\n  TRAIN: ('{name}',)\n")
    with pytest.raises(SystemExit, match=r"0\.png' would overwrite the input"):
        visualize_data.main(
            ["--config-file", str(tmp_path / "own.yaml"), "--output", str(pngs / "0.png")]
        )
    assert (pngs / "0.png").read_bytes() == before


def test_missing_predictions(saved, tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluate((saved[0], "nowhere.json"), tmp_path)
    assert "--predictions: there is no file 'nowhere.json'" in capsys.readouterr().err
