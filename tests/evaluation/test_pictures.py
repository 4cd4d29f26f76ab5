"""Pictures: sizes, repeatability, and what they are drawn from."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from PIL import Image
from tiny_panoptic import ANT, CAT, GRASS, SKY, Layout

from psf.evaluation.ground_truth import PanopticSegmentation, load_ground_truth
from psf.evaluation.pictures import (
    Sample,
    draw_panoptic,
    write_contact_sheet,
)

NOTHING: Layout = ([[0] * 40] * 30, {})
# 30 x 40 pixels: grass and sky, a cat, a crowd of ants, void.
SCENE: Layout = (
    [[1] * 20 + [2] * 20] * 10 + [[3] * 30 + [70000] * 10] * 10 + [[1] * 40] * 5 + [[0] * 40] * 5,
    {1: (GRASS, 0), 2: (SKY, 0), 3: (CAT, 0), 70000: (ANT, 1)},
)


@pytest.fixture
def scene(make_dataset):
    """Metadata, and records without and with segments."""
    name = make_dataset([NOTHING, SCENE])
    return MetadataCatalog.get(name), *DatasetCatalog.get(name)


def test_ground_truth_without_segments(scene):
    truth = load_ground_truth(scene[1])
    assert truth.panoptic_seg.tolist() == NOTHING[0]
    assert truth.segments_info == []


def test_ground_truth(scene):
    record = scene[2]
    truth = load_ground_truth(record)
    assert truth.panoptic_seg.dtype == torch.int32
    assert truth.panoptic_seg.tolist() == SCENE[0]
    assert truth.segments_info == record["segments_info"]
    truth.segments_info[0]["id"] = -1
    assert record["segments_info"][0]["id"] == 1


def test_ground_truth_that_is_missing_or_damaged(scene):
    record = scene[2]
    with pytest.raises(ValueError, match=r"1\.png' has segment ids \[70000\]"):
        load_ground_truth({**record, "segments_info": record["segments_info"][:3]})
    with pytest.raises(ValueError, match="no panoptic ground truth"):
        load_ground_truth({**record, "pan_seg_file_name": None})


def gray(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 128, dtype=np.uint8)


@pytest.mark.parametrize("scale", [0.5, 1, 3])
def test_an_image_without_segments_is_drawn_as_it_is(scene, scale):
    metadata, record, _ = scene
    drawn = draw_panoptic(gray(30, 40), *load_ground_truth(record), metadata, scale=scale)
    assert drawn.shape == (30 * scale, 40 * scale, 3)
    assert (drawn == 128).all()


def test_drawing_is_repeatable_and_changes_no_argument(scene):
    metadata, _, record = scene
    image, truth = gray(30, 40), load_ground_truth(record)
    before = copy.deepcopy(truth)
    random_state = np.random.get_state()[1].copy()
    first, second = (draw_panoptic(image, *truth, metadata, scale=4) for _ in range(2))
    assert first.shape == (120, 160, 3)
    assert (first == second).all()
    assert (first != 128).any()
    assert (image == 128).all()
    assert truth.segments_info == before.segments_info
    assert (np.random.get_state()[1] == random_state).all()


@pytest.mark.parametrize("kind", [(CAT, True), (SKY, False)])
def test_masks_are_painted_themselves(scene, kind):
    """A ring keeps its hole, and single pixels and two columns are seen."""
    ids = np.zeros((200, 200), dtype=np.int32)
    ids[40:160, 40:160] = 1
    ids[60:140, 60:140] = 0
    ids[180, 10] = ids[190, 10:12] = 1
    infos = [{"id": 1, "category_id": kind[0], "isthing": kind[1]}]
    drawn = draw_panoptic(gray(200, 200), torch.from_numpy(ids), infos, scene[0])
    assert (drawn[80:120, 80:120] == 128).all(), "the hole"
    changed = (drawn != 128).any(-1)
    assert changed[ids == 1].all()
    text = changed & (ids == 0)
    assert text.sum() < 2000, "only the name is outside"
    narrow = draw_panoptic(gray(9, 2), torch.ones(9, 2, dtype=torch.int32), infos, scene[0])
    assert (narrow != 128).any()


def test_names_that_look_like_formulas(scene):
    metadata = Metadata(name="x", thing_classes=["$5_$", "note $5_$", "$\\frac$"] * 2)
    metadata.stuff_classes = metadata.thing_classes
    infos = [{"id": i, "category_id": i, "isthing": i > 1} for i in range(1, 4)]
    ids = torch.tensor([[1, 2, 3]] * 3, dtype=torch.int32).repeat_interleave(30, 1)
    assert draw_panoptic(gray(3, 90), ids, infos, metadata).shape == (3, 90, 3)


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 20)])
def test_extreme_sizes(scene, size):
    ids = torch.ones(size, dtype=torch.int32)
    infos = [{"id": 1, "category_id": CAT, "isthing": True, "score": 0.9}]
    assert draw_panoptic(gray(*size), ids, infos, scene[0]).shape == (*size, 3)


def test_sizes_that_differ(scene):
    truth = load_ground_truth(scene[2])
    with pytest.raises(ValueError, match=r"\(10, 10\).*\(30, 40\)"):
        draw_panoptic(gray(10, 10), *truth, scene[0])


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_contact_sheet_without_samples(scene, tmp_path):
    write_contact_sheet([], scene[0], tmp_path / "new" / "sheet.png")
    assert picture(tmp_path / "new" / "sheet.png").shape[0] == 24  # the titles


def test_contact_sheet(scene, tmp_path):
    """A row is a caption, pictures enlarged to 384 pixels (288 high) and a gap."""
    metadata, *records = scene
    nothing = PanopticSegmentation(torch.zeros(30, 40, dtype=torch.int32), [])
    samples = [Sample(record, load_ground_truth(record), nothing) for record in records]
    write_contact_sheet(samples, metadata, tmp_path / "sheet.png")
    sheet = picture(tmp_path / "sheet.png")
    assert sheet.shape == (24 + 2 * (24 + 288 + 8), 3 * 384 + 4 * 8, 3)
    image, truth, prediction = (
        sheet[24 + 320 + 24 :][:288, 8 + i * 392 :][:, :384] for i in range(3)
    )
    assert (abs(image.astype(int) - 128) < 3).all()
    assert (image == prediction).all()
    assert (image != truth).any()


def test_contact_sheet_of_a_photo(scene, tmp_path):
    """A photo of 2000 x 1000 pixels becomes 640 x 320."""
    Image.fromarray(gray(1000, 2000)).save(tmp_path / "photo.jpg")
    truth = PanopticSegmentation(
        torch.ones(1000, 2000, dtype=torch.int32), [{"id": 1, "category_id": SKY, "isthing": False}]
    )
    sample = Sample({"file_name": str(tmp_path / "photo.jpg")}, truth, truth)
    write_contact_sheet([sample], scene[0], tmp_path / "sheet.png")
    assert picture(tmp_path / "sheet.png").shape == (24 + 24 + 320 + 8, 3 * 640 + 4 * 8, 3)
