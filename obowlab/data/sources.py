"""Find the images of a folder or a plain .tar: `SPLIT/CLASS/*.JPEG`, `CLASS/*.JPEG`, or images without class folders.

An archive is read in place, by offset: nothing is unpacked, so nothing can be written outside of the data root. Order and
class numbers are those of torchvision's `ImageFolder`: classes sorted by name, then images by folder and name.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from obowlab.data.archive import list_members
from obowlab.errors import UserError

SPLITS = ("train", "val")
ARCHIVE_SUFFIXES = (".tar", ".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z", ".rar")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_HIDDEN = ("@eadir", "__macosx", "thumbs.db", "desktop.ini", "lost+found", "$recycle.bin", "#recycle", "#snapshot")
"""Besides names that begin with a dot: what NAS, desktops and file systems put into folders; in lower case."""
_SPLIT_WORD = re.compile(
    r"(?:(?P<train>train(?:ing)?)|(?P<val>val(?:id(?:ation)?)?|eval(?:uation)?)|(?P<test>test(?:ing)?))(?:[-_]?set)?",
    re.IGNORECASE,
)
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
    """The images of one split in their final order; `class_names` are those of train, for every split."""

    name: str
    class_names: tuple[str, ...]
    images: tuple[SourceImage, ...]

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


def read_source(path: Path, *, labelled: bool = True) -> Source:
    """List the images of a folder or a .tar; no image is read.

    Split folders may be named `Train` and `validation`, `train2017` and `val2017` and the like, if it is clear which is which.
    Images that lie in no folder, or in the split folders themselves, have no labels.

    Args:
        path: folder or archive.
        labelled: whether folders are classes; otherwise all images are taken without labels, however deep they lie.

    Raises:
        UserError: there is nothing at `path`, it is not in ImageFolder layout, or val has classes that train has not.
    """
    path = path.expanduser().absolute()
    folders: list[str] = []
    if path.is_dir():
        files = list(_walk(path, folders=folders))
    elif path.is_file():
        files = list(_members(path, folders=folders))
    else:
        raise UserError(f"--source {path} is neither a folder nor a .tar file.")
    shown = [file for file in files if not is_hidden(file.name)]
    images = [file for file in shown if file.name.lower().endswith(IMAGE_SUFFIXES)]
    if not images:
        archives = [file.name for file in shown if file.name.lower().endswith(ARCHIVE_SUFFIXES)]
        inner = f"holds {len(archives)} archives, such as {archives[0]}, and" if archives else "holds"
        unpack = "; unpack each archive into a folder of its name" if archives else ""
        raise NoImageError(f"--source {path} {inner} no image; expected {LAYOUT}{unpack}.")
    layout = _layout(path, [tuple(image.name.split("/")) for image in images], labelled=labelled)
    splits = _splits(path, layout, images, labelled=labelled)
    found = [name for name in folders if not is_hidden(name)]
    return Source(
        path=path,
        splits=splits,
        num_ignored=len(shown) - sum(len(split.images) for split in splits),
        num_hidden=len(files) - len(shown),
        empty_classes=_empty_classes(layout, splits=splits, folders=found) if splits[0].class_names != (UNLABELLED,) else (),
    )


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
    splits = _split_words(path, words) if words else {}
    kept = [(splits.get(entry.split, "") if entry.split is not None else "train", entry) for entry in entries]
    kept = [(split, entry) for split, entry in kept if split]
    labelled = any(entry.class_name is not None for _, entry in kept)
    if all(entry.class_name is None for split, entry in kept if split == "val"):  # the labels of a test split are often secret
        kept = [(split, entry) for split, entry in kept if split == "train" or entry.class_name is not None or not labelled]
    without = sum(entry.class_name is None for _, entry in kept)
    if 0 < without < len(kept):
        odd = next(entry.image.name for _, entry in kept if entry.class_name is None)
        raise UserError(f"--source {path} has {without} images without a label, such as {odd}: label or remove them.")
    found = {split: {entry.class_name or UNLABELLED for where, entry in kept if where == split} for split, _ in kept}
    if unknown := sorted(found.get("val", set()) - found.get("train", set())):
        raise UserError(f"--source {path} has classes in val that train does not have, such as '{unknown[0]}'.")
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


def splits_of_shards(files: Sequence[Path], *, below: Path) -> list[str | None]:
    """Return the split that each shard's name or folder tells, as `data/train-00000-of-00004.parquet` does.

    Where none tells one, all are None; where some do, the others bear their own names, which are no split's.

    Args:
        files: the shards.
        below: the folder that `--source` names; folders above it do not count.
    """
    found: list[str | None] = []
    for file in files:
        kinds = [reading.kind for reading in _readings(file.stem) if reading.is_word]
        folders = file.relative_to(below).parts[:-1]
        kinds += [_readings(folder)[0].kind for folder in reversed(folders) if _is_bare_split(folder)]
        found.append(kinds[0] if kinds else None)
    return [split or (file.stem if any(found) else None) for split, file in zip(found, files, strict=True)]


def _split_words(path: Path, words: Sequence[str]) -> dict[str, str]:
    """Return which of the words that name splits are train and val; `test` is val only where nothing else is.

    Raises:
        UserError: none is train, or several are.
    """
    kinds: dict[str, list[str]] = {}
    for word in words:
        if _is_bare_split(word):
            kinds.setdefault(_readings(word)[0].kind, []).append(word)
    train, val = _preferred(kinds.get("train", [])), _preferred(kinds.get("val") or kinds.get("test") or [])
    if len(train) != 1 or len(val) > 1:
        raise UserError(
            f"--source {path} has the splits {', '.join(map(repr, words[:6]))}, and it is not clear which is train and which is "
            "val: name them 'train' and 'val'."
        )
    return {train[0]: "train"} | ({val[0]: "val"} if val else {})


def _in_order(names: Iterable[str]) -> list[str]:
    """Return class names by number where all of them are numbers, else by name."""
    try:
        return sorted(names, key=lambda name: (float(name), name))
    except ValueError:
        return sorted(names)


def list_images(folder: Path) -> list[str]:
    """Return the names of all images below a folder, relative to it, sorted; hidden files are left out and links followed.

    Raises:
        UserError: it is no folder, holds no image, or something in it cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"There is no folder '{folder}'.")
    files = (file.name for file in _walk(folder, folders=[], what=str(folder)))
    names = sorted(name for name in files if name.lower().endswith(IMAGE_SUFFIXES) and not is_hidden(name))
    if not names:
        raise UserError(f"{folder} holds no image; names of images end in {', '.join(IMAGE_SUFFIXES)}.")
    return names


