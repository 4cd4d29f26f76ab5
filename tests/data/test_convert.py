"""Instances with label maps, and LabelMe's files: converted, checked, loaded."""

import json
import math
from pathlib import Path

import convert_to_panoptic as tool
import numpy as np
import pycocotools.mask
import pytest
from PIL import Image

from psf.data import load_coco_panoptic
from psf.data.check import check_dataset
from psf.data.prepare.convert import convert_instances, convert_labelme
from psf.panoptic_png import read_panoptic_ids


def square(x, y, side):
    return [x, y, x + side, y, x + side, y + side, x, y + side]


@pytest.fixture
def instances(tmp_path):
    """A large square (polygon), a small one on it (run lengths) and a crowd below both."""
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg")
    labels = np.full((10, 20), 100, dtype=np.uint8)
    labels[5:] = 101
    labels[0] = 255
    (tmp_path / "labels").mkdir()
    Image.fromarray(labels).save(tmp_path / "labels" / "a.png")
    small = np.zeros((10, 20), dtype=np.uint8)
    small[3:5, 3:5] = 1
    crowd = np.zeros((10, 20), dtype=np.uint8)
    crowd[2:4, 6:12] = 1
    rles = [pycocotools.mask.encode(np.asfortranarray(m)) for m in (small, crowd)]
    encoded = [{"size": r["size"], "counts": r["counts"].decode()} for r in rles]
    common = {"image_id": 7, "category_id": 1, "iscrowd": 0}
    data = {
        "images": [{"id": 7, "file_name": "a.jpg", "height": 10, "width": 20}],
        "annotations": [
            {**common, "id": 1, "area": 4, "segmentation": encoded[0]},
            {**common, "id": 2, "area": 36, "segmentation": [square(2, 2, 6)]},
            {**common, "id": 3, "area": 12, "iscrowd": 1, "segmentation": encoded[1]},
        ],
        "categories": [{"id": 1, "name": "box"}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(data))
    return tmp_path


STUFF = [{"id": 100, "name": "sky"}, {"id": 101, "name": "ground"}]


def load(output, images):
    paths = (str(output / "panoptic.json"), str(images), str(output / "panoptic"))
    assert check_dataset(*(Path(p) for p in paths)) == []
    return load_coco_panoptic(*paths)


def test_instances_over_stuff(instances):
    convert_instances(instances / "instances.json", instances / "labels", STUFF, instances / "out")
    (record,) = load(instances / "out", instances)
    found = {(s["category_id"], s["iscrowd"]): s["area"] for s in record["segments_info"]}
    things = [s["area"] for s in record["segments_info"] if s["category_id"] == 0]
    assert sorted(things) == [4, 8, 32]  # small, what is left of the crowd, of the large square
    assert found[0, 1] == 8
    assert found[2, 0] == 100 - 6 * 3
    ids = read_panoptic_ids(record["pan_seg_file_name"])
    assert (ids[0] == 0).all()
    coco = json.loads((instances / "out" / "instances.json").read_text())
    assert [a["area"] for a in coco["annotations"]] == [8, 32, 4]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "labels" / "a.png").unlink(), r"labels/a\.png' does not exist"),
        (
            lambda root: Image.new("L", (3, 3)).save(root / "labels" / "a.png"),
            r"is \(3, 3\), but its image \(10, 20\)",
        ),
        (
            lambda root: (root / "stuff.json").write_text('[{"id": 1, "name": "sky"}]'),
            r"category 1: two categories have this id",
        ),
    ],
)
def test_instances_that_do_not_fit(instances, spoil, message):
    (instances / "stuff.json").write_text(json.dumps(STUFF))
    spoil(instances)
    options = ["--json", "instances.json", "--labels", "labels", "--stuff-categories", "stuff.json"]
    paths = [str(instances / o) if not o.startswith("--") else o for o in options]
    with pytest.raises(SystemExit, match=message):
        tool.main(["instances", *paths, "--output", str(instances / "out")])


