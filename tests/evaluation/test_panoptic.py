"""PQ: hand-computed numbers, and equality with panopticapi and Detectron2."""

import copy
import json
import logging
import math
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOPanopticEvaluator, DatasetEvaluators
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from panopticapi.evaluation import pq_compute
from PIL import Image
from tiny_panoptic import ANT, CAT, CATEGORIES, GRASS, SKY, Layout, panoptic_output

from psf.data import panoptic_metadata
from psf.evaluation import InstanceEvaluator, PanopticEvaluator, build_evaluators

# Two rows of grass over two rows of cat.
HALVES: Layout = (
    [[1, 1, 1, 1], [1, 1, 1, 1], [300, 300, 300, 300], [300, 300, 300, 300]],
    {1: (GRASS, 0), 300: (CAT, 0)},
)
NOTHING: Layout = ([[0] * 4] * 4, {})


def evaluate(name: str, outputs: list[Any], output_dir: Path | None = None, **options: bool):
    """The results of a model's outputs for a data set."""
    evaluator = PanopticEvaluator(name, output_dir and str(output_dir), **options)
    evaluator.reset()
    evaluator.process(DatasetCatalog.get(name), outputs)
    return evaluator.evaluate()


def change_json(name: str, change: Any) -> None:
    """Change the JSON of a data set, whose records stay as they are."""
    path = Path(MetadataCatalog.get(name).panoptic_json)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture
def measure(make_dataset):
    """PQ of predicted layouts against the layouts of a data set."""

    def run(truth: list[Layout], predicted: list[Layout], output_dir: Path | None = None):
        outputs = [panoptic_output(layout) for layout in predicted]
        return evaluate(make_dataset(truth), outputs, output_dir)["panoptic_seg"]

    return run


def test_empty_data_set_has_no_quality(measure):
    assert all(math.isnan(value) for value in measure([], []).values())


def test_images_without_segments_have_no_quality(measure):
    assert all(math.isnan(value) for value in measure([NOTHING], [NOTHING]).values())


def test_perfect_prediction(measure):
    result = measure([HALVES, HALVES], [HALVES, HALVES])
    for key in ("PQ", "SQ", "RQ", "PQ_th", "SQ_th", "RQ_th", "PQ_st", "SQ_st", "RQ_st"):
        assert result[key] == 100
    assert result["PQ-grass"] == result["PQ-cat"] == 100
    assert math.isnan(result["PQ-sky"])
    assert math.isnan(result["PQ-ant"])


def test_empty_prediction(measure):
    result = measure([HALVES], [NOTHING])
    assert result["PQ"] == result["PQ_th"] == result["PQ_st"] == 0


def test_numbers_by_hand(measure):
    """
    Grass of 8 pixels is predicted with 12: IoU 8/12, a match. Cat of 8 pixels is predicted with 4:
    IoU 4/8 is not above 0.5, so there are a false positive and a false negative.
    """
    predicted: Layout = (
        [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [2, 2, 2, 2]],
        {1: (GRASS, 0), 2: (CAT, 0)},
    )
    result = measure([HALVES], [predicted])
    assert result["PQ"] == pytest.approx(100 / 3)  # (2/3 + 0) / 2
    assert result["SQ"] == pytest.approx(100 / 3)
    assert result["RQ"] == 50
    assert result["PQ_st"] == result["PQ-grass"] == pytest.approx(200 / 3)
    assert result["PQ_th"] == result["PQ-cat"] == 0


def test_a_class_that_is_only_predicted_counts(measure):
    """Cat is called ant: each has PQ 0, so that three classes share grass's 1."""
    predicted: Layout = (HALVES[0], {1: (GRASS, 0), 300: (ANT, 0)})
    result = measure([HALVES], [predicted])
    assert result["PQ"] == pytest.approx(100 / 3)
    assert result["PQ_th"] == result["PQ-cat"] == result["PQ-ant"] == 0


@pytest.mark.parametrize(("category", "absent"), [(SKY, "PQ_th"), (ANT, "PQ_st")])
def test_data_set_with_only_stuff_or_only_things(measure, category, absent):
    layout: Layout = ([[5] * 4] * 4, {5: (category, 0)})
    result = measure([layout], [layout])
    assert result["PQ"] == 100
    assert math.isnan(result[absent])