def is_hidden(name: str) -> bool:
    """Return whether a path below a source is a hidden file or a thumbnail, or lies in a folder of such."""
    return any(part.startswith(".") or part.lower() in _HIDDEN for part in name.split("/"))


def _walk(root: Path, *, folders: list[str], what: str = "--source") -> Iterator[SourceImage]:
    """Yield the files below a folder, and add its folders to `folders`; `what` names it in an error."""

    def refuse(error: OSError) -> None:
        raise UserError(
            f"{what} holds {error.filename}, which cannot be read ({error.strerror}): remove it or make it readable."
        ) from None

    # Links are followed, as ImageFolder does: on clusters data sets are often folders of links.
    for parent, _, names in os.walk(root, followlinks=True, onerror=refuse):
        below = Path(parent).relative_to(root).as_posix()
        prefix = "" if below == "." else f"{below}/"
        folders.append(below)
        for name in names:
            file = f"{parent}/{name}"
            try:
                status = os.stat(file)  # noqa: PTH116
            except OSError as error:
                if not is_hidden(prefix + name):
                    refuse(error)
                continue
            if stat.S_ISREG(status.st_mode):
                yield SourceImage(label=-1, name=prefix + name, path=file, offset=0, size=status.st_size)


def _members(archive: Path, *, folders: list[str]) -> Iterator[SourceImage]:
    for member in list_members(archive):
        if member.is_folder:
            folders.append(member.name)
        else:
            yield SourceImage(label=-1, name=member.name, path=str(archive), offset=member.offset, size=member.size)


# ---------------------------------------------------------------------------------------------------------------- layout


