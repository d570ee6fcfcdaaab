"""PASCAL VOC's detection metric as Detectron2 computes it for VOC 2007: 11 points, at ten overlaps.

Coordinates are the annotation files': pixels from 1, both ends included, so a box is x1 - x0 + 1 wide. Detections are rounded as
Detectron2 writes them: scores to three decimals, coordinates to one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

OVERLAPS = tuple(percent / 100 for percent in range(50, 100, 5))


@dataclass(frozen=True)
class Truth:
    """The objects of one class in an image.

    Attributes:
        boxes: float64 [G, 4], as in the annotation file.
        difficult: bool [G]; such an object neither helps nor hurts.
    """

    boxes: Floats
    difficult: npt.NDArray[np.bool_]


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


def average_precision(found: Sequence[Found], *, truths: Mapping[str, Truth], overlap: float) -> float:
    """Return the 11-point average precision of one class, in percent.

    A detection counts when its overlap with the object that it overlaps most with is *greater* than `overlap`, and no surer one
    has that object already. Equal scores keep their order.

    Args:
        found: of all images.
        truths: of every image that shows the class.
        overlap: from 0 to 1.
    """
    num_objects = sum(int((~truth.difficult).sum()) for truth in truths.values())
    taken = {image: np.zeros(len(truth.boxes), dtype=np.bool_) for image, truth in truths.items()}
    right, wrong = np.zeros(len(found)), np.zeros(len(found))
    for place, each in enumerate(sorted(found, key=lambda one: -one.score)):
        truth = truths.get(each.image)
        overlaps = overlaps_with(each.box, truth.boxes) if truth is not None and len(truth.boxes) else np.zeros(0)
        best = int(overlaps.argmax()) if len(overlaps) else -1
        if truth is None or best < 0 or overlaps[best] <= overlap:
            wrong[place] = 1.0
        elif not truth.difficult[best]:
            (wrong if taken[each.image][best] else right)[place] = 1.0
            taken[each.image][best] = True
    return eleven_points(np.cumsum(right), np.cumsum(wrong), num_objects=num_objects)


def eleven_points(right: Floats, wrong: Floats, *, num_objects: int) -> float:
    """Return the mean over recalls of 0, 0.1, ..., 1 of the best precision at that recall or more, in percent.

    Args:
        right: how many of the surest detections are right, for 1, 2, ... of them.
        wrong: how many are wrong.
        num_objects: that there are to find; 0 gives 0.
    """
    if not num_objects or not len(right):
        return 0.0
    recall, precision = right / num_objects, right / np.maximum(right + wrong, np.finfo(np.float64).eps)
    best = [float(precision[recall >= point].max(initial=0.0)) for point in np.arange(0.0, 1.1, 0.1)]
    return 100.0 * sum(best) / 11


def overlaps_with(box: Sequence[float], boxes: Floats) -> Floats:
    """Return intersection over union of a box and others [G, 4], by pixels counted with both ends."""
    ours = np.asarray(box, dtype=np.float64)
    low, high = np.maximum(boxes[:, :2], ours[:2]), np.minimum(boxes[:, 2:], ours[2:])
    shared = np.maximum(high - low + 1.0, 0.0).prod(axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2] + 1.0).prod(axis=1)
    found: Floats = shared / (areas + (ours[2:] - ours[:2] + 1.0).prod() - shared)
    return found
