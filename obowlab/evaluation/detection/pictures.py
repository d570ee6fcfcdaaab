"""Pictures of a detector's test and its curves: which images are shown, what is drawn into them, and what is written of them.

Nothing here knows a metric: whoever judges detections says of each whether it is right, and hands over the curves of every class.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from obowlab import __version__
from obowlab.data.annotations import Annotation
from obowlab.errors import UserError
from obowlab.evaluation.detection.judged import OVERLAP, SCORE, JudgedDetections
from obowlab.pages.detection import keep_detection
from obowlab.randomness import Bools, Floats, Stream, uniforms
from obowlab.runs.detection_facts import (
    DETECTION_FORMAT,
    Box,
    ClassCurves,
    DetectionFacts,
    Groups,
    Picture,
    ShownDetection,
    ShownObject,
    Verdict,
)
from obowlab.runs.folder import RunFolder
from obowlab.views.pil_views import decode

if TYPE_CHECKING:
    from obowlab.data.datasets import Split

NUM_PICTURES = 12
"""Of each group."""

PICTURES_LANE = 8
"""Keeps the draw of pictures apart from those of episodes and probes, the lower lanes of the same stream."""

LONGEST = 480
"""Longer side of every picture, pixels: large images are shrunk, and small ones enlarged so that their boxes can be seen."""

JPEG_QUALITY = 85
LINE, HALO = 3, 2
DASH_LINE, DASH, GAP = 2, 7, 6
FONT_SIZE = 13

BLACK, WHITE = (0, 0, 0), (255, 255, 255)
COLOURS: dict[Verdict, tuple[int, int, int]] = {"right": (0, 114, 178), "wrong": (213, 94, 0), "neither": (110, 110, 110)}
"""Told apart by those who do not see all colours as well (Okabe and Ito); the page names them."""


@dataclass(frozen=True)
class Counts:
    """What the sure detections of one image are worth.

    Attributes:
        right: how many are right.
        wrong: how many are wrong.
        missed: how many objects none of them found; see `is_left_out`.
    """

    right: int
    wrong: int
    missed: int

    @property
    def f1(self) -> float | None:
        """Harmonic mean of precision and recall; None of an image without objects to find."""
        if not self.right + self.missed:
            return None
        return 2 * self.right / (2 * self.right + self.wrong + self.missed)


def show_detections(
    split: Split,
    *,
    detections: Sequence[JudgedDetections],
    truths: Sequence[Annotation],
    classes: Sequence[ClassCurves],
    metric: str,
    title: str,
    folder: RunFolder,
) -> None:
    """Choose images, draw their boxes, and write them with curves, facts and page into the folder of the training.

    Args:
        split: the N images that were tested.
        detections: of every image, [N].
        truths: of every image, [N].
        classes: curves of every class, in the split's order.
        metric: what the curves' AP is, in words.
        title: of the training's recipe.
        folder: of the training whose detector it is.

    Raises:
        UserError: an image cannot be decoded, or the folder not be written to.
    """
    counts = [count(found, truth=truth) for found, truth in zip(detections, truths, strict=True)]
    best, worst, random = choose(counts)
    images = list(dict.fromkeys((*best, *worst, *random)))
    pictures, files = [], {}
    for image in images:
        objects, found = _objects(truths[image]), _detected(detections[image])
        drawn = draw(decode(split, image), objects=objects, detections=found)
        name = f"{image:06d}.jpg"
        files[name] = _jpeg(drawn)
        pictures.append(
            Picture(
                file=name,
                image=image,
                width=drawn.width,
                height=drawn.height,
                f1=counts[image].f1,
                right=counts[image].right,
                wrong=counts[image].wrong,
                missed=counts[image].missed,
                objects=objects,
                detections=found,
            )
        )
    place = {image: number for number, image in enumerate(images)}
    facts = DetectionFacts(
        format=DETECTION_FORMAT,
        run_id=folder.run_id,
        title=title,
        version=__version__,
        dataset=split.dataset,
        split=split.name,
        num_images=split.num_images,
        num_with_objects=sum(each.f1 is not None for each in counts),
        metric=metric,
        score=SCORE,
        overlap=OVERLAP,
        classes=tuple(classes),
        pictures=tuple(pictures),
        groups=Groups(
            best=tuple(place[image] for image in best),
            worst=tuple(place[image] for image in worst),
            random=tuple(place[image] for image in random),
        ),
    )
    try:
        keep_detection(facts, pictures=files, run=folder.path)
    except OSError as error:
        raise UserError(
            f"Cannot write the pictures of the detector's test to {folder.path}: {error.strerror or error}."
        ) from None


def count(detections: JudgedDetections, *, truth: Annotation) -> Counts:
    """Return what the sure detections of an image are worth."""
    right, wrong = (int((verdict & detections.sure).sum()) for verdict in (detections.right, detections.wrong))
    return Counts(right, wrong, missed=int((~is_left_out(truth)).sum()) - right)


def is_left_out(truth: Annotation) -> Bools:
    """Return which objects of an image need not be found: difficult ones of PASCAL VOC and crowds of COCO, bool [G]."""
    crowds = [each.is_crowd for each in truth.outlines] or [False] * len(truth.labels)
    return truth.difficult | np.array(crowds, dtype=np.bool_)


def choose(counts: Sequence[Counts]) -> tuple[list[int], list[int], list[int]]:
    """Return the images to show: the best, the worst and random ones, at most `NUM_PICTURES` of each.

    Best and worst are images with objects to find, by their F1: of equally good ones those with more right detections come first,
    of equally bad ones those with more mistakes, then the lower number. No image is among both. Random ones are of all images, a
    function of their number alone.

    Args:
        counts: of every image.
    """
    f1 = {image: each.f1 for image, each in enumerate(counts) if each.f1 is not None}
    by_merit = sorted(f1, key=lambda image: (-f1[image], -counts[image].right, image))
    best = by_merit[: min(NUM_PICTURES, (len(by_merit) + 1) // 2)]
    rest = by_merit[len(best) :]
    worst = sorted(rest, key=lambda image: (f1[image], -counts[image].wrong - counts[image].missed, image))[:NUM_PICTURES]
    numbers = np.arange(len(counts), dtype=np.int64)
    chance = uniforms(seed=0, epoch=0, indices=numbers, stream=Stream.EPISODES, count=1, lane=PICTURES_LANE)[:, 0]
    return best, worst, np.argsort(chance, kind="stable")[:NUM_PICTURES].tolist()


def draw(image: Image.Image, *, objects: Sequence[ShownObject], detections: Sequence[ShownDetection]) -> Image.Image:
    """Return a picture of an image: predicted boxes solid, in the colour of their verdict and with a number, true ones dashed.

    Args:
        image: RGB.
        objects: true boxes.
        detections: predicted boxes; the first has the number 1.
    """
    scale = LONGEST / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    finest = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
    picture = image.resize((width, height), finest)
    canvas, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT_SIZE)
    places = [_place(each.box, scale=scale, size=picture.size) for each in detections]
    for each, (x0, y0, x1, y1) in zip(detections, places, strict=True):
        canvas.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=BLACK, width=LINE + HALO)
        canvas.rectangle((x0, y0, x1, y1), outline=COLOURS[each.verdict], width=LINE)
    for true in objects:
        _dashed(canvas, _place(true.box, scale=scale, size=picture.size))
    for number, (each, (x0, y0, _, _)) in enumerate(zip(detections, places, strict=True), start=1):
        tag = str(number)
        wide, high = round(canvas.textlength(tag, font=font)) + 6, FONT_SIZE + 4
        left, top = max(0, min(x0, width - wide)), max(0, y0 - high)
        canvas.rectangle((left, top, left + wide - 1, top + high - 1), fill=COLOURS[each.verdict])
        canvas.text((left + 3, top), tag, fill=WHITE, font=font)
    return picture


def _place(box: Box, *, scale: float, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the first and last column and row of a box in the picture: x0, y0, x1, y1."""
    x0, y0 = (min(max(round(value * scale), 0), side - 1) for value, side in zip(box[:2], size, strict=True))
    x1, y1 = (min(max(round(value * scale) - 1, 0), side - 1) for value, side in zip(box[2:], size, strict=True))
    return x0, y0, max(x0, x1), max(y0, y1)


