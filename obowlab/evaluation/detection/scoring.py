"""AP50, AP75 and AP of a detector on VOC 2007's test images, with intervals from resampled images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from obowlab.evaluation.detection.voc_metric import OVERLAPS, Floats, Found, Truth, overlaps_with
from obowlab.evaluation.result import Measurement
from obowlab.randomness import Bools, Ints, Stream, uniforms
from obowlab.runs.results import pack_values

RESAMPLES = 200
ROWS_AT_A_TIME = 20
BOOTSTRAP_LANE = 3
"""Keeps the draws apart from those of episodes, probes and SVMs, lanes 0 to 2 of the same stream."""

POINTS = np.arange(0.0, 1.1, 0.1)


@dataclass(frozen=True)
class Judged:
    """The detections of a class, the surest first.

    Attributes:
        images: number of the image of every detection, [D].
        right: whether it is right at every overlap, [T, D].
        wrong: whether it is wrong, [T, D]; on a difficult object it is neither.
        objects: how many there are to find in every image, [N].
    """

    images: Ints
    right: Bools
    wrong: Bools
    objects: Ints


def judge(found: Sequence[Found], *, truths: Mapping[str, Truth], images: Sequence[str]) -> Judged:
    """Say of every detection of a class whether it is right, at every overlap.

    Args:
        found: of all images.
        truths: of every image that shows the class.
        images: names of all test images.
    """
    number = {name: place for place, name in enumerate(images)}
    ordered = sorted(found, key=lambda one: -one.score)
    right, wrong = (np.zeros((len(OVERLAPS), len(ordered)), dtype=np.bool_) for _ in range(2))
    taken = {image: np.zeros((len(OVERLAPS), len(truth.boxes)), dtype=np.bool_) for image, truth in truths.items()}
    levels = np.array(OVERLAPS)
    for place, each in enumerate(ordered):
        truth = truths.get(each.image)
        if truth is None or not len(truth.boxes):
            wrong[:, place] = True
            continue
        overlaps = overlaps_with(each.box, truth.boxes)
        best = int(overlaps.argmax())
        enough = overlaps[best] > levels
        wrong[:, place] = ~enough
        if not truth.difficult[best]:
            right[:, place] = enough & ~taken[each.image][:, best]
            wrong[:, place] |= enough & taken[each.image][:, best]
            taken[each.image][:, best] |= enough
    objects = np.zeros(len(images), dtype=np.int64)
    for image, truth in truths.items():
        objects[number[image]] = int((~truth.difficult).sum())
    return Judged(np.array([number[each.image] for each in ordered], dtype=np.int64), right, wrong, objects)


def precisions(judged: Judged, weights: Floats) -> Floats:
    """Return the 11-point average precision at every overlap, in percent, with images that count as often as weights say.

    Args:
        judged: the detections of a class.
        weights: [R, N].

    Returns:
        [T, R].
    """
    num_objects = weights @ judged.objects
    values = np.zeros((len(OVERLAPS), len(weights)))
    if not len(judged.images):
        return values
    of_detections = weights[:, judged.images]
    for level in range(len(OVERLAPS)):
        right = np.cumsum(of_detections * judged.right[level], axis=1)
        wrong = np.cumsum(of_detections * judged.wrong[level], axis=1)
        recall = np.divide(right, num_objects[:, None], out=np.zeros_like(right), where=num_objects[:, None] > 0)
        precision = right / np.maximum(right + wrong, np.finfo(np.float64).eps)
        best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        for row in range(len(weights)):
            if num_objects[row]:
                places = np.searchsorted(recall[row], POINTS, side="left")
                values[level, row] = 100.0 * best[row][places[places < best.shape[1]]].sum() / len(POINTS)
    return values


def measure(judged: Mapping[str, Judged], *, num_images: int) -> tuple[tuple[Measurement, ...], dict[str, float]]:
    """Return `voc_ap50`, `voc_ap75` and `voc_ap` over classes, and the AP50 of every class, in percent.

    The intervals are those of other test images from the same world: the 2.5 and 97.5 percentiles of `RESAMPLES` draws of as many
    images with replacement. For comparisons of runs every image has a share in the value, as `evaluation.svm` has it.

    Args:
        judged: the detections of every class.
        num_images: how many images were tested.
    """
    once = np.ones((1, num_images))
    whole = np.mean([precisions(each, once)[:, 0] for each in judged.values()], axis=0)
    drawn = np.concatenate([_mean(judged, rows) for rows in _resamples(num_images)], axis=1)
    without = np.concatenate([_mean(judged, rows) for rows in _all_but_one(num_images)], axis=1)
    found = []
    for name, levels in (("voc_ap50", [0]), ("voc_ap75", [5]), ("voc_ap", list(range(len(OVERLAPS))))):
        value = float(whole[levels].mean())
        low, high = (float(end) for end in np.percentile(drawn[levels].mean(axis=0), (2.5, 97.5)))
        left_out = without[levels].mean(axis=0)
        shares = value - (num_images - 1) * (left_out - left_out.mean())
        found.append(Measurement(name, value, (high - low) / 2.0, low, high, count=num_images, samples=pack_values(shares)))
    return tuple(found), {name: float(precisions(each, once)[0, 0]) for name, each in judged.items()}


def _mean(judged: Mapping[str, Judged], weights: Floats) -> Floats:
    """Return the mean over classes at every overlap, [T, R]."""
    mean: Floats = np.mean([precisions(each, weights) for each in judged.values()], axis=0)
    return mean


def _resamples(num_images: int) -> Iterator[Floats]:
    images = np.arange(num_images, dtype=np.int64)
    for first in range(0, RESAMPLES, ROWS_AT_A_TIME):
        rows = np.empty((min(ROWS_AT_A_TIME, RESAMPLES - first), num_images))
        for place in range(len(rows)):
            chance = uniforms(seed=0, epoch=first + place, indices=images, stream=Stream.EPISODES, count=1, lane=BOOTSTRAP_LANE)[
                :, 0
            ]
            rows[place] = np.bincount((chance * num_images).astype(np.int64), minlength=num_images)
        yield rows


def _all_but_one(num_images: int) -> Iterator[Floats]:
    for first in range(0, num_images, ROWS_AT_A_TIME):
        rows = np.ones((min(ROWS_AT_A_TIME, num_images - first), num_images))
        rows[np.arange(len(rows)), first + np.arange(len(rows))] = 0.0
        yield rows
