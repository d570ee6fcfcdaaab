"""Draw the synthetic data set: small scenes of recurring parts, for trying everything without a download.

There are 24 parts: textures such as rows, checks or rings, and shapes such as a disc or a star. A class is a combination of
four of them in a loose layout; two classes share at most two parts, so no part alone tells the class. Everything else is drawn
anew for every image and says nothing about it: colours, a patchy ground, clutter, place, size and turn of the scene and of each
part, a part that is missing or covered. What a network has to find are the parts and which of them go together: what a bag of
visual words describes.

Nothing else is the same all over an image. Version 1 drew a lightness, a tint, stripes and a noise level for each image. A crop
foretells these of its image as well as it foretells parts, so a network could lower its loss without learning a class, and by
seed and rounding it did (docs/results/small-scales.md).

Every number is drawn by a counter-based generator keyed by (version, split, image), so an image never depends on another one.
Only exactly rounded arithmetic is used; the JPEG bytes are those of the installed JPEG library, so the content hash is recorded
where the set is drawn.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from obowlab.data.beton import Record

NAME = "synthetic"
SYNTHETIC_VERSION = 2
"""Raise it when any pixel changes: what was drawn before is then drawn again."""

NUM_CLASSES = 60
IMAGE_SIZE = 40
IMAGES_PER_CLASS = {"train": 90, "val": 20}
PARTS_PER_CLASS = 4

CLASS_NAMES: tuple[str, ...] = tuple(f"class_{label:02}" for label in range(NUM_CLASSES))

_JPEG_QUALITY = 95
_LIGHTNESS = 0.26  # of the ground, the same in every image
_CLASSES_STREAM = 2
_STREAMS = {"train": 0, "val": 1}

Plane = NDArray[np.float64]


def num_images(split: str) -> int:
    """Return the number of images of a split."""
    return NUM_CLASSES * IMAGES_PER_CLASS[split]


def records(split: str) -> Iterator[Record]:
    """Yield the images of a split, class by class, as RGB JPEG of 40x40 pixels."""
    for index in range(num_images(split)):
        buffer = io.BytesIO()
        Image.fromarray(draw(split, index=index)).save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
        label = index // IMAGES_PER_CLASS[split]
        yield Record(label=label, jpeg=buffer.getvalue(), height=IMAGE_SIZE, width=IMAGE_SIZE)


class Draws:
    """Uniform numbers of one image (or of the class table), each drawn once and in order."""

    def __init__(self, *, stream: int, index: int) -> None:
        key = np.array([SYNTHETIC_VERSION << 32 | stream, index], np.uint64)
        self._generator = np.random.Philox(key=key)
        self._ready: list[float] = []

    def many(self, *shape: int) -> Plane:
        """Return float64 in [0, 1), from raw bits: numpy guarantees these never change."""
        raw = self._generator.random_raw(math.prod(shape)).reshape(shape)
        uniforms: Plane = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return uniforms

    def one(self, low: float = 0.0, high: float = 1.0) -> float:
        """Return one number in [low, high)."""
        if not self._ready:  # one call for many: numpy's overhead would cost more than the drawing
            self._ready = self.many(128).tolist()
        return low + (high - low) * self._ready.pop()


# ----------------------------------------------------------------------------------------------------------------- parts
# A part is a signed distance (negative inside) over the square [-1, 1]^2, v downwards, symmetric left to right: a flip keeps it.


def _box(u: Plane, v: Plane, half_width: float, half_height: float) -> Plane:
    return np.maximum(np.abs(u) - half_width, np.abs(v) - half_height)


def _disc(u: Plane, v: Plane, radius: float) -> Plane:
    return np.sqrt(u * u + v * v) - radius


def _triangle(u: Plane, v: Plane) -> Plane:
    return np.maximum((2.0 * np.abs(u) - v - 0.75) / 2.236, v - 0.75)


def _any(*distances: Plane) -> Plane:
    nearest: Plane = np.minimum.reduce(distances)
    return nearest


def _star(u: Plane, v: Plane) -> Plane:
    diagonal_u, diagonal_v = (u + v) * 0.7071, (u - v) * 0.7071
    four = np.abs(u) + np.abs(v) + 2.2 * np.minimum(np.abs(u), np.abs(v))
    eight = np.abs(diagonal_u) + np.abs(diagonal_v) + 2.2 * np.minimum(np.abs(diagonal_u), np.abs(diagonal_v))
    return _any(four - 1.0, eight - 0.85) / 1.6


def _bars(t: Plane, period: float) -> Plane:
    """Return stripes across `t`, half of each period filled; one lies over t = 0."""
    return np.abs(t - period * np.floor(t / period + 0.5)) - 0.25 * period


def _grid(a: Plane, b: Plane) -> Plane:
    return np.minimum(a, b) + 0.06


def _checks(a: Plane, b: Plane) -> Plane:
    return np.minimum(np.maximum(a, b), np.maximum(-a, -b))


def _spots(u: Plane, v: Plane, period: float) -> Plane:
    near_u, near_v = u - period * np.floor(u / period + 0.5), v - period * np.floor(v / period + 0.5)
    return np.sqrt(near_u * near_u + near_v * near_v) - 0.34 * period


def silhouette(u: Plane, v: Plane) -> Plane:
    """Return the rounded square that textures are cut out of."""
    return np.maximum(_box(u, v, 0.88, 0.88), _disc(u, v, 1.1))


def _patch(texture: Callable[[Plane, Plane], Plane]) -> Callable[[Plane, Plane], Plane]:
    """Return a texture cut out in the shape of a rounded square."""

    def part(u: Plane, v: Plane) -> Plane:
        return np.maximum(texture(u, v), silhouette(u, v))

    return part


_FINE, _COARSE = 0.46, 0.8

PARTS: dict[str, Callable[[Plane, Plane], Plane]] = {
    "fine rows": _patch(lambda u, v: _bars(v, _FINE)),
    "coarse rows": _patch(lambda u, v: _bars(v, _COARSE)),
    "fine columns": _patch(lambda u, v: _bars(u, _FINE)),
    "coarse columns": _patch(lambda u, v: _bars(u, _COARSE)),
    "fine checks": _patch(lambda u, v: _checks(_bars(u, 2 * _FINE), _bars(v, 2 * _FINE))),
    "coarse checks": _patch(lambda u, v: _checks(_bars(u, 2 * _COARSE), _bars(v, 2 * _COARSE))),
    "fine spots": _patch(lambda u, v: _spots(u, v, _FINE)),
    "coarse spots": _patch(lambda u, v: _spots(u, v, _COARSE)),
    "fine grid": _patch(lambda u, v: _grid(_bars(u, _FINE), _bars(v, _FINE))),
    "coarse grid": _patch(lambda u, v: _grid(_bars(u, _COARSE), _bars(v, _COARSE))),
    "fine lattice": _patch(lambda u, v: _grid(_bars((u + v) * 0.7071, _FINE), _bars((u - v) * 0.7071, _FINE))),
    "coarse lattice": _patch(lambda u, v: _grid(_bars((u + v) * 0.7071, _COARSE), _bars((u - v) * 0.7071, _COARSE))),
    "fine rings": _patch(lambda u, v: _bars(np.sqrt(u * u + v * v), _FINE)),
    "coarse rings": _patch(lambda u, v: _bars(np.sqrt(u * u + v * v), _COARSE)),
    "fine roofs": _patch(lambda u, v: _bars((v - np.abs(u)) * 0.7071, _FINE)),
    "coarse roofs": _patch(lambda u, v: _bars((v - np.abs(u)) * 0.7071, _COARSE)),
    "fine valleys": _patch(lambda u, v: _bars((v + np.abs(u)) * 0.7071, _FINE)),
    "coarse valleys": _patch(lambda u, v: _bars((v + np.abs(u)) * 0.7071, _COARSE)),
    "disc": lambda u, v: _disc(u, v, 0.8),
    "ring": lambda u, v: np.abs(_disc(u, v, 0.66)) - 0.19,
    "plus": lambda u, v: _any(_box(u, v, 0.9, 0.24), _box(u, v, 0.24, 0.9)),
    "cross": lambda u, v: _any(
        _box((u + v) * 0.7071, (u - v) * 0.7071, 1.0, 0.24), _box((u + v) * 0.7071, (u - v) * 0.7071, 0.24, 1.0)
    ),
    "triangle": _triangle,
    "star": _star,
}
SHAPES = tuple(PARTS.values())


_COMBINATIONS = (((0, 1, 3, 9), 1), ((0, 1, 5, 12), 1), ((0, 2, 5, 15), 2))
"""Parts of the first class of a family and the step to the next one, modulo 24. Found by search: few classes share two parts.

