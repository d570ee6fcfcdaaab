"""Whether a data file is still the one that was written, without reading hundreds of gigabytes at every start.

A file is hashed when it is seen for the first time, and again when its size, its time or its place on the disk is another. What
was found is noted in `.hashed/` beside it or, where the data root is only read, in the run store; either can be deleted at any
time. Processes that meet a file together hash it once: one does, and the others wait for its note.

A note guards against accidents, not against intent: who changes a file in place and sets its time back is not noticed, nor is who
may write the data set's folder, and with it the manifest. A run store is often open to a whole group, which must not vouch for
data it cannot write: of the notes there, only the user's own count, and every user hashes once.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from obowlab.data.manifest import Manifest, beton_path, file_sha256
from obowlab.files.locks import file_lock
from obowlab.files.records import read_checked, with_checksum
from obowlab.files.replacing import write_atomic
from obowlab.files.sharing import shared_folder

NOTES = ".hashed"
PATIENCE_S = 3600.0
"""Longest time to wait for another process that hashes the same file; then it is hashed here too."""

LARGE = 2**30
"""Hashing a file of more bytes takes so long that it is announced."""


class FileIdentity(NamedTuple):
    """What changes whenever a file is written or replaced."""

    num_bytes: int
    mtime_ns: int
    inode: int


def identify(path: Path) -> FileIdentity:
    """Return what identifies a file as it is now.

    Raises:
        OSError: it cannot be asked.
    """
    facts = path.stat()
    return FileIdentity(facts.st_size, facts.st_mtime_ns, facts.st_ino)


def is_written_file(path: Path, *, manifest: Manifest, runs_root: Path | None = None) -> bool:
    """Return whether a data file has the SHA-256 of its manifest.

    Args:
        path: the data file.
        manifest: of its split.
        runs_root: the run store, which remembers the hash where the file's folder cannot be written.

    Raises:
        OSError: it cannot be read.
    """
    identity = identify(path)
    places = _places(path, identity=identity, runs_root=runs_root)
    digest = _noted(places)
    if digest is None:
        with _alone(places):
            digest = _noted(places) or _hash(path, identity=identity, places=places)
    return digest == manifest.file_sha256


def note_written(manifests: Iterable[Manifest], *, data_root: Path) -> None:
    """Note files that were hashed when they were written, just now; their first use need not hash them once more."""
    for manifest in manifests:
        path = beton_path(data_root, manifest.dataset, manifest.split)
        _note(path, digest=manifest.file_sha256, places=_places(path, identity=identify(path), runs_root=None))


def _places(path: Path, *, identity: FileIdentity, runs_root: Path | None) -> list[Path]:
    """Return where the note on a file as it is now may lie: beside it, then in the run store.

    A note each file and state: no two writers share one, and nodes with copies of their own do not overwrite each other's.
    """
    key = hashlib.sha256(json.dumps([str(path.absolute()), *identity]).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    beside = path.parent / NOTES / f"{key}.json"
    return [beside] if runs_root is None else [beside, runs_root / NOTES / f"{key}-{os.geteuid()}.json"]


def _noted(places: Sequence[Path]) -> str | None:
    for place in places:
        try:
            if place == places[0] or place.lstat().st_uid == os.geteuid():
                return str(read_checked(place)["sha256"])
        except (OSError, ValueError, KeyError):  # it only saves time
            continue
    return None


@contextmanager
def _alone(places: Sequence[Path]) -> Iterator[None]:
    """Let one process at a time pass, where locks can be had; elsewhere all of them."""
    with ExitStack() as stack:
        for place in places:
            try:
                shared_folder(place.parent)
                stack.enter_context(file_lock(place.with_suffix(".lock"), timeout_s=PATIENCE_S))
                break
            except (OSError, NotImplementedError):  # the latter is how filelock says that a file system has no locks
                continue
        yield


def _hash(path: Path, *, identity: FileIdentity, places: Sequence[Path]) -> str:
    if identity.num_bytes > LARGE:
        size = f"{identity.num_bytes / 1e9:.0f} GB"
        print(f"Hashing {path} ({size}), which is new here or has changed.", file=sys.stderr, flush=True)
    digest = file_sha256(path)
    if identify(path) == identity:
        _note(path, digest=digest, places=places)
    return digest


def _note(path: Path, *, digest: str, places: Sequence[Path]) -> None:
    """Write the note in the first place that takes it; where none does, the file is hashed again at the next start."""
    for place in places:
        try:
            shared_folder(place.parent)
            content = with_checksum(json.dumps({"file": str(path.absolute()), "sha256": digest}))
            return write_atomic(place, content, shared=True)
        except OSError:
            continue
    return None
