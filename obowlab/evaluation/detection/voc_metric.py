"""PASCAL VOC's detection metric as Detectron2 computes it for VOC 2007: 11 points, at ten overlaps.

Coordinates are the annotation files': pixels from 1, both ends included, so a box is x1 - x0 + 1 wide. Detections are rounded as
Detectron2 writes them: scores to three decimals, coordinates to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from obowlab.randomness import Bools, Floats

OVERLAPS = tuple(percent / 100 for percent in range(50, 100, 5))


@dataclass(frozen=True)
class Truth:
    """The objects of one class in an image.

    Attributes:
        boxes: float64 [G, 4], as in the annotation file.
        difficult: bool [G]; such an object neither helps nor hurts.
    """

    boxes: Floats
    difficult: Bools


@dataclass(frozen=True)
class Found:
    """A detection of one class.

    Attributes:
        image: its name.
        score: from 0 to 1.
        box: x0, y0, x1, y1 as in an annotation file.
    """

    image: str
    score: float
    box: tuple[float, float, float, float]


def as_written(image: str, *, score: float, box: Sequence[float]) -> Found:
    """Return a detection as Detectron2 would have written it.

    Args:
        image: its name.
        score: from 0 to 1.
        box: in continuous coordinates from 0.
    """
    x0, y0, x1, y1 = (float(f"{value + shift:.1f}") for value, shift in zip(box, (1, 1, 0, 0), strict=True))
    return Found(image, float(f"{score:.3f}"), (x0, y0, x1, y1))


def overlaps_with(box: Sequence[float], boxes: Floats) -> Floats:
    """Return intersection over union of a box and others [G, 4], by pixels counted with both ends."""
    ours = np.asarray(box, dtype=np.float64)
    low, high = np.maximum(boxes[:, :2], ours[:2]), np.minimum(boxes[:, 2:], ours[2:])
    shared = np.maximum(high - low + 1.0, 0.0).prod(axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2] + 1.0).prod(axis=1)
    found: Floats = shared / (areas + (ours[2:] - ours[:2] + 1.0).prod() - shared)
    return found
