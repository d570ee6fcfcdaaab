"""Whether a data file is still the one that was written, without reading hundreds of gigabytes at every start.

A file is hashed when it is seen for the first time, and again when its size, its time or its place on the disk is another;
what was found is noted in `.hashed.json` beside it, which can be deleted at any time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from obowlab.data.manifest import Manifest, beton_path, file_sha256
from obowlab.files import read_checked, with_checksum, write_atomic

NOTES = ".hashed.json"
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


def is_written_file(path: Path, *, manifest: Manifest) -> bool:
    """Return whether a data file has the SHA-256 of its manifest.

    Raises:
        OSError: it cannot be read.
    """
    identity = identify(path)
    noted = _notes(path.parent).get(path.name)
    if noted is not None and noted[:-1] == list(identity):
        return noted[-1] == manifest.file_sha256
    if identity.num_bytes > LARGE:
        print(
            f"Hashing {path} ({identity.num_bytes / 1e9:.0f} GB), which is new here or has changed.", file=sys.stderr, flush=True
        )
    digest = file_sha256(path)
    if identify(path) == identity:
        _note(path, identity=identity, digest=digest)
    return digest == manifest.file_sha256


def note_written(manifests: Iterable[Manifest], *, data_root: Path) -> None:
    """Note files that were hashed when they were written, just now; their first use need not hash them once more."""
    for manifest in manifests:
        path = beton_path(data_root, manifest.dataset, manifest.split)
        _note(path, identity=identify(path), digest=manifest.file_sha256)


def _notes(folder: Path) -> dict[str, list[int | str]]:
    try:
        return {str(name): list(noted) for name, noted in read_checked(folder / NOTES).items()}
    except (OSError, ValueError, TypeError):  # it only saves time
        return {}


def _note(path: Path, *, identity: FileIdentity, digest: str) -> None:
    try:
        write_atomic(path.parent / NOTES, with_checksum(json.dumps({**_notes(path.parent), path.name: [*identity, digest]})))
    except OSError:  # a data root that is only read: hashed again at the next start
        return
