"""Read a list of images: a line each with a path and, where there are any, a label and a split."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from obowlab.data.sources import IMAGE_SUFFIXES, Entry, Source, SourceImage, source_of_entries
from obowlab.errors import UserError

LIST_SUFFIXES = (".csv", ".tsv", ".txt", ".lst", ".list")
_PATH_NAMES = ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "img", "img_path", "name")
_LABEL_NAMES = ("label", "class", "class_name", "classname", "category", "target", "y", "label_name", "class_id", "label_id")
_SPLIT_NAMES = ("split", "set", "subset", "partition", "data set", "dataset")
_SHOWN = 5


class _Columns(NamedTuple):
    """Where path, label and split stand in a line; None where there is no such column."""

    path: int
    label: int | None
    split: int | None


def read_list(path: Path, *, labelled: bool = True) -> Source:
    """List the images that a file names: `path,label` or `path,label,split`, separated by comma, semicolon, tab or blanks.

    A first line without an image file is a header: `path`, `label` and `split` (or `filename`, `class`, `set`, ...) may then
    stand in any order among other columns. Paths are absolute or relative to the list. Images are sorted by class and path.

    Args:
        path: the list; UTF-8, or UTF-16 with a byte order mark.
        labelled: whether to use the labels.

    Raises:
        UserError: it cannot be read, names no image that is there, or one image with several labels.
    """
    lines = list(_lines(path))
    if not lines:
        raise UserError(f"--source {path} is empty; expected lines such as `images/001.jpg,daisy`.")
    columns, header = _columns(path, lines[0][1])
    entries: list[Entry] = []
    lost: list[str] = []
    given: dict[str, Entry] = {}
    for number, cells in lines[header:]:
        entry = _entry(path, number, cells, columns=columns, labelled=labelled)
        first = given.setdefault(entry.image.path, entry)
        if first is not entry:
            if first[:2] != entry[:2]:
                raise UserError(f"--source {path}, line {number}: {entry.image.name} stood before with another label or split.")
            continue
        entries.append(entry)
        if entry.image.size < 0:
            lost.append(entry.image.name)
    if len(lost) == len(entries):
        example = lost[0] if lost else "none"
        raise UserError(
            f"--source {path} names {len(entries)} images and none of them is there, such as {example}: paths are absolute or "
            f"relative to {path.parent}."
        )
    entries.sort(key=lambda entry: entry.image.name)
    notes = []
    if lost:
        some = ", ".join(lost[:_SHOWN]) + (", ..." if len(lost) > _SHOWN else "")
        notes.append(f"named in the list, but not there: {len(lost)} files ({some})")
    repeated = len(lines) - header - len(entries)
    if repeated:
        notes.append(f"named twice and taken once: {repeated} images")
    return source_of_entries(path, entries, by_class=True, notes=notes)


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield every line that is not empty with its number, split into cells.

    Raises:
        UserError: it is no text.
    """
    try:
        data = path.read_bytes()
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except OSError as error:
        raise UserError(f"Cannot read --source {path}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--source {path} is no UTF-8 text (byte {error.start}): save the list as UTF-8.") from None
    if "\0" in text:
        raise UserError(f"--source {path} is no list of images: it holds binary data.")
    lines = text.splitlines()
    first = next((line for line in lines if line.strip()), "")
    separator = next((mark for mark in "\t,;" if mark in first), " ")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                (cells,) = csv.reader([line.strip()], delimiter=separator, skipinitialspace=True, strict=True)
            except csv.Error:
                raise UserError(f"--source {path}, line {number}: a quote is not closed.") from None
            yield number, _joined(cells) if separator == " " else [cell.strip() for cell in cells]


def _joined(cells: list[str]) -> list[str]:
    """Put a path with blanks together again: it ends where the name of an image does."""
    end = next((place for place, cell in enumerate(cells, start=1) if _is_image(cell)), 1)
    return [" ".join(cells[:end]), *(cell for cell in cells[end:] if cell)]


def _is_image(cell: str) -> bool:
    return cell.lower().endswith(IMAGE_SUFFIXES)


def _columns(path: Path, first: Sequence[str]) -> tuple[_Columns, int]:
    """Return where the columns are, and how many lines are header.

    Raises:
        UserError: the header has no column of paths.
    """
    if any(map(_is_image, first)):
        if not _is_image(first[0]):
            raise UserError(f"--source {path}: the path of the image comes first, then its label; or add a header `path,label`.")
        return _Columns(0, 1 if len(first) > 1 else None, 2 if len(first) > 2 else None), 0
    names = [cell.lower() for cell in first]

    def place(known: Sequence[str]) -> int | None:
        return next((names.index(name) for name in known if name in names), None)

    where = place(_PATH_NAMES)
    if where is None:
        raise UserError(
            f"--source {path}: the first line names neither an image ({', '.join(IMAGE_SUFFIXES[:3])}, ...) nor a column `path`; "
            "expected lines such as `images/001.jpg,daisy`, with or without the header `path,label,split`."
        )
    label, split = place(_LABEL_NAMES), place(_SPLIT_NAMES)
    others = [each for each in range(len(names)) if each not in (where, split)]
    if label is None and len(others) == 1:
        label = others[0]
    elif label is None and others:
        raise UserError(
            f"--source {path}: none of its columns ({', '.join(names[:8])}) is called `label`: rename the one of the labels, "
            "or remove the others."
        )
    return _Columns(where, label, split), 1


def _entry(path: Path, number: int, cells: Sequence[str], *, columns: _Columns, labelled: bool) -> Entry:
    needed = max(place for place in columns if place is not None) + 1
    if len(cells) < needed:
        raise UserError(f"--source {path}, line {number}: {len(cells)} columns instead of {needed}.")
    name, label, split = (cells[place] if place is not None else None for place in columns)
    if not name:
        raise UserError(f"--source {path}, line {number}: no path.")
    if columns.split is not None and not split:
        raise UserError(f"--source {path}, line {number}: no split.")
    file, size = _file(path.parent, name)
    below = os.path.relpath(file, path.parent)
    name = name if below.startswith("..") else below
    return Entry(split, (label or None) if labelled else None, SourceImage(-1, name, file, offset=0, size=size))


def _file(folder: Path, name: str) -> tuple[str, int]:
    """Return the file that a line names and its size; -1 where there is none. Backslashes are those of Windows."""
    for each in (name, name.replace("\\", "/")):
        file = os.path.normpath(folder / Path(each).expanduser())
        try:
            if os.path.isfile(file):  # noqa: PTH113
                return file, os.stat(file).st_size  # noqa: PTH116
        except (OSError, ValueError):
            continue
    return os.path.normpath(folder / name), -1