def _dashed(canvas: ImageDraw.ImageDraw, place: tuple[int, int, int, int]) -> None:
    x0, y0, x1, y1 = place
    thick, step = DASH_LINE - 1, DASH + GAP
    dashes = [(x, y, min(x + DASH - 1, x1), y + thick) for y in (y0, y1 - thick) for x in range(x0, x1 + 1, step)]
    dashes += [(x, y, x + thick, min(y + DASH - 1, y1)) for x in (x0, x1 - thick) for y in range(y0, y1 + 1, step)]
    for left, top, right, bottom in dashes:
        canvas.rectangle((left - 1, top - 1, right + 1, bottom + 1), fill=BLACK)
    for dash in dashes:
        canvas.rectangle(dash, fill=WHITE)


def _objects(truth: Annotation) -> tuple[ShownObject, ...]:
    return tuple(
        ShownObject(label=label, difficult=difficult, box=_box(box))
        for box, label, difficult in zip(truth.boxes, truth.labels.tolist(), is_left_out(truth).tolist(), strict=True)
    )


def _detected(detections: JudgedDetections) -> tuple[ShownDetection, ...]:
    return tuple(
        ShownDetection(
            label=int(detections.labels[row]),
            score=float(detections.scores[row]),
            verdict="right" if detections.right[row] else "wrong" if detections.wrong[row] else "neither",
            box=_box(detections.boxes[row]),
        )
        for row in np.flatnonzero(detections.sure)
    )


def _box(sides: Floats) -> Box:
    x0, y0, x1, y1 = (round(side, 1) for side in sides.tolist())
    return x0, y0, x1, y1


def _jpeg(picture: Image.Image) -> bytes:
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return content.getvalue()
