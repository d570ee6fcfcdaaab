"""Run a detector over test images, one at a time, as Detectron2's test of PASCAL VOC does."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from obowlab.config import Detector
from obowlab.data.boxes import read_boxes
from obowlab.evaluation.detection.scoring import Judged, judge
from obowlab.evaluation.detection.voc_metric import Found, Truth, as_written
from obowlab.evaluation.features import frozen
from obowlab.methods.detection.boxes import clip, has_area
from obowlab.methods.detection.faster_rcnn import FasterRcnn
from obowlab.views.detection_views import View, resized, show
from obowlab.views.photometric import normalise
from obowlab.views.pil_views import decode

if TYPE_CHECKING:
    from obowlab.data.datasets import Split

REPORT_EVERY_S = 10.0


@dataclass(frozen=True)
class Pixels:
    """Mean and deviation of the pixels that an encoder is used to."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def judge_all(
    detector: FasterRcnn,
    *,
    split: Split,
    config: Detector,
    pixels: Pixels,
    device: torch.device,
    workers: int,
    report: Callable[[str], None],
) -> dict[str, Judged]:
    """Return the judged detections of every class on all images of a split.

    Args:
        detector: on the device.
        split: prepared images with boxes.
        config: sizes of the test.
        pixels: that images are normalised by.
        device: where to compute.
        workers: threads that decode.
        report: called with a line now and then.

    Raises:
        UserError: a record cannot be decoded, or there are no boxes.
    """
    annotations = read_boxes(split)
    names = [f"{index:06d}" for index in range(split.num_images)]
    found: dict[str, list[Found]] = {name: [] for name in split.class_names}
    last = time.monotonic()
    with frozen(detector):
        for index, shown in enumerate(_images(split, config=config, workers=workers)):
            images = normalise(shown[None], device=device, mean=pixels.mean, std=pixels.std).contiguous()
            (detections,) = detector.detect(images, sizes=[(shown.shape[0], shown.shape[1])])
            height, width = annotations[index].size
            scale = detections.boxes.new_tensor([width / shown.shape[1], height / shown.shape[0]] * 2)
            boxes = clip(detections.boxes * scale, size=(height, width))
            kept = has_area(boxes)
            for box, label, score in zip(
                boxes[kept].tolist(), detections.labels[kept].tolist(), detections.scores[kept].tolist(), strict=True
            ):
                found[split.class_names[label]].append(as_written(names[index], score=score, box=box))
            if time.monotonic() - last > REPORT_EVERY_S:
                last = time.monotonic()
                report(f"voc-detection: {index + 1}/{split.num_images} images")
    truths: dict[str, dict[str, Truth]] = {name: {} for name in split.class_names}
    for name, annotation in zip(names, annotations, strict=True):
        for label in set(annotation.labels.tolist()):
            own = annotation.labels == label
            truths[split.class_names[label]][name] = Truth(annotation.as_counted[own], annotation.difficult[own])
    return {name: judge(found[name], truths=truths[name], images=names) for name in split.class_names}


def _images(split: Split, *, config: Detector, workers: int) -> Iterator[Tensor]:
    """Yield the images of a split as they are tested, uint8 [H, W, 3], decoded ahead by threads."""
    waiting: deque[Future[Tensor]] = deque()
    with ThreadPoolExecutor(max(1, workers)) as pool:
        try:
            for index in range(split.num_images):
                waiting.append(pool.submit(_read, split, config, index))
                if len(waiting) > 2 * max(1, workers):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _read(split: Split, config: Detector, index: int) -> Tensor:
    image = decode(split, index)
    size = resized((image.height, image.width), side=config.test_side, longest=config.longest)
    return torch.from_numpy(show(image, view=View(size, flipped=False)))