def test_table_and_json_are_written_and_logged_once(measure, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="psf"):
        measure([HALVES], [NOTHING], tmp_path / "out")
    assert sum("| class" in message for message in caplog.messages) == 1
    lines = (tmp_path / "out" / "pq.txt").read_text().splitlines()
    names = [line.split("|")[1].strip() for line in lines]
    assert names[2:] == ["all", "things", "stuff", *(c["name"] for c in CATEGORIES)]
    rows = json.loads((tmp_path / "out" / "panoptic_results.json").read_text())
    by_name = {row["name"]: row for row in rows}
    assert by_name["cat"] == {
        "name": "cat", "kind": "thing", "pq": 0, "sq": 0, "rq": 0, "tp": 0, "fp": 0, "fn": 1,
    }  # fmt: skip
    assert by_name["all"]["fn"] == 2
    assert by_name["sky"]["pq"] is None


def random_layout(generator: np.random.Generator, *, crowds: bool) -> Layout:
    """Blocks of 4 x 4 pixels of eight segments, and void."""
    ids = generator.integers(0, 9, (6, 6)).repeat(4, axis=0).repeat(4, axis=1)
    segments = {
        int(i): (int(generator.integers(4)), int(crowds and i == 8)) for i in np.unique(ids) if i
    }
    return ids.tolist(), segments


def disturbed(layout: Layout, generator: np.random.Generator) -> Layout:
    """Some pixels get another id, some segments another class."""
    ids = np.array(layout[0])
    changed = generator.random(ids.shape) < 0.2
    ids[changed] = generator.choice(ids.flatten(), changed.sum())
    segments = {
        int(i): layout[1][i] if generator.random() < 0.8 else (int(generator.integers(4)), 0)
        for i in np.unique(ids)
        if i
    }
    return ids.tolist(), segments


def test_equals_detectron2_and_panopticapi(make_dataset, monkeypatch):
    """Detectron2's evaluator is panopticapi's ``pq_compute``; it also works on the same output."""
    generator = np.random.default_rng(0)
    truth = [random_layout(generator, crowds=True) for _ in range(6)]
    name = make_dataset(truth)
    outputs = [panoptic_output(disturbed(layout, generator)) for layout in truth]
    results = []
    monkeypatch.setattr(multiprocessing, "cpu_count", lambda: 2)
    for kind in (PanopticEvaluator, COCOPanopticEvaluator):
        evaluator = kind(name)
        evaluator.reset()
        evaluator.process(DatasetCatalog.get(name), copy.deepcopy(outputs))
        results.append(evaluator.evaluate()["panoptic_seg"])
    ours, reference = results
    assert 0 < reference["PQ"] < 100
    # The sums of two processes are added up in another order.
    assert {key: ours[key] for key in reference} == pytest.approx(reference, rel=1e-12)


def test_the_output_is_not_changed(make_dataset):
    name = make_dataset([HALVES])
    output = panoptic_output(HALVES)
    before = copy.deepcopy(output)
    evaluate(name, [output])
    assert output["panoptic_seg"][1] == before["panoptic_seg"][1]
    assert torch.equal(output["panoptic_seg"][0], before["panoptic_seg"][0])


def test_images_of_one_name_in_two_folders(make_dataset):
    name = make_dataset([HALVES, NOTHING], file_name="{}/same.jpg")
    outputs = [panoptic_output(HALVES), panoptic_output(NOTHING)]
    assert evaluate(name, outputs)["panoptic_seg"]["PQ"] == 100


def test_missing_prediction(make_dataset):
    name = make_dataset([HALVES, HALVES])
    evaluator = PanopticEvaluator(name)
    evaluator.reset()
    evaluator.process(DatasetCatalog.get(name)[:1], [panoptic_output(HALVES)])
    with pytest.raises(ValueError, match=r"No prediction for 1 of the 2 images .* \[101\]"):
        evaluator.evaluate()


