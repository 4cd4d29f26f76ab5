import importlib
import json
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from PIL import Image, ImageOps

import psf.images
from psf.data import PanopticDatasetMapper
from psf.data.check import check_dataset
from psf.evaluation.ground_truth import PanopticSegmentation
from psf.evaluation.pictures import Sample, resize_picture, write_contact_sheet
from psf.images import read_image, read_values
from psf.panoptic_png import read_panoptic_ids, write_panoptic_ids

GRAY = np.array([[0, 100, 255], [7, 8, 9]], dtype=np.uint8)
RGB = np.stack([GRAY, GRAY[:, ::-1], 255 - GRAY], axis=-1)


def save(image: Image.Image, path) -> str:
    image.save(path)
    return str(path)


def upscaled(size):
    return Image.fromarray(RGB).resize(size, Image.Resampling.BICUBIC)


def test_one_pixel(tmp_path):
    path = save(Image.new("RGB", (1, 1), (1, 2, 3)), tmp_path / "a.png")
    assert read_image(path, "RGB").tolist() == [[[1, 2, 3]]]
    assert read_image(path, "BGR").tolist() == [[[3, 2, 1]]]


def as_palette(rgb):
    return Image.fromarray(rgb).quantize(colors=256)


def as_transparent_palette(rgb):
    image = as_palette(rgb)
    image.info["transparency"] = bytes([0, 128, 255])
    return image


def as_rgba(rgb):
    alpha = np.full((*rgb.shape[:2], 1), 3, dtype=np.uint8)
    return Image.fromarray(np.concatenate([rgb, alpha], axis=-1))


@pytest.mark.parametrize(
    "encode",
    [Image.fromarray, as_palette, as_transparent_palette, as_rgba],
    ids=lambda f: f.__name__,
)
def test_colour_modes(tmp_path, encode):
    path = save(encode(RGB), tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(read_image(path, "RGB"), RGB)


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_gray_modes(tmp_path, mode):
    gray = GRAY // 128 * 255 if mode == "1" else GRAY
    path = save(Image.fromarray(gray).convert(mode, dither=Image.Dither.NONE), tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(path, "RGB"), np.stack([gray] * 3, axis=-1))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_is_scaled_not_clipped(tmp_path, suffix):
    """v / 257 rounded: 65535 is white, 128 is half a step of 8 bits."""
    values = np.array([[0, 128, 129, 257, 25700, 65535]], dtype=np.uint16)
    path = save(Image.fromarray(values), tmp_path / f"a{suffix}")
    assert read_image(path, "RGB")[0, :, 0].tolist() == [0, 0, 1, 1, 100, 255]


@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [(np.int32, 70000, "more than 16 bits"), (np.float32, 0.5, "floating-point")],
)
def test_other_depths_are_refused(tmp_path, dtype, value, message):
    path = save(Image.fromarray(np.full((2, 2), value, dtype=dtype)), tmp_path / "a.tif")
    with pytest.raises(ValueError, match=rf"a\.tif.*{message}.*Convert"):
        read_image(path)


def test_cmyk(tmp_path):
    path = save(Image.fromarray(RGB).convert("CMYK"), tmp_path / "a.tif")
    np.testing.assert_array_equal(read_image(path, "RGB"), RGB)