@pytest.fixture
def labelme(tmp_path):
    folder = tmp_path / "labelme"
    folder.mkdir()
    Image.new("RGB", (20, 10)).save(folder / "a.jpg")
    polygon = {"shape_type": "polygon", "group_id": None, "flags": {}}
    shapes = [
        {**polygon, "label": "sky", "points": [[0, 0], [19, 0], [19, 4], [0, 4]]},
        {**polygon, "label": "sky", "points": [[0, 5], [3, 5], [3, 6], [0, 6]]},
        {"label": "cat", "shape_type": "rectangle", "points": [[8, 3], [5, 1]], "group_id": None},
        {"label": "cat", "shape_type": "circle", "points": [[15, 6], [17, 6]], "group_id": 3},
        {"label": "cat", "shape_type": "rectangle", "points": [[1, 8], [2, 9]], "group_id": 3},
        {**polygon, "label": "dog", "points": [[8, 7], [9, 7], [9, 8]], "group_id": 4},
        {
            **polygon,
            "label": "dog",
            "points": [[8, 7], [10, 7], [10, 9]],
            **{"group_id": 4, "flags": {"crowd": True}},  # of any shape of a group
        },
    ]
    content = {"imagePath": "a.jpg", "imageHeight": 10, "imageWidth": 20, "shapes": shapes}
    (folder / "a.json").write_text(json.dumps(content))
    return folder


def test_labelme(labelme, tmp_path, capsys):
    output = tmp_path / "out"
    tool.main(["labelme", "--input", str(labelme), "--stuff", "sky", "--output", str(output)])
    assert capsys.readouterr().out.strip() == str(output / "panoptic.json")
    (record,) = load(output, labelme)
    names = ["cat", "dog", "sky"]
    found = sorted(
        (names[s["category_id"]], s["iscrowd"], s["area"]) for s in record["segments_info"]
    )
    assert [(name, crowd) for name, crowd, _ in found] == [
        ("cat", 0),
        ("cat", 0),
        ("dog", 1),
        ("sky", 0),
    ]
    assert found[0][2] == 12  # the rectangle 5..8 x 1..3
    assert found[3][2] == 100 - 12 + 8 - 1  # both polygons, less the rectangle and the circle


@pytest.mark.parametrize(
    ("stuff", "spoil", "message"),
    [
        ("grass", None, r"stuff labels \['grass'\]. Known: \['cat', 'dog', 'sky'\]"),
        ("", '"polygon"', r"a\.json': shape number \d, 'sky': a shape of type 'line'"),
    ],
)
def test_labelme_files_that_do_not_fit(labelme, tmp_path, stuff, spoil, message):
    path = labelme / "a.json"
    if spoil:
        path.write_text(path.read_text().replace(spoil, '"line"'))
    with pytest.raises(SystemExit, match=message):
        tool.main(
            ["labelme", "--input", str(labelme), "--stuff", stuff, "--output", str(tmp_path / "o")]
        )


def run_instances(root, spoil=lambda data: None):
    """Spoil the JSON of the fixture and convert it with the tool."""
    data = json.loads((root / "instances.json").read_text(encoding="utf-8-sig"))
    spoil(data)
    (root / "instances.json").write_text(json.dumps(data), encoding="utf-8-sig")
    (root / "stuff.json").write_text(json.dumps(STUFF), encoding="utf-8-sig")
    names = ("instances.json", "labels", "stuff.json")
    options = zip(("--json", "--labels", "--stuff-categories"), names, strict=True)
    paths = [part for option, name in options for part in (option, str(root / name))]
    tool.main(["instances", *paths, "--output", str(root / "out")])
    return json.loads((root / "out" / "panoptic.json").read_text())["annotations"]


def spoil_mask(value, key="segmentation"):
    return lambda data: data["annotations"][1].update({key: value})


