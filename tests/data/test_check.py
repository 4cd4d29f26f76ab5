"""Every kind of defect is found, and named by file and id."""

import functools
import json
from pathlib import Path

import check_dataset as tool
import numpy as np
import pytest
from PIL import Image

from psf.data import load_coco_panoptic
from psf.data.check import check_dataset
from psf.data.coco_writer import PanopticImage, Segment, Split, write_image, write_json_files
from psf.panoptic_png import write_panoptic_ids


class Files:
    """Two images of 6 x 4 pixels: a cat (70000) and a crowd of cats on grass (5)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in ("images", "pngs"):
            (root / folder).mkdir()
        index_map = np.ones((4, 6), dtype=int)
        index_map[1:3, 1:4] = 2
        index_map[3, 4:] = 3
        index_map[0, 0] = 0
        segments = [Segment(2, id=5), Segment(1, id=70000), Segment(1, iscrowd=1, id=9)]
        categories = [
            {"id": 1, "name": "cat", "isthing": 1},
            {"id": 2, "name": "grass", "isthing": 0},
        ]
        json_file = root / "panoptic.json"
        split = Split("files", root / "pngs", json_file, root / "instances.json", categories)
        entries = []
        for i in (1, 2):
            Image.new("RGB", (6, 4)).save(root / "images" / f"{i}.jpg")
            image = PanopticImage(i, f"{i}.jpg", f"{i}.png", index_map, segments)
            entries.append(write_image(split, image))
        write_json_files(split, entries)
        self.json = json.loads(json_file.read_text())

    @property
    def paths(self) -> tuple[Path, Path, Path]:
        path = self.root / "panoptic.json"
        path.write_text(json.dumps(self.json))
        return path, self.root / "images", self.root / "pngs"

    @property
    def options(self) -> list[str]:
        """The command line of the tool."""
        json_file, images, pngs = map(str, self.paths)
        return ["--json", json_file, "--images", images, "--pngs", pngs]

    def segment(self, position: int) -> dict:
        return self.json["annotations"][1]["segments_info"][position]


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


def test_no_images(files):
    files.json["images"], files.json["annotations"] = [], []
    (defect,) = check_dataset(*files.paths)
    assert defect[1:] == ("JSON", "has no image with a usable annotation")


@pytest.mark.parametrize("num_processes", [1, 2])
def test_nothing_wrong(files, num_processes):
    assert check_dataset(*files.paths, num_processes=num_processes) == []


def paint(files, ids):
    write_panoptic_ids(str(files.root / "pngs" / "2.png"), np.asarray(ids))


def cut(files):
    path = files.root / "images" / "2.jpg"
    path.write_bytes(path.read_bytes()[:-100])


# What is spoiled, the file that is named, the id, and the problem.
DEFECTS = {
    "image is missing": (
        lambda f: (f.root / "images" / "2.jpg").unlink(),
        ("2.jpg", "image 2", "does not exist"),
    ),
    "PNG is missing": (
        lambda f: (f.root / "pngs" / "2.png").unlink(),
        ("2.png", "image 2", "does not exist"),
    ),
    "image is cut off": (cut, ("2.jpg", "image 2", "truncated")),
    "image of another size": (
        lambda f: Image.new("RGB", (4, 6)).save(f.root / "images" / "2.jpg"),
        ("2.jpg", "image 2", "is 4 x 6 pixels, but 6 x 4 in the JSON"),
    ),
    "PNG of another size": (
        lambda f: paint(f, np.full((4, 5), 5)),
        ("2.png", "image 2", "is 5 x 4 pixels, but 6 x 4 in the JSON"),
    ),
    "id in the PNG only": (
        lambda f: f.json["annotations"][1]["segments_info"].pop(0),
        ("2.png", "image 2, segment 5", "is in the PNG but not in the JSON"),
    ),
    "id in the JSON only": (
        lambda f: f.json["annotations"][1]["segments_info"].append({**f.segment(0), "id": 8}),
        ("2.png", "image 2, segment 8", "is in the JSON but not in the PNG"),
    ),
    "wrong area": (
        lambda f: f.segment(1).update(area=7),
        ("panoptic.json", "image 2, segment 70000", "area is 7, but 6 pixels are in the PNG"),
    ),
    "wrong box": (
        lambda f: f.segment(1).update(bbox=[1, 1, 4, 3]),
        ("panoptic.json", "image 2, segment 70000", "but [1, 1, 3, 2] in the PNG"),
    ),
    "crowd of stuff": (
        lambda f: f.segment(0).update(iscrowd=1),
        ("panoptic.json", "image 2, segment 5", "is a crowd, but of a stuff category"),
    ),
    "two segments of a stuff class": (
        lambda f: f.segment(1).update(category_id=2),
        ("panoptic.json", "image 2", "has 2 segments of the stuff category 2"),
    ),
    "PNG of another image": (
        lambda f: f.json["annotations"][1].update(file_name="1.png"),
        ("panoptic.json", "annotation of image 2", "its PNG '1.png' belongs to the image '1.jpg'"),
    ),
    "image with two PNGs": (
        lambda f: f.json["images"][1].update(file_name="1.jpg"),
        ("panoptic.json", "annotation of image 2", "its image '1.jpg' belongs to the PNG '1.png'"),
    ),
    "segment without area": (
        lambda f: f.segment(0).pop("area"),
        ("panoptic.json", "image 2, segment 5", "lacks area"),
    ),
    "category twice": (
        lambda f: f.json["categories"].append({"id": 3, "name": "cat", "isthing": 1}),
        ("panoptic.json", "category 3", "another category has the name 'cat'"),
    ),
    "image without annotation": (
        lambda f: f.json["annotations"].pop(1),
        ("panoptic.json", "image 2", "has no annotation"),
    ),
}


@pytest.mark.parametrize(("spoil", "expected"), DEFECTS.values(), ids=DEFECTS)
def test_defect(files, spoil, expected):
    spoil(files)
    file, where, problem = expected
    defects = check_dataset(*files.paths)
    assert any(
        d.file.endswith(file) and d.where == where and problem in d.problem for d in defects
    ), defects


def put(value, *path):
    *parents, key = path

    def spoil(f):
        functools.reduce(lambda parent, part: parent[part], parents, f.json)[key] = value

    return spoil


INFOS = ("annotations", 1, "segments_info")
# What is put where in the JSON, and what the report says about it.
MALFORMED = {
    "image without a name": (put("..", "images", 1, "file_name"), "file_name is '..' instead of"),
    "class of two lines": (put("a\nb", "categories", 0, "name"), "without line breaks"),
    "null images": (put(None, "images"), "images is None instead of a list"),
    "null image": (put(None, "images", 1), "image number 1: is None instead of an object"),
    "nested segments": (put([[{}]], *INFOS), "segment number 0: is [{}] instead of an object"),
    "list id": (put([1], "images", 1, "id"), "id is [1] instead of"),
    "object image_id": (put({}, "annotations", 1, "image_id"), "image_id is {} instead of"),
    "infinite box": (put([0, 0, float("inf"), 1], *INFOS, 0, "bbox"), "bbox is [0, 0, inf, 1]"),
    "long name": (put("x" * 5000, "images", 1, "file_name"), "does not exist"),
    "half a character": (put("\ud800.jpg", "images", 1, "file_name"), "does not exist"),
    "instances": (put([{"segmentation": []}], "annotations"), "has instance annotations: convert"),
}


@pytest.mark.parametrize(("spoil", "problem"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_json(files, capsys, spoil, problem):
    """The tool reports, the loader raises one line; neither stumbles."""
    spoil(files)
    json_file, images, pngs = (str(path) for path in files.paths)
    assert tool.main([*files.options, "--sheet", str(files.root / "sheet.png")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(problem in line for line in lines[:-2]), lines
    assert lines[-1].startswith("No sheet: ")
    with pytest.raises((ValueError, OSError)) as error:
        load_coco_panoptic(json_file, images, pngs)
    assert "\n" not in str(error.value)
    assert json_file in str(error.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[]", "is [] instead of an object"),
        ('{"shapes": [], "imagePath": "a.jpg"}', "is a file of LabelMe: convert it"),
        ('{"a": 1}', "lacks images, annotations, categories"),
        ("[" * 100_000, "is not valid JSON"),
        ("\ufeff", "is not valid JSON"),
        ('{"images": [', "is not valid JSON"),
        (None, "There is no file"),
    ],
)
def test_other_json_files(tmp_path, text, problem):
    path = tmp_path / "a.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    (defect,) = check_dataset(path, tmp_path, tmp_path)
    assert problem in defect.problem
    with pytest.raises((ValueError, OSError), match=r"a\.json'"):
        load_coco_panoptic(str(path), str(tmp_path), str(tmp_path))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks(files, encoding):
    """As editors on Windows write them."""
    json_file, images, pngs = files.paths
    json_file.write_text(json_file.read_text(), encoding=encoding)
    assert check_dataset(json_file, images, pngs) == []
    assert len(load_coco_panoptic(str(json_file), str(images), str(pngs))) == 2


def test_backslashes(files):
    """As Windows joins folders and names."""
    for folder, suffix in (("images", "jpg"), ("pngs", "png")):
        below = files.root / folder / "part"
        below.mkdir()
        (files.root / folder / f"1.{suffix}").rename(below / f"1.{suffix}")
    files.json["images"][0]["file_name"] = "part\\1.jpg"
    files.json["annotations"][0]["file_name"] = "part\\1.png"
    assert check_dataset(*files.paths) == []
    record, _ = load_coco_panoptic(*map(str, files.paths))
    assert Path(record["file_name"]) == files.root / "images" / "part" / "1.jpg"
    assert Path(record["pan_seg_file_name"]) == files.root / "pngs" / "part" / "1.png"


@pytest.mark.parametrize(
    ("convert", "cause"),
    [
        (lambda image: Image.merge("RGB", image.split()[::-1]), "written as BGR"),
        (lambda image: image.split()[0], "a map of one channel"),
    ],
)
def test_pngs_with_other_channels(files, convert, cause):
    path = files.root / "pngs" / "2.png"
    with Image.open(path) as image:
        other = convert(image)
    other.save(path)
    defects = check_dataset(*files.paths)
    assert any(cause in d.problem and d.file == str(path) for d in defects), defects


@pytest.mark.parametrize("option", ["--samples=-3", "--processes=0", "--samples=x"])
def test_numbers_of_the_tool(files, capsys, option):
    with pytest.raises(SystemExit):
        tool.main([option])
    assert "is not a number of at least 1" in capsys.readouterr().err


def test_ten_defects_at_once(files, capsys):
    """Each is found although there are others."""
    planted = [
        "image is cut off",
        "wrong area",
        "wrong box",
        "crowd of stuff",
        "id in the JSON only",
        "category twice",
    ]
    for name in planted:
        DEFECTS[name][0](files)
    other = files.json["annotations"][0]["segments_info"]
    other[1]["category_id"] = 99
    other[2]["iscrowd"] = 2
    (files.root / "pngs" / "1.png").unlink()
    files.json["images"].append({"id": 3, "file_name": "3.jpg", "height": 1, "width": 1})
    assert tool.main(files.options) == 1
    printed = capsys.readouterr().out
    for name in planted:
        file, where, problem = DEFECTS[name][1]
        assert any(
            file in line and where in line and problem in line for line in printed.splitlines()
        ), name
    assert "annotation of image 1, segment 70000: category_id 99 is not among" in printed
    assert "annotation of image 1, segment 9: iscrowd is 2" in printed
    assert "1.png: image 1: does not exist" in printed
    assert "image 3: has no annotation" in printed
    assert printed.endswith("11 defects\n")  # the copied crowd of stuff counts too


@pytest.mark.parametrize("options", [[], ["--all"]])
def test_many_defects_of_a_kind_are_counted(files, capsys, options):
    """One fault of the whole file fills no screen, nor hides another."""
    for i in range(3, 12):
        files.json["images"].append({"id": i, "file_name": f"{i}.jpg", "height": 4, "width": 6})
    del files.json["categories"][0]["isthing"]
    assert tool.main([*files.options, *options]) == 1
    lines = capsys.readouterr().out.splitlines()
    unannotated = [line for line in lines if "has no annotation" in line]
    assert len(unannotated) == (9 if options else tool.EXAMPLES)
    assert ("... and 4 more of this kind (--all lists them)" in lines) != bool(options)
    assert "category 1: lacks isthing" in lines[0]
    assert "category_id" not in "".join(lines)  # the category's own line says it
    assert lines[-1] == "10 defects"


@pytest.mark.parametrize("damaged", [False, True])
def test_the_tool_draws(files, capsys, damaged):
    """One damaged image does not lose the sheet."""
    if damaged:
        cut(files)
    sheet = files.root / "sheet.png"
    assert tool.main([*files.options, "--sheet", str(sheet)]) == damaged
    out = capsys.readouterr().out
    assert ("Not on the sheet: " in out) == damaged
    assert ("no defects" in out) != damaged
    assert out.endswith(f"{sheet}\n")
    assert Image.open(sheet).size[0] > 700


def test_the_tool_says_what_it_needs(capsys):
    with pytest.raises(SystemExit):
        tool.main([])
    assert "--name" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no data set 'nowhere'"):
        tool.main(["--name", "nowhere"])
    with pytest.raises(SystemExit, match="'coco_2017_val' is no panoptic data set"):
        tool.main(["--name", "coco_2017_val"])


def test_real_coco_images(coco_sample):
    paths = (coco_sample / "panoptic.json", coco_sample / "images", coco_sample / "panoptic")
    assert check_dataset(*paths) == []
