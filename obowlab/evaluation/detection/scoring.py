"""AP50, AP75 and AP of a detector, with intervals over images, and what PASCAL VOC's metric says of each detection."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from obowlab.evaluation.detection.judged import CURVE_OVERLAPS, OVERLAP, JudgedDetections, curve
from obowlab.evaluation.detection.voc_metric import OVERLAPS, Found, Truth, overlaps_with
from obowlab.evaluation.jackknife import all_but_one, measurement
from obowlab.evaluation.result import Measurement
from obowlab.randomness import Bools, Floats, Ints
from obowlab.runs.detection_facts import ClassCurves

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
    ordered = surest_first(found)
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


def surest_first(found: Sequence[Found]) -> list[Found]:
    """Return detections by falling score; equal scores keep their order."""
    return sorted(found, key=lambda one: -one.score)


def by_image(
    found: Mapping[str, Sequence[Found]], *, judged: Mapping[str, Judged], num_images: int
) -> tuple[JudgedDetections, ...]:
    """Return the judged detections of every image, as pictures show them.

    Args:
        found: of every class.
        judged: what `judge` says of them, of every class in the split's order.
        num_images: how many images were tested.
    """
    level = OVERLAPS.index(OVERLAP)
    ordered = {name: surest_first(each) for name, each in found.items()}
    images = np.concatenate([each.images for each in judged.values()])
    labels = np.repeat(np.arange(len(judged), dtype=np.int64), [len(each.images) for each in judged.values()])
    right, wrong = (np.concatenate([getattr(each, kind)[level] for each in judged.values()]) for kind in ("right", "wrong"))
    scores = np.array([one.score for name in judged for one in ordered[name]], dtype=np.float64)
    boxes = np.array([one.box for name in judged for one in ordered[name]], dtype=np.float64).reshape(-1, 4)
    boxes[:, :2] -= 1.0
    order = np.lexsort((-scores, images))
    ends = np.searchsorted(images[order], np.arange(num_images + 1))
    rows = [order[first:last] for first, last in itertools.pairwise(ends.tolist())]
    return tuple(JudgedDetections(boxes[each], labels[each], scores[each], right[each], wrong[each]) for each in rows)


def class_curves(judged: Mapping[str, Judged], *, num_images: int, recalls: Floats = POINTS) -> tuple[ClassCurves, ...]:
    """Return the curves of every class at the overlaps that the page shows.

    Args:
        judged: the detections of every class.
        num_images: how many images were tested.
        recalls: see `precisions`.
    """
    levels = [(OVERLAPS.index(overlap), overlap) for overlap in CURVE_OVERLAPS]
    found = []
    for name, each in judged.items():
        num_objects, average = int(each.objects.sum()), precisions(each, np.ones((1, num_images)), recalls=recalls)[:, 0]
        curves = tuple(
            curve(each.right[level], each.wrong[level], num_objects=num_objects, overlap=overlap, ap=float(average[level]))
            for level, overlap in levels
        )
        found.append(ClassCurves(name=name, num_objects=num_objects, curves=curves))
    return tuple(found)


def precisions(judged: Judged, weights: Floats, *, recalls: Floats = POINTS) -> Floats:
    """Return the average precision at every overlap, in percent, with images that count as often as weights say.

    Args:
        judged: the detections of a class.
        weights: [R, N].
        recalls: over which precision is averaged; VOC 2007's 11 if absent.

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
                places = np.searchsorted(recall[row], recalls, side="left")
                values[level, row] = 100.0 * best[row][places[places < best.shape[1]]].sum() / len(recalls)
    return values


def measure(
    judged: Mapping[str, Judged], *, num_images: int, name: str = "voc", recalls: Floats = POINTS
) -> tuple[tuple[Measurement, ...], dict[str, float]]:
    """Return `NAME_ap50`, `NAME_ap75` and `NAME_ap` over the classes that are shown, and the AP50 of each of them, in percent.

    Intervals and shares are as `jackknife` has them.

    Args:
        judged: the detections of every class.
        num_images: how many images were tested.
        name: that measurements begin with.
        recalls: see `precisions`.
    """
    once = np.ones((1, num_images))
    whole = _mean(judged, once, recalls=recalls)[:, 0]
    without = _without_each(judged, num_images=num_images, recalls=recalls)
    found = tuple(
        measurement(
            f"{name}_{ending}",
            float(whole[levels].mean()),
            without=without[levels].mean(axis=0),
        )
        for ending, levels in (("ap50", [0]), ("ap75", [5]), ("ap", list(range(len(OVERLAPS)))))
    )
    of_classes = {name: precisions(each, once, recalls=recalls)[0, 0] for name, each in judged.items() if each.objects.any()}
    return found, {name: float(value) for name, value in of_classes.items()}


def _mean(judged: Mapping[str, Judged], weights: Floats, *, recalls: Floats) -> Floats:
    """Return the mean over the classes that are shown, at every overlap, [T, R]."""
    shown = np.stack([weights @ each.objects > 0 for each in judged.values()])
    values = np.stack([precisions(each, weights, recalls=recalls) for each in judged.values()])
    mean: Floats = values.sum(axis=0) / np.maximum(shown.sum(axis=0), 1)  # a class that is not shown has 0
    return mean


def _without_each(judged: Mapping[str, Judged], *, num_images: int, recalls: Floats) -> Floats:
    """Return `_mean` without each of the images in turn, [T, N]."""
    total, shown = np.zeros((len(OVERLAPS), num_images)), np.zeros(num_images)
    for each in judged.values():
        values = np.repeat(precisions(each, np.ones((1, num_images)), recalls=recalls), num_images, axis=1)
        concerned = np.union1d(each.images, np.flatnonzero(each.objects))
        for own, weights in all_but_one(concerned, num_images=num_images):
            values[:, own] = precisions(each, weights, recalls=recalls)
        is_shown = each.objects.sum() - each.objects > 0
        total += values * is_shown
        shown += is_shown
    mean: Floats = total / np.maximum(shown, 1)
    return mean