def save_turned(path: Path, orientation: int, where: str = "exif") -> str:
    """Save an image of 40 x 24 pixels that asks for a rotation in EXIF or XMP."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    xmp = f'<x:xmpmeta><a tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()
    options = {"exif": exif} if where == "exif" else {"xmp": xmp}
    upscaled((40, 24)).save(path, **options)
    return str(path)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("suffix", "where"),
    [("jpg", "exif"), ("jpg", "xmp"), ("png", "exif"), ("tif", "exif"), ("webp", "exif")],
)
def test_orientation_is_applied(tmp_path, suffix, where, orientation):
    """In every format, and as Pillow does it, also where OpenCV decodes."""
    path = save_turned(tmp_path / f"a.{suffix}", orientation, where)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    np.testing.assert_array_equal(read_image(path, "RGB"), expected)
    assert read_image(path).shape == ((40, 24, 3) if orientation > 4 else (24, 40, 3))


def test_damaged_exif_data_are_ignored(tmp_path):
    whole = Path(save_turned(tmp_path / "a.jpg", 6)).read_bytes()
    broken = tmp_path / "b.jpg"
    broken.write_bytes(
        whole.replace(b"Exif\0\0MM", b"Exif\0\0XX").replace(b"Exif\0\0II", b"Exif\0\0XX")
    )
    assert read_image(str(broken)).shape == (24, 40, 3)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png' does not exist"):
        read_image(str(tmp_path / "nowhere.png"))


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp"])
def test_truncated_and_damaged_files_are_named(tmp_path, suffix):
    """Every length and every damaged byte: either the file is named, or the pixels are readable."""
    whole = tmp_path / f"whole.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).save(whole)
    content = whole.read_bytes()
    damaged = [content[:n] for n in range(0, len(content) - 64, 37)]
    for i in range(0, min(len(content), 400), 7):
        damaged.append(content[:i] + bytes([content[i] ^ 0x5A]) + content[i + 1 :])
    path = tmp_path / f"damaged.{suffix}"
    refused = 0
    for data in damaged:
        path.write_bytes(data)
        try:
            read_image(str(path))
        except ValueError as error:
            refused += 1
            known = ("is not a readable image", "declares")
            assert any(f"damaged.{suffix}' {k}" in str(error) for k in known)  # noqa: PT017
    assert refused > len(content) // 80


def test_unknown_format():
    with pytest.raises(ValueError, match=r"INPUT\.FORMAT must be 'RGB' or 'BGR', not 'L'"):
        read_image("a.png", "L")


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{"orientation": 6}, {"progressive": True}, {"subsampling": 0}])
def test_jpegs_equal_pillow(tmp_path, mode, options):
    exif = Image.Exif()
    exif[0x0112] = options.pop("orientation", 1)
    for size in ((1, 1), (90, 60), (33, 17)):
        path = tmp_path / "a.jpg"
        upscaled(size).convert(mode).save(path, exif=exif, quality=80, **options)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
        np.testing.assert_array_equal(read_image(str(path), "RGB"), expected)
        np.testing.assert_array_equal(read_image(str(path), "BGR"), expected[:, :, ::-1])


def declare(content: bytes, offset: int, form: str, *size: int) -> bytes:
    """Overwrite the size in a header."""
    new = struct.pack(form, *size)
    return content[:offset] + new + content[offset + len(new) :]


def save_bomb(path: Path) -> str:
    """A small file whose header says 60000 x 60000 pixels."""
    Image.fromarray(RGB).save(path)
    content = path.read_bytes()
    if path.suffix == ".jpg":
        content = declare(content, content.index(b"\xff\xc0") + 5, ">HH", 60000, 60000)
    elif path.suffix == ".png":
        header = declare(content[12:29], 4, ">II", 60000, 60000)
        content = content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]
    elif path.suffix == ".bmp":
        content = declare(content, 18, "<ii", 60000, 60000)
    elif path.suffix == ".gif":
        content = declare(content, 6, "<HH", 60000, 60000)
    else:
        content = content.replace(b"3 2\n255", b"60000 60000\n255")
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("read", [read_image, read_values, read_panoptic_ids])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".gif", ".ppm"])
def test_bombs_are_refused_by_their_header(tmp_path, suffix, read):
    """Decoded, each would take 10 GB."""
    path = save_bomb(tmp_path / f"a{suffix}")
    message = r"60000 x 60000 pixels.*limit of 268435456.*PSF_MAX_IMAGE_PIXELS"
    if read is read_panoptic_ids and suffix != ".png":
        message = r"it is no PNG"
    with pytest.raises(ValueError, match=rf"a\{suffix}' .*{message}"):
        read(path)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_the_limit_is_exact(tmp_path, monkeypatch, suffix):
    path = save(Image.fromarray(RGB), tmp_path / f"a{suffix}")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6)
    assert read_image(path).shape == (2, 3, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    with pytest.raises(ValueError, match=r"3 x 2 pixels, more than the limit of 5"):
        read_image(path)


def test_the_limit_is_set_by_a_variable(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setenv("PSF_MAX_IMAGE_PIXELS", "1000000000")
    importlib.reload(psf.images)
    assert Image.MAX_IMAGE_PIXELS == 1_000_000_000
    for wrong in ("1e9", "0", "-1", "", str(2**30 + 1)):
        monkeypatch.setenv("PSF_MAX_IMAGE_PIXELS", wrong)
        with pytest.raises(ValueError, match=r"PSF_MAX_IMAGE_PIXELS is .*, not a number"):
            importlib.reload(psf.images)


FOREIGN = {
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n",
    "PDF": b"%PDF-1.4\n%%EOF",
    "text": b"no image",
    "nothing": b"",
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("read", [read_image, read_values, read_panoptic_ids])
def test_other_formats_start_no_program(tmp_path, monkeypatch, content, read):
    """Pillow runs Ghostscript for EPS, whatever the suffix."""
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch '{tmp_path}/started'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"photo\.jpg' is not a readable image"):
        read(str(path))
    assert not (tmp_path / "started").exists()


def test_values_are_as_stored(tmp_path):
    palette = Image.fromarray(GRAY % 4)
    palette.putpalette([200, 0, 0] * 4)
    assert read_values(save(palette, tmp_path / "p.png")).tolist() == (GRAY % 4).tolist()
    deep = np.array([[1, 26001]], dtype=np.uint16)
    assert read_values(save(Image.fromarray(deep), tmp_path / "d.png")).tolist() == deep.tolist()
    assert read_values(save(Image.fromarray(RGB), tmp_path / "c.png")).tolist() == RGB.tolist()


ODD_FILES = {
    "16 bits.png": lambda path: Image.fromarray(GRAY.astype(np.uint16) * 257).save(path),
    "CMYK.jpg": lambda path: upscaled((40, 24)).convert("CMYK").save(path),
    "alpha.png": lambda path: as_rgba(RGB).save(path),
    "palette.png": lambda path: as_transparent_palette(RGB).save(path),
    "EXIF.jpg": lambda path: save_turned(path, 6),
    "XMP.jpg": lambda path: save_turned(path, 8, "xmp"),
}


@pytest.mark.parametrize("name", ODD_FILES)
def test_training_evaluation_pictures_and_check_read_the_same(cfg, tmp_path, name):
    path = tmp_path / name
    ODD_FILES[name](path)
    expected = read_image(str(path), "RGB")
    height, width = expected.shape[:2]
    cfg.INPUT.FORMAT, cfg.INPUT.MIN_SIZE_TEST = "RGB", 0
    result = PanopticDatasetMapper(cfg, False)({"file_name": str(path)})
    np.testing.assert_array_equal(result["image"].permute(1, 2, 0).numpy(), expected)

    empty = PanopticSegmentation(torch.zeros(height, width, dtype=torch.int32), [])
    sample = Sample({"file_name": str(path)}, empty, empty)
    metadata = MetadataCatalog.get("test_mapper")
    write_contact_sheet([sample], metadata, tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    drawn = resize_picture(expected, 384 / max(height, width))
    left = 8 + (384 - drawn.shape[1]) // 2
    np.testing.assert_array_equal(sheet[48:, left:][: len(drawn), : drawn.shape[1]], drawn)

    write_panoptic_ids(str(tmp_path / "ids.png"), np.zeros((height, width), dtype=np.uint8))
    content = {
        "images": [{"id": 1, "file_name": name, "height": height, "width": width}],
        "annotations": [{"image_id": 1, "file_name": "ids.png", "segments_info": []}],
        "categories": [{"id": 1, "name": "cat", "isthing": 1}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert check_dataset(tmp_path / "a.json", tmp_path, tmp_path) == []
