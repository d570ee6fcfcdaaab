"""What an image shows and where, as annotation files have it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Outline:
    """The outline of an object.

    Attributes:
        polygons: closed ones, x0, y0, x1, y1, ..., float64 [2 P] each; what lies in one of them belongs to the object.
        counts: of a crowd, in place of polygons: how many pixels in turn are outside and inside, column by column, int64.
        area: of the object, pixels, as its file says.
    """

    polygons: tuple[Floats, ...]
    counts: npt.NDArray[np.int64] | None
    area: float

    @property
    def is_crowd(self) -> bool:
        """Whether it stands for many objects; a detector neither learns it nor has to find it."""
        return self.counts is not None

    @property
    def drawn(self) -> tuple[Floats, ...]:
        """The polygons that have an inside: at least three points."""
        return tuple(each for each in self.polygons if len(each) >= 6 and len(each) % 2 == 0)


@dataclass(frozen=True)
class Annotation:
    """What an image shows.

    Attributes:
        size: height and width of the image, pixels.
        boxes: float64 [G, 4], x0, y0, x1, y1 in continuous coordinates.
        labels: int64 [G], positions among the class names.
        difficult: bool [G]; such objects of PASCAL VOC are trained on and left out of the score.
        outlines: of every object; none of PASCAL VOC's.
    """

    size: tuple[int, int]
    boxes: Floats
    labels: npt.NDArray[np.int64]
    difficult: Flags
    outlines: tuple[Outline, ...] = ()

    @property
    def as_counted(self) -> Floats:
        """The boxes as PASCAL VOC's files have them, pixels from 1 with both ends."""
        boxes: Floats = self.boxes + np.array([1.0, 1.0, 0.0, 0.0])
        return boxes

    @property
    def is_trained_on(self) -> Flags:
        """Which objects a detector learns, bool [G]: no crowds, and none whose outline has no inside."""
        if not self.outlines:
            return np.ones(len(self.labels), dtype=np.bool_)
        return np.array([not each.is_crowd and len(each.drawn) > 0 for each in self.outlines], dtype=np.bool_)


Annotate = Callable[[tuple[int, int]], Annotation]
"""Reads what an image of a height and width shows, and refuses another size."""
