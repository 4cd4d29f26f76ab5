"""Panoptic PNGs of every kind are read as Pillow reads them, and damaged ones are refused."""

import io
import resource
import struct

import cv2
import numpy as np
import pytest
from PIL import Image

from psf.panoptic_png import read_panoptic_ids, unknown_ids, write_panoptic_ids


def ids_of(rgb: np.ndarray) -> np.ndarray:
    return rgb.astype(np.uint32) @ np.array([1, 256, 65536], dtype=np.uint32)


def patches(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A few large patches of random colours, as panoptic PNGs have."""
    cells = rng.integers(0, 256, (rng.integers(1, 5), rng.integers(1, 5), 3), dtype=np.uint8)
    return cv2.resize(cells, (width, height), interpolation=cv2.INTER_NEAREST)


def test_one_pixel(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (1, 1), (1, 2, 3)).save(path)
    assert read_panoptic_ids(str(path)).tolist() == [[1 + 256 * 2 + 65536 * 3]]


def test_any_size(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "a.png"
    for _ in range(20):
        rgb = patches(rng, *rng.integers(1, 70, 2))
        Image.fromarray(rgb).save(path, compress_level=int(rng.integers(10)))
        ids = read_panoptic_ids(str(path))
        assert ids.dtype == np.uint32
        np.testing.assert_array_equal(ids, ids_of(rgb))


@pytest.mark.parametrize("mode", ["P", "RGBA", "L"])
def test_other_modes_are_read_too(tmp_path, mode):
    """Optimisers store PNGs of few colours with a palette."""
    image = Image.fromarray(patches(np.random.default_rng(0), 20, 30))
    image = image.quantize(colors=256) if mode == "P" else image.convert(mode)
    if mode == "RGBA":
        image.putalpha(0)
    image.save(tmp_path / "a.png")
    expected = ids_of(np.asarray(image.convert("RGB")))
    np.testing.assert_array_equal(read_panoptic_ids(str(tmp_path / "a.png")), expected)


def test_an_orientation_is_ignored(tmp_path):
    """The ids belong to the pixels as they are stored."""
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb = patches(np.random.default_rng(0), 20, 30)
    Image.fromarray(rgb).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_panoptic_ids(str(tmp_path / "a.png")), ids_of(rgb))


def test_every_truncation_and_damaged_byte_is_refused(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(patches(np.random.default_rng(1), 30, 40)).save(buffer, "PNG")
    content = buffer.getvalue()
    damaged = [content[:n] for n in range(len(content))]
    # But for the checksum at the very end, which covers no pixel.
    damaged += [
        content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :] for i in range(len(content) - 4)
    ]
    path = tmp_path / "a.png"
    message = r"a\.png' (is not a readable image|declares \d+ x \d+ pixels)"
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            read_panoptic_ids(str(path))


def test_what_is_written_is_read_back(tmp_path):
    path = str(tmp_path / "a.png")
    ids = np.array([[0, 1, 255], [256, 65536, (1 << 24) - 1]], dtype=np.int64)
    write_panoptic_ids(path, ids)
    np.testing.assert_array_equal(read_panoptic_ids(path), ids)
    np.testing.assert_array_equal(ids_of(np.asarray(Image.open(path))), ids)
    with pytest.raises(ValueError, match=r"a\.png': ids -1\.\.5 do not fit"):
        write_panoptic_ids(path, np.array([[-1, 5]]))


def test_16_bits_per_channel_are_refused(tmp_path):
    """As Cityscapes' instance ids; OpenCV would cut them to 8 bits."""
    Image.fromarray(np.full((2, 3), 26001, dtype=np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png' has 16 bits per channel.*Convert label maps"):
        read_panoptic_ids(str(tmp_path / "a.png"))


@pytest.mark.parametrize("kind", [b"IDAT", b"PLTE", b"tEXt", b"acTL"])
def test_a_chunk_that_declares_gigabytes_takes_no_memory(tmp_path, kind):
    """OpenCV allocates the length before it reads."""
    path = tmp_path / "a.png"
    Image.new("RGB", (3, 2)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:33] + struct.pack(">I", 2**31 - 1) + kind + whole[41:])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"a\.png' is not a readable image"):
        read_panoptic_ids(str(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


@pytest.mark.parametrize("suffix", ["jpg", "bmp"])
def test_other_formats_are_refused(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (3, 2)).save(path)
    path.rename(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png' is not a readable image: it is no PNG"):
        read_panoptic_ids(str(tmp_path / "a.png"))


@pytest.mark.parametrize(
    ("unknown", "cause"),
    [
        (
            [(112 << 16) + (70000 & 0xFF00) + 1],
            "With red and blue swapped it has: it was written as BGR",
        ),
        ([5 << 16], "written as BGR"),
        ([5 * 65793, 7 * 65793], "gray: it is a map of one channel, not a panoptic PNG"),
        ([7], "of different versions"),
    ],
)
def test_why_ids_are_unknown(unknown, cause):
    assert cause in unknown_ids("a.png", unknown, [5, 70000])
