"""The 95 % interval of a number that all N images of a test set make together, by bootstrap, and each image's share by jackknife.

The interval is that of other test images from the same world: its ends are the 2.5 and 97.5 percentiles of draws of as many
images with replacement. What training adds to the spread is not in it.

So that runs can be compared on the same images, every image gets a share whose mean is the value: the value plus its jackknife
pseudo-value's deviation from their mean (Efron and Tibshirani, "An introduction to the bootstrap", chapter 11).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from obowlab.evaluation.result import Measurement
from obowlab.randomness import Floats, Ints, Stream, uniforms
from obowlab.runs.results import pack_values

ROWS_AT_A_TIME = 20
"""Keeps tables of images and their detections small."""


def resamples(num_images: int, *, count: int, lane: int) -> Iterator[Floats]:
    """Yield how often each image is drawn, [R, N], for a few resamples at a time; pure in the number of the resample.

    Args:
        num_images: N.
        count: of resamples.
        lane: keeps the draws apart from those of episodes and probes, lanes 0 and 1 of the same stream, and of other protocols.
    """
    images = np.arange(num_images, dtype=np.int64)
    for numbers in _some_at_a_time(np.arange(count)):
        counts = np.empty((len(numbers), num_images))
        for place, number in enumerate(numbers.tolist()):
            chance = uniforms(seed=0, epoch=number, indices=images, stream=Stream.EPISODES, count=1, lane=lane)[:, 0]
            counts[place] = np.bincount((chance * num_images).astype(np.int64), minlength=num_images)
        yield counts


def all_but_one(images: Ints, *, num_images: int) -> Iterator[tuple[Ints, Floats]]:
    """Yield a few of the images, [R], and a row for each of them, [R, N], in which all others count once and it does not."""
    for own in _some_at_a_time(images):
        counts = np.ones((len(own), num_images))
        counts[np.arange(len(own)), own] = 0.0
        yield own, counts


def measurement(name: str, value: float, *, drawn: Floats, without: Floats) -> Measurement:
    """Return a value with its interval and shares.

    Args:
        name: of the measurement.
        value: percent.
        drawn: the value of each resample.
        without: the value without each image, [N].
    """
    low, high = (float(end) for end in np.percentile(drawn, (2.5, 97.5)))
    shares = value - (len(without) - 1) * (without - without.mean())
    return Measurement(name, value, (high - low) / 2.0, low, high, count=len(without), samples=pack_values(shares))


def _some_at_a_time(numbers: Ints) -> Iterator[Ints]:
    return (numbers[first : first + ROWS_AT_A_TIME] for first in range(0, len(numbers), ROWS_AT_A_TIME))
