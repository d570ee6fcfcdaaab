"""Test a detector on COCO's images: boxes and masks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from obowlab.data.annotations import Annotation
from obowlab.evaluation.detection.coco_metric import Kind, Sighting, evaluated, judge_coco, summary
from obowlab.evaluation.detection.judged import JudgedDetections
from obowlab.evaluation.detection.scoring import Judged, by_image
from obowlab.evaluation.detection.voc_metric import Found
from obowlab.methods.detection.masks import put_into_image
from obowlab.methods.detection.two_stage import Detections

KINDS: dict[str, Kind] = {"coco_box": "bbox", "coco_mask": "segm"}
"""What measurements begin with, and what pycocotools calls it."""


@dataclass(frozen=True)
class CocoTest:
    """What a detector finds in the N images of a split.

    Attributes:
        judged: the detections of every class, of boxes and of masks, by the names of `KINDS`.
        summaries: what pycocotools says of objects of all sizes, by the same names.
        detections: of every image, as pictures show them, by their boxes, [N].
    """

    judged: dict[str, dict[str, Judged]]
    summaries: dict[str, dict[str, float]]
    detections: tuple[JudgedDetections, ...]


def judge_coco_images(found: Iterable[Detections], *, truths: Sequence[Annotation], class_names: tuple[str, ...]) -> CocoTest:
    """Judge what was found in every image of a split, in order.

    Args:
        found: of every image, with masks.
        truths: what every image shows.
        class_names: of the split.
    """
    whole = list(truths)
    sightings = [each for image, one in enumerate(found) for each in sightings_in(one, image=image, size=whole[image].size)]
    judged, summaries = {}, {}
    for name, kind in KINDS.items():
        evaluation = evaluated(sightings, truths=whole, num_classes=len(class_names), kind=kind)
        of_classes = judge_coco(evaluation, truths=whole, num_classes=len(class_names))
        judged[name] = dict(zip(class_names, of_classes, strict=True))
        summaries[name] = summary(evaluation)
    by_class: dict[str, list[Found]] = {name: [] for name in class_names}
    for each in sightings:
        x0, y0, x1, y1 = each.box
        by_class[class_names[each.label]].append(Found(str(each.image), each.score, (x0 + 1.0, y0 + 1.0, x1, y1)))
    return CocoTest(judged, summaries, by_image(by_class, judged=judged["coco_box"], num_images=len(whole)))


def sightings_in(found: Detections, *, image: int, size: tuple[int, int]) -> list[Sighting]:
    """Return the detections of an image, with the pixels of their masks.

    Args:
        found: in the image's own pixels.
        image: its number.
        size: its height and width.
    """
    from pycocotools import mask

    assert found.masks is not None, "of a network that learns masks"
    pixels = put_into_image(found.masks, boxes=found.boxes, size=size).numpy().astype(np.uint8)
    encoded = mask.encode(np.asfortranarray(pixels.transpose(1, 2, 0))) if len(pixels) else []
    sightings = []
    for box, label, score, each in zip(found.boxes.tolist(), found.labels.tolist(), found.scores.tolist(), encoded, strict=True):
        sightings.append(Sighting(image, label, score, (box[0], box[1], box[2], box[3]), each))
    return sightings


def objects_of(truths: Sequence[Annotation]) -> list[list[float]]:
    """Return what identifies the objects of every image: boxes, classes, areas and crowds."""
    return [_numbers(each) for each in truths]


def _numbers(annotation: Annotation) -> list[float]:
    outlines = [number for each in annotation.outlines for number in (each.area, float(each.is_crowd))]
    return [*annotation.boxes.reshape(-1).tolist(), *annotation.labels.tolist(), *outlines]