RUNS = {"size": [10, 20], "counts": [200]}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_mask([]), "image 7, annotation 2: its shape needs at least 3 points"),
        (spoil_mask([[1, 1, 5, 1, 5]]), "annotation 2: its shape needs at least 3 points"),
        (spoil_mask([[1, 1, 5, 1, 1e9, 1e9]]), "near the image of 20 x 10 pixels"),
        (spoil_mask([[1, 1, 5, 1, 5, math.nan]]), "annotation 2: its shape needs"),
        (spoil_mask(None), "annotation 2: segmentation is None instead of polygons"),
        (
            spoil_mask({**RUNS, "size": [20, 10]}),
            r"annotation 2: its run lengths are of \[20, 10\]",
        ),
        (spoil_mask({**RUNS, "counts": [199]}), "run lengths are not those of 200 pixels"),
        (spoil_mask({**RUNS, "counts": "P" * 9999}), "run lengths are not those of"),
        (spoil_mask("0", "iscrowd"), "annotation 2: iscrowd is '0' instead of 0 or 1"),
        (spoil_mask(9, "image_id"), "annotation 2: image_id 9 is not among the images"),
        (spoil_mask(9, "category_id"), "category_id 9 is not among the categories"),
        (lambda d: d["categories"][0].update(name="Sky"), "another category has the name 'sky'"),
        (lambda d: d["images"].append({**d["images"][0], "id": 8}), "image 8: two images have"),
        (
            lambda d: d["images"].append({**d["images"][0], "id": 8, "file_name": "a.tif"}),
            r"2 images have the PNG 'a\.png'",
        ),
        (lambda d: d["images"][0].update(file_name="."), "image 7: file_name is '.' instead of"),
        (lambda d: d["images"][0].update(file_name="../a.jpg"), "outside of the output folder"),
        (lambda d: d.update(images=[], annotations=[]), r"instances\.json' has no images"),
    ],
)
def test_instances_that_are_damaged(instances, spoil, message):
    (instances / "a.png").write_bytes((instances / "labels" / "a.png").read_bytes())
    before = (instances / "a.png").read_bytes()
    with pytest.raises(SystemExit, match=message):
        run_instances(instances, spoil)
    assert (instances / "a.png").read_bytes() == before


def test_all_kinds_of_run_lengths(instances):
    """Lists and texts, also of long runs and of many, as pycocotools reads them."""
    generator = np.random.default_rng(0)
    mask = np.asfortranarray(generator.random((10, 20)) < 0.3, dtype=np.uint8)
    mask[:, 5:12] = 1
    rle = pycocotools.mask.encode(mask)
    first = {"size": rle["size"], "counts": rle["counts"].decode()}
    flat = mask.ravel(order="F")
    starts = np.flatnonzero(np.diff(flat, prepend=0, append=1 - flat[-1]))
    second = {"size": rle["size"], "counts": np.diff(starts, prepend=0).tolist()}
    for runs in (first, second):

        def only(data, runs=runs):
            data["annotations"][:] = [{**data["annotations"][0], "segmentation": runs}]

        (annotation,) = run_instances(instances, only)
        assert annotation["segments_info"][-1]["area"] == mask.sum()


def test_inputs_are_not_overwritten(instances, labelme):
    (instances / "stuff.json").write_text(json.dumps(STUFF))
    before = (instances / "instances.json").read_bytes()
    with pytest.raises(ValueError, match=r"instances\.json' would overwrite the input"):
        convert_instances(instances / "instances.json", instances / "labels", STUFF, instances)
    assert (instances / "instances.json").read_bytes() == before
    (instances / "labels").rename(instances / "panoptic")
    (instances / "instances.json").rename(instances / "input.json")
    with pytest.raises(ValueError, match=r"panoptic' would overwrite the input"):
        convert_instances(instances / "input.json", instances / "panoptic", STUFF, instances)
    (labelme / "a.json").rename(labelme / "panoptic.json")
    with pytest.raises(ValueError, match=r"panoptic\.json' would overwrite the input"):
        convert_labelme(labelme, [], labelme)
    (instances / "panoptic.json").write_text("{}")
    (instances / "panoptic").rename(instances / "labels")
    with pytest.raises(ValueError, match=r"panoptic\.json' exists, but was not written by this"):
        convert_instances(instances / "input.json", instances / "labels", STUFF, instances)
    png = instances / "out" / "panoptic" / "a.png"
    png.parent.mkdir(parents=True)
    png.write_bytes(before)
    with pytest.raises(ValueError, match=r"out/panoptic' has files that no conversion wrote"):
        convert_instances(instances / "input.json", instances / "labels", STUFF, instances / "out")
    assert png.read_bytes() == before


