"""What a detector sees of an image: its size in training and test, the flip, and where its boxes are then."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

Floats = npt.NDArray[np.float64]

SMALLEST_SIDE = 1e-5
"""Boxes whose sides are not longer are dropped, pixels."""


@dataclass(frozen=True)
class View:
    """How an image is shown.

    Attributes:
        size: height and width, pixels.
        flipped: left to right.
    """

    size: tuple[int, int]
    flipped: bool


def resized(size: tuple[int, int], *, side: int, longest: int) -> tuple[int, int]:
    """Return height and width of an image whose shorter side becomes `side`, and whose longer one at most `longest`."""
    scale = side / min(size)
    height, width = (side * 1.0, scale * size[1]) if size[0] < size[1] else (scale * size[0], side * 1.0)
    if max(height, width) > longest:
        shrink = longest / max(height, width)
        height, width = height * shrink, width * shrink
    return math.floor(height + 0.5), math.floor(width + 0.5)


def train_view(size: tuple[int, int], *, uniforms: Floats, sides: tuple[int, ...], longest: int) -> View:
    """Return how an image is shown in a training step.

    Args:
        size: its height and width.
        uniforms: two numbers in [0, 1): of the side and of the flip.
        sides: of which one is drawn for the shorter side.
        longest: of the longer side.
    """
    side = sides[int(uniforms[0] * len(sides))]
    return View(resized(size, side=side, longest=longest), flipped=bool(uniforms[1] < 0.5))


def show(image: Image.Image, *, view: View) -> npt.NDArray[np.uint8]:
    """Return the pixels of an RGB image in a view, uint8 [H, W, 3]: PIL's bilinear filter, then the flip."""
    height, width = view.size
    pixels = np.array(image.resize((width, height), Image.Resampling.BILINEAR))
    return np.ascontiguousarray(pixels[:, ::-1]) if view.flipped else pixels


def moved(boxes: Floats, *, size: tuple[int, int], view: View) -> Floats:
    """Return the boxes of an image in a view, cut off at its edges, [G, 4].

    Args:
        boxes: [G, 4] in the pixels of the image.
        size: height and width of the image.
        view: of it.
    """
    (height, width), (to_height, to_width) = size, view.size
    scale = np.array([to_width / width, to_height / height] * 2)
    found = boxes * scale
    if view.flipped:
        found = np.stack((to_width - found[:, 2], found[:, 1], to_width - found[:, 0], found[:, 3]), axis=1)
    limit = np.array([to_width, to_height] * 2, dtype=np.float64)
    clipped: Floats = np.clip(found, 0.0, limit)
    return clipped


def moved_points(points: Floats, *, size: tuple[int, int], view: View) -> Floats:
    """Return the points of a polygon, x0, y0, x1, y1, ..., of an image in a view, [2 P]; they may lie outside of it."""
    (height, width), (to_height, to_width) = size, view.size
    found = points.reshape(-1, 2) * np.array([to_width / width, to_height / height])
    if view.flipped:
        found[:, 0] = to_width - found[:, 0]
    flat: Floats = found.reshape(-1)
    return flat


def is_kept(boxes: Floats) -> npt.NDArray[np.bool_]:
    """Return which boxes [G, 4] are trained on, bool [G]."""
    kept: npt.NDArray[np.bool_] = (boxes[:, 2:] - boxes[:, :2]).min(axis=1) > SMALLEST_SIDE
    return kept
