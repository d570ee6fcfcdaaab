"""Judge what a detector finds in test images as Detectron2 does for PASCAL VOC."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from obowlab.data.annotations import Annotation
from obowlab.evaluation.detection.judged import JudgedDetections
from obowlab.evaluation.detection.scoring import Judged, by_image, judge
from obowlab.evaluation.detection.voc_metric import Found, Truth, as_written
from obowlab.methods.detection.two_stage import Detections


@dataclass(frozen=True)
class VocTest:
    """What a detector finds in the N images of a split.

    Attributes:
        judged: the detections of every class.
        detections: those of every image, as pictures show them, [N].
    """

    judged: dict[str, Judged]
    detections: tuple[JudgedDetections, ...]


def judge_voc_images(found: Iterable[Detections], *, truths: Sequence[Annotation], class_names: tuple[str, ...]) -> VocTest:
    """Judge what was found in every image of a split, in order.

    Args:
        found: of every image.
        truths: what every image shows.
        class_names: of the split.
    """
    names = [f"{index:06d}" for index in range(len(truths))]
    by_class: dict[str, list[Found]] = {name: [] for name in class_names}
    for name, each in zip(names, found, strict=True):
        for box, label, score in zip(each.boxes.tolist(), each.labels.tolist(), each.scores.tolist(), strict=True):
            by_class[class_names[label]].append(as_written(name, score=score, box=box))
    shown: dict[str, dict[str, Truth]] = {name: {} for name in class_names}
    for name, annotation in zip(names, truths, strict=True):
        for label in set(annotation.labels.tolist()):
            own = annotation.labels == label
            shown[class_names[label]][name] = Truth(annotation.as_counted[own], annotation.difficult[own])
    judged = {name: judge(by_class[name], truths=shown[name], images=names) for name in class_names}
    return VocTest(judged, by_image(by_class, judged=judged, num_images=len(truths)))