class _Layout(NamedTuple):
    """Where the splits are: outer folders that all images share, then the folder of each split.

    Without split folders `names` is empty, and class folders follow the outer ones.
    """

    depth: int
    names: dict[str, str]
    """Of a folder, its split."""

    def place(self, parts: Sequence[str]) -> tuple[str, Sequence[str]] | None:
        """Return the split of a path and what follows below it; None outside of all splits."""
        inner = parts[self.depth :]
        if not self.names:
            return "train", inner
        return (self.names[inner[0]], inner[1:]) if inner and inner[0] in self.names else None


def _layout(path: Path, parts: Sequence[Sequence[str]], *, labelled: bool) -> _Layout:
    """Find the split folders, looking through single outer folders.

    Raises:
        UserError: it is not clear what the folders are.
    """
    depth = 0
    while True:
        tops = {names[depth] for names in parts}
        if len(tops) > 1 or min(map(len, parts)) - depth < 3 or _is_bare_split(next(iter(tops))):
            break
        depth += 1
    with_classes = {names[depth] for names in parts if len(names) - depth >= 3}
    names = _split_folders(path, tops, with_classes=with_classes, outer="/".join(parts[0][:depth]))
    if not names and labelled:
        _check_classes(path, [names[depth:] for names in parts], outer=parts[0][:depth])
    return _Layout(depth, names)


def _split_folders(path: Path, tops: set[str], *, with_classes: set[str], outer: str) -> dict[str, str]:
    """Return which folder is which split; nothing where folders are classes.

    The folders of a pair are named alike but for the word: `train2017` goes with `val2017`. Exact names come first, and `test` is
    the validation split only where nothing else can be. A folder without class folders counts by its exact name alone, unless
    there is no class folder anywhere: then `train2017` and `val2017` hold images without labels, and `train` beside `bus` is a
    class.
    """
    if not with_classes:
        with_classes = {name for name in tops if _is_bare_split(name)}
        if with_classes != tops and len({_readings(name)[0].kind for name in with_classes}) < 2:
            return {}
    readings = {name: _readings(name) for name in sorted(tops) if name in with_classes or name in SPLITS}
    kinds: dict[tuple[str, str], dict[str, list[str]]] = {}
    for name, found in readings.items():
        for reading in found:
            kinds.setdefault((reading.before, reading.after), {}).setdefault(reading.kind, []).append(name)
    pairs: list[dict[str, str]] = []
    for alike in kinds.values():
        train, val = _preferred(alike.get("train", [])), _preferred(alike.get("val") or alike.get("test") or [])
        if len(train) == 1 and len(val) == 1:
            pairs.append({train[0]: "train", val[0]: "val"})
    pairs = [pair for pair in pairs if set(pair) & set(SPLITS)] or pairs
    if len(pairs) == 1:
        return pairs[0]
    like = [name for name, found in readings.items() if any(reading.is_word for reading in found)]
    like = like or sorted({name for pair in pairs for name in pair})
    bare = [name for name in like if _is_bare_split(name)]
    is_train = [any(reading.kind == "train" for reading in readings[name]) for name in like]
    if len(like) == 1 and bare and is_train[0]:
        return {bare[0]: "train"}
    if bare and not any(is_train):
        raise UserError(f"--source {path} has {bare[0]}/ but no train/; expected {LAYOUT}.")
    if bare or len(like) > 1:
        odd = next(name for name in like if name not in SPLITS)
        word = "train" if readings[odd][0].kind == "train" else "val"
        folder = path / outer if path.is_dir() else outer or "."
        listed = " and ".join(f"{name}/" for name in like[:4])
        raise UserError(
            f"--source {path} holds {listed}, which look like splits, and it is not clear which is train and which is val: "
            f"rename one, as in `cd {shlex.quote(str(folder))} && mv {shlex.quote(odd)} {word}`; expected {LAYOUT}."
        )
    return {}


class _Reading(NamedTuple):
    """A split that a folder may be named after, and what stands around the word, in lower case."""

    kind: str
    before: str
    after: str

    @property
    def is_word(self) -> bool:
        """Whether the word stands alone, not within another one as in `constraints`."""
        return not (self.before[-1:].isalpha() or self.after[:1].isalpha())


