"""A run as one file that another run store takes: what `obowlab runs export` writes."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

from obowlab.errors import UserError
from obowlab.runs.folder import RunFolder

BUNDLED = (
    "run.json",
    "state.json",
    "attempts.jsonl",
    "metrics.jsonl",
    "online.jsonl",
    "system.jsonl",
    "labels.json",
    "results",
    "words",
    "detection",
    "encoder.safetensors",
    "log.txt",
    "dirty.diff",
)
"""What `runs export` takes along: everything that is known about a run, and nothing that belongs to this machine."""


def is_kept(path: Path) -> bool:
    """Return whether a file or folder of a run goes along: links stay, whatever they lead to."""
    return path.exists() and not path.is_symlink()


def _kept(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return member if member.isreg() or member.isdir() else None


def write_bundle(folder: RunFolder, *, names: list[str], target: Path) -> None:
    """Write files of a run folder into a .tar.gz under the run's id, beside and renamed.

    Raises:
        UserError: the file cannot be written.
    """
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with tarfile.open(beside, "x:gz") as bundle:
            for name in names:
                bundle.add(folder.path / name, arcname=f"{folder.run_id}/{name}", filter=_kept)
        beside.replace(target)
    except OSError as error:
        raise UserError(f"Cannot write {target} (--out): {error.strerror or error}.") from None
    finally:
        beside.unlink(missing_ok=True)