def test_a_conversion_that_is_repeated(instances):
    """Changed annotations, label maps and categories are converted again."""
    first = run_instances(instances)
    assert run_instances(instances) == first
    changed = run_instances(instances, spoil_mask([square(2, 2, 4)]))
    assert changed != first
    Image.new("L", (20, 10), 101).save(instances / "labels" / "a.png")
    assert run_instances(instances) != changed
    png = instances / "out" / "panoptic" / "a.png"
    whole = png.read_bytes()
    for damage in (png.unlink, lambda: png.write_bytes(b""), lambda: png.write_bytes(whole[:-9])):
        damage()
        run_instances(instances)
        assert png.read_bytes() == whole
    (instances / "labels" / "x").mkdir()
    with pytest.raises(SystemExit, match=r"both have the PNG 'a\.png'"):
        run_instances(
            instances,
            lambda d: d["images"].append({**d["images"][0], "id": 8, "file_name": "x/../a.jpg"}),
        )


@pytest.mark.parametrize("annotations", [None, [{"image_id": 1}]])
def test_damaged_results_of_a_conversion_are_made_again(instances, annotations):
    first = run_instances(instances)
    path = instances / "out" / "panoptic.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "annotations": annotations}))
    assert run_instances(instances) == first


def test_a_conversion_that_stops_leaves_no_json_of_other_pngs(instances):
    """Otherwise the JSON before would be taken for that of the PNGs that are changed already."""
    labels, png = instances / "labels" / "b.png", instances / "out" / "panoptic" / "a.png"
    Image.new("L", (20, 10), 101).save(labels)

    def add_b(data):
        data["images"].append({**data["images"][0], "id": 8, "file_name": "b.jpg"})

    first = run_instances(instances, add_b)
    before, json_before = png.read_bytes(), (instances / "instances.json").read_bytes()
    Image.new("L", (3, 3)).save(labels)
    with pytest.raises(SystemExit, match=r"b\.png' is \(3, 3\)"):
        run_instances(instances, spoil_mask([square(2, 2, 4)]))
    assert png.read_bytes() != before
    assert list((instances / "out").glob("*.json")) == []
    with (instances / "out" / "panoptic.json.partial").open("ab") as notes:
        notes.write(b'3\n["no"]\n["a", "b", 1, 2, 3]\nnull\n\xff\xfe\n\x00')  # damage
    (instances / "instances.json").write_bytes(json_before)
    Image.new("L", (20, 10), 101).save(labels)
    assert run_instances(instances) == first
    assert png.read_bytes() == before


def test_names_from_windows_and_folders_that_look_like_files(instances, labelme, tmp_path):
    (instances / "labels" / "x").mkdir()
    (instances / "labels" / "a.png").rename(instances / "labels" / "x" / "a.png")
    (annotation,) = run_instances(
        instances, lambda data: data["images"][0].update(file_name="x\\a.jpg")
    )
    assert annotation["file_name"] == "x/a.png"
    (labelme / "folder.json").mkdir()
    convert_labelme(labelme, ["sky"], tmp_path / "o")
    assert (tmp_path / "o" / "panoptic" / "a.png").is_file()


