"""mIoU against the panoptic ground truth."""

import math

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from tiny_panoptic import ANT, CAT, GRASS, SKY, Layout

from psf.evaluation import SemanticEvaluator
from psf.evaluation.semantic import semantic_labels

# Two grass pixels, two cats, a crowd of ants, void.
LAYOUT: Layout = ([[1, 1, 2], [3, 4, 0]], {1: (GRASS, 0), 2: (CAT, 0), 3: (CAT, 0), 4: (ANT, 1)})


def scores(labels: list[list[int]]) -> dict[str, torch.Tensor]:
    """A semantic output, (classes, H, W), that says these labels."""
    one_hot = torch.nn.functional.one_hot(torch.tensor(labels), 4)
    return {"sem_seg": one_hot.permute(2, 0, 1).float()}


def evaluate(name: str, *labels: list[list[int]], output_dir: str | None = None):
    evaluator = SemanticEvaluator(name, output_dir)
    evaluator.reset()
    evaluator.process(DatasetCatalog.get(name), [scores(each) for each in labels])
    return evaluator.evaluate()["sem_seg"]


def test_image_without_segments(make_dataset):
    name = make_dataset([([[0, 0]], {})])
    with np.errstate(invalid="ignore"):
        assert math.isnan(evaluate(name, [[GRASS, SKY]])["mIoU"])


def test_labels_ignore_void_and_crowd(make_dataset):
    record = DatasetCatalog.get(make_dataset([LAYOUT]))[0]
    expected = [[GRASS, GRASS, CAT], [CAT, 255, 255]]
    assert semantic_labels(record, 255).tolist() == expected


def test_perfect_prediction(make_dataset, tmp_path):
    name = make_dataset([LAYOUT])
    result = evaluate(name, [[GRASS, GRASS, CAT], [CAT, SKY, ANT]], output_dir=str(tmp_path))
    assert result["mIoU"] == result["pACC"] == result["IoU-grass"] == result["IoU-cat"] == 100


def test_numbers_by_hand(make_dataset):
    """Grass: 2 of the 3 pixels called grass. Cat: 1 of the 2 cat pixels."""
    result = evaluate(make_dataset([LAYOUT]), [[GRASS, GRASS, GRASS], [CAT, SKY, SKY]])
    assert result["IoU-grass"] == pytest.approx(200 / 3)
    assert result["IoU-cat"] == pytest.approx(50)
    assert result["mIoU"] == pytest.approx((200 / 3 + 50) / 2)
    assert math.isnan(result["IoU-sky"])


def test_more_than_255_classes(make_dataset):
    """Class 255 is not the ignored label; label files, in which it would be, are refused."""
    name = make_dataset([([[1, 1, 2, 0]], {1: (GRASS, 0), 2: (SKY, 0)})])
    metadata, (record,) = MetadataCatalog.get(name), DatasetCatalog.get(name)
    metadata.__dict__["stuff_classes"] = [f"class {i}" for i in range(300)]
    metadata.__dict__["thing_dataset_id_to_contiguous_id"] = {}
    metadata.__dict__["stuff_dataset_id_to_contiguous_id"] = {i: i for i in range(300)}
    for info, class_id in zip(record["segments_info"], (255, 299), strict=True):
        info["category_id"] = class_id
    evaluator = SemanticEvaluator(name)
    evaluator.reset()
    predicted = torch.nn.functional.one_hot(torch.tensor([[255, 7, 299, 255]]), 300)
    evaluator.process([record], [{"sem_seg": predicted.permute(2, 0, 1)}])
    result = evaluator.evaluate()["sem_seg"]
    assert result["IoU-class 255"] == 50
    assert result["IoU-class 299"] == 100
    record["sem_seg_file_name"] = "labels.png"
    with pytest.raises(ValueError, match="its label 255 is a class and means 'ignore' as well"):
        SemanticEvaluator(name)


def test_a_label_that_is_no_class(make_dataset, tmp_path):
    name = make_dataset([LAYOUT])
    labels = np.array([[GRASS, GRASS, CAT], [CAT, 255, 4]], dtype=np.uint8)
    Image.fromarray(labels).save(tmp_path / "labels.png")
    DatasetCatalog.get(name)[0]["sem_seg_file_name"] = str(tmp_path / "labels.png")
    with pytest.raises(ValueError, match=r"labels\.png' has the label 4, but .* 0\.\.3, or 255"):
        evaluate(name, [[GRASS, GRASS, CAT], [CAT, SKY, ANT]])


def test_ids_shared_by_things_and_stuff(make_dataset):
    name = make_dataset([LAYOUT])
    MetadataCatalog.get(name).stuff_dataset_id_to_contiguous_id[10] = CAT
    with pytest.raises(ValueError, match="share a contiguous id"):
        SemanticEvaluator(name)


def test_output_without_sem_seg(make_dataset):
    name = make_dataset([LAYOUT])
    evaluator = SemanticEvaluator(name)
    evaluator.reset()
    with pytest.raises(ValueError, match=r"no 'sem_seg'.*SEMANTIC_ON"):
        evaluator.process(DatasetCatalog.get(name), [{}])
