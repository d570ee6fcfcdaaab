"""PASCAL VOC's folders: photographs that show several of 20 classes (Everingham et al., IJCV 2010).

Which classes an image shows stands in `ImageSets/Main/CLASS_trainval.txt`: 1, -1 for absent, and 0 where all its objects of the
class are difficult. As Facebook's benchmark has it (docs/transfer.md), 0 counts as absent in training and is left out in the
test of that class. Classes are in the order of their names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from obowlab.data.annotations import Annotate
from obowlab.data.sources import ABSENT, DIFFICULT, PRESENT, Source, SourceImage, SourceSplit
from obowlab.data.voc_boxes import read_annotation
from obowlab.errors import UserError

SEVERAL_YEARS = ("voc0712",)
"""Data sets that are made of 2007 and 2012 together."""

_MAIN = Path("ImageSets", "Main")
_PLACES = (".", "VOC2007", "VOC2012", "VOCdevkit", "VOCdevkit/VOC2007", "VOCdevkit/VOC2012")
_MARKS = {"1": PRESENT, "-1": ABSENT, "0": DIFFICULT}
_SPLITS = (("trainval", "test"), ("train", "val"))
"""The lists that become train and val: VOC2007 has a public test set, VOC2012 has none."""


def find_voc(path: Path) -> Path | None:
    """Return the folder of one year of VOC that `path` is or holds; None when there is none.

    Raises:
        UserError: it holds several years.
    """
    found = sorted({(path / place).resolve() for place in _PLACES if (path / place / _MAIN).is_dir()})
    if len(found) > 1:
        raise UserError(f"--source {path} holds {len(found)} years of VOC: give one of them, as in `--source {found[0]}`.")
    return found[0] if found else None


def read_voc(path: Path) -> Source:
    """List the images of one year of VOC: trainval becomes train and test val, or train and val where there is no test.

    Raises:
        UserError: a list or an image is missing, a list is damaged, or lists do not agree.
    """
    main = path / _MAIN
    lists = next((names for names in _SPLITS if all((main / f"{name}.txt").is_file() for name in names)), None)
    if lists is None:
        raise UserError(
            f"{main} has neither trainval.txt and test.txt nor train.txt and val.txt: the test images of VOC2007 come in an "
            "archive of their own, which is unpacked into the same folder."
        )
    # A name with two underscores is no class: some copies have lists of layouts and persons there.
    files = sorted(file.stem for file in main.glob(f"*_{lists[0]}.txt"))
    class_names = tuple(name.removesuffix(f"_{lists[0]}") for name in files if name.count("_") == 1)
    if len(class_names) < 2:
        raise UserError(
            f"{main} names {len(class_names)} classes: CLASS_{lists[0]}.txt says of every image whether it shows CLASS."
        )
    splits = tuple(
        _read_split(path, name=name, listed=listed, class_names=class_names)
        for name, listed in zip(("train", "val"), lists, strict=True)
    )
    note = f"several classes an image: {len(class_names)}; {lists[0]} becomes train, {lists[1]} val"
    return Source(path=path, splits=splits, num_ignored=0, num_hidden=0, notes=(note,))


def read_both_years(path: Path) -> Source:
    """List the images that detectors are trained on: trainval of 2007 and 2012 become train, and test of 2007 val.

    Args:
        path: a folder that holds VOC2007 and VOC2012.

    Raises:
        UserError: as `read_voc`, or a year is missing.
    """
    years = {}
    for year in ("VOC2007", "VOC2012"):
        found = next((path / place / year for place in (".", "VOCdevkit") if (path / place / year / _MAIN).is_dir()), None)
        if found is None:
            raise UserError(f"--source {path} has no folder {year}: unpack the archives of both years into one folder.")
        years[year] = found
    first = _read_split(years["VOC2007"], name="train", listed="trainval", class_names=(names := _classes(years["VOC2007"])))
    second = _read_split(years["VOC2012"], name="train", listed="trainval", class_names=names)
    test = _read_split(years["VOC2007"], name="val", listed="test", class_names=names)
    parts = [(year, split) for year, split in zip(years, (first, second), strict=True)]
    train = SourceSplit(
        name="train",
        class_names=names,
        images=tuple(replace(image, name=f"{year}/{image.name}") for year, split in parts for image in split.images),
        targets=first.targets + second.targets,
        annotations=first.annotations + second.annotations,
    )
    note = f"several classes an image: {len(names)}; trainval of 2007 and 2012 becomes train, test of 2007 val"
    return Source(path=path, splits=(train, test), num_ignored=0, num_hidden=0, notes=(note,))


def _classes(path: Path) -> tuple[str, ...]:
    files = sorted(file.stem for file in (path / _MAIN).glob("*_trainval.txt"))
    return tuple(name.removesuffix("_trainval") for name in files if name.count("_") == 1)


def _read_split(path: Path, *, name: str, listed: str, class_names: tuple[str, ...]) -> SourceSplit:
    file = path / _MAIN / f"{listed}.txt"
    ids = [words[0] for words in _lines(file)]
    if not ids or len(set(ids)) < len(ids):
        raise UserError(f"{file} names {'no image' if not ids else 'an image twice'}: unpack the archive again.")
    columns = []
    for class_name in class_names:
        mark_of = _marks(path / _MAIN / f"{class_name}_{listed}.txt")
        if set(mark_of) != set(ids):
            odd = sorted(set(mark_of) ^ set(ids))
            raise UserError(
                f"{path / _MAIN / f'{class_name}_{listed}.txt'} and {file.name} do not name the same images: {len(odd)} are in "
                f"one only, such as {odd[0]}. Unpack the archive again."
            )
        columns.append([mark_of[each] for each in ids])
    targets = tuple("".join(marks) for marks in zip(*columns, strict=True))
    images, absent = [], []
    for each, marks in zip(ids, targets, strict=True):
        photo = path / "JPEGImages" / f"{each}.jpg"
        try:
            size = photo.stat().st_size
        except OSError:
            absent.append(each)
            continue
        images.append(SourceImage(label=first_class(marks), name=f"{each}.jpg", path=str(photo), offset=0, size=size))
    if absent:
        raise UserError(
            f"{path / 'JPEGImages'} lacks {len(absent)} of the {len(ids)} images of {file.name}, such as {absent[0]}.jpg: unpack "
            "the archive again."
        )
    return SourceSplit(name, class_names, tuple(images), targets, _annotations(path, ids, class_names=class_names))


def _annotations(path: Path, ids: list[str], *, class_names: tuple[str, ...]) -> tuple[Annotate, ...]:
    """Return what reads the boxes of every image; none where there are no files at all, as for the test images of some copies.

    Raises:
        UserError: some are missing.
    """
    files = tuple(path / "Annotations" / f"{each}.xml" for each in ids)
    absent = [file for file in files if not file.is_file()]
    if absent and len(absent) < len(files):
        raise UserError(
            f"{path / 'Annotations'} lacks {len(absent)} of {len(files)} files, such as {absent[0].name}: unpack it again."
        )
    numbers = {name: number for number, name in enumerate(class_names)}
    return () if absent else tuple(_reader(file, class_numbers=numbers) for file in files)


def _reader(file: Path, *, class_numbers: Mapping[str, int]) -> Annotate:
    return lambda size: read_annotation(file, class_numbers=class_numbers, size=size)


def first_class(marks: str) -> int:
    """Return the label of an image for whatever takes one class an image: the first that it shows, or else shows badly, or 0."""
    return max(0, marks.find(PRESENT) if PRESENT in marks else marks.find(DIFFICULT))


def _marks(file: Path) -> dict[str, str]:
    """Return the mark of every image of a class's list.

    Raises:
        UserError: a line is no image and one of 1, 0 and -1, or an image stands there twice.
    """
    marks: dict[str, str] = {}
    for words in _lines(file):
        if len(words) != 2 or words[1] not in _MARKS or words[0] in marks:
            raise UserError(f"{file} is damaged: '{' '.join(words)}' is not an image and 1, 0 or -1. Unpack the archive again.")
        marks[words[0]] = _MARKS[words[1]]
    return marks


def _lines(file: Path) -> Iterator[list[str]]:
    """Yield the words of every line that has some; ids keep their leading zeros.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({getattr(error, 'strerror', None) or error}).") from None
    yield from (words for line in lines if (words := line.split()))
