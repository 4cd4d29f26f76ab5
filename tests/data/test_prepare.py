"""From the official downloads in miniature to training and evaluation."""

import json
import os
import sys
import tarfile
import zipfile
from pathlib import Path

import check_dataset as check_tool
import evaluate_predictions
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from miniatures import HEIGHT, WIDTH, make_ade20k, make_cityscapes, make_coco, zip_folder
from PIL import Image

from psf.data import ClassMap, coco_writer, register_builtin
from psf.data.coco_panoptic import datasets_root
from psf.data.prepare.__main__ import main
from psf.data.prepare.archives import unpack
from psf.evaluation import PanopticEvaluator, build_evaluators
from psf.panoptic_png import read_panoptic_ids
from psf.trainer import Trainer

MAKERS = {"ade20k": make_ade20k, "cityscapes": make_cityscapes, "coco": make_coco}
NAMES = {
    "ade20k": ("ade20k_panoptic_train", "ade20k_panoptic_val"),
    "cityscapes": ("cityscapes_fine_panoptic_train", "cityscapes_fine_panoptic_val"),
    "coco": ("coco_2017_train_panoptic", "coco_2017_val_panoptic"),
}


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """Run the command in a folder of miniatures, in which the data sets are then registered."""

    def run(data_set, *options):
        argv = ["prepare", data_set, "--root", str(tmp_path), *options]
        monkeypatch.setattr(sys, "argv", argv)
        main()
        register_builtin(str(tmp_path))

    yield run
    register_builtin(datasets_root())


@pytest.fixture(params=MAKERS)
def prepared(request, tmp_path, prepare):
    MAKERS[request.param](tmp_path)
    prepare(request.param, "--allow-partial")
    return NAMES[request.param]


def perfect_output(record):
    """What a model would give that knows the ground truth."""
    ids = torch.from_numpy(read_panoptic_ids(record["pan_seg_file_name"]).astype(np.int32))
    segments = [s for s in record["segments_info"] if not s["iscrowd"]]
    for crowd in (s for s in record["segments_info"] if s["iscrowd"]):
        ids[ids == crowd["id"]] = 0
    infos = [{k: s[k] for k in ("id", "category_id", "isthing")} for s in segments]
    things = [s for s in segments if s["isthing"]]
    instances = Instances((HEIGHT, WIDTH))
    instances.pred_masks = torch.stack([ids == s["id"] for s in things])
    x, y, w, h = torch.tensor([s["bbox"] for s in things], dtype=torch.float32).T
    instances.pred_boxes = Boxes(torch.stack([x, y, x + w, y + h], dim=1))
    instances.scores = torch.ones(len(things))
    instances.pred_classes = torch.tensor([s["category_id"] for s in things])
    num_classes = len(MetadataCatalog.get(record["name"]).stuff_classes)
    sem_seg = torch.zeros(num_classes, HEIGHT, WIDTH)
    for s in segments:
        sem_seg[s["category_id"]][ids == s["id"]] = 1
    return {"panoptic_seg": (ids, infos), "instances": instances, "sem_seg": sem_seg}


def test_registration_loading_and_evaluation(prepared, tmp_path):
    for name in prepared:
        records = DatasetCatalog.get(name)
        assert len(records) == 2
        evaluator = build_evaluators(
            name, panoptic=True, instances=True, sem_seg=True, output_dir=str(tmp_path / "out")
        )
        evaluator.reset()
        for record in records:
            assert (record["height"], record["width"]) == (HEIGHT, WIDTH)
            evaluator.process([record], [perfect_output({**record, "name": name})])
        results = evaluator.evaluate()
        assert results["panoptic_seg"]["PQ"] == 100
        assert results["segm"]["AP"] == pytest.approx(100)
        if "sem_seg_file_name" in records[0]:  # labels and instances of ADE20K differ
            assert results["sem_seg"]["mIoU"] > 45
        else:
            assert results["sem_seg"]["mIoU"] == pytest.approx(100)


