"""A source of images: its splits and classes, and how the images of a list or a table become one."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from obowlab.data.annotations import Annotate
from obowlab.data.split_names import SPLITS, splits_of_words
from obowlab.errors import UserError

ARCHIVE_SUFFIXES = (".tar", ".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z", ".rar")
UNREAD_SUFFIXES = (".heic", ".heif", ".avif", ".gif", ".jp2", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf")
"""Photos too, of kinds that are not read."""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
PRESENT, ABSENT, DIFFICULT = "+-?"
"""Marks of images with several classes: shown, not shown, and shown by objects alone that are hard to recognise."""

UNLABELLED = "unlabelled"
"""The one class of images without labels."""
LAYOUT = "train/CLASS/*.JPEG and val/CLASS/*.JPEG (or CLASS/*.JPEG alone, which becomes train)"


class NoImageError(UserError):
    """A folder or an archive holds no image file."""


@dataclass(frozen=True)
class SourceImage:
    """One image file: its class number, its name below the split's folder, and where its bytes are."""

    label: int
    name: str
    path: str
    """Of the file or of the archive; text, as millions of Path objects take longer to make than to list."""
    offset: int
    size: int

    def read(self) -> bytes:
        """Return the bytes of the file."""
        with open(self.path, "rb") as file:  # noqa: PTH123
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class FetchedImage(SourceImage):
    """An image that is no file of its own: a row of a table, or an array of pixels."""

    fetch: Callable[[], bytes] = field(repr=False, compare=False)

    def read(self) -> bytes:
        """Return the bytes of the image as a file."""
        return self.fetch()


@dataclass(frozen=True)
class SourceSplit:
    """The images of one split in their final order; `class_names` are those of train, for every split.

    Images that may show several classes have `targets`: for every image a mark for every class. With `annotations` it
    is known where in an image they are.
    """

    name: str
    class_names: tuple[str, ...]
    images: tuple[SourceImage, ...]
    targets: tuple[str, ...] = ()
    annotations: tuple[Annotate, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes of all images together."""
        return sum(image.size for image in self.images)

    @property
    def listing_hash(self) -> str:
        """SHA-256 (hex) of every image's name and size: a change of the source shows without reading images."""
        digest = hashlib.sha256()
        for image in self.images:
            digest.update(f"{image.name}\0{image.size}\n".encode("utf-8", "surrogateescape"))
        for marks in self.targets:
            digest.update(f"{marks}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Source:
    """The splits found, and what was left out.

    Attributes:
        path: folder, archive or file, or `torchvision:NAME:ROOT`; what `--source` takes.
        splits: train, and val if there is one.
        num_ignored: files that are neither image nor in a split.
        num_hidden: hidden files and thumbnails, and all files in hidden folders.
        empty_classes: class folders without an image, as `train/CLASS`.
        notes: what else a person should know, a sentence each.
        val_fraction: share of every class that became val for want of a val split; None if the source has its own splits.
    """

    path: Path
    splits: tuple[SourceSplit, ...]
    num_ignored: int
    num_hidden: int
    empty_classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    val_fraction: float | None = None

    @property
    def is_labelled(self) -> bool:
        """Whether the images have labels."""
        return self.splits[0].class_names != (UNLABELLED,)

    def split(self, name: str) -> SourceSplit | None:
        """Return the split of that name, if the source has it."""
        return next((split for split in self.splits if split.name == name), None)


class Entry(NamedTuple):
    """An image of a list or a table, as it stands there: its split and its class, each None where none is given."""

    split: str | None
    class_name: str | None
    image: SourceImage


def source_of_entries(
    path: Path,
    entries: Sequence[Entry],
    *,
    class_names: Sequence[str] | None = None,
    by_class: bool = False,
    notes: Sequence[str] = (),
    num_ignored: int = 0,
) -> Source:
    """Sort the images of a list or a table into splits and number their classes.

    Args:
        path: what `--source` names.
        entries: the images; the labels and names they bear are replaced.
        class_names: in the order of their numbers; without them classes are sorted by number where all are numbers, else by name.
        by_class: sort the images of a split by class; otherwise they keep their order, in which a table is read fastest.
        notes: for the source.
        num_ignored: files or rows left out already.

    Raises:
        UserError: no split is train, some images have a class and some have none, or val has classes that train has not.
    """
    words = sorted({entry.split for entry in entries if entry.split is not None})
    splits = splits_of_words(path, words) if words else {}
    kept = [(splits.get(entry.split, "") if entry.split is not None else "train", entry) for entry in entries]
    kept = [(split, entry) for split, entry in kept if split]
    labelled = any(entry.class_name is not None for _, entry in kept)
    if all(entry.class_name is None for split, entry in kept if split == "val"):  # the labels of a test split are often secret
        kept = [(split, entry) for split, entry in kept if split == "train" or entry.class_name is not None or not labelled]
    left = Counter(entry.split for entry in entries if entry.split is not None and entry.split not in splits)
    notes = [*notes, *(f"neither train nor val: {number} images of split '{word}'" for word, number in sorted(left.items()))]
    without = sum(entry.class_name is None for _, entry in kept)
    if 0 < without < len(kept):
        odd = next(entry.image.name for _, entry in kept if entry.class_name is None)
        raise UserError(f"--source {path} has {without} images without a label, such as {odd}: label or remove them.")
    found = {split: {entry.class_name or UNLABELLED for where, entry in kept if where == split} for split, _ in kept}
    if unknown := sorted(found.get("val", set()) - found.get("train", set())):
        raise UserError(
            f"--source {path} has classes in val that train does not have, such as '{unknown[0]}': give those images a class of "
            "train, or leave them out."
        )
    names = tuple(class_names or _in_order(found["train"]))
    numbers = {name: number for number, name in enumerate(names)}
    images: dict[str, list[SourceImage]] = {}
    for split, entry in kept:
        class_name = entry.class_name or UNLABELLED
        name = f"{class_name}/{entry.image.name}" if entry.class_name is not None else entry.image.name
        images.setdefault(split, []).append(replace(entry.image, label=numbers[class_name], name=name))
    if by_class:
        images = {split: sorted(each, key=lambda image: image.label) for split, each in images.items()}
    return Source(
        path=path,
        splits=tuple(SourceSplit(split, names, tuple(images[split])) for split in SPLITS if split in images),
        num_ignored=num_ignored + len(entries) - len(kept),
        num_hidden=0,
        notes=tuple(notes),
    )


def _in_order(names: Iterable[str]) -> list[str]:
    """Return class names by number where all of them are numbers, else by name."""
    try:
        return sorted(names, key=lambda name: (float(name), name))
    except ValueError:
        return sorted(names)