def test_output_without_panoptic_seg(make_dataset):
    name = make_dataset([HALVES])
    with pytest.raises(ValueError, match=r"0\.jpg' has no 'panoptic_seg'.*PANOPTIC_ON"):
        evaluate(name, [{"instances": None}])


def test_data_set_that_is_not_panoptic(make_dataset):
    name = make_dataset([HALVES])
    MetadataCatalog.get(name).__dict__["panoptic_json"] = None
    with pytest.raises(ValueError, match="'panoptic_json'"):
        PanopticEvaluator(name)


def test_missing_annotations(make_dataset):
    name = make_dataset([HALVES])
    change_json(name, lambda content: content.pop("annotations"))
    with pytest.raises(ValueError, match="no annotations"):
        evaluate(name, [panoptic_output(HALVES)])


def test_build_evaluators(make_dataset, tmp_path):
    name = make_dataset([HALVES], instances=True)

    def build(**switches: bool) -> Any:
        off = {"panoptic": False, "instances": False, "sem_seg": False}
        return build_evaluators(name, **(off | switches), output_dir=str(tmp_path))

    assert isinstance(build(panoptic=True), PanopticEvaluator)
    assert isinstance(build(instances=True), InstanceEvaluator)
    assert isinstance(build(panoptic=True, instances=True, sem_seg=True), DatasetEvaluators)
    with pytest.raises(ValueError, match="Nothing to evaluate"):
        build()


def test_a_data_set_that_numbers_the_models_classes_differently(make_dataset, tmp_path):
    """All outputs are renumbered by the names; what the data set lacks is left out."""
    name, model_dataset = make_dataset([HALVES], instances=True), f"{tmp_path}_model"
    more = [{"id": 8, "name": "gnu", "isthing": 1}, {"id": 9, "name": "fog", "isthing": 0}]
    MetadataCatalog.get(model_dataset).set(**panoptic_metadata([*more, *CATEGORIES[::-1]]))
    gnu, _ant, cat, fog, _sky, grass = range(6)
    ids = torch.tensor(HALVES[0])
    cats = Instances((4, 4), pred_masks=(ids == 300).expand(2, 4, 4), scores=torch.tensor([1, 0.9]))
    cats.pred_boxes = Boxes(torch.tensor([[0, 2, 4, 4]]).expand(2, 4))
    cats.pred_classes = torch.tensor([gnu, cat])
    infos = [(1, grass, False), (300, cat, True), (5, gnu, True), (6, fog, False)]
    keys = ("id", "category_id", "isthing")
    predicted = ids.clone()
    predicted[0, :2] = torch.tensor([5, 6])
    output = {
        "panoptic_seg": (predicted, [dict(zip(keys, info, strict=True)) for info in infos]),
        "instances": cats,
        "sem_seg": torch.stack(
            [2 * (ids == 1), ids < 0, ids == 300, 2 * (ids == 300), ids < 0, ids == 1]
        ).float(),
    }
    switches = dict.fromkeys(("panoptic", "instances", "sem_seg"), True)
    evaluator = build_evaluators(
        name, **switches, output_dir=str(tmp_path), model_dataset=model_dataset
    )
    evaluator.reset()
    evaluator.process(DatasetCatalog.get(name), [output])
    results = evaluator.evaluate()
    assert results["sem_seg"]["mIoU"] == results["panoptic_seg"]["RQ"] == 100
    assert results["panoptic_seg"]["PQ"] == pytest.approx(100 * (1 + 6 / 8) / 2)
    assert results["segm"]["AP-cat"] == pytest.approx(100)
    assert output["instances"].pred_classes.tolist() == [gnu, cat]
    del MetadataCatalog.get(model_dataset).thing_classes
    with pytest.raises(ValueError, match="cannot be matched without names"):
        build_evaluators(name, **switches, output_dir=None, model_dataset=model_dataset)
    MetadataCatalog.remove(model_dataset)