@pytest.mark.parametrize("prepared", ["ade20k"], indirect=True)
def test_a_training_step(prepared, tiny_cfg, tmp_path):
    train, val = prepared
    tiny_cfg.merge_from_list(
        [
            *("DATASETS.TRAIN", (train,), "DATASETS.TEST", (val,)),
            *("MODEL.PSF.NUM_THING_CLASSES", 0, "MODEL.PSF.NUM_STUFF_CLASSES", 0),
            *("DATALOADER.NUM_WORKERS", 0, "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False),
            *("INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MIN_SIZE_TEST", 64),
            *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 1, "SOLVER.STEPS", ()),
            *("OUTPUT_DIR", str(tmp_path / "output")),
        ]
    )
    Trainer(tiny_cfg).train()
    assert "panoptic_seg/PQ" in (tmp_path / "output" / "metrics.json").read_text()


def test_ade20k(tmp_path, prepare):
    """Things lie on stuff; labels become Detectron2's; areas are those that are visible."""
    make_ade20k(tmp_path)
    prepare("ade20k", "--allow-partial")
    metadata = MetadataCatalog.get("ade20k_panoptic_val")
    class_map = ClassMap.from_metadata(metadata)
    assert (len(class_map.thing_ids), len(class_map.stuff_ids)) == (100, 50)
    record = DatasetCatalog.get("ade20k_panoptic_val")[0]
    assert record["image_id"] == "ADE_val_00000001"
    found = [
        (metadata.stuff_classes[s["category_id"]], s["isthing"], s["area"], s["bbox"])
        for s in record["segments_info"]
    ]
    assert found == [
        ("wall", False, 28 * 64 - 10 * 47, [0, 20, 64, 28]),
        ("sky", False, 15 * 64 - 50, [0, 5, 64, 15]),
        ("person", True, 200, [5, 30, 20, 10]),
        ("person", True, 270, [25, 30, 27, 10]),
        ("car", True, 50, [10, 10, 10, 5]),
    ]
    labels = np.asarray(Image.open(record["sem_seg_file_name"]))
    assert (labels[0, 0], labels[10, 0], labels[47, 0]) == (255, 2, 0)


def test_cityscapes(tmp_path, prepare):
    """Groups are crowds; what is not evaluated is void; names as cityscapesScripts gives them."""
    make_cityscapes(tmp_path)
    prepare("cityscapes", "--allow-partial")
    metadata = MetadataCatalog.get("cityscapes_fine_panoptic_train")
    class_map = ClassMap.from_metadata(metadata)
    assert class_map == ClassMap(tuple(range(11, 19)), tuple(range(11)))
    record = DatasetCatalog.get("cityscapes_fine_panoptic_train")[0]
    assert record["image_id"] == "aachen_000000_000019"
    assert Path(record["pan_seg_file_name"]).name == "aachen_000000_000019_gtFine_panoptic.png"
    found = {
        s["id"]: (metadata.stuff_classes[s["category_id"]], s["isthing"], s["iscrowd"])
        for s in record["segments_info"]
    }
    assert found == {
        7: ("road", False, 0),
        23: ("sky", False, 0),
        24: ("person", True, 1),
        26000: ("car", True, 0),
        26001: ("car", True, 0),
    }
    ids = read_panoptic_ids(record["pan_seg_file_name"])
    assert (ids[0, 0], ids[42, 4], ids[30, 31]) == (0, 0, 26001)
    labels = np.asarray(Image.open(record["sem_seg_file_name"]))
    assert (labels[0, 0], labels[42, 4], labels[30, 31], labels[11, 45]) == (255, 255, 13, 11)
    detectron2_loads_it(tmp_path)


def detectron2_loads_it(root):
    from detectron2.data.datasets.cityscapes_panoptic import load_cityscapes_panoptic

    truth = root / "cityscapes" / "gtFine"
    meta = MetadataCatalog.get("cityscapes_fine_panoptic_val").as_dict()
    records = load_cityscapes_panoptic(
        str(root / "cityscapes" / "leftImg8bit" / "val"),
        str(truth / "cityscapes_panoptic_val"),
        str(truth / "cityscapes_panoptic_val.json"),
        meta,
    )
    names = [r["image_id"] for r in records]
    assert names == ["frankfurt_000000_000019", "frankfurt_000001_000019"]


