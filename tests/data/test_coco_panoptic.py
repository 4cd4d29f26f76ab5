import json
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
            "categories": CATEGORIES,
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
def test_registration(files, name, categories):
    panoptic_json, image_root, panoptic_root = files.paths
    calls = []
    register_panoptic(
        name,
        image_root=image_root,
        panoptic_root=panoptic_root,
        panoptic_json=panoptic_json,
        categories=categories,
        prepare=lambda: calls.append(1),
    )
    metadata = MetadataCatalog.get(name)
    assert ClassMap.from_metadata(metadata) == ClassMap(thing_ids=(0, 1), stuff_ids=(2, 3))
    assert metadata.evaluator_type == "coco_panoptic_seg"
    assert (metadata.ignore_label, metadata.label_divisor) == (255, 1000)
    assert (metadata.panoptic_json, metadata.panoptic_root) == (panoptic_json, panoptic_root)
    assert not calls
    assert DatasetCatalog.get(name) == files.load()
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


def test_truncated_json(files):
    json_file, *roots = files.paths
    (files.root / "panoptic.json").write_text('{"images": [')
    with pytest.raises(ValueError, match=r"panoptic\.json' is not valid JSON.*Copy it again"):
        load_coco_panoptic(json_file, *roots)


def spoil_image(data):
    del data["images"][0]["height"]


def spoil_annotation(data):
    del data["annotations"][0]["file_name"]


def spoil_image_id(data):
    data["annotations"][0]["image_id"] = 99


def spoil_category_id(data):
    data["annotations"][0]["segments_info"][1]["category_id"] = 6


def spoil_segment(data):
    del data["annotations"][0]["segments_info"][0]["category_id"]


def spoil_categories(data):
    del data["categories"]


def spoil_category(data):
    data["categories"] = [{"id": 1, "name": "cat"}]


def repeat_category(data):
    data["categories"] = [*CATEGORIES, CATEGORIES[0]]


def repeat_segment_id(data):
    data["annotations"][0]["segments_info"][1]["id"] = 1


def use_void_id(data):
    data["annotations"][0]["segments_info"][1]["id"] = 0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_image, "An image of '{json}' lacks ['height']"),
        (spoil_annotation, "An annotation of '{json}' lacks ['file_name']"),
        (spoil_image_id, "'{json}' annotates image_id 99, which is not"),
        (
            spoil_category_id,
            "Segment 300 of the annotation of image_id 10 in '{json}' has category_id 6, which is "
            "not among the data set's categories [2, 5, 7, 90]",
        ),
        (
            spoil_segment,
            "A segment of the annotation of image_id 10 in '{json}' lacks ['category_id']",
        ),
        (spoil_categories, "'{json}' lacks ['categories']"),
        (spoil_category, "A category lacks ['isthing']"),
        (repeat_category, "Category ids must be unique, got [2, 5, 7, 90, 90]"),
        (repeat_segment_id, "Segment id 1 of the annotation of image_id 10 in '{json}'"),
        (use_void_id, "Segment id 0 of the annotation of image_id 10 in '{json}'"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_contradictions_are_named(files, spoil, message):
    spoil(files.json)
    expected = re.escape(message.format(json=files.root / "panoptic.json"))
    with pytest.raises(ValueError, match=expected):
        files.load()


# --------------------------------------------------------------------------- numbering and config


def test_numbering_in_the_order_of_the_list():
    metadata = panoptic_metadata(CATEGORIES, things_first=False)
    assert metadata["thing_dataset_id_to_contiguous_id"] == {5: 1, 2: 3}
    assert metadata["stuff_dataset_id_to_contiguous_id"] == {90: 0, 7: 2}
    assert metadata["thing_classes"] == metadata["stuff_classes"] == ["sky", "cat", "grass", "dog"]


def test_label_pngs_that_the_json_names(files):
    files.json["annotations"][0]["sem_seg_file_name"] = "a/b.png"
    first, second = load_coco_panoptic(*files.paths, sem_seg_root="labels")
    assert first["sem_seg_file_name"] == "labels/a/b.png"
    assert "sem_seg_file_name" not in second


def test_a_name_that_is_taken(files, name):
    panoptic_json, image_root, panoptic_root = files.paths
    common = {"image_root": image_root, "panoptic_root": panoptic_root}
    register_panoptic(name, panoptic_json=panoptic_json, **common)
    with pytest.raises(ValueError, match=f"'{name}' is registered already"):
        register_panoptic(name, panoptic_json=panoptic_json, **common)


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