@pytest.mark.parametrize("num_workers", [1, 2, 7])
def test_the_number_of_processes_changes_no_bit(make_dataset, monkeypatch, num_workers):
    generator = np.random.default_rng(1)
    truth = [random_layout(generator, crowds=True) for _ in range(9)]
    name = make_dataset(truth)
    outputs = [panoptic_output(disturbed(layout, generator)) for layout in truth]
    records = DatasetCatalog.get(name)
    order = generator.permutation(len(records))
    workers = [PanopticEvaluator(name) for _ in range(num_workers)]
    for i in order:
        workers[i % num_workers].process([records[i]], [outputs[i]])
    sent = []
    monkeypatch.setattr(comm, "gather", lambda data: sent.append(pickle.dumps(data)) or [])
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    assert all(worker.evaluate() is None for worker in workers[1:])
    monkeypatch.undo()
    alone = PanopticEvaluator(name)
    alone.process(records, outputs)
    expected = alone.evaluate()
    monkeypatch.setattr(comm, "gather", lambda data: [data, *map(pickle.loads, sent)])
    assert str(workers[0].evaluate()) == str(expected)  # NaN != NaN


def test_boundary_quality(make_dataset, tmp_path):
    name = make_dataset([HALVES])
    results = evaluate(name, [panoptic_output(HALVES)], tmp_path / "out", boundary=True)
    assert results["boundary_panoptic_seg"]["PQ"] == results["panoptic_seg"]["PQ"] == 100
    assert (tmp_path / "out" / "boundary_pq.txt").is_file()


def test_a_saved_prediction_scores_the_same_with_panopticapi(make_dataset, tmp_path, monkeypatch):
    """What COCO's server gets: the official tool reads it and gives the same numbers."""
    generator = np.random.default_rng(2)
    truth = [random_layout(generator, crowds=False) for _ in range(3)]
    name = make_dataset(truth)
    outputs = [panoptic_output(disturbed(layout, generator)) for layout in truth]
    ours = evaluate(name, outputs, tmp_path / "out", save_predictions=True)["panoptic_seg"]
    monkeypatch.setattr(multiprocessing, "cpu_count", lambda: 1)
    metadata, out = MetadataCatalog.get(name), str(tmp_path / "out" / "predictions")
    theirs = pq_compute(metadata.panoptic_json, f"{out}.json", metadata.panoptic_root, out)
    assert ours["PQ"] == 100 * theirs["All"]["pq"]
    assert ours["PQ_th"] == 100 * theirs["Things"]["pq"]


def test_a_test_set_is_predicted_but_not_measured(make_dataset, tmp_path):
    name = make_dataset([HALVES])
    change_json(name, lambda content: content.pop("annotations"))
    assert evaluate(name, [panoptic_output(HALVES)], tmp_path / "out", save_predictions=True) == {}
    (annotation,) = json.loads((tmp_path / "out" / "predictions.json").read_text())["annotations"]
    assert annotation["segments_info"] == [
        {"id": 1, "category_id": 10},
        {"id": 300, "category_id": 3},
    ]
    png = tmp_path / "out" / "predictions" / annotation["file_name"]
    assert np.asarray(Image.open(png))[3, 0].tolist() == [300 - 256, 1, 0]
    with pytest.raises(ValueError, match="output_dir"):
        PanopticEvaluator(name, save_predictions=True)


@pytest.mark.parametrize("kind", ["parent", "absolute", "link", "folder"])
def test_predictions_stay_below_the_output_folder(make_dataset, tmp_path, kind):
    """Whatever the JSON names its PNGs, and where links lead; the ground truth stays as it is."""
    name, output = make_dataset([HALVES]), tmp_path / "out"
    metadata = MetadataCatalog.get(name)
    png = Path(metadata.panoptic_root, "0.png")
    before = png.read_bytes()
    file_name = {"parent": "../panoptic/0.png", "absolute": str(png)}.get(kind, "0.png")
    change_json(name, lambda content: content["annotations"][0].update(file_name=file_name))
    if kind == "link":
        (output / "predictions").mkdir(parents=True)
        (output / "predictions" / "0.png").symlink_to(png)
    if kind == "folder":
        output.mkdir()
        (output / "predictions").symlink_to(png.parent)
    message = "overwrite the input" if kind == "folder" else "outside of the output folder"
    with pytest.raises(ValueError, match=message):
        PanopticEvaluator(name, str(output), save_predictions=True)
    assert png.read_bytes() == before


