"""COCO's metric: pycocotools says which detections are right, and images may count several times in what is made of it.

Precision is taken at 101 recalls, at ten overlaps; crowds neither help nor hurt; coordinates are continuous.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from obowlab.data.annotations import Annotation
from obowlab.evaluation.detection.scoring import Judged

Kind = Literal["bbox", "segm"]

RECALLS = np.linspace(0.0, 1.0, 101)
MAX_DETECTIONS = 100

_SIZES = ("small", "medium", "large")
_SUMMARY = ("ap", "ap50", "ap75", *(f"ap_{size}" for size in _SIZES), "ar1", "ar10", "ar100", *(f"ar_{size}" for size in _SIZES))


@dataclass(frozen=True)
class Sighting:
    """A detection.

    Attributes:
        image: its number, from 0.
        label: of the class, from 0.
        score: from 0 to 1.
        box: x0, y0, x1, y1 in continuous coordinates.
        mask: its pixels, as pycocotools encodes them; None where there are none.
    """

    image: int
    label: int
    score: float
    box: tuple[float, float, float, float]
    mask: Mapping[str, Any] | None = None


def evaluated(sightings: Sequence[Sighting], *, truths: Sequence[Annotation], num_classes: int, kind: Kind) -> Any:
    """Return pycocotools' COCOeval after its evaluation of all images; None where nothing was found.

    Args:
        sightings: of all images.
        truths: what every image shows.
        num_classes: that there are.
        kind: of what is compared, boxes or masks.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if not sightings:
        return None
    truth = COCO()
    truth.dataset = {
        "images": [{"id": number, "height": each.size[0], "width": each.size[1]} for number, each in enumerate(truths)],
        "categories": [{"id": number} for number in range(num_classes)],
        "annotations": _objects(truths),
    }
    found = [
        {
            "image_id": each.image,
            "category_id": each.label,
            "score": each.score,
            **({"bbox": _as_sides(each.box)} if kind == "bbox" else {"segmentation": each.mask}),
        }
        for each in sightings
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # it tells of its progress
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(found), kind)
        evaluation.evaluate()
    return evaluation


def judge_coco(evaluation: Any, *, truths: Sequence[Annotation], num_classes: int) -> list[Judged]:
    """Return the judged detections of every class, of objects of all sizes.

    Args:
        evaluation: as `evaluated` returns it.
        truths: what every image shows.
        num_classes: that there are.
    """
    objects = np.zeros((num_classes, len(truths)), dtype=np.int64)
    for number, each in enumerate(truths):
        own = ~np.array([outline.is_crowd for outline in each.outlines], dtype=np.bool_)
        np.add.at(objects[:, number], each.labels[own], 1)
    if evaluation is None:
        nothing = np.zeros((len(_overlaps()), 0), dtype=np.bool_)
        return [Judged(np.zeros(0, dtype=np.int64), nothing, nothing, each) for each in objects]
    sizes, images = len(evaluation.params.areaRng), len(evaluation.params.imgIds)
    return [
        _judged(evaluation.evalImgs[label * sizes * images : label * sizes * images + images], objects=objects[label])
        for label in range(num_classes)
    ]


def summary(evaluation: Any) -> dict[str, float]:
    """Return average precision and recall of objects of several sizes as pycocotools computes them, in percent.

    A size without objects is left out.
    """
    if evaluation is None:
        return {}
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.accumulate()
        evaluation.summarize()
    return {name: 100.0 * float(value) for name, value in zip(_SUMMARY, evaluation.stats, strict=True) if value >= 0}


def _judged(of_images: Sequence[Mapping[str, Any] | None], *, objects: Any) -> Judged:
    """Return the judged detections of a class from what pycocotools says of every image."""
    shown = [(number, each) for number, each in enumerate(of_images) if each is not None and len(each["dtScores"])]
    if not shown:
        nothing = np.zeros((len(_overlaps()), 0), dtype=np.bool_)
        return Judged(np.zeros(0, dtype=np.int64), nothing, nothing, objects)
    images = np.concatenate([np.full(len(each["dtScores"][:MAX_DETECTIONS]), number) for number, each in shown])
    scores = np.concatenate([each["dtScores"][:MAX_DETECTIONS] for _, each in shown])
    matched = np.concatenate([each["dtMatches"][:, :MAX_DETECTIONS] for _, each in shown], axis=1) != 0
    ignored = np.concatenate([each["dtIgnore"][:, :MAX_DETECTIONS] for _, each in shown], axis=1) != 0
    order = np.argsort(-scores, kind="stable")
    return Judged(
        images=images[order].astype(np.int64),
        right=(matched & ~ignored)[:, order],
        wrong=(~matched & ~ignored)[:, order],
        objects=objects,
    )


def _objects(truths: Sequence[Annotation]) -> list[dict[str, Any]]:
    """Return what images show as COCO's annotation files have it, numbered from 1."""
    found: list[dict[str, Any]] = []
    for number, each in enumerate(truths):
        height, width = each.size
        for box, label, outline in zip(each.boxes.tolist(), each.labels.tolist(), each.outlines, strict=True):
            shape = (
                [points.tolist() for points in outline.polygons]
                if outline.counts is None
                else {"counts": outline.counts.tolist(), "size": [height, width]}
            )
            found.append(
                {
                    "id": len(found) + 1,
                    "image_id": number,
                    "category_id": label,
                    "bbox": _as_sides(box),
                    "area": outline.area,
                    "iscrowd": int(outline.is_crowd),
                    "segmentation": shape,
                }
            )
    return found


def _as_sides(box: Sequence[float]) -> list[float]:
    x0, y0, x1, y1 = box
    return [x0, y0, x1 - x0, y1 - y0]


def _overlaps() -> tuple[float, ...]:
    return tuple(np.linspace(0.5, 0.95, 10).tolist())
