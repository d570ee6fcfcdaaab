"""Places205 as its archives unpack: images in folders of places, and lists that say which are train and val (Zhou 2014).

`train_places205.csv` and `val_places205.csv` hold, despite their name, a path and a number from 0 to 204 with a blank between.
The number is the class; its name is the folder's, as `abbey` of `a/abbey/gsun_0.jpg` and `apartment_building-outdoor` of
`a/apartment_building/outdoor/gsun_0.jpg`. Images that are sorted into train/CLASS and val/CLASS are an ImageFolder as any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from obowlab.data.sources import Source, SourceImage, SourceSplit
from obowlab.errors import UserError

_LISTS = {"train": "train_places205.csv", "val": "val_places205.csv"}
_LIST_PLACES = (".", "trainvalsplit_places205")
_IMAGE_PLACES = (
    ".",
    "images256",
    "data/vision/torralba/deeplearning/images256",
    "imagesPlaces205_resize",
    "imagesPlaces205_resize/data/vision/torralba/deeplearning/images256",
)


def find_places(path: Path) -> Path | None:
    """Return the folder with the lists of Places205 that `path` is or holds; None when there is none."""
    found = (path / place for place in _LIST_PLACES)
    return next((folder for folder in found if any((folder / name).is_file() for name in _LISTS.values())), None)


def read_places(path: Path, *, lists: Path) -> Source:
    """List the images of Places205, sorted by class and name.

    Args:
        path: what `--source` names.
        lists: the folder with the two lists.

    Raises:
        UserError: a list or an image is missing, a line is damaged, or a class has two folders.
    """
    read = {split: list(_lines(lists / name)) for split, name in _LISTS.items()}
    folders: dict[int, str] = {}
    for split, lines in read.items():
        for name, label in lines:
            folder = name.rpartition("/")[0]
            if folders.setdefault(label, folder) != folder:
                raise UserError(
                    f"{lists / _LISTS[split]} has class {label} in two folders, {folders[label]} and {folder}: unpack it again."
                )
    if sorted(folders) != list(range(len(folders))):
        gap = next(number for number in range(len(folders) + 1) if number not in folders)
        raise UserError(f"{lists} has no image of class {gap}, but of others above it: unpack the archive of the lists again.")
    class_names = tuple(_class_name(folders[label]) for label in range(len(folders)))
    first = read["train"][0][0]
    root = next((path / place for place in _IMAGE_PLACES if (path / place / first).is_file()), None)
    if root is None:
        raise UserError(
            f"--source {path} has the lists of Places205, but not the image {first}: unpack imagesPlaces205_resize beside them."
        )
    splits = tuple(_split(name, lines, root=root, class_names=class_names, file=lists) for name, lines in read.items())
    return Source(path=path, splits=splits, num_ignored=0, num_hidden=0)


def _split(name: str, lines: list[tuple[str, int]], *, root: Path, class_names: tuple[str, ...], file: Path) -> SourceSplit:
    images, absent = [], []
    for image, label in sorted(lines, key=lambda line: (line[1], line[0])):
        try:
            size = (root / image).stat().st_size
        except OSError:
            absent.append(image)
            continue
        images.append(SourceImage(label=label, name=image, path=str(root / image), offset=0, size=size))
    if absent:
        raise UserError(
            f"{root} lacks {len(absent)} of the {len(lines)} images of {file / _LISTS[name]}, such as {absent[0]}: unpack the "
            "archive again."
        )
    return SourceSplit(name, class_names, tuple(images))


def _class_name(folder: str) -> str:
    """Return the name of a class by its folder, which lies in that of its first letter: `a/apartment_building/outdoor`."""
    parts = [part for part in folder.split("/") if part]
    return "-".join(parts[1:] if len(parts) > 1 and len(parts[0]) == 1 else parts)


def _lines(file: Path) -> Iterator[tuple[str, int]]:
    """Yield path and class of every line that is not blank.

    Raises:
        UserError: there is no such file, or a line is something else.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise UserError(f"{file} cannot be read ({why}): unpack trainvalsplit_places205 again.") from None
    seen = set()
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        path, _, label = line.strip().rpartition(" ")
        if not path or not label.isascii() or not label.isdigit() or path in seen:
            raise UserError(f"{file}, line {number}: '{line}' is not an image, a blank and a number, or stood before.")
        seen.add(path)
        yield path.strip().lstrip("/"), int(label)
    if not seen:
        raise UserError(f"{file} is empty: unpack trainvalsplit_places205 again.")
