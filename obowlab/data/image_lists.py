"""Lists of the training images that a recipe trains on, such as 1 % of ImageNet's; joined by the names that files had before.

A list is a text with one file name a line, as the semi-supervised protocols publish it. A recipe names it by the SHA-256 of its
bytes (`data.image_list`), and it lies in DATA_ROOT/DATASET/lists/SHA256.txt.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from obowlab.data.beton import fix_for
from obowlab.data.manifest import NAMES_SUFFIX
from obowlab.data.prepared import Prepared
from obowlab.errors import AbsentError, UserError
from obowlab.files.replacing import write_atomic
from obowlab.files.sharing import shared_folder

LARGEST_LIST = 200 * 2**20
"""No list of names is larger, in bytes: five million lines."""


def write_names(path: Path, names: Sequence[str]) -> None:
    """Write the names of a split's images, in order."""
    path.write_bytes(gzip.compress(json.dumps(list(names)).encode("ascii"), mtime=0))


def read_names(split: Prepared) -> tuple[str, ...]:
    """Return the names that the images of a split had, in order.

    Raises:
        UserError: it was prepared without names, or they are damaged.
    """
    path = split.path.with_suffix(NAMES_SUFFIX)
    try:
        names = json.loads(gzip.decompress(path.read_bytes()))
    except FileNotFoundError:
        raise UserError(
            f"'{split.dataset}' was prepared without the names of its images, by which a list finds them: "
            f"{fix_for(split.dataset)}."
        ) from None
    except (OSError, EOFError, ValueError):
        raise UserError(f"{path} is damaged: {fix_for(split.dataset)}.") from None
    if len(names) != split.num_images:
        raise UserError(f"{path} has {len(names)} names of {split.num_images} images: {fix_for(split.dataset)}.")
    return tuple(names)


def keep_list(file: Path, *, dataset: str, data_root: Path, dry_run: bool = False) -> str:
    """Keep a list beside a prepared data set, unless it is a dry run, and return its SHA-256 (hex).

    Raises:
        UserError: it cannot be read, is no list of names, or cannot be kept.
    """
    try:
        if file.stat().st_size > LARGEST_LIST:
            raise UserError(f"--list {file} is larger than a list of file names can be.")
        content = file.read_bytes()
        if not _lines(content):
            raise UserError(f"--list {file} names no image; it has a file name on each line.")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise UserError(f"Cannot read --list {file}: {why}.") from None
    digest = hashlib.sha256(content).hexdigest()
    path = _path(data_root / dataset, digest)
    if not path.is_file() and not dry_run:
        try:
            write_atomic(shared_folder(path.parent) / path.name, content, shared=True)
        except OSError as error:
            raise UserError(f"Cannot keep --list {file} in {path.parent}: {error.strerror}.") from None
    return digest


def num_listed(list_hash: str, *, dataset: str, data_root: Path) -> int | None:
    """Return how many images a list names; None where it is not kept here."""
    try:
        return len(_lines(_path(data_root / dataset, list_hash).read_bytes()))
    except (OSError, UnicodeDecodeError):
        return None


def refuse_absent(list_hash: str, *, folder: Path) -> None:
    """Refuse a list that was never given on this machine.

    Raises:
        AbsentError: it is not in the folder of its data set.
    """
    path = _path(folder, list_hash)
    if not path.is_file():
        raise AbsentError(
            f"data.image_list names a list (SHA-256 {list_hash[:12]}) that is not in {path.parent}: give it with --list FILE."
        )


def listed(split: Prepared, list_hash: str) -> NDArray[np.int64]:
    """Return the positions of the images that a list names, int64 [n], in the order of the split.

    A line is the name of an image below the folder of its split, or the last part of it where no two images share that.

    Raises:
        UserError: the list is not here, is not what it was, or names images that the split lacks.
    """
    refuse_absent(list_hash, folder=split.path.parent)
    path = _path(split.path.parent, list_hash)
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != list_hash:
        raise UserError(f"{path} is not the list that its name says: remove it, and give the list with --list FILE.")
    positions: dict[str, int] = {}
    shared: set[str] = set()
    names = read_names(split)
    for position, name in enumerate(names):
        last = name.rpartition("/")[2]
        if last in positions:
            shared.add(last)
        positions[last] = position
    positions |= {name: position for position, name in enumerate(names)}
    lines = _lines(content)
    if len(set(lines)) < len(lines):
        raise UserError(f"{path} names an image twice: take the list as it was published.")
    absent = [line for line in lines if line not in positions]
    if absent:
        raise UserError(
            f"{len(absent)} of the {len(lines)} images of {path} are not in '{split.dataset}', such as {absent[0]}: prepare all "
            "of its images, or give another --list."
        )
    unclear = next((line for line in lines if line in shared and line not in names), None)
    if unclear is not None:
        raise UserError(f"{path} names {unclear}, which several images of '{split.dataset}' are called: write CLASS/{unclear}.")
    return np.sort(np.array([positions[line] for line in lines], dtype=np.int64))


def _path(folder: Path, list_hash: str) -> Path:
    return folder / "lists" / f"{list_hash}.txt"


def _lines(content: bytes) -> list[str]:
    return [line.strip() for line in content.decode("utf-8-sig").splitlines() if line.strip()]