@pytest.mark.parametrize("annotated", [True, False])
def test_images_of_one_name_do_not_overwrite_each_other(make_dataset, tmp_path, annotated):
    """In folders, with other suffixes; two images with one PNG are refused."""
    name = make_dataset([HALVES, NOTHING, HALVES])
    path = Path(MetadataCatalog.get(name).panoptic_json)
    content = json.loads(path.read_text())
    for image, file_name in zip(content["images"], ("a/x.jpg", "b/x.jpg", "b/x.png"), strict=True):
        image["file_name"] = file_name
    if annotated:
        content["annotations"][1]["file_name"] = "./0.png"
    else:
        del content["annotations"]
    path.write_text(json.dumps(content))
    if annotated:  # before the first prediction
        with pytest.raises(ValueError, match=r"images 100 and 101 would both be '\./0\.png'"):
            PanopticEvaluator(name, str(tmp_path / "out"), save_predictions=True)
        return
    outputs = [panoptic_output(layout) for layout in (HALVES, NOTHING, HALVES)]
    evaluate(name, outputs, tmp_path / "out", save_predictions=True)
    saved = json.loads((tmp_path / "out" / "predictions.json").read_text())["annotations"]
    assert [a["file_name"] for a in saved] == ["a/x.png", "b/x.jpg.png", "b/x.png.png"]
    assert all((tmp_path / "out" / "predictions" / a["file_name"]).is_file() for a in saved)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda info: info.update(category_id=9), "unknown category_id 9"),
        (lambda info: info.update(id=2), r"segment ids \[1\] that segments_info does not list"),
    ],
)
def test_predictions_that_contradict_themselves(make_dataset, spoil, message):
    name = make_dataset([HALVES])
    output = panoptic_output(HALVES)
    spoil(output["panoptic_seg"][1][0])
    with pytest.raises(KeyError, match=message):
        PanopticEvaluator(name).process(DatasetCatalog.get(name), [output])


def test_an_image_of_another_data_set(make_dataset):
    name = make_dataset([HALVES])
    record = {**DatasetCatalog.get(name)[0], "image_id": 5}
    with pytest.raises(KeyError, match="has no annotation of image 5"):
        PanopticEvaluator(name).process([record], [panoptic_output(HALVES)])


@pytest.mark.parametrize(
    ("factor", "first"), [(None, None), (0.1, "0.8 pixels"), (4, "32 pixels"), (0, "0 pixels")]
)
def test_areas_are_those_of_the_png(make_dataset, caplog, factor, first):
    """Whatever the JSON says, a perfect prediction has 100; where it differs is said."""
    name = make_dataset([HALVES])
    path = Path(MetadataCatalog.get(name).panoptic_json)
    content = json.loads(path.read_text())
    for segment in content["annotations"][0]["segments_info"]:
        area = segment.pop("area")
        if factor is not None:
            segment["area"] = area * factor
    path.write_text(json.dumps(content))
    assert evaluate(name, [panoptic_output(HALVES)])["panoptic_seg"]["PQ"] == 100
    warnings = [m for m in caplog.messages if "differ in the area of 2 segments" in m]
    assert len(warnings) == (factor is not None)
    assert all(f"segment 1 has {first} in the JSON and 8" in w for w in warnings)


def test_segments_that_only_the_png_has(make_dataset, caplog):
    name = make_dataset([HALVES])
    change_json(name, lambda content: content["annotations"][0]["segments_info"].pop())
    evaluate(name, [panoptic_output(HALVES)])
    assert "segment 300 has 0 pixels in the JSON and 8 in the PNG" in caplog.text


def test_categories_by_the_data_sets_ids(make_dataset):
    """Segments without isthing, as Detectron2 allows: category_id is then the data set's own."""
    name = make_dataset([HALVES])
    output = panoptic_output(HALVES)
    for info in output["panoptic_seg"][1]:
        del info["isthing"]
        info["category_id"] = CATEGORIES[info["category_id"]]["id"]
    assert evaluate(name, [output])["panoptic_seg"]["PQ"] == 100