Neighbouring parts resemble each other, and families put neighbours together. It helps a short training: after 840 steps of 64
images, one run each, 5-shot accuracy of 50 classes was 19 percent, and 8 with the parts shuffled (6 before training).
"""


@cache
def class_parts() -> tuple[tuple[int, ...], ...]:
    """Return for every class its parts, in the order of the layout's places (upper left, upper right, lower left, lower right).

    Every part is used by ten classes, and two classes share at most two parts.
    """
    draws = Draws(stream=_CLASSES_STREAM, index=0)
    classes = []
    for first, step in _COMBINATIONS:
        for shift in range(0, len(PARTS), step):
            places = np.argsort(draws.many(PARTS_PER_CLASS), kind="stable")
            classes.append(tuple((first[place] + shift) % len(PARTS) for place in places.tolist()))
    assert len(classes) == NUM_CLASSES
    return tuple(classes)


# ---------------------------------------------------------------------------------------------------------------- images


def draw(split: str, *, index: int) -> NDArray[np.uint8]:
    """Return one image, uint8 [40, 40, 3]; its class is `index // IMAGES_PER_CLASS[split]`."""
    draws = Draws(stream=_STREAMS[split], index=index)
    parts = class_parts()[index // IMAGES_PER_CLASS[split]]
    canvas = background(draws)
    for _ in range(int(draws.one(0, 3))):
        clutter(canvas, draws)
    _scene(canvas, draws, parts)
    if draws.one() < 0.1:
        _cover(canvas, draws)
    noise = draws.many(3, IMAGE_SIZE, IMAGE_SIZE, 3).sum(axis=0) - 1.5  # nearly normal, standard deviation 0.5
    canvas += noise * 0.02
    image: NDArray[np.uint8] = np.rint(canvas.clip(0, 1) * 255).astype(np.uint8)
    return image


def _scene(canvas: Plane, draws: Draws, parts: tuple[int, ...]) -> None:
    """Draw the parts of a class: the scene is mirrored, shifted, turned and scaled, then each part on its own."""
    side = len(canvas)
    scale = draws.one(0.82, 1.08)
    cos, sin = turn(draws.one(-0.25, 0.25))
    centre_u, centre_v = draws.one(0.43, 0.57), draws.one(0.43, 0.57)
    missing = int(draws.one(0, 4)) if draws.one() < 0.1 else None
    mirrored = -1 if draws.one() < 0.5 else 1
    shared_colour = light_colour(draws)
    for place, part in enumerate(parts):
        slot_u = mirrored * (-1, 1)[place % 2] * 0.235 + draws.one(-0.045, 0.045)
        slot_v = (-1, 1)[place // 2] * 0.235 + draws.one(-0.045, 0.045)
        at = (centre_u + scale * (cos * slot_u - sin * slot_v), centre_v + scale * (sin * slot_u + cos * slot_v))
        colour = shared_colour if draws.one() < 0.5 else light_colour(draws)
        size = scale * draws.one(0.19, 0.235)
        turned = turn(draws.one(-0.25, 0.25))
        if place != missing:
            paint(canvas, SHAPES[part], at=(at[0] * side, at[1] * side), radius=size * side, turned=turned, colour=colour)


def background(draws: Draws, *, side: int = IMAGE_SIZE) -> Plane:
    """Return a patchy ground [side, side, 3]."""
    return _LIGHTNESS + draws.one(0.03, 0.08) * (_smooth(draws.many(5, 5, 3), side) - 0.5)


def clutter(canvas: Plane, draws: Draws) -> None:
    """Draw a bar or a blot that is no part."""
    side = len(canvas)
    half_width, half_height = draws.one(0.15, 0.9), draws.one(0.08, 0.25)
    colour = _LIGHTNESS + draws.one(-0.15, 0.2) + (draws.many(3) - 0.5) * 0.15
    at = (draws.one() * side, draws.one() * side)
    turned = turn(draws.one(-3.2, 3.2))
    paint(
        canvas,
        lambda u, v: _box(u, v, half_width, half_height),
        at=at,
        radius=draws.one(0.1, 0.3) * side,
        turned=turned,
        colour=colour,
    )


def _cover(canvas: Plane, draws: Draws) -> None:
    """Cover a rectangle with one colour."""
    side = len(canvas)
    height, width = int(draws.one(0.12, 0.3) * side), int(draws.one(0.12, 0.3) * side)
    top, left = int(draws.one() * (side - height)), int(draws.one() * (side - width))
    canvas[top : top + height, left : left + width] = 0.1 + 0.5 * draws.one() + (draws.many(3) - 0.5) * 0.2


def light_colour(draws: Draws) -> Plane:
    """Return a colour lighter than the ground: hue at random, so that colour says nothing about the class."""
    return (_LIGHTNESS + draws.one(0.45, 0.55) + (draws.many(3) - 0.5) * 0.12).clip(0, 1)


def paint(
    canvas: Plane,
    shape: Callable[[Plane, Plane], Plane],
    *,
    at: tuple[float, float],
    radius: float,
    turned: tuple[float, float],
    colour: Plane,
) -> None:
    """Blend a shape into the canvas with smooth edges; `at` is (x, y) in pixels, `turned` its (cosine, sine)."""
    height, width = canvas.shape[:2]
    reach = radius * 1.5
    left, right = max(0, int(at[0] - reach)), min(width, int(at[0] + reach) + 1)
    top, bottom = max(0, int(at[1] - reach)), min(height, int(at[1] + reach) + 1)
    if left >= right or top >= bottom:
        return
    x = (np.arange(left, right) + 0.5 - at[0])[None, :] / radius
    y = (np.arange(top, bottom) + 0.5 - at[1])[:, None] / radius
    cos, sin = turned
    distance = shape(cos * x + sin * y, cos * y - sin * x)
    cover = (0.5 - distance * radius).clip(0, 1)[:, :, None]
    window = canvas[top:bottom, left:right]
    window += cover * (colour - window)


def _smooth(grid: Plane, side: int) -> Plane:
    """Return a grid [g, g, 3] interpolated to [side, side, 3]."""
    place = np.arange(side) * ((len(grid) - 1) / side)
    low = place.astype(np.int64)
    weight = (place - low)[:, None, None]
    rows = grid[low] * (1 - weight) + grid[low + 1] * weight
    weight = weight.reshape(1, side, 1)
    smooth: Plane = rows[:, low] * (1 - weight) + rows[:, low + 1] * weight
    return smooth


def turn(angle: float) -> tuple[float, float]:
    """Return cosine and sine, rounded so that mathematical libraries agree about them."""
    return round(math.cos(angle), 9), round(math.sin(angle), 9)