@pytest.mark.parametrize("data_set", MAKERS)
def test_counts_are_verified(tmp_path, prepare, data_set):
    MAKERS[data_set](tmp_path)
    with pytest.raises(SystemExit, match=r"2 .*instead of \d+.*--allow-partial"):
        prepare(data_set)


@pytest.mark.parametrize("data_set", MAKERS)
def test_missing_downloads_are_named(tmp_path, prepare, data_set):
    with pytest.raises(SystemExit, match=r"does not exist\. Put .*(zip|tar).*datasets/README\.md"):
        prepare(data_set)


def test_an_interrupted_run_goes_on(tmp_path, prepare, monkeypatch):
    make_cityscapes(tmp_path, num_images=3)
    written = []

    def write(path, ids, whole=coco_writer.write_panoptic_ids):
        written.append(Path(path).name)
        if len(written) == 3:
            raise KeyboardInterrupt
        whole(path, ids)

    monkeypatch.setattr(coco_writer, "write_panoptic_ids", write)
    with pytest.raises(KeyboardInterrupt):
        prepare("cityscapes", "--allow-partial")
    truth = tmp_path / "cityscapes" / "gtFine"
    notes = truth / "cityscapes_panoptic_train.json.partial"
    with open(notes, "a") as file:
        file.write('["half a li')  # the process was killed while it wrote
    assert not (truth / "cityscapes_panoptic_train.json").exists()
    prepare("cityscapes", "--allow-partial")
    assert written[2:4] == ["aachen_000002_000019_gtFine_panoptic.png"] * 2
    assert len(written) == 3 + 1 + 3
    assert not notes.exists()
    content = json.loads((truth / "cityscapes_panoptic_train.json").read_text())
    assert len(content["annotations"]) == 3
    prepare("cityscapes", "--allow-partial")
    assert len(written) == 7, "what is complete is left alone"
    (labels,) = (truth / "train").glob("*/aachen_000001_*TrainIds.png")
    for lost in (labels, truth / "cityscapes_panoptic_train" / written[0]):
        lost.unlink()
        prepare("cityscapes", "--allow-partial")
        assert lost.is_file()
    for archive in tmp_path.rglob("*.zip"):
        archive.unlink()  # it would be unpacked again
    (source,) = (truth / "train").glob("*/aachen_000001_*instanceIds.png")
    Image.fromarray(np.full_like(np.asarray(Image.open(source)), 23)).save(source)
    prepare("cityscapes", "--allow-partial")
    content = json.loads((truth / "cityscapes_panoptic_train.json").read_text())
    assert [23] in [[s["category_id"] for s in a["segments_info"]] for a in content["annotations"]]
    (truth / "cityscapes_panoptic_train.json").write_text('{"annotations": []}')
    with pytest.raises(SystemExit, match="was not written by this version of the conversion"):
        prepare("cityscapes", "--allow-partial")


@pytest.mark.parametrize("name", ["evil.zip", "evil.tar"])
def test_an_archive_cannot_write_elsewhere(tmp_path, name):
    archive, folder = tmp_path / name, tmp_path / "a" / "b"
    (tmp_path / "file").write_text("evil")
    if name.endswith("zip"):
        with zipfile.ZipFile(archive, "w") as file:
            file.write(tmp_path / "file", "../../evil.txt")
        unpack(archive, folder)
    else:
        with tarfile.open(archive, "w") as file:
            file.add(tmp_path / "file", "../../evil.txt")
        with pytest.raises(ValueError, match=r"evil\.tar': .*outside the destination"):
            unpack(archive, folder)
    assert not (tmp_path / "evil.txt").exists()


