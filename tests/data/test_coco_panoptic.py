import copy
import json
import math
import re

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from psf.data import (
    ClassMap,
    load_coco_panoptic,
    panoptic_metadata,
    register_listed,
    register_panoptic,
)
from psf.evaluation.ground_truth import read_annotations

CATEGORIES = [
    {"id": 90, "name": "sky", "isthing": 0, "color": [1, 2, 3]},
    {"id": 5, "name": "cat", "isthing": 1, "color": [4, 5, 6]},
    {"id": 7, "name": "grass", "isthing": 0, "color": [7, 8, 9]},
    {"id": 2, "name": "dog", "isthing": 1, "color": [10, 11, 12]},
]


class Files:
    """A data set of two 4 x 3 images in a folder, whose JSON a test may spoil."""

    def __init__(self, root):
        self.root = root
        self.json = {
            "images": [
                {"id": 11, "file_name": "b.jpg", "height": 3, "width": 4},
                {"id": 10, "file_name": "a.png", "height": 3, "width": 4},
            ],
            "annotations": [
                {
                    "image_id": 10,
                    "file_name": "x.png",
                    "segments_info": [
                        {"id": 1, "category_id": 7, "area": 6, "bbox": [0, 0, 2, 3], "iscrowd": 0},
                        {"id": 300, "category_id": 2, "area": 6, "bbox": [2, 0, 2, 3]},
                    ],
                },
                {"image_id": 11, "file_name": "y.png", "segments_info": []},
            ],
            "categories": copy.deepcopy(CATEGORIES),
        }
        for folder in ("images", "panoptic"):
            (root / folder).mkdir()
        for name in ("images/a.png", "images/b.jpg", "panoptic/x.png", "panoptic/y.png"):
            Image.fromarray(np.zeros((3, 4, 3), dtype=np.uint8)).save(root / name)

    @property
    def paths(self):
        path = self.root / "panoptic.json"
        path.write_text(json.dumps(self.json))
        return str(path), str(self.root / "images"), str(self.root / "panoptic")

    def load(self):
        return load_coco_panoptic(*self.paths)


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


def test_no_images(files):
    files.json.update(images=[], annotations=[])
    assert files.load() == []


def test_records(files):
    first, second = files.load()
    assert first == {
        "file_name": str(files.root / "images" / "a.png"),
        "image_id": 10,
        "height": 3,
        "width": 4,
        "pan_seg_file_name": str(files.root / "panoptic" / "x.png"),
        "segments_info": [
            {
                "id": 1,
                "category_id": 3,
                "isthing": False,
                "area": 6,
                "bbox": [0, 0, 2, 3],
                "iscrowd": 0,
            },
            {
                "id": 300,
                "category_id": 1,
                "isthing": True,
                "area": 6,
                "bbox": [2, 0, 2, 3],
                "iscrowd": 0,
            },
        ],
    }
    assert second["file_name"] == str(files.root / "images" / "b.jpg")
    assert second["segments_info"] == []


def test_images_without_an_annotation_are_left_out_unless_there_are_none_at_all(files):
    del files.json["annotations"][0]
    assert [r["image_id"] for r in files.load()] == [11]
    del files.json["annotations"]
    assert [(r["image_id"], r["pan_seg_file_name"]) for r in files.load()] == [
        (11, None),
        (10, None),
    ]


def test_metadata_has_things_first_in_the_order_of_the_list():
    metadata = panoptic_metadata(CATEGORIES)
    assert metadata["thing_classes"] == ["cat", "dog"]
    assert metadata["stuff_classes"] == ["cat", "dog", "sky", "grass"]
    assert metadata["thing_colors"] == [[4, 5, 6], [10, 11, 12]]
    assert metadata["stuff_colors"] == [[4, 5, 6], [10, 11, 12], [1, 2, 3], [7, 8, 9]]
    assert metadata["thing_dataset_id_to_contiguous_id"] == {5: 0, 2: 1}
    assert metadata["stuff_dataset_id_to_contiguous_id"] == {90: 2, 7: 3}


def test_renumbering_the_categories_changes_no_contiguous_id(files):
    before = files.load()
    new_ids = {90: 1, 5: 40, 7: 39, 2: 1000}
    files.json["categories"] = [{**c, "id": new_ids[c["id"]]} for c in CATEGORIES]
    for segment in files.json["annotations"][0]["segments_info"]:
        segment["category_id"] = new_ids[segment["category_id"]]
    assert files.load() == before


