"""Draws one synthetic scene with its panoptic segmentation.

Colour and filling do not depend on the class: things differ by their outline, stuff by its texture.
Lengths are in pixels of a 128 x 128 image and scale with the size.

Shapes: S the side of the square image; h x w a window of it. Signed distances are negative inside.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..coco_writer import Segment

Array = NDArray[np.floating]
Window = tuple[slice, slice]  # rows and columns of an image

# Sparse ids, things and stuff interleaved, so that code cannot assume an order.
CATEGORIES: list[dict[str, Any]] = [
    {"id": 3, "name": "circle", "isthing": 1, "color": [230, 60, 60]},
    {"id": 7, "name": "grass", "isthing": 0, "color": [90, 160, 70]},
    {"id": 8, "name": "square", "isthing": 1, "color": [250, 170, 30]},
    {"id": 12, "name": "water", "isthing": 0, "color": [50, 110, 190]},
    {"id": 15, "name": "triangle", "isthing": 1, "color": [170, 60, 220]},
    {"id": 16, "name": "brick", "isthing": 0, "color": [150, 85, 65]},
    {"id": 21, "name": "star", "isthing": 1, "color": [250, 240, 60]},
    {"id": 22, "name": "sky", "isthing": 0, "color": [160, 205, 235]},
    {"id": 30, "name": "sand", "isthing": 0, "color": [220, 195, 140]},
    {"id": 31, "name": "ring", "isthing": 1, "color": [60, 225, 225]},
]

_MIN_VISIBLE = 40  # pixels; things with fewer are not drawn
_MIN_STUFF_FRACTION = 0.05  # of the image, before things cover it
_CROWD_PROBABILITY = 0.08
_VOID_BAND_PROBABILITY = 0.6
_VOID_BLOB_PROBABILITY = 0.3
_TOUCHING_PROBABILITY = 0.4


class Scene(NamedTuple):
    """An image and its panoptic segmentation."""

    image: NDArray[np.uint8]  # (S, S, 3) RGB
    index_map: NDArray[np.int32]  # (S, S), 1 + the segment at each pixel; 0 is void
    segments: list[Segment]


class _Item(NamedTuple):
    """Something that lies on the stuff."""

    category: str | None  # None: an unannotated blob
    window: Window  # which contains it
    distance: Array  # (h, w) signed distance to the outline
    rgb: Array  # (3, h, w) the colours inside
    iscrowd: bool = False


class _Placement(NamedTuple):
    """Where a thing is."""

    category: str
    x: float
    y: float
    radius: float


def draw_scene(rng: np.random.Generator, size: int) -> Scene:
    """
    Draw a scene: 2-4 stuff regions; 1-6 things, some touching, hidden or cut by the border; at
    times a crowd, an unannotated blob or an unannotated band between stuff regions.
    """
    scale = size / 128
    names, regions = _stuff_layout(rng, size)
    canvas = np.zeros((3, size, size), dtype=np.float32)
    for i, name in enumerate(names):
        np.copyto(canvas, _STUFF[name](rng, size), where=regions == i)
    owners = regions + 1  # 0 is void; then stuff; then items
    if rng.random() < _VOID_BAND_PROBABILITY:
        owners[_borders(regions)] = 0

    items = _remove_hidden(_items(rng, size, scale), size, _MIN_VISIBLE * scale**2)
    for i, item in enumerate(items, start=len(names) + 1):
        coverage = np.clip(0.5 - item.distance, 0, 1)  # anti-aliased
        behind = canvas[(slice(None), *item.window)]
        behind += coverage * (item.rgb - behind)
        owners[item.window][item.distance < 0] = 0 if item.category is None else i

    light = rng.uniform(0.8, 1.1) + 0.08 * _ramp(rng, size)
    image = np.clip(canvas * light, 0, 255).astype(np.uint8).transpose(1, 2, 0)
    owner_categories = [None, *names, *(item.category for item in items)]
    is_crowd = [False] * (len(names) + 1) + [item.iscrowd for item in items]
    return _number_segments(rng, image, owners, owner_categories, is_crowd)


def _number_segments(
    rng: np.random.Generator,
    image: NDArray[np.uint8],
    owners: NDArray[np.integer],
    owner_categories: list[str | None],
    is_crowd: list[bool],
) -> Scene:
    """Give every owner that shows enough an id that, like COCO's, looks like a random colour."""
    areas = np.bincount(owners.ravel(), minlength=len(owner_categories))
    min_visible = _MIN_VISIBLE * owners.size / 128**2
    category_ids = {c["name"]: c["id"] for c in CATEGORIES}
    index_of_owner = np.zeros(len(owner_categories), dtype=np.int32)
    segments: list[Segment] = []
    taken = {0}
    for owner, category in enumerate(owner_categories):
        if category is None or areas[owner] < min_visible:
            continue  # void
        segment_id = 0
        while segment_id in taken:
            segment_id = int(rng.integers(1 << 24))
        taken.add(segment_id)
        segments.append(Segment(category_ids[category], int(is_crowd[owner]), segment_id))
        index_of_owner[owner] = len(segments)
    return Scene(np.ascontiguousarray(image), index_of_owner[owners], segments)


