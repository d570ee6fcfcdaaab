"""What a metric says of a detector's findings, image by image and as curves: what scores hand over and pictures show."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from obowlab.randomness import Bools, Floats, Ints
from obowlab.runs.detection_facts import Curve

SCORE = 0.5
"""That a detection needs to be drawn, and to count in an image's F1."""

OVERLAP = 0.5
"""At which a detection is right in pictures."""

CURVE_OVERLAPS = (0.5, 0.75)
MOST_POINTS = 100
"""Of a curve."""


@dataclass(frozen=True)
class JudgedDetections:
    """The D detections of one image, the surest first.

    Attributes:
        boxes: float64 [D, 4], x0, y0, x1, y1 in pixels of the image, in continuous coordinates from 0.
        labels: int64 [D], positions among the class names.
        scores: float64 [D], from 0 to 1.
        right: whether it is right at `OVERLAP`, bool [D].
        wrong: whether it is wrong there, bool [D]; on an object that is left out it is neither.
    """

    boxes: Floats
    labels: Ints
    scores: Floats
    right: Bools
    wrong: Bools

    @property
    def sure(self) -> Bools:
        """Which have a score of `SCORE` or more."""
        sure: Bools = self.scores >= SCORE
        return sure


def curve(right: Bools, wrong: Bools, *, num_objects: int, overlap: float, ap: float) -> Curve:
    """Return precision over recall after each right detection; of more than `MOST_POINTS` as many, evenly spread, both ends too.

    Args:
        right: of a class's detections at this overlap, the surest first, [D].
        wrong: likewise.
        num_objects: that there are to find.
        overlap: from 0 to 1.
        ap: average precision there, percent.
    """
    hits = np.flatnonzero(right)
    if len(hits) > MOST_POINTS:
        hits = hits[np.linspace(0, len(hits) - 1, MOST_POINTS).round().astype(np.int64)]
    num_right, num_wrong = (np.cumsum(each.astype(np.float64))[hits] for each in (right, wrong))
    recall, precision = num_right / max(num_objects, 1), num_right / np.maximum(num_right + num_wrong, 1.0)
    return Curve(overlap=overlap, ap=round(ap, 4), recall=_rounded(recall), precision=_rounded(precision))


def _rounded(shares: Floats) -> tuple[float, ...]:
    return tuple(round(share, 5) for share in shares.tolist())