def test_categories_without_colours_get_different_ones():
    categories = [{"id": i, "name": str(i), "isthing": i % 2} for i in range(30)]
    colors = panoptic_metadata(categories)["stuff_colors"]
    assert len({tuple(c) for c in colors}) == 30
    assert np.asarray(colors).min() >= 0
    assert np.asarray(colors).max() <= 255


@pytest.fixture
def name():
    name = "test_coco_panoptic"
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


@pytest.mark.parametrize("categories", [None, CATEGORIES])
def test_registration(files, name, categories, monkeypatch):
    panoptic_json, _, panoptic_root = files.paths
    monkeypatch.setenv("HOME", str(files.root))
    calls = []
    register_panoptic(
        name,
        image_root="~/images",
        panoptic_root="~/panoptic",
        panoptic_json=panoptic_json.replace(str(files.root), "~"),
        instances_json="~/instances.json",
        categories=categories,
        prepare=lambda: calls.append(1),
    )
    metadata = MetadataCatalog.get(name)
    assert ClassMap.from_metadata(metadata) == ClassMap(thing_ids=(0, 1), stuff_ids=(2, 3))
    assert metadata.evaluator_type == "coco_panoptic_seg"
    assert (metadata.ignore_label, metadata.label_divisor) == (255, 1000)
    assert (metadata.panoptic_json, metadata.panoptic_root) == (panoptic_json, panoptic_root)
    assert metadata.json_file == str(files.root / "instances.json")
    assert not calls
    assert DatasetCatalog.get(name) == [{**r, "dataset_name": name} for r in files.load()]
    assert calls == [1]


def test_registering_known_categories_needs_no_files(tmp_path, name):
    register_panoptic(
        name,
        image_root=str(tmp_path / "images"),
        panoptic_root=str(tmp_path / "panoptic"),
        panoptic_json=str(tmp_path / "panoptic.json"),
        categories=CATEGORIES,
    )
    message = r"panoptic\.json' do not exist.*DETECTRON2_DATASETS"
    with pytest.raises(FileNotFoundError, match=message):
        DatasetCatalog.get(name)


# ------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("folder", ["images", "panoptic"])
def test_missing_folder(files, folder):
    (files.root / folder).rename(files.root / "elsewhere")
    message = f"{folder}' does not exist.*DETECTRON2_DATASETS"
    with pytest.raises(FileNotFoundError, match=message):
        files.load()


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("panoptic/y.png", "1 of the 2 panoptic PNGs that '.*panoptic.json' names .*y.png"),
        ("images/a.png", "1 of the 2 images that '.*panoptic.json' names .*a.png"),
    ],
)
def test_missing_file(files, file, message):
    (files.root / file).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        files.load()


FIRST = ("annotations", 0)
SEGMENT = (*FIRST, "segments_info", 1)  # of image 10, with id 300
OF_SEGMENT = "annotation of image 10, segment "
CATEGORY = ("categories", 1)  # the cat, with id 5
DELETE = object()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("images",), DELETE, "JSON: lacks images"),
        (("annotations",), None, "JSON: annotations is None instead of a list"),
        (("images", 0), [], "image number 0: is [] instead of an object"),
        (("images", 0, "height"), DELETE, "image 11: lacks height"),
        (("images", 0, "height"), 3.0, "image 11: height is 3.0 instead of a positive integer"),
        (("images", 0, "file_name"), None, "image 11: file_name is None instead of the name"),
        (("images", 0, "id"), 11.0, "image 11.0: id is 11.0 instead of an integer or a text"),
        (("images", 0, "id"), 10, "image 10: two images have this id"),
        ((*FIRST, "image_id"), 99, "annotation of image 99: is not among the images"),
        ((*FIRST, "image_id"), 11, "annotation of image 11: two annotations have this id"),
        ((*FIRST, "segments_info"), None, "segments_info is None instead of a list"),
        (FIRST, None, "annotation of image number 0: is None instead of an object"),
        ((*SEGMENT, "category_id"), 6, f"{OF_SEGMENT}300: category_id 6 is not among the categ"),
        ((*SEGMENT, "category_id"), [2], f"{OF_SEGMENT}300: category_id is [2] instead"),
        ((*SEGMENT, "id"), 1, f"{OF_SEGMENT}1: two segments have this id"),
        ((*SEGMENT, "id"), 0, f"{OF_SEGMENT}0: id is 0 instead of an integer in 1..16777215"),
        ((*SEGMENT, "iscrowd"), "0", f"{OF_SEGMENT}300: iscrowd is '0' instead of 0 or 1"),
        ((*SEGMENT, "iscrowd"), None, "iscrowd is None instead of 0 or 1"),
        ((*SEGMENT, "area"), -6, "area is -6 instead of a number of at least 0"),
        ((*SEGMENT, "area"), math.nan, "area is nan instead"),
        ((*SEGMENT, "area"), 10**30, "area is 1000"),
        ((*SEGMENT, "bbox"), [0, 0, math.inf, 1], "bbox is [0, 0, inf, 1] instead of [x, y, wid"),
        ((*CATEGORY, "isthing"), DELETE, "category 5: lacks isthing"),
        ((*CATEGORY, "isthing"), 2, "category 5: isthing is 2 instead of 0 or 1"),
        ((*CATEGORY, "id"), 5.0, "category 5.0: id is 5.0 instead of an integer"),
        ((*CATEGORY, "id"), 90, "category 90: two categories have this id"),
        ((*CATEGORY, "name"), " Dog", "category 2: another category has the name 'dog'"),
        ((*CATEGORY, "color"), [1, 2, 300], "category 5: color is [1, 2, 300] instead of three"),
        (("categories",), [], "categories: there are none"),
    ],
)
@pytest.mark.parametrize("read", ["training", "evaluation"])
def test_values_that_are_not_usable(files, path, value, message, read):
    """Training and evaluation refuse them with one message, which names file, object and key."""
    *parents, key = path
    parent = files.json
    for part in parents:
        parent = parent[part]
    if value is DELETE:
        del parent[key]
    else:
        parent[key] = value
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        files.load() if read == "training" else read_annotations(files.paths[0])
    assert str(error.value).startswith(f"'{files.root / 'panoptic.json'}': ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "tiger"}, "category 5: is 'cat', but 'tiger' is expected under this id"),
        ({"isthing": 0}, "category 5: isthing is 1, but 0 is expected"),
    ],
)
def test_registered_categories_that_the_json_contradicts(files, change, message):
    categories = [{**c, **(change if c["id"] == 5 else {})} for c in CATEGORIES]
    with pytest.raises(ValueError, match=message):
        load_coco_panoptic(*files.paths, categories=categories)


