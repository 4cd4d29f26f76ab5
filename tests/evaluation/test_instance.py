"""Instance AP with thing ids that are neither contiguous nor in the data set's order."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from tiny_panoptic import ANT, CAT, GRASS, Layout

from psf.evaluation import InstanceEvaluator

# A cat and an ant of 2 x 2 pixels on grass.
LAYOUT: Layout = (
    [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 3, 3]],
    {1: (CAT, 0), 2: (ANT, 0), 3: (GRASS, 0)},
)


def instances(*classes: int) -> dict[str, Instances]:
    """The left and the right square, with these classes."""
    ids = torch.tensor(LAYOUT[0])
    result = Instances((3, 4))
    result.pred_masks = torch.stack([ids == 1, ids == 2])[: len(classes)]
    result.pred_boxes = Boxes(torch.tensor([[0.0, 0, 2, 2], [2, 0, 4, 2]])[: len(classes)])
    result.scores = torch.ones(len(classes))
    result.pred_classes = torch.tensor(classes, dtype=torch.int64)
    return {"instances": result}


def evaluate(name: str, output: dict[str, Instances]):
    evaluator = InstanceEvaluator(name)
    evaluator.reset()
    evaluator.process(DatasetCatalog.get(name), [output])
    return evaluator.evaluate()


def test_no_instances(make_dataset):
    result = evaluate(make_dataset([LAYOUT], instances=True), instances())
    assert math.isnan(result["segm"]["AP"])


def test_perfect_prediction(make_dataset):
    output = instances(CAT, ANT)
    result = evaluate(make_dataset([LAYOUT], instances=True), output)
    for task in ("bbox", "segm"):
        assert result[task]["AP"] == pytest.approx(100)
        assert result[task]["AP-cat"] == result[task]["AP-ant"] == pytest.approx(100)
    assert output["instances"].pred_classes.tolist() == [CAT, ANT]


def test_one_class_wrong(make_dataset):
    result = evaluate(make_dataset([LAYOUT], instances=True), instances(CAT, CAT))
    assert result["segm"]["AP-cat"] == pytest.approx(100)
    assert result["segm"]["AP-ant"] == 0
    assert result["segm"]["AP"] == pytest.approx(50)


def test_without_instances_json(make_dataset):
    with pytest.raises(ValueError, match=r"json_file.*INSTANCE_ON"):
        InstanceEvaluator(make_dataset([LAYOUT]))


def test_instances_json_without_a_thing_class(make_dataset):
    name = make_dataset([LAYOUT], instances=True)
    MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id[99] = 4
    with pytest.raises(ValueError, match=r"instances\.json' lacks .* \[99\]"):
        InstanceEvaluator(name)


def test_instances_json_of_other_names(make_dataset):
    """Ids that mean other classes, as after a renumbering of one of the files."""
    name = make_dataset([LAYOUT], instances=True)
    path = Path(MetadataCatalog.get(name).json_file)
    path.write_text(path.read_text().replace('"cat"', '"cow"'))
    with pytest.raises(ValueError, match=r"json' calls category 3 'cow' instead of 'cat'"):
        InstanceEvaluator(name)


def change_annotations(name, change):
    """Change the annotations of the instances JSON, given with their positions."""
    path = Path(MetadataCatalog.get(name).json_file)
    data = json.loads(path.read_text())
    for i, annotation in enumerate(data["annotations"]):
        annotation |= change(i)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize("numbered", [lambda i: {"id": i}, lambda i: {"id": 7}])
def test_annotation_ids_that_coco_counts_wrong(make_dataset, numbered):
    """The id 0 is "no match" to pycocotools, and of equal ids it keeps the last."""
    name = make_dataset([LAYOUT], instances=True)
    change_annotations(name, numbered)
    assert evaluate(name, instances(CAT, ANT))["segm"]["AP"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iscrowd": "0"}, "iscrowd is '0' instead of 0 or 1"),
        ({"area": None}, "area is None instead of a number"),
        ({"bbox": [1, 2, 3]}, "bbox is [1, 2, 3] instead of [x, y, width, height]"),
        ({"segmentation": []}, "segmentation is [] instead of polygons of at least 3 points"),
        ({"category_id": 10}, "category_id 10 is not among the categories"),
        ({"image_id": "100"}, "image_id '100' is not among the images"),
    ],
)
def test_annotations_that_cannot_be_scored(make_dataset, change, message):
    """Refused when the evaluator is built, before a training."""
    name = make_dataset([LAYOUT], instances=True)
    change_annotations(name, lambda i: change)
    with pytest.raises(ValueError, match=rf"instances\.json'.*{re.escape(message)}"):
        InstanceEvaluator(name)


def test_instances_json_of_other_images(make_dataset):
    name = make_dataset([LAYOUT, LAYOUT], instances=True)
    path = Path(MetadataCatalog.get(name).json_file)
    data = json.loads(path.read_text())
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] == 100]
    path.write_text(json.dumps({**data, "images": data["images"][:1]}))
    with pytest.raises(ValueError, match=r"instances\.json' lacks 1 images, such as 101, of"):
        InstanceEvaluator(name)


def test_output_without_instances(make_dataset):
    name = make_dataset([LAYOUT], instances=True)
    evaluator = InstanceEvaluator(name)
    evaluator.reset()
    with pytest.raises(ValueError, match=r"no 'instances'.*INSTANCE_ON"):
        evaluator.process(DatasetCatalog.get(name), [{}])
