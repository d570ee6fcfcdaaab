"""The 95 % interval of a number that all N images of a test set make together, and each image's share of it, by jackknife.

Every image gets a share: the value plus the deviation of its pseudo-value from their mean (Efron and Tibshirani, "An introduction
to the bootstrap", chapter 11). The mean of the shares is the value, so runs can be compared on the same images, and 1.96 standard
errors of that mean on either side are the interval: of the value on other test images of the same world, as many of them. What
training adds to the spread is not in it. (A bootstrap would do worse: among images that are drawn twice an average precision is
too high, so that its percentiles miss the value that they are about.)
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from obowlab.evaluation.result import Z_95, Measurement
from obowlab.randomness import Floats, Ints
from obowlab.runs.results import pack_values

ROWS_AT_A_TIME = 20
"""Keeps tables of images and their detections small."""


def all_but_one(images: Ints, *, num_images: int) -> Iterator[tuple[Ints, Floats]]:
    """Yield a few of the images, [R], and a row for each of them, [R, N], in which all others count once and it does not."""
    for first in range(0, len(images), ROWS_AT_A_TIME):
        own = images[first : first + ROWS_AT_A_TIME]
        counts = np.ones((len(own), num_images))
        counts[np.arange(len(own)), own] = 0.0
        yield own, counts


def measurement(name: str, value: float, *, without: Floats) -> Measurement:
    """Return a value with its interval and shares.

    Args:
        name: of the measurement.
        value: percent.
        without: the value without each image, [N], two at least.
    """
    count = len(without)
    shares = value - (count - 1) * (without - without.mean())
    interval = Z_95 * float(shares.std(ddof=1)) / count**0.5
    return Measurement(name, value, interval, value - interval, value + interval, count=count, samples=pack_values(shares))
