"""The boxes of PASCAL VOC's annotation files: `Annotations/ID.xml`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from obowlab.data.annotations import Annotation
from obowlab.errors import UserError

LARGEST = 4 << 20
"""Bytes; the largest of VOC's files has some ten thousand."""

_SIDES = ("xmin", "ymin", "xmax", "ymax")


def read_annotation(path: Path, *, class_numbers: Mapping[str, int], size: tuple[int, int] | None = None) -> Annotation:
    """Read a file of boxes.

    Only children of `object` itself count: a person may hold parts with names and boxes of their own. VOC counts pixels from 1
    and includes both ends, so minima lose 1.

    Args:
        path: of the file.
        class_numbers: class name -> its number.
        size: height and width of the image, when it was decoded.

    Raises:
        UserError: it cannot be read, names another class, or has a box outside of the image or another size than the image.
    """
    root = _parse(path)
    height, width = (_number(root.find("size"), name, path=path) for name in ("height", "width"))
    if size is not None and (height, width) != size:
        raise UserError(
            f"{path} is of an image of {width:g} x {height:g} pixels, but the image has {size[1]} x {size[0]}: unpack both "
            "archives again."
        )
    boxes, labels, difficult = [], [], []
    for each in root.findall("object"):
        name = (each.findtext("name") or "").strip()
        if name not in class_numbers:
            raise UserError(f"{path} shows the class '{name}', which the lists in ImageSets/Main do not name.")
        x0, y0, x1, y1 = (_number(each.find("bndbox"), side, path=path) for side in _SIDES)
        if not (1 <= x0 <= x1 <= width and 1 <= y0 <= y1 <= height):
            box = ", ".join(f"{side:g}" for side in (x0, y0, x1, y1))
            raise UserError(f"{path} has a box ({box}) that is not within {width:g} x {height:g} pixels.")
        boxes.append((x0 - 1, y0 - 1, x1, y1))
        labels.append(class_numbers[name])
        difficult.append((each.findtext("difficult") or "0").strip() == "1")
    return Annotation(
        size=(int(height), int(width)),
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        labels=np.array(labels, dtype=np.int64),
        difficult=np.array(difficult, dtype=np.bool_),
    )


def _parse(path: Path) -> ElementTree.Element:
    try:
        content = path.read_bytes()[: LARGEST + 1]
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): unpack the archive of the annotations again.") from None
    if len(content) > LARGEST or b"<!" in content:  # entities, which may grow without end
        raise UserError(f"{path} is no annotation file of VOC: unpack the archive again.")
    try:
        return ElementTree.fromstring(content)
    except ElementTree.ParseError as error:
        raise UserError(f"{path} is damaged ({error}): unpack the archive of the annotations again.") from None


def _number(parent: ElementTree.Element | None, name: str, *, path: Path) -> float:
    """Return a number as a float: two of VOC 2012's files have fractions of pixels."""
    text = None if parent is None else parent.findtext(name)
    try:
        value = float(text or "")
    except ValueError:
        raise UserError(f"{path} has no number for '{name}': unpack the archive of the annotations again.") from None
    if not np.isfinite(value):
        raise UserError(f"{path} has {value} for '{name}': unpack the archive of the annotations again.")
    return value
