"""Draw a folder laid out as PASCAL VOC 2007's, of the synthetic set's parts: for trying transfer without a download.

Each image shows one to four of 24 parts, which are its classes; one object in ten is drawn faint and marked as difficult. Lists,
marks and boxes are written as in VOC: boxes in pixels from 1, both ends included.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from obowlab.data import synthetic
from obowlab.data.drawing import drawn_into

NUM_IMAGES = {"trainval": 600, "test": 400}
CLASS_NAMES = tuple(name.replace(" ", "-") for name in synthetic.PARTS)

_STREAMS = {"trainval": 16, "test": 17}
_SIZES = ((40, 40), (40, 52), (52, 40))
"""Heights and widths; a scene's parts are as large as in the synthetic set."""


@dataclass(frozen=True)
class DrawnObject:
    """A part in an image: its class, whether it is faint, and its box (left, top, right, bottom), 1-based, ends included."""

    class_name: str
    is_difficult: bool
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class PlacedPart:
    """A part in an image.

    Attributes:
        number: of the part.
        is_faint: whether it hardly shows.
        at: x and y of its centre, pixels.
        radius: half of its side, pixels.
        turned: cosine and sine of the angle.
    """

    number: int
    is_faint: bool
    at: tuple[float, float]
    radius: float
    turned: tuple[float, float]


def draw_voc(folder: Path) -> Path:
    """Write FOLDER/VOC2007 and return it.

    Args:
        folder: is made; its VOC2007 must not be there.

    Raises:
        UserError: there is something already, or the disk refuses.
    """
    place = folder / "VOC2007"
    done = 0
    with drawn_into(place) as new:
        for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
            (new / name).mkdir(parents=True)
        for listed, count in NUM_IMAGES.items():
            shown: dict[str, list[DrawnObject]] = {}
            for index in range(count):
                image_id = f"{done:06d}"
                image, shown[image_id] = draw(listed, index=index)
                Image.fromarray(image).save(new / "JPEGImages" / f"{image_id}.jpg", quality=95, subsampling=0)
                _write_annotation(new / "Annotations" / f"{image_id}.xml", image, shown[image_id])
                done += 1
            _write_lists(new / "ImageSets" / "Main", listed=listed, shown=shown)
    return place


def draw(listed: str, *, index: int) -> tuple[NDArray[np.uint8], list[DrawnObject]]:
    """Return an image of a list, uint8 [H, W, 3], and what it shows; a function of the list and the index alone."""
    image, parts = draw_scene(_STREAMS[listed], index=index)
    height, width = image.shape[:2]
    objects = []
    for part in parts:  # its edges lie between pixels; VOC names the first and the last pixel, from 1
        left, top = (max(1, round(centre - part.radius) + 1) for centre in part.at)
        right, bottom = (min(end, round(centre + part.radius)) for centre, end in zip(part.at, (width, height), strict=True))
        objects.append(DrawnObject(CLASS_NAMES[part.number], part.is_faint, (left, top, right, bottom)))
    return image, objects


def draw_scene(stream: int, *, index: int, is_empty: bool = False) -> tuple[NDArray[np.uint8], list[PlacedPart]]:
    """Return an image, uint8 [H, W, 3], and where which parts are in it.

    Args:
        stream: of random numbers.
        index: of the image in it.
        is_empty: whether to show no part.
    """
    draws = synthetic.Draws(stream=stream, index=index)
    height, width = _SIZES[int(draws.one(0, len(_SIZES)))]
    side = max(height, width)
    canvas = synthetic.background(draws, side=side)[:height, :width]
    for _ in range(int(draws.one(0, 3))):
        synthetic.clutter(canvas, draws)
    slots = np.argsort(draws.many(4), kind="stable").tolist()[: 1 + int(draws.one(0, 4))]
    numbers = np.argsort(draws.many(len(CLASS_NAMES)), kind="stable").tolist()
    parts = []
    for slot, number in zip([] if is_empty else slots, numbers, strict=False):
        is_faint = draws.one() < 0.1
        at = ((0.26, 0.74)[slot % 2] * width + draws.one(-2, 2), (0.26, 0.74)[slot // 2] * height + draws.one(-2, 2))
        radius = draws.one(0.19, 0.235) * synthetic.IMAGE_SIZE
        colour = synthetic.light_colour(draws)
        if is_faint:
            colour = 0.7 * canvas.mean(axis=(0, 1)) + 0.3 * colour
        turned = synthetic.turn(draws.one(-0.25, 0.25))
        synthetic.paint(canvas, synthetic.SHAPES[number], at=at, radius=radius, turned=turned, colour=colour)
        parts.append(PlacedPart(number, is_faint, at, radius, turned))
    canvas = canvas + (draws.many(3, height, width, 3).sum(axis=0) - 1.5) * 0.02
    return np.rint(canvas.clip(0, 1) * 255).astype(np.uint8), parts


def _write_annotation(path: Path, image: NDArray[np.uint8], objects: list[DrawnObject]) -> None:
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = f"{path.stem}.jpg"
    size = ElementTree.SubElement(root, "size")
    for name, value in zip(("height", "width", "depth"), image.shape, strict=True):
        ElementTree.SubElement(size, name).text = str(value)
    for each in objects:
        node = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(node, "name").text = each.class_name
        ElementTree.SubElement(node, "difficult").text = str(int(each.is_difficult))
        box = ElementTree.SubElement(node, "bndbox")
        for name, value in zip(("xmin", "ymin", "xmax", "ymax"), each.box, strict=True):
            ElementTree.SubElement(box, name).text = str(value)
    ElementTree.indent(root)
    path.write_bytes(ElementTree.tostring(root))


def _write_lists(main: Path, *, listed: str, shown: dict[str, list[DrawnObject]]) -> None:
    (main / f"{listed}.txt").write_text("".join(f"{image_id}\n" for image_id in shown))
    for class_name in CLASS_NAMES:
        lines = []
        for image_id, objects in shown.items():
            of_class = [each.is_difficult for each in objects if each.class_name == class_name]
            mark = -1 if not of_class else int(not all(of_class))
            lines.append(f"{image_id} {mark:2d}\n")
        (main / f"{class_name}_{listed}.txt").write_text("".join(lines))
