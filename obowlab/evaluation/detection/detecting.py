"""Run a detector over test images, one at a time, as Detectron2's tests do."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from obowlab.config import Detector
from obowlab.evaluation.features import frozen
from obowlab.methods.detection.boxes import clip, has_area
from obowlab.methods.detection.two_stage import Detections, TwoStageDetector
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


def detect_all(
    detector: TwoStageDetector,
    *,
    split: Split,
    config: Detector,
    pixels: Pixels,
    device: torch.device,
    workers: int,
    report: Callable[[str], None],
) -> Iterator[Detections]:
    """Yield what is found in every image of a split, in the image's own pixels and on the CPU.

    Args:
        detector: on the device.
        split: prepared images.
        config: sizes of the test.
        pixels: that images are normalised by.
        device: where to compute.
        workers: threads that decode.
        report: called with a line now and then.

    Raises:
        UserError: a record cannot be decoded.
    """
    last = time.monotonic()
    with frozen(detector):
        for index, shown in enumerate(_images(split, config=config, workers=workers)):
            images = normalise(shown[None], device=device, mean=pixels.mean, std=pixels.std).contiguous()
            (found,) = detector.detect(images, sizes=[(shown.shape[0], shown.shape[1])])
            height, width = int(split.heights[index]), int(split.widths[index])
            scale = found.boxes.new_tensor([width / shown.shape[1], height / shown.shape[0]] * 2)
            yield _kept(replace(found, boxes=clip(found.boxes * scale, size=(height, width))))
            if time.monotonic() - last > REPORT_EVERY_S:
                last = time.monotonic()
                report(f"test of the detector: {index + 1}/{split.num_images} images")


def _kept(found: Detections) -> Detections:
    """Return the detections whose boxes have an area, on the CPU."""
    kept = has_area(found.boxes)
    masks = None if found.masks is None else found.masks[kept].cpu()
    return Detections(found.boxes[kept].cpu(), found.labels[kept].cpu(), found.scores[kept].cpu(), masks)


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
