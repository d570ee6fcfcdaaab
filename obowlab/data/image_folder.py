"""Find the images of a folder or a plain .tar: `SPLIT/CLASS/*.JPEG`, `CLASS/*.JPEG`, or images without class folders.

An archive is read in place, by offset: nothing is unpacked, so nothing can be written outside of the data root. Order and
class numbers are those of torchvision's `ImageFolder`: classes sorted by name, then images by folder and name.
"""

from __future__ import annotations

import os
import shlex
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from obowlab.data.archive import list_members
from obowlab.data.sources import (
    ARCHIVE_SUFFIXES,
    IMAGE_SUFFIXES,
    LAYOUT,
    UNLABELLED,
    UNREAD_SUFFIXES,
    NoImageError,
    Source,
    SourceImage,
    SourceSplit,
)
from obowlab.data.split_names import SPLITS, is_bare_split, preferred, readings_of
from obowlab.errors import UserError

_HIDDEN = ("@eadir", "__macosx", "thumbs.db", "desktop.ini", "lost+found", "$recycle.bin", "#recycle", "#snapshot")
"""Besides names that begin with a dot: what NAS, desktops and file systems put into folders; in lower case."""


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
    photos = unread_photos(file.name for file in shown)
    if not images and photos:
        raise NoImageError(f"--source {path} holds {photos}, which are not read: convert them to JPEG or PNG.")
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
        notes=(f"photos of a kind that is not read: {photos}; convert them to JPEG or PNG",) if photos else (),
        empty_classes=_empty_classes(layout, splits=splits, folders=found) if splits[0].class_names != (UNLABELLED,) else (),
    )


def unread_photos(names: Iterable[str]) -> str:
    """Return how many of some files are photos of each kind that is not read, in words; nothing where none is."""
    unread = Counter(suffix for name in names if (suffix := Path(name).suffix.lower()) in UNREAD_SUFFIXES)
    return " and ".join(f"{number} {suffix} files" for suffix, number in sorted(unread.items()))


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
        if len(tops) > 1 or min(map(len, parts)) - depth < 3 or is_bare_split(next(iter(tops))):
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
        with_classes = {name for name in tops if is_bare_split(name)}
        if with_classes != tops and len({readings_of(name)[0].kind for name in with_classes}) < 2:
            return {}
    readings = {name: readings_of(name) for name in sorted(tops) if name in with_classes or name in SPLITS}
    kinds: dict[tuple[str, str], dict[str, list[str]]] = {}
    for name, found in readings.items():
        for reading in found:
            kinds.setdefault((reading.before, reading.after), {}).setdefault(reading.kind, []).append(name)
    pairs: list[dict[str, str]] = []
    for alike in kinds.values():
        train, val = preferred(alike.get("train", [])), preferred(alike.get("val") or alike.get("test") or [])
        if len(train) == 1 and len(val) == 1:
            pairs.append({train[0]: "train", val[0]: "val"})
    pairs = [pair for pair in pairs if set(pair) & set(SPLITS)] or pairs
    if len(pairs) == 1:
        return pairs[0]
    like = [name for name, found in readings.items() if any(reading.is_word for reading in found)]
    like = like or sorted({name for pair in pairs for name in pair})
    bare = [name for name in like if is_bare_split(name)]
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
            if name.isalpha() and is_bare_split(name):
                inner.setdefault(readings_of(name)[0].kind, "/".join((*outer, *names[: number + 1])))
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
        raise UserError(
            f"--source {path} has classes in val/ that train/ does not have, such as '{unknown[0]}': name the folders of val/ as "
            "those of train/, or prepare train/ alone, with --val-fraction 0.1."
        )
    splits = []
    for split in SPLITS:
        if split in groups:
            ordered: list[SourceImage] = []
            for label, class_name in enumerate(class_names):
                for folder, name, image in sorted(groups[split].get(class_name, []), key=lambda found: found[:2]):
                    ordered.append(replace(image, label=label, name=f"{folder}/{name}" if folder else name))
            splits.append(SourceSplit(name=split, class_names=class_names, images=tuple(ordered)))
    return tuple(splits)