def _readings(name: str) -> list[_Reading]:
    """Return every split that a folder may be named after."""
    return [
        _Reading(str(found.lastgroup), name[: found.start()].lower(), name[found.end() :].lower())
        for found in _SPLIT_WORD.finditer(name)
    ]


def _preferred(names: Sequence[str]) -> Sequence[str]:
    """Return the one of several names that is a split's own, if there is one."""
    return [name for name in names if name in SPLITS] or names


def _is_bare_split(name: str) -> bool:
    """Return whether a folder is named after a split and nothing else, but for digits and signs."""
    return any(not any(map(str.isalpha, reading.before + reading.after)) for reading in _readings(name))


def _check_classes(path: Path, parts: Sequence[Sequence[str]], *, outer: Sequence[str]) -> None:
    """Refuse folders that hold data sets or anything else, rather than classes.

    Raises:
        UserError: splits lie within the folders, or images of different folders lie at different depths.
    """
    depths: dict[str, set[int]] = {}
    inner: dict[str, str] = {}
    for names in parts:
        depths.setdefault(names[0], set()).add(len(names))
        for number, name in enumerate(names[1:-1], start=1):
            if name.isalpha() and _is_bare_split(name):
                inner.setdefault(_readings(name)[0].kind, "/".join((*outer, *names[: number + 1])))
    if "train" in inner and len(inner) > 1:
        within, above = inner["train"], shlex.quote(str((path / inner["train"]).parent))
        raise UserError(
            f"--source {path} holds splits further inside, such as {within}: give the folder of one data set, such as "
            f"`--source {above}`, in which there is {LAYOUT}."
        )
    if len(depths) > 1 and not set.intersection(*depths.values()):
        raise UserError(
            f"--source {path} is no ImageFolder: its folders hold images at different depths, such as {'/'.join(parts[0])}; "
            f"give the folder that holds the data set, with {LAYOUT}, or add --no-labels to take all images without labels."
        )


def _empty_classes(layout: _Layout, *, splits: Sequence[SourceSplit], folders: Iterable[str]) -> tuple[str, ...]:
    """Return the class folders without an image: torchvision's ImageFolder would complain, and a reader might count them."""
    full = {(split.name, image.name.split("/", 1)[0]) for split in splits for image in split.images}
    found = {(place[0], place[1][0]) for name in folders if (place := layout.place(name.split("/"))) and len(place[1]) == 1}
    return tuple(sorted(f"{split}/{name}" for split, name in found - full if name != "."))


def _splits(path: Path, layout: _Layout, images: Iterable[SourceImage], *, labelled: bool) -> tuple[SourceSplit, ...]:
    """Sort images into splits and classes."""
    placed = [(place, image) for image in images if (place := layout.place(image.name.split("/"))) is not None]
    bare = [(split, names) for (split, names), _ in placed if len(names) < 2]
    if labelled and 0 < len(bare) < len(placed):
        where = f"{bare[0][0]}/" if layout.names else ""
        raise UserError(
            f"--source {path} has images without a class folder, such as {where}{bare[0][1][-1]}; expected {LAYOUT}, or add "
            "--no-labels to take all images without labels."
        )
    labelled = labelled and not bare
    groups: dict[str, dict[str, list[tuple[str, str, SourceImage]]]] = {}
    for (split, names), image in placed:
        in_class = groups.setdefault(split, {}).setdefault(names[0] if labelled else UNLABELLED, [])
        in_class.append(("/".join(names[:-1]), names[-1], image))
    class_names = tuple(sorted(groups["train"]))
    unknown = sorted(set(groups.get("val", {})) - set(class_names))
    if unknown:
        raise UserError(f"--source {path} has classes in val/ that train/ does not have, such as '{unknown[0]}'.")
    splits = []
    for split in SPLITS:
        if split in groups:
            ordered: list[SourceImage] = []
            for label, class_name in enumerate(class_names):
                for folder, name, image in sorted(groups[split].get(class_name, []), key=lambda found: found[:2]):
                    ordered.append(replace(image, label=label, name=f"{folder}/{name}" if folder else name))
            splits.append(SourceSplit(name=split, class_names=class_names, images=tuple(ordered)))
    return tuple(splits)
