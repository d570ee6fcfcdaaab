"""COCO's folders: photographs with boxes and outlines of objects of 80 classes (Lin et al. 2014).

`annotations/instances_train2017.json` and `instances_val2017.json` say what the images of `train2017/` and `val2017/` show.
Numbers of categories have gaps; classes are in the order of these numbers. Images without an object stay: a test counts what is
found there.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from obowlab.data.annotations import Annotate, Annotation, Outline
from obowlab.data.sources import ABSENT, DIFFICULT, PRESENT, Source, SourceImage, SourceSplit
from obowlab.errors import UserError

_FILE = re.compile(r"instances_(train|val)(.*)\.json")
_PLACES = (".", "annotations", "coco", "coco/annotations")
_SPLITS = ("train", "val")


def find_coco(path: Path) -> Path | None:
    """Return the folder of annotation files that `path` is or holds; None when there is none."""
    found = (path / place for place in _PLACES)
    return next((folder for folder in found if folder.is_dir() and any(_files(folder))), None)


def read_coco(path: Path, *, annotations: Path) -> Source:
    """List the images of COCO in the order of their numbers.

    Args:
        path: what `--source` names.
        annotations: the folder of annotation files, as `find_coco` returns it.

    Raises:
        UserError: a file or an image is missing or damaged, or there are several years.
    """
    found: dict[str, Path] = {}
    for split, file in _files(annotations):
        if split in found:
            raise UserError(f"{annotations} has {found[split].name} and {file.name}: leave the files of one year there.")
        found[split] = file
    if lacking := [split for split in _SPLITS if split not in found]:
        raise UserError(f"{annotations} has no instances_{lacking[0]}2017.json: unpack the archive of the annotations again.")
    contents = {split: _Content(found[split]) for split in _SPLITS}
    if contents["train"].classes != contents["val"].classes:
        raise UserError(f"{found['train']} and {found['val'].name} name other categories: unpack the archive again.")
    splits = tuple(_split(name, contents[name], path=path, annotations=annotations) for name in _SPLITS)
    note = f"boxes and outlines of {len(contents['train'].classes)} classes; {found['train'].stem} becomes train, val stays val"
    return Source(path=path, splits=splits, num_ignored=0, num_hidden=0, notes=(note,))


class _Content:
    """What an annotation file says.

    Attributes:
        path: of the file.
        classes: number of a category -> its name, in the order of the numbers.
        images: number, name, height and width of every image, in the order of the numbers.
        objects: of every image by its number.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            content = json.loads(path.read_bytes())
            self.classes = {int(each["id"]): str(each["name"]) for each in sorted(content["categories"], key=lambda c: c["id"])}
            self.images = sorted(
                (int(each["id"]), str(each["file_name"]), int(each["height"]), int(each["width"])) for each in content["images"]
            )
            self.objects: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
            for each in content["annotations"]:
                self.objects[int(each["image_id"])].append(each)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): unpack the archive of the annotations again.") from None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{path} is no annotation file of COCO: unpack the archive of the annotations again.") from None
        self._places = {category: place for place, category in enumerate(self.classes)}
        numbers = {number for number, *_ in self.images}
        if not self.images or len(numbers) < len(self.images) or len(self.classes) < 2:
            self._refuse("has no image, an image twice, or less than two categories")
        if strangers := [number for number in self.objects if number not in numbers]:
            self._refuse(f"has objects of the image {strangers[0]}, which it does not name")

    def annotation(self, number: int, size: tuple[int, int]) -> Annotation:
        """Return what an image shows.

        Raises:
            UserError: an object is damaged.
        """
        boxes, labels, outlines = [], [], []
        for each in self.objects.get(number, ()):
            try:
                x, y, width, height = (float(side) for side in each["bbox"])
                labels.append(self._places[int(each["category_id"])])
                outlines.append(_outline(each, size=size))
            except (KeyError, TypeError, ValueError):
                self._refuse(f"has an object of the image {number} without a box, a known category or an outline")
            boxes.append((x, y, x + width, y + height))
        found = np.array(boxes, dtype=np.float64).reshape(-1, 4)
        if not np.isfinite(found).all():
            self._refuse(f"has a box of the image {number} that is not finite")
        return Annotation(
            size=size,
            boxes=found,
            labels=np.array(labels, dtype=np.int64),
            difficult=np.zeros(len(labels), dtype=np.bool_),
            outlines=tuple(outlines),
        )

    def _refuse(self, problem: str) -> NoReturn:
        raise UserError(f"{self.path} {problem}: unpack the archive of the annotations again.")


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the annotation files of a folder with their splits."""
    for file in sorted(folder.glob("instances_*.json")):
        if (parts := _FILE.fullmatch(file.name)) is not None:
            yield parts[1], file


def _split(name: str, content: _Content, *, path: Path, annotations: Path) -> SourceSplit:
    folder_name = content.path.stem.removeprefix("instances_")
    roots = (annotations.parent, annotations, path)
    folder = next((root / folder_name for root in roots if (root / folder_name).is_dir()), None)
    if folder is None:
        raise UserError(f"--source {path} has {content.path.name}, but no folder {folder_name}: unpack its images beside it.")
    images, absent = [], []
    targets = tuple(_marks(content.objects.get(number, ()), classes=list(content.classes)) for number, *_ in content.images)
    for (_, file_name, _, _), marks in zip(content.images, targets, strict=True):
        file = folder / file_name
        try:
            size = file.stat().st_size
        except OSError:
            absent.append(file_name)
            continue
        images.append(SourceImage(label=max(0, marks.find(PRESENT)), name=file_name, path=str(file), offset=0, size=size))
    if absent:
        raise UserError(
            f"{folder} lacks {len(absent)} of the {len(content.images)} images of {content.path.name}, such as {absent[0]}: "
            "unpack the archive again."
        )
    return SourceSplit(
        name=name,
        class_names=tuple(content.classes.values()),
        images=tuple(images),
        targets=targets,
        annotations=tuple(_reader(content, image) for image in content.images),
    )


def _reader(content: _Content, image: tuple[int, str, int, int]) -> Annotate:
    number, file_name, height, width = image

    def annotate(size: tuple[int, int]) -> Annotation:
        if size != (height, width):
            raise UserError(
                f"{content.path} says that {file_name} has {width} x {height} pixels, but it has {size[1]} x {size[0]}: "
                "unpack both archives again."
            )
        return content.annotation(number, size)

    return annotate


def _marks(objects: Sequence[Mapping[str, Any]], *, classes: Sequence[int]) -> str:
    """Return the mark of every class: shown, shown by crowds alone, or not shown."""
    crowds = {each.get("category_id") for each in objects if each.get("iscrowd")}
    shown = {each.get("category_id") for each in objects if not each.get("iscrowd")}
    return "".join(PRESENT if number in shown else DIFFICULT if number in crowds else ABSENT for number in classes)


def _outline(thing: Mapping[str, Any], *, size: tuple[int, int]) -> Outline:
    """Return the outline of an object.

    Raises:
        KeyError, TypeError, ValueError: it has none.
    """
    shape, area = thing["segmentation"], float(thing["area"])
    if not thing.get("iscrowd"):
        return Outline(tuple(np.array(points, dtype=np.float64).reshape(-1) for points in shape), None, area)
    counts = np.array(shape["counts"], dtype=np.int64)
    if tuple(shape["size"]) != size or counts.sum() != size[0] * size[1] or (counts < 0).any():
        raise ValueError("counts are not of this image")
    return Outline((), counts, area)
