"""What lies in DATA_ROOT/NAME: one `.beton` and one manifest per split, put there whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from obowlab.data.beton import fix_for
from obowlab.data.split_names import SPLITS
from obowlab.errors import UserError, refusal_of
from obowlab.files.locks import file_lock
from obowlab.files.opening import user_name
from obowlab.files.records import read_checked, with_checksum
from obowlab.files.sharing import share, shared_folder

NAMES_SUFFIX = ".names.gz"
"""Of the file beside a split's images that holds the name of every image below the folder of its split, as JSON."""

OBJECTS_SUFFIX = ".objects.npz"
"""Of the file beside them that says what every image shows and where, where the source does (`data.objects`)."""

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


class Skipped(BaseModel):
    """An image of the source that could not be read, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    reason: str


class Manifest(BaseModel):
    """What a prepared split is made of; the content hash identifies the images, the file hash the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str
    split: str
    num_images: int
    class_names: tuple[str, ...]
    content_hash: str
    file_bytes: int
    file_sha256: str
    source: str
    source_hash: str
    """SHA-256 of the names and sizes of the source's files, or the recipe of a generated set."""
    created_at: str
    obowlab_version: str
    skipped: tuple[Skipped, ...] = ()
    val_fraction: float | None = None
    """Share of every class that became val for want of a val split, see `opening.with_val`; None for splits of the source."""
    targets: tuple[str, ...] = ()
    """Of images that may show several classes: for every image a mark for every class, see `sources.PRESENT`."""


def check_name(name: str) -> str:
    """Return `name` if it can name a data set (and so never a path).

    Raises:
        UserError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"'{name}' cannot name a data set: use lower-case letters, digits, - and _, as in `my-photos`.")
    return name


def beton_path(data_root: Path, dataset: str, split: str) -> Path:
    """Return where the images of a split lie."""
    return data_root / dataset / f"{split}.beton"


def read_manifest(data_root: Path, dataset: str, split: str) -> Manifest | None:
    """Return the manifest of a split; None if that split was never prepared.

    Raises:
        UserError: the manifest is no manifest.
    """
    path = beton_path(data_root, dataset, split).with_suffix(".json")
    try:
        manifest = Manifest.model_validate(read_checked(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP):
            raise UserError(refusal_of(error, file=path)) from None  # the machine's fault, not the file's
        raise UserError(f"{path} cannot be read ({error.strerror}): fix its permissions, or {fix_for(dataset)}.") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path} is no manifest of a data set ({where}: {first['msg']}): {fix_for(dataset)}.") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0]}): {fix_for(dataset)}.") from None
    if (manifest.dataset, manifest.split) != (dataset, split):
        raise UserError(f"{path} describes {manifest.dataset}/{manifest.split}, not {dataset}/{split}: {fix_for(dataset)}.")
    return manifest


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write a manifest so that it survives a power cut."""
    with path.open("w", encoding="utf-8") as file:
        file.write(with_checksum(json.dumps(manifest.model_dump(mode="json"), indent=1)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def file_sha256(path: Path) -> str:
    """Return the SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def workplace(data_root: Path, dataset: str, *, wait: bool) -> Iterator[Path]:
    """Lock a data set for writing and yield an empty folder beside it, which is removed at the end.

    What an interrupted process left there is removed first. The lock ends with its process.

    Args:
        data_root: folder of all data sets; created if absent.
        dataset: name of the data set to write.
        wait: wait for a process that writes the same data set, or complain.

    Raises:
        UserError: another process writes it, or the data root cannot be written.
    """
    working = data_root / f".{dataset}.preparing"
    try:
        data_root.mkdir(parents=True, exist_ok=True)
        lock = file_lock(data_root / f".{dataset}.lock", timeout_s=-1 if wait else 0).acquire()
    except TimeoutError:
        raise UserError(f"Another process is preparing '{dataset}' in {data_root}: wait until it is done.") from None
    except OSError as error:
        raise UserError(
            f"Cannot write to the data root {data_root} ({error.strerror}): choose another with --data-root."
        ) from None
    with lock:
        try:
            if working.exists():
                shutil.rmtree(working)
        except OSError as error:
            raise UserError(
                f"Cannot remove {working}, which an interrupted command left ({error.strerror}): let "
                f"{user_name(working.lstat().st_uid)} remove it."
            ) from None
        shared_folder(working)  # whoever comes next may remove what is left in it
        try:
            yield working
        finally:
            shutil.rmtree(working)


def refuse_closed(data_root: Path, dataset: str) -> None:
    """Refuse to write a data set that is there and that this user may not write to; an absent one passes.

    Raises:
        UserError: names its owner.
    """
    target = data_root / dataset
    if target.exists() and not os.access(target, os.W_OK | os.X_OK):
        raise UserError(
            f"You may not write to {target}, which belongs to {user_name(target.stat().st_uid)}: let them type the command, "
            "or choose another name or --data-root."
        )


def publish(working: Path, data_root: Path, dataset: str) -> None:
    """Move finished files into DATA_ROOT/NAME; manifests leave first and come last, so no reader sees a mixture."""
    target = shared_folder(data_root / dataset)
    for suffix in (".json", ".beton", NAMES_SUFFIX, OBJECTS_SUFFIX):
        for split in SPLITS:
            (target / f"{split}{suffix}").unlink(missing_ok=True)
    for suffix in (NAMES_SUFFIX, OBJECTS_SUFFIX, ".beton", ".json"):
        for split in SPLITS:
            if (working / f"{split}{suffix}").exists():
                share(working / f"{split}{suffix}")
                (working / f"{split}{suffix}").replace(target / f"{split}{suffix}")
    for folder in (target, data_root):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
