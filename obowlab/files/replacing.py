"""Files and folders that are replaced whole: a reader sees the old one or the new one. And archives, checked as a whole."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from obowlab.files.opening import name_beside, open_file
from obowlab.files.sharing import share

MOST_INFLATED = 20
"""Weights are stored as they are, and shrink by a tenth where another program packs them."""


def write_atomic(path: Path, content: str | bytes, *, shared: bool = False) -> None:
    """Write beside, sync and rename: a reader sees the old file or the new one, never a part.

    Args:
        path: the file.
        content: all of it.
        shared: whether everybody may read and write it who may write to its folder, whatever the umask.
    """
    beside = name_beside(path)
    try:
        with beside.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        if shared:
            share(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def folder_written(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`; when the block succeeds it takes that place, replacing a folder that is there.

    An error or Ctrl-C in the block leaves what was there before, and nothing else.
    """
    beside = name_beside(path)
    before = beside.with_name(f"{beside.name}.before")
    beside.mkdir(parents=True)
    try:
        yield beside
        if path.exists():
            path.rename(before)
        beside.rename(path)
    finally:
        if before.exists() and not path.exists():
            before.rename(path)
        for rest in (beside, before):
            shutil.rmtree(rest, ignore_errors=True)


def inflated_record(archive: zipfile.ZipFile) -> str | None:
    """Return in words what an archive says of itself that no weights do: a record grows more than `MOST_INFLATED` times."""
    for record in archive.infolist():
        if record.file_size > MOST_INFLATED * (record.compress_size + 1024):
            packed, size = (f"{number / 1e6:.1f} MB" for number in (record.compress_size, record.file_size))
            return f"{packed} in it grow to {size} when they are unpacked ({record.filename[:100]})"
    return None


def archive_damage(path: Path) -> str | None:
    """Return one sentence on the damage of a zip archive, as a checkpoint is; None when every record fits its checksum."""
    try:
        with open_file(path) as file, zipfile.ZipFile(file) as archive:
            inflated = inflated_record(archive)
            damaged = archive.testzip() if inflated is None else None
    except (OSError, zipfile.BadZipFile, RuntimeError, EOFError, ValueError) as error:
        return f"{path} is damaged ({str(error).splitlines()[0]})."
    if inflated is not None:
        return f"{path} is damaged ({inflated})."
    return None if damaged is None else f"{path} is damaged (record {damaged} does not match its checksum)."
