"""The demo's command line, and its pictures with a fake predictor."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.data import Metadata
from PIL import Image

import demo

METADATA = Metadata(name="demo", thing_classes=["cat", "sky"], stuff_classes=["cat", "sky"])


@pytest.fixture
def photos(tmp_path):
    """Three images and a text in a folder."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("b.png", "a.jpg", "c.JPG"):
        Image.new("RGB", (60, 40), (10, 20, 200)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


class FakePredictor:
    """Calls the whole image sky and remembers its colour."""

    metadata = METADATA

    def __init__(self, cfg=None, *, fast=False) -> None:
        self.colors: list[list[int]] = []

    def __call__(self, image_bgr):
        self.colors.append(image_bgr[0, 0].tolist())
        ids = torch.ones(image_bgr.shape[:2], dtype=torch.int32)
        infos = [{"id": 1, "category_id": 1, "isthing": False, "score": 0.9}]
        return {"panoptic_seg": (ids, infos)}


def test_no_image_is_found(tmp_path):
    (tmp_path / "empty").mkdir()
    for pattern in ("missing.jpg", "*.png", "empty"):
        with pytest.raises(
            SystemExit, match=r"--input: there is no image at '.*(missing|\*|empty)"
        ):
            demo.find_images([str(tmp_path / pattern)])


def test_images_of_files_folders_and_globs(photos):
    def names(*patterns: str) -> list[str]:
        return [path.name for path in demo.find_images([str(photos / p) for p in patterns])]

    assert names("") == ["a.jpg", "b.png", "c.JPG"]
    assert names("b.png", "*.jpg", "a.jpg") == ["b.png", "a.jpg"]
    assert names("notes.txt") == ["notes.txt"]  # named explicitly: reported when it is read
    assert [p.name for p in demo.find_images([str(photos.parent / "**" / "*.png")])] == ["b.png"]


def test_where_pictures_go(tmp_path):
    a, b, text = Path("x/a.jpg"), Path("y/b.png"), Path("c.raw")
    out = tmp_path / "out"
    assert demo.plan([a], None) == [(a, None)]
    assert demo.plan([a], tmp_path / "new.png") == [(a, tmp_path / "new.png")]
    assert demo.plan([a, b, text], out) == [
        (a, out / "a.jpg"),
        (b, out / "b.png"),
        (text, out / "c.raw.png"),
    ]


def test_outputs_that_cannot_be_written(photos):
    with pytest.raises(SystemExit, match=r"result\.png' is one file, but there are 2 images"):
        demo.plan([Path("a.jpg"), Path("b.jpg")], Path("result.png"))
    with pytest.raises(SystemExit, match="would both be"):
        demo.plan([Path("x/a.jpg"), Path("y/a.jpg")], Path("out"))
    with pytest.raises(SystemExit, match="would overwrite the input"):
        demo.plan([photos / "a.jpg"], photos)
    with pytest.raises(SystemExit, match="would overwrite the input"):
        demo.plan([photos / "a.jpg"], photos / "a.jpg")
    out = photos.parent / "out"
    out.mkdir()
    (out / "a.jpg").symlink_to(photos / "b.png")  # another image than the one it would be of
    with pytest.raises(SystemExit, match=r"out/a\.jpg' would overwrite the input .*b\.png"):
        demo.plan([photos / "a.jpg", photos / "b.png"], out)


def test_pictures_are_written_and_bad_images_reported(photos, capsys):
    """Images are given as BGR; 60 x 40 pixels are enlarged to 512."""
    (photos / "b.png").write_bytes((photos / "b.png").read_bytes()[:50])
    jobs = demo.plan(demo.find_images([str(photos)]), photos.parent / "out")
    predictor = FakePredictor()
    assert demo.run(jobs, predictor, METADATA) == [photos / "b.png"]
    assert np.allclose(predictor.colors, [[200, 20, 10]] * 2, atol=3)
    assert sorted(p.name for p in (photos.parent / "out").iterdir()) == ["a.jpg", "c.JPG"]
    assert Image.open(photos.parent / "out" / "a.jpg").size == (512, 341)
    out, err = capsys.readouterr()
    assert "[1/3]" in out
    assert "a.jpg: 1 segments" in out
    assert "[2/3]" in err
    assert "b.png" in err


def test_one_bad_image_does_not_end_the_others(photos, capsys):
    """Damaged, foreign, gone, too large for its format, for the memory, or for the picture."""

    class Fussy(FakePredictor):
        def __call__(self, image_bgr):
            if image_bgr.shape[0] == 7:
                raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 9 GiB")
            if image_bgr.shape[0] == 8:
                raise ValueError("an image that the\nmodel refuses")
            return super().__call__(image_bgr)

    for name, size in (("d.png", (9, 7)), ("e.png", (9, 8)), ("f.webp", (1, 1)), ("h.jpg", (2, 3))):
        Image.new("RGB", size).save(photos / name)
    Image.new("RGB", (16_384, 1)).save(photos / "g.png")
    (photos / "b.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0")
    jobs = demo.plan(demo.find_images([str(photos)]), photos.parent / "out")
    jobs = [job._replace(target=job.target.with_suffix(".webp")) for job in jobs]
    (photos / "h.jpg").unlink()
    failed = demo.run(jobs, Fussy(), METADATA)
    assert [path.name for path in failed] == ["b.png", "d.png", "e.png", "h.jpg"]
    written = sorted(p.name for p in (photos.parent / "out").iterdir())
    assert written == ["a.webp", "c.webp", "f.webp", "g.webp"]
    assert Image.open(photos.parent / "out" / "g.webp").size == (16_383, 1)
    out, err = capsys.readouterr()
    assert "g.png: 1 segments" in out
    assert "picture reduced to 16383 pixels ->" in out
    lines = err.splitlines()
    expected = [
        r"b.png' is not a readable image: it has none of the formats",
        r"d.png: not enough memory for this image",
        r"e.png: an image that the model refuses",
        r"h.jpg' does not exist",
    ]
    assert len(lines) == len(expected)
    for line, message in zip(lines, expected, strict=True):
        assert message in line


def test_any_name_of_a_file_is_one_line(photos, capsys, monkeypatch):
    """Not UTF-8, and of two lines, on a terminal that shows ASCII alone."""
    names = ["\udce4.jpg", "b\n.jpg", "\u00fc.jpg"]
    for name in names:
        Image.new("RGB", (9, 9)).save(photos / name)
    (photos / "x\udce4.jpg").write_text("no image")
    monkeypatch.setattr(type(sys.stdout), "encoding", "ascii", raising=False)
    jobs = demo.plan(demo.find_images([str(photos / "*.jpg")]), photos.parent / "out")
    assert len(demo.run(jobs, FakePredictor(), METADATA)) == 1
    out, err = capsys.readouterr()
    assert (out + err).isascii()
    assert (len(out.splitlines()), len(err.splitlines())) == (4, 1)
    assert "\\udce4.jpg" in out


def test_the_home_folder(photos, monkeypatch):
    """The shell leaves ``~`` as it is behind ``=`` and in quotes."""
    monkeypatch.setenv("HOME", str(photos))
    monkeypatch.setenv("USERPROFILE", str(photos))
    assert demo.find_images(["~/b.png", "~/*.JPG"]) == [photos / "b.png", photos / "c.JPG"]
    line = ["--config-file=~/c.yaml", "--input", "a", "--output=~/out"]
    args = demo.parse_args(line)
    assert (args.config_file, args.output) == (photos / "c.yaml", photos / "out")


def test_command_exits_with_an_error_after_the_other_images(photos, monkeypatch):
    monkeypatch.setattr(demo, "Predictor", FakePredictor)
    monkeypatch.setattr(demo, "setup", lambda config_file, opts: None)
    out = photos.parent / "out"
    files = [str(photos / name) for name in ("notes.txt", "a.jpg")]
    with pytest.raises(SystemExit, match=r"1 of 2 images failed: .*notes\.txt"):
        demo.main(["--config-file", "x", "--input", *files, "--output", str(out)])
    assert (out / "a.jpg").is_file()


def test_opts_take_the_rest():
    line = ["--config-file", "c", "--input", "a", "b", "--opts", "SEED", "1"]
    args = demo.parse_args(line)
    assert args.input == ["a", "b"]
    assert args.opts == ["SEED", "1"]
    assert args.output is None


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.NO_KEY", "1"], "NO_KEY"),
        (["SEED"], "odd length"),
        ([], "no weights"),
        (["MODEL.WEIGHTS", "missing.pth"], r"no file 'missing\.pth'"),
        (["MODEL.WEIGHTS", __file__, "DATASETS.TEST", "()"], "DATASETS.TEST is empty"),
    ],
)
def test_config_that_cannot_work(tmp_path, opts, message):
    (tmp_path / "config.yaml").write_text("SEED: 3\n")
    with pytest.raises(SystemExit, match=message):
        demo.setup(str(tmp_path / "config.yaml"), opts)


def test_config(tmp_path):
    (tmp_path / "config.yaml").write_text("VERSION: 2\nSEED: 3\nDATASETS:\n  TEST: ('some_set',)\n")
    opts = ["MODEL.WEIGHTS", __file__, "MODEL.PSF.TEST.PANOPTIC_ON", "False"]
    cfg = demo.setup(str(tmp_path / "config.yaml"), opts)
    assert cfg.SEED == 3
    assert cfg.MODEL.PSF.TEST.PANOPTIC_ON
    with pytest.raises(SystemExit, match=r"no config '.*other\.yaml'"):
        demo.setup(str(tmp_path / "other.yaml"), [])


def test_no_window(monkeypatch):
    monkeypatch.setattr(demo.cv2, "getBuildInformation", lambda: "  GUI:         NONE\n")
    with pytest.raises(SystemExit, match=r"headless.*--output"):
        demo.check_window()
    monkeypatch.setattr(demo.cv2, "getBuildInformation", lambda: "  GUI:         GTK3\n")
    monkeypatch.setattr(demo, "sys", SimpleNamespace(platform="linux"))
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(SystemExit, match=r"no display.*--output"):
        demo.check_window()
    monkeypatch.setenv("DISPLAY", ":0")
    demo.check_window()
