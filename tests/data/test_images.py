import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps

from psf.data import read_image

GRAY = np.array([[0, 100, 255], [7, 8, 9]], dtype=np.uint8)
RGB = np.stack([GRAY, GRAY[:, ::-1], 255 - GRAY], axis=-1)


def save(image: Image.Image, path) -> str:
    image.save(path)
    return str(path)


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


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(RGB).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(str(tmp_path / "a.png"), "RGB"), np.rot90(RGB, -1))


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
            assert f"damaged.{suffix}' is not a readable image" in str(error)  # noqa: PT017
    assert refused > len(content) // 80


def test_unknown_format():
    with pytest.raises(ValueError, match=r"INPUT\.FORMAT must be 'RGB' or 'BGR', not 'L'"):
        read_image("a.png", "L")


def upscaled(size):
    return Image.fromarray(RGB).resize(size, Image.Resampling.BICUBIC)


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


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    path = save(Image.fromarray(RGB), tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2)  # of 6
    with pytest.raises(ValueError, match=r"a\.png' is not a readable image .*decompression bomb"):
        read_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    with pytest.warns(Image.DecompressionBombWarning):
        read_image(path)
