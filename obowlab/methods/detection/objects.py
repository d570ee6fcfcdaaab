"""What an image shows a detector, and where."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

Polygons = tuple[npt.NDArray[np.float64], ...]
"""The outline of an object: closed polygons x0, y0, x1, y1, ..., [2 P] each; what lies in one of them belongs to the object."""


@dataclass(frozen=True)
class Objects:
    """What an image shows and where, in the pixels of the image as the network sees it.

    Attributes:
        boxes: x0, y0, x1, y1 in continuous coordinates, float [G, 4].
        labels: int64 [G].
        size: height and width of the image without its padding.
        outlines: of every object, where they are known.
    """

    boxes: Tensor
    labels: Tensor
    size: tuple[int, int]
    outlines: tuple[Polygons, ...] = ()
