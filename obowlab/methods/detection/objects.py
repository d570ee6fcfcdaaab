"""What an image shows a detector, and where."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Objects:
    """What an image shows and where, in the pixels of the image as the network sees it.

    Attributes:
        boxes: x0, y0, x1, y1 in continuous coordinates, float [G, 4].
        labels: int64 [G].
        size: height and width of the image without its padding.
    """

    boxes: Tensor
    labels: Tensor
    size: tuple[int, int]
