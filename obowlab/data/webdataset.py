"""Read the tars of a WebDataset: `KEY.jpg` beside `KEY.cls` or `KEY.json`, in shards whose names or folders tell the split."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from obowlab.data.archive import Member, list_members
from obowlab.data.sources import IMAGE_SUFFIXES, Entry, Source, SourceImage, source_of_entries
from obowlab.data.split_names import splits_of_shards
from obowlab.errors import UserError

_LABEL_KEYS = ("cls", "label", "class", "class_id", "label_id", "class_name", "category", "target")
_IMAGES = {suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES}
_PEEK = 64
"""Members of a tar that are looked at to see what it is."""

_CLASS_FILES = ("classnames.txt", "classes.txt")


def is_webdataset(archive: Path) -> bool:
    """Return whether the first files of a tar are pairs of an image and a `.cls` or `.json` file of the same key."""
    keys: dict[str, set[str]] = {}
    try:
        with tarfile.open(archive, "r:") as tar:
            for member in islice(tar, _PEEK):
                key, suffix = _key(member.name)
                keys.setdefault(key, set()).add(suffix)
    except (tarfile.TarError, EOFError, OSError):  # reading it says why
        return False
    return any(suffixes & {"cls", "json"} and suffixes & _IMAGES for suffixes in keys.values())


def read_webdataset(path: Path, shards: Sequence[Path], *, labelled: bool = True) -> Source:
    """List the images of shards; a label is the text of `KEY.cls`, or `label`, `cls`, `class`, ... in `KEY.json`.

    Where a folder holds `classnames.txt`, a name a line, numbers become these names.

    Args:
        path: what `--source` names.
        shards: the tars, in order.
        labelled: whether to use the labels.

    Raises:
        UserError: a shard cannot be read, or some images have a label and some have none.
    """
    entries: list[Entry] = []
    num_others = 0
    splits = splits_of_shards(shards, below=path) if path.is_dir() else [None] * len(shards)
    for shard, split in zip(shards, splits, strict=True):
        images: dict[str, Member] = {}
        labels: dict[str, dict[str, Member]] = {}
        for member in list_members(shard):
            key, suffix = _key(member.name)
            if member.is_folder:
                continue
            if suffix in _IMAGES and key not in images:
                images[key] = member
            elif suffix in ("cls", "json"):
                labels.setdefault(key, {})[suffix] = member
            else:
                num_others += suffix != "txt"
        for key, image in images.items():
            label = _label(shard, labels.get(key, {})) if labelled else None
            found = SourceImage(-1, f"{shard.stem}/{image.name}", str(shard), offset=image.offset, size=image.size)
            entries.append(Entry(split, label, found))
    if not entries:
        raise UserError(f"--source {path} holds no image; expected tars with KEY.jpg and KEY.cls or KEY.json.")
    names = _class_names(path if path.is_dir() else path.parent) if labelled else None
    if names is not None:
        entries = [entry._replace(class_name=_named(entry.class_name, names)) for entry in entries]
    return source_of_entries(path, entries, class_names=names, num_ignored=num_others)


def _key(name: str) -> tuple[str, str]:
    """Split the name of a member into its key, all before the first dot of the file, and the rest in lower case."""
    folder, slash, file = name.rpartition("/")
    key, _, suffix = file.partition(".")
    return f"{folder}{slash}{key}", suffix.lower()


def _label(shard: Path, members: dict[str, Member]) -> str | None:
    """Return the label that stands beside an image, None where none does.

    Raises:
        UserError: it cannot be read.
    """
    if (member := members.get("cls") or members.get("json")) is None:
        return None
    with shard.open("rb") as file:
        file.seek(member.offset)
        data = file.read(member.size)
    try:
        text = data.decode("utf-8-sig").strip()
        if member.name.lower().endswith(".cls"):
            return text or None
        document: Any = json.loads(text)
    except ValueError:
        raise UserError(f"--source {shard} holds {member.name}, which is not the text of a label: fix or remove it.") from None
    values = [document[key] for key in _LABEL_KEYS if key in document] if isinstance(document, dict) else [document]
    return next((str(value) for value in values if isinstance(value, str | int)), None)


def _class_names(folder: Path) -> list[str] | None:
    for name in _CLASS_FILES:
        if (folder / name).is_file():
            lines = (folder / name).read_text(encoding="utf-8-sig").splitlines()
            names = [line.strip() for line in lines if line.strip()]
            return names if names and len(set(names)) == len(names) else None
    return None


def _named(label: str | None, names: Sequence[str]) -> str | None:
    """Return the name of a class that is given by its number; a name stays as it is.

    Raises:
        UserError: there is no such class.
    """
    if label is None or label in names:
        return label
    if re.fullmatch(r"\d+", label) and int(label) < len(names):
        return names[int(label)]
    raise UserError(f"There is a label '{label}', and the file of class names has {len(names)} names: fix or remove that file.")