# --------------------------------------------------------------------------- numbering and config


def test_numbering_in_the_order_of_the_list():
    metadata = panoptic_metadata(CATEGORIES, things_first=False)
    assert metadata["thing_dataset_id_to_contiguous_id"] == {5: 1, 2: 3}
    assert metadata["stuff_dataset_id_to_contiguous_id"] == {90: 0, 7: 2}
    assert metadata["thing_classes"] == metadata["stuff_classes"] == ["sky", "cat", "grass", "dog"]


def test_label_pngs_that_the_json_names(files):
    files.json["annotations"][0]["sem_seg_file_name"] = "a\\b.png"  # as Windows writes it
    first, second = load_coco_panoptic(*files.paths, sem_seg_root="labels")
    assert first["sem_seg_file_name"] == "labels/a/b.png"
    assert "sem_seg_file_name" not in second


def test_a_name_that_is_taken(files, name):
    panoptic_json, image_root, panoptic_root = files.paths
    common = {"image_root": image_root, "panoptic_root": panoptic_root}
    register_panoptic(name, panoptic_json=panoptic_json, **common)
    with pytest.raises(ValueError, match=f"'{name}' is registered already"):
        register_panoptic(name, panoptic_json=panoptic_json, **common)


@pytest.mark.parametrize("bad", ["", "..", "../x", "a/b", "a\\b", "/x"])
def test_a_name_that_is_no_folder(files, bad):
    """Results are written to a folder of that name."""
    panoptic_json, image_root, panoptic_root = files.paths
    with pytest.raises(ValueError, match="cannot be the name of a data set"):
        register_listed([[bad, image_root, panoptic_root, panoptic_json]])
    assert bad not in DatasetCatalog.list()


@pytest.mark.parametrize("instances", [[], ["instances.json"]])
def test_registration_from_a_config(files, name, instances):
    panoptic_json, image_root, panoptic_root = files.paths
    entry = [name, image_root, panoptic_root, panoptic_json, *instances]
    for _ in range(2):  # the second time it stays
        register_listed([entry])
    assert len(DatasetCatalog.get(name)) == 2
    assert MetadataCatalog.get(name).json_file == (instances[0] if instances else None)
    with pytest.raises(
        ValueError, match=f"DATASETS.REGISTER: '{name}' is the name of another data set"
    ):
        register_listed([[name, "elsewhere", panoptic_root, panoptic_json]])


@pytest.mark.parametrize("entry", [["name", "images", "pngs"], ["name", "images", "pngs", 3]])
def test_config_entries_of_another_form(entry):
    with pytest.raises(ValueError, match=r"DATASETS\.REGISTER: .* is not of the form \[name, "):
        register_listed([entry])
