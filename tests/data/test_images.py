import io
import struct
import warnings
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from psf.data import images, read_image
from psf.panoptic_png import has_image_extension

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


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp"])
def test_truncated_and_damaged_files_are_named(tmp_path, suffix, fast):
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
            read_image(str(path), fast=fast)
        except ValueError as error:
            refused += 1
            assert f"damaged.{suffix}' is not a readable image" in str(error)  # noqa: PT017
    assert refused > len(content) // 80


def test_unknown_format():
    with pytest.raises(ValueError, match=r"INPUT\.FORMAT must be 'RGB' or 'BGR', not 'L'"):
        read_image("a.png", "L")


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_fast_reading_shows_the_same(tmp_path, image_format, mode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    large = Image.fromarray(RGB).resize((90, 60), Image.Resampling.BICUBIC)
    large.convert(mode).save(tmp_path / "a.jpg", exif=exif, quality=95)
    path = str(tmp_path / "a.jpg")
    exact, fast = read_image(path, image_format), read_image(path, image_format, fast=True)
    assert exact.shape == fast.shape
    assert np.abs(exact.astype(int) - fast).max() <= 2


needs_extension = pytest.mark.skipif(not has_image_extension(), reason="psf._image is not in use")
NOISE = np.random.default_rng(0).integers(0, 256, (9, 5, 3), dtype=np.uint8)


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(before=(), after=(), *, between=(), rows=None, kind=(8, 2, 0, 0, 0)) -> bytes:
    """NOISE with chunks before, after and inside of the data, or rows of filters and residuals."""
    rows = b"".join(b"\0" + row.tobytes() for row in NOISE) if rows is None else rows
    data = zlib.compress(rows)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", NOISE.shape[1], NOISE.shape[0], *kind))
    first, second = chunk(b"IDAT", data[:50]), chunk(b"IDAT", data[50:])
    parts = [header, *before, first, *between, second, *after, chunk(b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def by_pillow(content: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(content))
    return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def assert_read_as_by_pillow(path, content: bytes) -> None:
    path.write_bytes(content)
    expected = by_pillow(content)
    np.testing.assert_array_equal(read_image(str(path), "RGB"), expected)
    np.testing.assert_array_equal(read_image(str(path), "BGR"), expected[:, :, ::-1])


@pytest.fixture
def without_pillow(monkeypatch):
    def refuse(_file):
        raise OSError("opened by Pillow")

    monkeypatch.setattr(images.Image, "open", refuse)


def smooth(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return cv2.resize(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8), (width, height))


def noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("make", [smooth, noise])
def test_png_of_any_size_and_compression(tmp_path, make):
    rng = np.random.default_rng(0)
    for trial in range(40):
        height, width = (int(n) for n in rng.integers(1, 90, 2))
        height, width = (1, width) if trial < 5 else (height, 1) if trial < 10 else (height, width)
        rgb = make(rng, height, width)
        buffer = io.BytesIO()
        Image.fromarray(rgb).save(buffer, "PNG", compress_level=int(rng.integers(10)))
        assert_read_as_by_pillow(tmp_path / "a.png", buffer.getvalue())
        options = [cv2.IMWRITE_PNG_STRATEGY, int(rng.integers(5)), cv2.IMWRITE_PNG_COMPRESSION]
        content = cv2.imencode(".png", rgb, [*options, int(rng.integers(1, 10))])[1].tobytes()
        assert_read_as_by_pillow(tmp_path / "a.png", content)


@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.95])
def test_png_of_any_filters(tmp_path, zeros):
    rng = np.random.default_rng(1)
    for _ in range(60):
        residuals = rng.integers(0, 256, NOISE.shape, dtype=np.uint8)
        residuals[rng.random(NOISE.shape[:2]) < zeros] = 0
        rows = b"".join(bytes([rng.integers(5)]) + row.tobytes() for row in residuals)
        assert_read_as_by_pillow(tmp_path / "a.png", png(rows=rows))


def test_png_with_long_huffman_codes(tmp_path):
    """The n-th value is half as frequent as the one before: codes of up to 15 bits."""
    rng = np.random.default_rng(2)
    values = np.minimum(rng.geometric(0.5, (300, 300, 3)) - 1, 255).astype(np.uint8)
    level = [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY]
    content = cv2.imencode(".png", values * 37, level)[1].tobytes()
    assert_read_as_by_pillow(tmp_path / "a.png", content)


HARMLESS = [
    chunk(b"pHYs", struct.pack(">IIB", 2835, 2835, 1)),
    chunk(b"gAMA", struct.pack(">I", 45455)),
    chunk(b"cHRM", bytes(32)),
    chunk(b"sRGB", b"\0"),
    chunk(b"tIME", bytes(7)),
    chunk(b"bKGD", bytes(6)),
    chunk(b"sBIT", b"\5\6\5"),
    chunk(b"tEXt", b"Software\0exif"),
]


@needs_extension
def test_harmless_chunks_do_not_slow_down_reading(tmp_path, without_pillow):
    for place in ("before", "after"):
        (tmp_path / "a.png").write_bytes(png(**{place: HARMLESS}))
        np.testing.assert_array_equal(read_image(str(tmp_path / "a.png"), "RGB"), NOISE)


def exif_of(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()[6:]  # without "Exif\0\0"


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"/>'
RAW_EXIF = b"\nexif\n 26\n" + (b"Exif\0\0" + exif_of(6)).hex().encode()
TURNING = {
    "eXIf": chunk(b"eXIf", exif_of(6)),
    "exif text": chunk(b"tEXt", b"exif\0" + b"Exif\0\0" + exif_of(6)),
    "raw profile": chunk(b"tEXt", b"Raw profile type exif\0" + RAW_EXIF),
    "compressed": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(RAW_EXIF)),
    "XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
    "XMP text": chunk(b"tEXt", b"XML:com.adobe.xmp\0" + XMP),
}


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("name", list(TURNING))
def test_every_orientation_in_a_png_is_applied(tmp_path, place, name):
    content = png(**{place: [*HARMLESS, TURNING[name]]})
    np.testing.assert_array_equal(by_pillow(content), np.rot90(NOISE, -1))
    assert_read_as_by_pillow(tmp_path / "a.png", content)


OTHER = {
    "transparent": png([chunk(b"tRNS", bytes(6))]),
    "suggested palette": png([chunk(b"PLTE", bytes(6))]),
    "profile": png([chunk(b"iCCP", b"a\0\0" + zlib.compress(b"b"))]),
    "private": png(after=[chunk(b"prIv", b"a")]),
    "interlaced": png(kind=(8, 2, 0, 0, 1)),
    "16 bit": png(rows=(b"\0" + bytes(30)) * 9, kind=(16, 2, 0, 0, 0)),
    "two headers": png([chunk(b"IHDR", struct.pack(">IIBBBBB", 5, 9, 8, 2, 0, 0, 0))]),
    "interrupted": png(between=[chunk(b"tIME", bytes(7))]),
    "unknown filters": png(kind=(8, 2, 0, 1, 0)),
    "short gamma": png([chunk(b"gAMA", b"a")]),
    "short resolution": png([chunk(b"pHYs", b"a")]),
    "wrong checksum": png().replace(chunk(b"IEND"), chunk(b"tIME", bytes(7))[:-1] + b"?"),
    "no end": png()[:-12],
    "no data": png(rows=b""),
    "first another chunk": png().replace(b"IHDR", b"IHDA"),
}


def outcomes(path, monkeypatch) -> list:
    """Pixels or error with and without the extension."""
    results = []
    for extension in (images.image_extension, None):
        with monkeypatch.context() as patch:
            patch.setattr(images, "image_extension", extension)
            try:
                results.append(read_image(str(path), "BGR").tolist())
            except ValueError as error:
                results.append(str(error).partition(" object at ")[0])  # an address follows
    return results


@needs_extension
@pytest.mark.parametrize("name", list(OTHER))
def test_other_pngs_are_left_to_pillow(tmp_path, monkeypatch, name):
    path = tmp_path / "a.png"
    path.write_bytes(OTHER[name])
    assert images._decode_plain_png(OTHER[name], "BGR") is None
    result, expected = outcomes(path, monkeypatch)
    assert result == expected


@needs_extension
def test_every_damage_has_the_same_result_as_without_the_extension(tmp_path, monkeypatch):
    whole = png(HARMLESS[:2], HARMLESS[-1:])
    damaged = [whole[:n] for n in range(len(whole))]
    damaged += [whole[:i] + bytes([byte ^ 0x5A]) + whole[i + 1 :] for i, byte in enumerate(whole)]
    path = tmp_path / "a.png"
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        result, expected = outcomes(path, monkeypatch)
        assert result == expected
        refused += isinstance(result, str)
    assert refused > len(whole)


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png())
    monkeypatch.setattr(images.Image, "MAX_IMAGE_PIXELS", 20)  # of 45
    with pytest.raises(ValueError, match=r"a\.png' is not a readable image .*decompression bomb"):
        read_image(str(tmp_path / "a.png"))
    monkeypatch.setattr(images.Image, "MAX_IMAGE_PIXELS", 30)
    with pytest.warns(Image.DecompressionBombWarning):
        read_image(str(tmp_path / "a.png"))


@needs_extension
def test_pixels_are_written_within_the_buffer():
    with pytest.raises(ValueError, match="smaller than the image"):
        images.image_extension.decode_pixels(png(), np.empty(134, np.uint8), 9, 5, False)
    with pytest.raises(ValueError, match="header is another"):
        images.image_extension.decode_pixels(png(), np.empty(135, np.uint8), 5, 9, False)