# ------------------------------------------------------------------------------------- stuff


def _stuff_layout(rng: np.random.Generator, size: int) -> tuple[list[str], NDArray[np.int64]]:
    """Names of the stuff classes in the image and, for each pixel (S, S), which of them it is."""
    count = rng.integers(2, 4)
    names = [str(name) for name in rng.permutation(list(_STUFF))[:count]]
    fields = np.stack([_smooth_noise(rng, size, 3) + 1.5 * _ramp(rng, size) for _ in names])
    while True:
        regions = fields.argmax(axis=0)
        areas = np.bincount(regions.ravel(), minlength=len(names))
        smallest = int(areas.argmin())
        if areas[smallest] >= _MIN_STUFF_FRACTION * size**2:
            return names, regions
        del names[smallest]
        fields = np.delete(fields, smallest, axis=0)


def _borders(regions: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(S, S), the pixels on either side of a border between regions."""
    padded = np.pad(regions, 1, mode="edge")
    neighbours = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    return np.logical_or.reduce([regions != neighbour for neighbour in neighbours])


def _grass(rng: np.random.Generator, size: int) -> Array:
    blades = _smooth_noise(rng, size, (size // 9, size // 2)) + 0.4 * _smooth_noise(rng, size, 5)
    return _tint(rng, (95, 140, 65), 24 * blades)


def _water(rng: np.random.Generator, size: int) -> Array:
    y, x = _pixels(size)
    wavelength = rng.uniform(8, 12) * size / 128
    sway = 2.0 * _smooth_noise(rng, size, 6) + np.sin(x * rng.uniform(0.08, 0.14) * 128 / size)
    waves = np.sin(y * (2 * math.pi / wavelength) + sway + rng.uniform(0, 6))
    return _tint(rng, (60, 110, 155), 24 * waves)


def _brick(rng: np.random.Generator, size: int) -> Array:
    y, x = _pixels(size)
    height = rng.uniform(9, 13) * size / 128
    row = np.floor(y / height + rng.random())
    column = np.floor(x / (2 * height) + 0.5 * (row % 2) + rng.random())
    tones = rng.uniform(-20, 20, (32, 32)).astype(np.float32)
    mortar = np.zeros((size, size), dtype=bool)
    mortar[1:] |= row[1:] != row[:-1]
    mortar[:, 1:] |= column[:, 1:] != column[:, :-1]
    tone = tones[row.astype(int) % 32, column.astype(int) % 32]
    return _tint(rng, (150, 95, 75), np.where(mortar, 55 * _sign(rng), tone))


def _sky(rng: np.random.Generator, size: int) -> Array:
    return _tint(rng, (140, 170, 200), 16 * _smooth_noise(rng, size, 4) + 20 * _ramp(rng, size))


def _sand(rng: np.random.Generator, size: int) -> Array:
    grains = _smooth_noise(rng, size, size // 2 + 1) + 0.7 * _smooth_noise(rng, size, size // 4)
    return _tint(rng, (180, 155, 120), 24 * grains)


_STUFF: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "grass": _grass,
    "water": _water,
    "brick": _brick,
    "sky": _sky,
    "sand": _sand,
}


def _tint(rng: np.random.Generator, rgb: tuple[int, int, int], relief: Array) -> Array:
    """(3, S, S): the colour of the class, at random one time in five, and the relief (S, S)."""
    base = np.array(rgb) + rng.normal(0, 22, 3) if rng.random() < 0.8 else rng.uniform(60, 200, 3)
    strength = rng.uniform(0.8, 1.2) * rng.uniform(0.8, 1.2, 3)
    return _channels(base) + _channels(strength) * relief


def _sign(rng: np.random.Generator) -> np.float32:
    return np.float32(1 if rng.random() < 0.5 else -1)


def _channels(rgb: NDArray[np.float64]) -> Array:
    """A colour in the shape (3, 1, 1)."""
    return rgb.astype(np.float32)[:, None, None]


# ------------------------------------------------------------------------------------- things


def _items(rng: np.random.Generator, size: int, scale: float) -> list[_Item]:
    """What lies on the stuff, from back to front."""
    items = []
    if rng.random() < _VOID_BLOB_PROBABILITY:
        items.append(_blob(rng, size, scale))
    if rng.random() < _CROWD_PROBABILITY:
        items.append(_crowd(rng, size, scale))
    placements: list[_Placement] = []
    for _ in range(rng.integers(1, 6)):
        if placements and rng.random() < _TOUCHING_PROBABILITY:
            placement = _beside(rng, placements[rng.integers(len(placements))])
        else:
            small = rng.random() < 0.15
            radius = scale * (rng.uniform(8, 13) if small else rng.uniform(14, 30))
            x, y = rng.uniform(0, size, 2).tolist()
            placement = _Placement(str(rng.choice(list(_THINGS))), x, y, radius)
        placements.append(placement)
        items.append(_thing(rng, size, placement))
    return items


def _beside(rng: np.random.Generator, other: _Placement) -> _Placement:
    """A thing of the same class that touches the other one."""
    radius = other.radius * rng.uniform(0.85, 1.15)
    angle = rng.uniform(0, 2 * math.pi)
    reach = (radius + other.radius) * rng.uniform(0.85, 1.0)
    x, y = other.x + reach * math.cos(angle), other.y + reach * math.sin(angle)
    return _Placement(other.category, x, y, radius)


def _thing(rng: np.random.Generator, size: int, placement: _Placement) -> _Item:
    window = _window(size, placement.x, placement.y, 1.2 * placement.radius + 1)
    distance = _outline(rng, size, window, placement)
    rgb = _fill(rng, size, window)
    if rng.random() < 0.6:  # a dark rim
        rgb *= np.where(distance > -2, np.float32(rng.uniform(0.35, 0.6)), np.float32(1))
    return _Item(placement.category, window, distance, rgb)


def _crowd(rng: np.random.Generator, size: int, scale: float) -> _Item:
    """Many small things of one class, close to each other."""
    category = str(rng.choice(list(_THINGS)))
    centre = rng.uniform(0.2 * size, 0.8 * size, 2)
    window = (slice(0, size), slice(0, size))
    distance = np.full((size, size), np.inf, dtype=np.float32)
    for _ in range(rng.integers(10, 19)):
        x, y = (centre + rng.normal(0, 13 * scale, 2)).tolist()
        member = _Placement(category, x, y, scale * rng.uniform(4.5, 6.5))
        distance = np.minimum(distance, _outline(rng, size, window, member))
    rgb = _fill(rng, size, window)
    rgb *= np.where(distance > -1, np.float32(0.6), np.float32(1))
    return _Item(category, window, distance, rgb, iscrowd=True)


def _blob(rng: np.random.Generator, size: int, scale: float) -> _Item:
    """An object of no class."""
    radius = scale * rng.uniform(9, 15)
    centre_x, centre_y = rng.uniform(0, size, 2).tolist()
    window = _window(size, centre_x, centre_y, 2 * radius)
    y, x = (coordinate[window] for coordinate in _pixels(size))
    bulges = (0.3 * radius) * _smooth_noise(rng, size, 12)[window]
    distance = np.hypot(x - centre_x, y - centre_y) + bulges - radius
    return _Item(None, window, distance, _fill(rng, size, window))


def _remove_hidden(items: list[_Item], size: int, min_visible: float) -> list[_Item]:
    """Drop the items of which others, nearer to the front, leave less than ``min_visible``."""
    kept = []
    covered = np.zeros((size, size), dtype=bool)
    for item in reversed(items):
        inside = item.distance < 0
        if np.count_nonzero(inside & ~covered[item.window]) >= min_visible:
            kept.append(item)
            covered[item.window] |= inside
    return kept[::-1]


def _window(size: int, x: float, y: float, reach: float) -> Window:
    """The part of the image within ``reach`` of a point."""
    columns, rows = (
        slice(max(0, math.floor(c - reach)), max(0, math.ceil(c + reach))) for c in (x, y)
    )
    return (rows, columns)


def _fill(rng: np.random.Generator, size: int, window: Window) -> Array:
    """(3, h, w), a filling of any two colours: plain, shaded, striped or chequered."""
    y, x = (coordinate[window] for coordinate in _pixels(size))
    first, second = rng.uniform(15, 240, (2, 3))
    angle, period = rng.uniform(0, math.pi), rng.uniform(8, 14) * size / 128
    u = x * math.cos(angle) + y * math.sin(angle)
    v = y * math.cos(angle) - x * math.sin(angle)
    kind = rng.choice(["plain", "shaded", "striped", "chequered"], p=[0.35, 0.3, 0.2, 0.15])
    if kind == "plain":
        mix = np.zeros_like(u)
    elif kind == "shaded":
        mix = 0.5 + 0.5 * np.sin(u * (math.pi / (4 * period)))
    elif kind == "striped":
        mix = 0.5 * (u % period < period / 2).astype(np.float32)
    else:
        mix = 0.5 * ((u % period < period / 2) ^ (v % period < period / 2)).astype(np.float32)
    return _channels(first) + mix * _channels(second - first)


def _outline(rng: np.random.Generator, size: int, window: Window, placement: _Placement) -> Array:
    """(h, w), the signed distance to a shape, turned by a random angle."""
    y, x = (coordinate[window] for coordinate in _pixels(size))
    x, y = x - placement.x, y - placement.y
    angle = rng.uniform(0, 2 * math.pi)
    cos, sin = math.cos(angle), math.sin(angle)
    return _THINGS[placement.category](x * cos + y * sin, y * cos - x * sin, placement.radius)


def _circle(x: Array, y: Array, radius: float) -> Array:
    return np.hypot(x, y) - 0.95 * radius


def _square(x: Array, y: Array, radius: float) -> Array:
    return np.maximum(np.abs(x), np.abs(y)) - 0.8 * radius


def _triangle(x: Array, y: Array, radius: float) -> Array:
    return np.maximum(np.abs(x) * (math.sqrt(3) / 2) + y * 0.5, -y) - 0.58 * radius


def _star(x: Array, y: Array, radius: float) -> Array:
    """Five tips: by symmetry, the line from a tip to a notch in half a tip's sector."""
    half_sector = math.pi / 5
    angle = np.abs((np.arctan2(y, x) + half_sector) % (2 * half_sector) - half_sector)
    length = np.hypot(x, y)
    tip, notch = 1.15 * radius, 0.52 * radius  # on the x axis, at the end of the half sector
    notch_x, notch_y = notch * math.cos(half_sector), notch * math.sin(half_sector)
    line = math.hypot(notch_y, tip - notch_x)
    normal_x, normal_y = notch_y / line, (tip - notch_x) / line
    return (length * np.cos(angle) - tip) * normal_x + length * np.sin(angle) * normal_y


def _ring(x: Array, y: Array, radius: float) -> Array:
    return np.abs(np.hypot(x, y) - 0.74 * radius) - 0.25 * radius


_THINGS: dict[str, Callable[[Array, Array, float], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
}


# -------------------------------------------------------------------------------------- noise


@lru_cache
def _pixels(size: int) -> tuple[Array, Array]:
    """y and x of the centre of every pixel, each (S, S)."""
    y, x = np.mgrid[:size, :size].astype(np.float32) + np.float32(0.5)
    return y, x


@lru_cache
def _spline(size: int, cells: int) -> tuple[NDArray[np.intp], Array]:
    """Cubic B-spline through ``cells`` cells along a side: first knot (S,) and weights (4, S)."""
    position = (np.arange(size) + 0.5) * cells / size
    knot = np.floor(position).astype(np.intp)
    t = np.abs(position - knot + 1 - np.arange(4)[:, None])
    weights = np.where(t < 1, 2 / 3 - t**2 + t**3 / 2, np.clip(2 - t, 0, None) ** 3 / 6)
    weights /= np.sqrt((weights**2).sum(axis=0).mean())  # noise keeps its variance, on average
    return knot, weights.astype(np.float32)


def _smooth_noise(rng: np.random.Generator, size: int, cells: int | tuple[int, int]) -> Array:
    """(S, S), normal noise of unit variance that varies ``cells`` times along (y, x)."""
    cells_y, cells_x = (cells, cells) if isinstance(cells, int) else cells
    noise = rng.standard_normal((cells_y + 3, cells_x + 3), dtype=np.float32)
    for cells_along in (cells_y, cells_x):  # not by matmul, whose bits depend on the threads
        knot, weights = _spline(size, cells_along)
        noise = sum(w[:, None] * noise[knot + k] for k, w in enumerate(weights)).T
    return noise


def _ramp(rng: np.random.Generator, size: int) -> Array:
    """(S, S), a plane that falls from 1 to -1 in a random direction."""
    y, x = _pixels(size)
    angle = rng.uniform(0, 2 * math.pi)
    return ((x - size / 2) * math.cos(angle) + (y - size / 2) * math.sin(angle)) * (2 / size)