def test_things_go_over_stuff_and_what_is_covered_is_said(tmp_path, caplog):
    box = {"shape_type": "rectangle", "points": [[2, 2], [5, 5]]}
    shapes = [
        {**box, "label": "cat"},
        {**box, "label": "dog"},
        {"label": "sky", "shape_type": "rectangle", "points": [[0, 0], [19, 9]]},
        {"label": "cat", "points": [[-9, -9], [-8, -9], [-8, -8]]},
    ]
    content = {"imageHeight": 10, "imageWidth": 20, "imagePath": "a.jpg", "shapes": shapes}
    (tmp_path / "a.json").write_text(json.dumps(content), encoding="utf-8-sig")
    (tmp_path / "labels.json").write_text('{"cat": 1}')
    convert_labelme(tmp_path, ["sky"], tmp_path / "out")
    (annotation,) = json.loads((tmp_path / "out" / "panoptic.json").read_text())["annotations"]
    assert sorted(s["area"] for s in annotation["segments_info"]) == [16, 200 - 16]
    assert "a.json': shape number 4, 'cat' has no pixel in the image" in caplog.text
    assert "segments are covered by others completely and left out, in 1 images" in caplog.text
    assert "no image shows 1 of the 3 categories: cat" in caplog.text
    assert "labels.json' is no file of LabelMe" in caplog.text


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("points", [], "with 0 points cannot be converted"),
        ("points", [[0, 0], [1e9, 0], [1, 1]], "near the image of 20 x 10 pixels"),
        ("group_id", [1], r"shape number 1: group_id is \[1\] instead of"),
        ("imageHeight", "10", "JSON: imageHeight is '10' instead of a positive integer"),
        ("imagePath", "x\\", "JSON: imagePath is .* instead of the name of a file"),
        ("imageHeight", 1 << 30, "declares 20 x 1073741824 pixels, more than the limit of 2684354"),
        ("label", "a\nb", "shape number 1: label is .* instead of a text without line breaks"),
    ],
)
def test_labelme_files_that_are_damaged(labelme, tmp_path, key, value, message):
    content = json.loads((labelme / "a.json").read_text())
    (content if key.startswith("image") else content["shapes"][0])[key] = value
    (labelme / "a.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=rf"a\.json':? .*{message}"):
        tool.main(["labelme", "--input", str(labelme), "--output", str(tmp_path / "o")])


def test_no_labelme_files(tmp_path):
    with pytest.raises(ValueError, match="Is it a folder of LabelMe"):
        convert_labelme(tmp_path, [], tmp_path / "out")


def test_real_coco_images_come_back(coco_sample, tmp_path):
    """Taken apart into instances and label maps, and put together again: the same segments."""
    data = json.loads((coco_sample / "panoptic.json").read_text())
    isthing = {c["id"]: c["isthing"] for c in data["categories"]}
    (tmp_path / "labels").mkdir()
    annotations = []
    for annotation in data["annotations"]:
        ids = read_panoptic_ids(str(coco_sample / "panoptic" / annotation["file_name"]))
        labels = np.zeros(ids.shape, dtype=np.uint8)
        for s in annotation["segments_info"]:
            mask = ids == s["id"]
            if not isthing[s["category_id"]]:
                labels[mask] = s["category_id"]
                continue
            rle = pycocotools.mask.encode(np.asfortranarray(mask, dtype=np.uint8))
            segmentation = {"size": rle["size"], "counts": rle["counts"].decode()}
            annotations.append(
                {**s, "image_id": annotation["image_id"], "segmentation": segmentation}
            )
        Image.fromarray(labels).save(tmp_path / "labels" / annotation["file_name"])
    things = [c for c in data["categories"] if c["isthing"]]
    content = {"images": data["images"], "annotations": annotations, "categories": things}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    stuff = [c for c in data["categories"] if not c["isthing"]]
    convert_instances(tmp_path / "instances.json", tmp_path / "labels", stuff, tmp_path / "out")
    converted = json.loads((tmp_path / "out" / "panoptic.json").read_text())
    by_image = {a["image_id"]: a for a in converted["annotations"]}
    keys = ("category_id", "iscrowd", "area", "bbox")
    for annotation in data["annotations"]:
        original, again = (
            sorted([s[k] for k in keys] for s in a["segments_info"])
            for a in (annotation, by_image[annotation["image_id"]])
        )
        assert original == again
