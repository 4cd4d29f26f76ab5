"""Annotations read from their file one by one: those that ``json.load`` gives, in its order."""

import io
import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from psf.evaluation import annotations
from psf.evaluation.annotations import PanopticAnnotations


def content_of(num_images: int) -> dict[str, Any]:
    """Ids and names of every kind that may stand in a file."""
    ids = [7, "ä/ö", 'quoted "\\', "雪", -1]
    return {
        "info": {"year": 2017, "nested": [1.5e3, None, True, {"a": []}]},
        "images": [{"id": i, "file_name": "é.jpg"} for i in range(num_images)],
        "version": 12,
        "annotations": [
            {
                "image_id": ids[i] if i < len(ids) else 1000 + i,
                "file_name": f"{'ü' * (i % 3)}{i}.png",
                "segments_info": [{"id": k, "note": "]}, {["} for k in range(i % 4)],
            }
            for i in range(num_images)
        ],
        "categories": [{"id": 3, "name": "snow ❄", "isthing": 0}],
    }


def write(path: Path, content: Any, **style: Any) -> str:
    path.write_text(json.dumps(content, **style), encoding="utf-8", newline="")
    return str(path)


def test_no_annotations_and_no_list_of_them_are_told_apart(tmp_path):
    empty = PanopticAnnotations(write(tmp_path / "a", {"annotations": [], "categories": []}))
    assert empty.are_given
    assert not empty.image_ids
    assert empty.categories == []
    absent = PanopticAnnotations(write(tmp_path / "b", {"images": [{"id": 1}], "categories": []}))
    assert not absent.are_given


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1 << 20])
@pytest.mark.parametrize(
    "style",
    [
        {},
        {"ensure_ascii": False},
        {"indent": 2, "ensure_ascii": False},
        {"separators": (",", ":")},
        {"sort_keys": True},  # categories come last, or between
    ],
    ids=str,
)
def test_equals_the_whole_file_at_once(tmp_path, monkeypatch, style, chunk):
    monkeypatch.setattr(annotations, "_CHUNK", chunk)
    content = content_of(9)
    found = PanopticAnnotations(write(tmp_path / "a.json", content, **style))
    assert found.categories == content["categories"]
    assert list(found.image_ids) == [a["image_id"] for a in content["annotations"]]
    for annotation in content["annotations"]:
        assert found.read(annotation["image_id"]) == annotation


def test_windows_line_ends(tmp_path):
    content = content_of(5)
    text = json.dumps(content, indent=1, ensure_ascii=False).replace("\n", "\r\n")
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8", newline="")
    found = PanopticAnnotations(str(path))
    assert [found.read(i) for i in found.image_ids] == content["annotations"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'{' expected (byte 0)"),
        ("[]", "'{' expected (byte 0)"),
        ('{"annotations": 5}', "'[' expected (byte 16)"),
        ('{"a": 1', "'}' expected (byte 7)"),
        ('{"a" 1}', "':' expected (byte 5)"),
        ('{"ä": nul}', "Expecting value (byte 7)"),
        ('{"annotations": [{"image_id": 1', "delimiter (byte 17)"),
        ('{"categories": []} {}', "something follows the end (byte 19)"),
        ('{"a": 1}', "lacks 'categories'"),
        ('{"annotations": [{"image_id": 1}]}', "lacks ['file_name', 'segments_info']"),
        ('{"annotations": [5]}', "lacks ['image_id', 'file_name', 'segments_info']"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_damaged_files_are_named(tmp_path, monkeypatch, text, message, chunk):
    monkeypatch.setattr(annotations, "_CHUNK", chunk)
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}'.*{re.escape(message)}"):
        PanopticAnnotations(str(path))


def test_a_file_that_is_not_utf_8_is_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes('{"ä": 1}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.json' is not valid JSON: it is not UTF-8"):
        PanopticAnnotations(str(path))


@pytest.mark.parametrize(
    "change", [lambda text: "ä" * len(text), lambda text: f" {text}", str.upper]
)
def test_a_file_that_changes_is_refused(tmp_path, change):
    path = tmp_path / "a.json"
    found = PanopticAnnotations(write(path, content_of(3)))
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.json' was changed"):
        found.read(7)


def test_memory_holds_no_annotations(tmp_path):
    """1 KB of JSON an image, an order of magnitude more as dicts; kept is the place of each."""
    path = tmp_path / "a.json"
    segment = {"id": 1, "category_id": 2, "area": 3, "bbox": [1, 2, 3, 4], "iscrowd": 0}
    with path.open("w") as file:
        file.write('{"annotations": [')
        for i in range(4000):
            annotation = {"image_id": i, "file_name": f"{i}.png", "segments_info": [segment] * 14}
            file.write(f"{',' if i else ''}{json.dumps(annotation)}")
        file.write('], "categories": []}')
    assert path.stat().st_size > 4_000_000
    tracemalloc.start()
    found = PanopticAnnotations(str(path))
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found.image_ids) == 4000
    assert kept < 200 * 4000
    assert peak < 200 * 4000 + 6 * annotations._CHUNK


def test_reading_a_value_stops_at_its_end():
    """A number at the end of a chunk may have more digits in the next."""
    reader = annotations._JsonReader(io.StringIO(" 12.5 , [1]"), "a.json")
    assert reader.value() == 12.5
    assert reader.offset == 5
    reader.skip(",")
    assert reader.value() == [1]
    assert reader.peek() == ""
