"""The decoder of panoptic PNGs equals Pillow on every kind of file, and refuses damaged ones."""

import io
import os
import struct
import subprocess
import sys
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from psf import panoptic_png
from psf.panoptic_png import has_image_extension, read_panoptic_ids, write_panoptic_ids


def ids_of(rgb: np.ndarray) -> np.ndarray:
    return rgb.astype(np.uint32) @ np.array([1, 256, 65536], dtype=np.uint32)


def png_of(rows: list[bytes], width: int, *, wbits: int = 15, strategy: int = 0) -> bytes:
    """A PNG of given filter bytes and residuals."""
    compress = zlib.compressobj(9, zlib.DEFLATED, wbits, 8, strategy)
    data = compress.compress(b"".join(rows)) + compress.flush()
    header = struct.pack(">IIBBBBB", width, len(rows), 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"tEXt", b"a\0b"), (b"IDAT", data[:9]), (b"IDAT", data[9:])]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in [*chunks, (b"IEND", b"")]
    )


def flat_image(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A few large patches of random colours, as panoptic PNGs have."""
    cells = rng.integers(0, 256, (rng.integers(1, 5), rng.integers(1, 5), 3), dtype=np.uint8)
    return cv2.resize(cells, (width, height), interpolation=cv2.INTER_NEAREST)


def noise_image(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_one_pixel(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (1, 1), (1, 2, 3)).save(path)
    assert read_panoptic_ids(str(path)).tolist() == [[1 + 256 * 2 + 65536 * 3]]


@pytest.mark.parametrize("make", [flat_image, noise_image])
def test_any_size_and_compression_equals_pillow(tmp_path, make):
    rng = np.random.default_rng(0)
    path = tmp_path / "a.png"
    for _ in range(60):
        rgb = make(rng, *rng.integers(1, 70, 2))
        Image.fromarray(rgb).save(path, compress_level=int(rng.integers(10)))
        np.testing.assert_array_equal(read_panoptic_ids(str(path)), ids_of(rgb))
        strategy = [cv2.IMWRITE_PNG_STRATEGY, int(rng.integers(5))]
        cv2.imwrite(str(path), rgb[:, :, ::-1], [*strategy, cv2.IMWRITE_PNG_COMPRESSION, 6])
        np.testing.assert_array_equal(read_panoptic_ids(str(path)), ids_of(rgb))


@pytest.mark.parametrize("row_filter", range(5))
@pytest.mark.parametrize("strategy", [zlib.Z_DEFAULT_STRATEGY, zlib.Z_RLE, zlib.Z_FIXED])
@pytest.mark.parametrize("zeros", [0.0, 0.9])
def test_every_filter_equals_pillow(tmp_path, row_filter, strategy, zeros):
    """Residuals are random; with many zeros, the shortcuts of Sub and Paeth are taken."""
    rng = np.random.default_rng(row_filter)
    path = tmp_path / "a.png"
    for width in (1, 2, 7, 50):
        residuals = rng.integers(0, 256, (9, width, 3), dtype=np.uint8)
        residuals[rng.random((9, width)) < zeros] = 0
        rows = [bytes([row_filter if y else 0]) + r.tobytes() for y, r in enumerate(residuals)]
        path.write_bytes(png_of(rows, width, strategy=strategy))
        expected = ids_of(np.asarray(Image.open(path)))
        np.testing.assert_array_equal(read_panoptic_ids(str(path)), expected)


@pytest.mark.parametrize("mode", ["P", "RGBA", "L"])
def test_other_modes_are_read_too(tmp_path, mode):
    """Optimisers store PNGs of few colours with a palette."""
    rgb = flat_image(np.random.default_rng(0), 20, 30)
    image = Image.fromarray(rgb)
    image = image.quantize(colors=256) if mode == "P" else image.convert(mode)
    image.save(tmp_path / "a.png")
    expected = ids_of(np.asarray(image.convert("RGB")))
    np.testing.assert_array_equal(read_panoptic_ids(str(tmp_path / "a.png")), expected)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png' does not exist"):
        read_panoptic_ids(str(tmp_path / "nowhere.png"))


def test_every_truncation_and_damaged_byte_is_refused(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(flat_image(np.random.default_rng(1), 30, 40)).save(buffer, "PNG")
    content = buffer.getvalue()
    path = tmp_path / "a.png"
    # Pillow overlooks the end of a file, where the pixels are complete.
    damaged = [content[:n] for n in range(len(content) - (12 if has_image_extension() else 30))]
    if has_image_extension():  # Pillow overlooks a damaged checksum at the very end
        damaged += [
            content[:i] + bytes([b ^ 0x5A]) + content[i + 1 :] for i, b in enumerate(content)
        ]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"a\.png' is not a readable image"):
            read_panoptic_ids(str(path))


@pytest.mark.skipif(not has_image_extension(), reason="psf._image is not in use")
def test_damage_behind_right_checksums_is_refused():
    """Any bytes as compressed data: refused or decoded, never a write beyond the image."""
    rng = np.random.default_rng(0)
    whole = png_of([b"\4" + bytes(90)] * 20, 30)
    start = whole.index(b"IDAT")
    rows = b"".join(
        bytes([int(rng.integers(5))]) + noise_image(rng, 1, 30).tobytes() for _ in range(20)
    )
    streams = [zlib.compress(rows), zlib.compress(rows, 0), zlib.compress(bytes(1820), 9)]
    refused = 0
    for trial in range(3000):
        data = bytearray(streams[trial % 3])
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(2, len(data))] = rng.integers(256)
        chunk = b"IDAT" + bytes(data)
        png = whole[: start - 4] + struct.pack(">I", len(data)) + chunk
        png += struct.pack(">I", zlib.crc32(chunk)) + whole[-12:]
        ids = np.zeros((22, 30), dtype=np.uint32)
        try:
            panoptic_png.image_extension.decode_ids(png, ids[:20], 20, 30)
        except ValueError:
            refused += 1
        assert not ids[20:].any()
    assert refused > 500


@pytest.mark.skipif(not has_image_extension(), reason="psf._image is not in use")
@pytest.mark.parametrize(
    ("rows", "height", "message"),
    [
        ([b"\0" + bytes(6)] * 2, 3, "fewer pixels"),
        ([b"\0" + bytes(6)] * 4, 3, "more pixels"),
        ([b"\5" + bytes(6)] * 3, 3, "unknown filter"),
    ],
)
def test_contents_that_contradict_the_header(rows, height, message):
    with pytest.raises(ValueError, match=message):
        panoptic_png.image_extension.decode_ids(
            png_of(rows, 2), np.zeros((height, 2), np.uint32), height, 2
        )
    with pytest.raises(ValueError, match="smaller than the image"):
        panoptic_png.image_extension.decode_ids(png_of(rows, 2), np.zeros(3, np.uint32), height, 2)


def test_what_is_written_is_read_back(tmp_path):
    path = str(tmp_path / "a.png")
    ids = np.array([[0, 1, 255], [256, 65536, (1 << 24) - 1]], dtype=np.int64)
    write_panoptic_ids(path, ids)
    np.testing.assert_array_equal(read_panoptic_ids(path), ids)
    np.testing.assert_array_equal(ids_of(np.asarray(Image.open(path))), ids)
    with pytest.raises(ValueError, match=r"a\.png': ids -1\.\.5 do not fit"):
        write_panoptic_ids(path, np.array([[-1, 5]]))


def test_without_the_extension_the_ids_are_the_same(tmp_path):
    path = tmp_path / "a.png"
    rgb = flat_image(np.random.default_rng(2), 31, 17)
    Image.fromarray(rgb).save(path)
    program = (
        "import sys; from psf.panoptic_png import has_image_extension, read_panoptic_ids as read;"
        "assert not has_image_extension(); print(int(read(sys.argv[1]).astype(int).sum()))"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(path)],
        env={**os.environ, "PSF_DISABLE_EXTENSION": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(result.stdout) == int(ids_of(rgb).astype(int).sum())
