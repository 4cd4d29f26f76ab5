import contextlib
import io
import json
import logging
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from psf.data import (
    generate_shapes,
    load_coco_panoptic,
    register_shapes,
)
from psf.data.shapes import CATEGORIES, dataset
from psf.data.shapes.__main__ import main
from psf.data.shapes.scene import draw_scene

SIZES = {"num_train": 3, "num_val": 2, "size": 64}


def content(root):
    """Every file of a data set, with its bytes."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def load_json(path):
    return json.loads(path.read_text())


def read_ids(path):
    return np.asarray(Image.open(path)).astype(np.int64) @ [1, 256, 65536]


def generator(index, seed=0):
    return np.random.Generator(np.random.PCG64([seed, 0, index]))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets") / "shapes"
    generate_shapes(root, num_train=0, num_val=20, size=128)
    return root


# -------------------------------------------------------------------------------------- scenes


def test_a_scene_is_a_function_of_its_generator():
    for a, b in [(draw_scene(generator(i), 64), draw_scene(generator(i), 64)) for i in range(10)]:
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_array_equal(a.index_map, b.index_map)
        assert a.segments == b.segments


@pytest.mark.parametrize("size", [32, 100, 128])
def test_the_segments_are_those_of_the_map(size):
    stuff = {c["id"] for c in CATEGORIES if not c["isthing"]}
    for i in range(10):
        scene = draw_scene(generator(i), size)
        assert scene.image.shape == (size, size, 3)
        indices = range(1, len(scene.segments) + 1)
        assert set(np.unique(scene.index_map).tolist()) - {0} == set(indices)
        assert len({s.id for s in scene.segments}) == len(scene.segments)
        present = [s.category_id for s in scene.segments if s.category_id in stuff]
        assert len(set(present)) == len(present)  # at most one segment of a stuff class


def test_categories_interleave_and_are_many_enough():
    is_thing = [c["isthing"] for c in sorted(CATEGORIES, key=lambda c: c["id"])]
    assert sum(is_thing) >= 5
    assert len(is_thing) - sum(is_thing) >= 4
    changes = np.count_nonzero(np.diff(is_thing))
    assert changes >= 5
    assert len({c["id"] for c in CATEGORIES}) == len(CATEGORIES)


def test_scenes_have_the_difficulties_they_promise():
    things = {c["id"] for c in CATEGORIES if c["isthing"]}
    crowds = voids = cut = touching = 0
    classes = set()
    for i in range(100):
        scene = draw_scene(generator(i), 128)
        crowds += any(s.iscrowd for s in scene.segments)
        index_map = scene.index_map
        voids += (index_map == 0).any()
        classes |= {s.category_id for s in scene.segments}
        category_of = [0, *(s.category_id for s in scene.segments)]
        border = np.concatenate([index_map[0], index_map[-1], index_map[:, 0], index_map[:, -1]])
        cut += any(category_of[k] in things for k in border.tolist())
        neighbours = (index_map[:, :-1].ravel().tolist(), index_map[:, 1:].ravel().tolist())
        touching += any(
            a != b and category_of[a] == category_of[b] and category_of[a] in things
            for a, b in zip(*neighbours, strict=True)
        )
    assert 3 <= crowds <= 15
    assert 40 <= voids <= 95
    assert cut >= 30
    assert touching >= 20
    assert classes == {c["id"] for c in CATEGORIES}


# --------------------------------------------------------------------------------------- files


def test_no_images_at_all(tmp_path):
    generate_shapes(tmp_path / "shapes", num_train=0, num_val=0, size=64)
    assert load_json(tmp_path / "shapes" / "panoptic_train.json")["images"] == []


def test_generation_is_deterministic_and_an_image_does_not_depend_on_the_count(tmp_path):
    generate_shapes(tmp_path / "a", **SIZES)
    generate_shapes(tmp_path / "b", **SIZES)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    generate_shapes(tmp_path / "c", num_train=1, num_val=1, size=64)
    more, fewer = content(tmp_path / "a"), content(tmp_path / "c")
    assert all(more[name] == fewer[name] for name in fewer if name.endswith(".png"))
    generate_shapes(tmp_path / "d", **SIZES, seed=1)
    other = content(tmp_path / "d")
    pngs = [data[name] for data in (more, other) for name in data if name.endswith(".png")]
    assert len(set(pngs)) == len(pngs) == 2 * 2 * (3 + 2), "splits and seeds differ"


def test_area_and_box_are_those_of_the_png(root):
    data = load_json(root / "panoptic_val.json")
    assert len(data["annotations"]) == 20
    for annotation in data["annotations"]:
        ids = read_ids(root / "panoptic_val" / annotation["file_name"])
        segments = annotation["segments_info"]
        assert {s["id"] for s in segments} == set(np.unique(ids).tolist()) - {0}
        for segment in segments:
            y, x = np.nonzero(ids == segment["id"])
            box = [x.min(), y.min(), x.max() - x.min() + 1, y.max() - y.min() + 1]
            assert (segment["area"], segment["bbox"]) == (len(x), box)


def test_instances_are_the_things_of_the_png(root):
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(root / "instances_val.json"))
    panoptic = load_json(root / "panoptic_val.json")
    things = {c["id"] for c in CATEGORIES if c["isthing"]}
    assert set(coco.getCatIds()) == things
    for annotation in panoptic["annotations"]:
        ids = read_ids(root / "panoptic_val" / annotation["file_name"])
        expected = [s for s in annotation["segments_info"] if s["category_id"] in things]
        instances = coco.loadAnns(coco.getAnnIds(imgIds=[annotation["image_id"]]))
        assert [i["iscrowd"] for i in instances] == [s["iscrowd"] for s in expected]
        for instance, segment in zip(instances, expected, strict=True):
            np.testing.assert_array_equal(coco.annToMask(instance), ids == segment["id"])


# --------------------------------------------------------------- atomic, concurrent, up to date


def test_nothing_is_done_when_the_data_is_there(tmp_path, monkeypatch):
    generate_shapes(tmp_path / "shapes", **SIZES)
    monkeypatch.setattr(dataset, "draw_scene", None)  # would fail if it were called
    generate_shapes(tmp_path / "shapes", **SIZES)


class Interruption(BaseException):
    """Like KeyboardInterrupt, which pytest would take as its own."""


def interrupt_after(count, monkeypatch):
    scenes = iter(range(count))

    def draw(rng, size):
        if next(scenes, None) is None:
            raise Interruption
        return draw_scene(rng, size)

    monkeypatch.setattr(dataset, "draw_scene", draw)


@pytest.mark.parametrize("count", [0, 2, 4])
def test_interrupted_generation_leaves_nothing(tmp_path, monkeypatch, count):
    root = tmp_path / "shapes"
    with monkeypatch.context() as patch:
        interrupt_after(count, patch)
        with pytest.raises(Interruption):
            generate_shapes(root, **SIZES)
    assert {path.name for path in tmp_path.iterdir()} <= {"shapes.lock"}
    generate_shapes(root, **SIZES)
    assert len(load_coco_panoptic(*paths(root, "train"))) == 3


def test_remains_of_killed_processes_are_removed(tmp_path):
    remains = tmp_path / "shapes.partial-abc" / "new" / "train"
    remains.mkdir(parents=True)
    (remains / "000001.png").write_text("half an im")
    generate_shapes(tmp_path / "shapes", **SIZES)
    assert {path.name for path in tmp_path.iterdir()} <= {"shapes", "shapes.lock"}


def paths(root, split):
    return (
        str(root / f"panoptic_{split}.json"),
        str(root / split),
        str(root / f"panoptic_{split}"),
    )


def test_generating_at_the_same_time(tmp_path):
    """In threads, which the lock keeps apart as it does processes."""
    barrier = threading.Barrier(3)

    def generate(_):
        barrier.wait()
        generate_shapes(tmp_path / "shapes", **SIZES)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(generate, range(3)))
    assert {path.name for path in tmp_path.iterdir()} <= {"shapes", "shapes.lock"}
    generate_shapes(tmp_path / "alone", **SIZES)
    assert content(tmp_path / "shapes") == content(tmp_path / "alone")


def test_another_version_is_replaced(tmp_path, monkeypatch, caplog):
    root = tmp_path / "shapes"
    generate_shapes(root, **SIZES)
    with caplog.at_level(logging.INFO, logger="psf.data.shapes.dataset"):
        generate_shapes(root, num_train=1, num_val=1, size=64)
    assert caplog.text.count("holds another version of shapes, which is replaced") == 1
    assert len(load_json(root / "panoptic_train.json")["images"]) == 1
    monkeypatch.setattr(dataset, "GENERATOR_VERSION", dataset.GENERATOR_VERSION + 1)
    before = (root / "panoptic_train.json").stat().st_ino
    generate_shapes(root, num_train=1, num_val=1, size=64)
    assert (root / "panoptic_train.json").stat().st_ino != before


@pytest.mark.parametrize(
    ("name", "content"),
    [("thesis.tex", "x"), ("panoptic_val.json", "[]"), ("panoptic_val.json", '{"info": "mine"}')],
)
def test_other_files_are_never_removed(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match="is not empty and holds no shapes data set"):
        generate_shapes(tmp_path, **SIZES)
    assert (tmp_path / name).read_text() == content


def test_a_root_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    message = r"Cannot generate .*file.shapes'.*DETECTRON2_DATASETS"
    with pytest.raises(OSError, match=message):
        generate_shapes(tmp_path / "file" / "shapes", **SIZES)


def test_senseless_arguments(tmp_path):
    with pytest.raises(ValueError, match="at least 32"):
        generate_shapes(tmp_path / "shapes", size=8)


# --------------------------------------------------------------------------------- registration


def test_registered_data_is_generated_on_first_use(tmp_path):
    root = tmp_path / "shapes"
    register_shapes(str(root), prefix="test_shapes", **SIZES)
    try:
        assert not root.exists()
        assert len(DatasetCatalog.get("test_shapes_train")) == 3
        assert len(DatasetCatalog.get("test_shapes_val")) == 2
        metadata = MetadataCatalog.get("test_shapes_val")
        for path in (metadata.panoptic_json, metadata.panoptic_root, metadata.json_file):
            assert os.path.exists(path)
    finally:
        for name in ("test_shapes_train", "test_shapes_val"):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def test_the_default_root_follows_detectron2(monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", os.path.join("~", "data"))
    assert dataset.default_root() == os.path.join(os.path.expanduser("~"), "data", "shapes")
    monkeypatch.delenv("DETECTRON2_DATASETS")
    assert dataset.default_root() == os.path.join("datasets", "shapes")


def test_importing_registers():
    metadata = MetadataCatalog.get("shapes_panoptic_val")
    assert metadata.thing_classes == ["circle", "square", "triangle", "star", "ring"]
    names = {f"shapes_panoptic_{split}" for split in ("train", "val", "tune")}
    assert names <= set(DatasetCatalog.list())


def test_command_line(tmp_path, monkeypatch):
    arguments = ["--num-train", "1", "--num-val", "1", "--size", "64", "--seed", "5"]
    monkeypatch.setattr(sys, "argv", ["shapes", *arguments])
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "a"))
    main()
    generate_shapes(tmp_path / "b", num_train=1, num_val=1, size=64, seed=5)
    assert content(tmp_path / "a" / "shapes") == content(tmp_path / "b")