@pytest.mark.parametrize("name", ["val2017.zip", "annotations_instance.tar"])
def test_a_damaged_archive_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"half a download")
    with pytest.raises(ValueError, match=rf"(?s)Cannot unpack '.*{name}'.*Download it again"):
        unpack(tmp_path / name, tmp_path)


def test_unpacking_goes_on_where_it_was_interrupted(tmp_path, caplog):
    for name in ("whole.txt", "half.txt", "absent.txt"):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text("content")
    zip_folder(tmp_path / "in", tmp_path / "in.zip")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "half.txt").write_text("con")
    (tmp_path / "in" / "whole.txt").write_text("mine..!")
    unpack(tmp_path / "in.zip", tmp_path, members="in/")
    found = {path.name: path.read_text() for path in (tmp_path / "in").iterdir()}
    assert found == {"whole.txt": "mine..!", "half.txt": "content", "absent.txt": "content"}
    assert "1 files differ" in caplog.text  # a file that is newer than the archive is kept
    os.utime(tmp_path / "in" / "whole.txt", (0, 0))
    unpack(tmp_path / "in.zip", tmp_path, members="in/")
    assert (tmp_path / "in" / "whole.txt").read_text() == "content"


def test_a_missing_png_of_coco_is_named(tmp_path, prepare):
    make_coco(tmp_path)
    prepare("coco", "--allow-partial")
    (tmp_path / "coco" / "panoptic_val2017" / "000000000002.png").unlink()
    (tmp_path / "coco" / "annotations" / "panoptic_val2017.zip").unlink()
    (tmp_path / "coco" / "panoptic_annotations_trainval2017.zip").unlink()
    annotations = tmp_path / "coco" / "annotations" / "panoptic_val2017.json"
    annotations.write_text(annotations.read_text(), encoding="utf-8-sig")
    with pytest.raises(SystemExit, match=r"1 of the 2 panoptic PNGs .*000000000002\.png"):
        prepare("coco", "--allow-partial")


def test_ade20k_instances_of_no_category(tmp_path, prepare):
    make_ade20k(tmp_path)
    prepare("ade20k", "--allow-partial")
    data = tmp_path / "ADEChallengeData2016"
    path = data / "annotations_instance" / "validation" / "ADE_val_00000001.png"
    array = np.asarray(Image.open(path)).copy()
    array[30, 5] = (101, 1, 0)
    Image.fromarray(array).save(path)
    (tmp_path / "annotations_instance.tar").unlink()
    (data / "ade20k_panoptic_val.json").unlink()
    with pytest.raises(
        SystemExit, match=r"Instance 1 of 'ADE_val_00000001\.jpg' has the categories"
    ):
        prepare("ade20k", "--allow-partial")


@pytest.mark.parametrize("prepared", ["cityscapes"], indirect=True)
def test_the_tools_find_the_images_by_the_name_of_the_data_set(prepared, tmp_path, capsys):
    """Also those of Cityscapes, in folders that its JSON does not name."""
    name = prepared[1]
    sheet = tmp_path / "sheet.png"
    assert check_tool.main(["--name", name, "--sheet", str(sheet)]) == 0
    assert capsys.readouterr().out == f"no defects\n{sheet}\n"
    evaluator = PanopticEvaluator(name, str(tmp_path / "out"), save_predictions=True)
    for record in DatasetCatalog.get(name):
        evaluator.process([record], [perfect_output({**record, "name": name})])
    evaluator.evaluate()
    predictions, scores = tmp_path / "out" / "predictions.json", tmp_path / "scores"
    evaluate_predictions.main(
        ["--name", name, "--predictions", str(predictions), "--output", str(scores)]
    )
    assert (scores / "worst.png").is_file()


def test_check_dataset_says_how_to_get_what_is_missing(tmp_path):
    register_builtin(str(tmp_path))
    try:
        with pytest.raises(SystemExit, match="DETECTRON2_DATASETS"):
            check_tool.main(["--name", "coco_2017_val_panoptic"])
    finally:
        register_builtin(datasets_root())
