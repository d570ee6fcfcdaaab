"""Files that outlive their writer: JSON with a checksum, appended lines, files and folders that are replaced whole; file locks.

A line file survives `kill -9` of its writer up to the last complete line; a replaced file is the old one or the new one.

JSON objects end in a checksum: the last entry, `crc`, is the CRC-32 of every byte before it. A torn file is no JSON any more,
but a bit that flips inside a number still is; the checksum tells both from what was written. It protects against accidents of
disks and editors, not against deliberate changes. JSON without one, which earlier versions wrote, is accepted.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json

from obowlab.errors import UserError

if TYPE_CHECKING:
    from filelock import FileLock

KEY = "crc"
_CHECKSUM = re.compile(rb',\s*"crc":\s*"([0-9a-f]{8})"\s*\}\s*$')
_LONGEST = 48
"""No checksum entry is longer, in bytes."""


def with_checksum(text: str) -> str:
    """Return the text of a JSON object of at least one entry, with its checksum as last entry; indented if the text is."""
    body = text.rstrip()
    assert body.startswith("{")
    assert body.endswith("}")
    between = "\n " if body.endswith("\n}") else ""
    body = body[:-1].rstrip()
    return f'{body},{between}"{KEY}":"{zlib.crc32(body.encode()):08x}"{between.rstrip(" ")}}}'


def checksum_fits(content: bytes) -> bool:
    """Return whether the checksum fits the bytes; True without a checksum."""
    found = _CHECKSUM.search(content, max(0, len(content) - _LONGEST))
    return found is None or zlib.crc32(content[: found.start()]) == int(found[1], 16)


def parse_checked(content: bytes) -> dict[str, Any]:
    """Parse a JSON object and return it without its checksum.

    Raises:
        ValueError: it is no JSON object, or its checksum does not fit.
    """
    if not checksum_fits(content):
        raise ValueError("its checksum does not fit")
    value = json.loads(content)
    if not isinstance(value, dict):
        raise ValueError(f"it holds no object but {type(value).__name__}")
    value.pop(KEY, None)
    return value


def read_checked(path: Path) -> dict[str, Any]:
    """Parse a file of one JSON object with a checksum.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    return parse_checked(path.read_bytes())


def append_whole(file: FileIO, line: bytes) -> None:
    """Append a line to a file of one writer, whole or not at all: a full disk takes a part of it and only then fails.

    Raises:
        OSError: the disk refuses.
    """
    before = os.fstat(file.fileno()).st_size
    rest = memoryview(line)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        os.ftruncate(file.fileno(), before)
        raise


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write beside, sync and rename: a reader sees the old file or the new one, never a part."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with beside.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def archive_damage(path: Path) -> str | None:
    """Return one sentence on the damage of a zip archive, as a checkpoint is; None when every record fits its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile, RuntimeError, EOFError, ValueError) as error:
        return f"{path} is damaged ({str(error).splitlines()[0]})."
    return None if damaged is None else f"{path} is damaged (record {damaged} does not match its checksum)."


@contextmanager
def folder_written(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`; when the block succeeds it takes that place, replacing a folder that is there.

    An error or Ctrl-C in the block leaves what was there before, and nothing else.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
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


def file_lock(path: Path, *, timeout_s: float = -1.0) -> FileLock:
    """Return an exclusive lock on a file, to be entered with `with`; the kernel gives it back when its process dies.

    The file stays where it is. A forked child does not hold the lock of its parent; network file systems know it too.

    Args:
        path: the lock file, made if absent; its folder has to be there.
        timeout_s: longest time to wait when entering, which then raises TimeoutError; negative: without a limit.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    from filelock import FileLock  # late: importing it takes longer than many a command

    if not path.parent.is_dir():  # filelock would make it, and with it the folder of a run that was just moved away
        raise FileNotFoundError(2, os.strerror(2), str(path.parent))
    # No fallback to files whose presence is the lock: such a file outlives its process.
    return FileLock(path, timeout=timeout_s, thread_local=False, fallback_to_soft=False)


def is_held(path: Path) -> bool:
    """Return whether any process, this one included, holds the `file_lock` of this file; makes no file.

    filelock can only ask by taking the lock, which needs a right to write and disturbs others that ask; a shared flock does not.
    """
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def only_we_write(path: Path) -> bool:
    """Return whether nobody but this user and the superuser can put anything else in the place of a folder or of what is in it.

    So every folder on the way to it belongs to one of them and gives no others the right to write, or keeps them from touching
    what they do not own (as /tmp does). Folders that are not there yet count as ours to make.
    """
    place = path.resolve()
    for folder in (place, *place.parents):
        try:
            facts = folder.stat()
        except FileNotFoundError:
            continue
        if facts.st_uid not in (0, os.geteuid()):
            return False
        if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and (folder == place or not facts.st_mode & stat.S_ISVTX):
            return False
    return True


def private_folder(name: str) -> Path:
    """Return a folder of this user for files that are run as code, made with mode 700 if it is not there.

    Args:
        name: below `$XDG_STATE_HOME/obowlab` (`~/.local/state/obowlab`).

    Raises:
        UserError: it cannot be made, belongs to somebody else, or others may use it.
    """
    base = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "obowlab"
    folder = base / name
    for place in (base, folder):
        try:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            facts = place.lstat()
        except OSError as error:
            raise UserError(f"Cannot make the private folder {place}: {error.strerror}.") from None
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
            raise UserError(f"{place} is to hold files that are run as code, so it has to be yours alone: chmod 700 {place}")
    return folder


def read_lines(path: Path, *, check: Callable[[dict[str, Any]], object] = len) -> Iterator[dict[str, Any]]:
    """Yield every complete line; one that is still being written is left for the next reading.

    Damaged lines at the end are left out: a crash of the machine leaves such, and the writer cuts them off when it resumes.

    Args:
        path: a line file; one that is not there has no lines.
        check: raises ValueError for a line of another shape.

    Raises:
        UserError: a line is damaged and an intact one follows it.
    """
    damaged = 0
    for number, line in enumerate(_complete_lines(path), start=1):
        try:
            value = parse_checked(line)
            check(value)
        except ValueError:
            damaged = damaged or number
            continue
        if damaged:
            raise damaged_line(path, damaged)
        yield value


def read_all(path: Path) -> list[dict[str, Any]]:
    """Return what `read_lines` yields, parsed at once: four times as fast, for the large files of many runs.

    Raises:
        UserError: as `read_lines`.
    """
    lines = _complete_lines(path)
    if all(checksum_fits(line) for line in lines):
        try:
            values: list[dict[str, Any]] = from_json(b"[" + b",".join(lines) + b"]")
        except ValueError:
            return list(read_lines(path))
        if len(values) == len(lines) and all(isinstance(value, dict) for value in values):
            return values
    return list(read_lines(path))


def damaged_line(path: Path, number: int) -> UserError:
    """Return the error for a damaged line of a line file, from 1."""
    return UserError(f"{path} is damaged at line {number}: restore it from a copy, or delete that line to continue without it.")


def cut_torn_tail(path: Path, *, check: Callable[[dict[str, Any]], object] = len) -> None:
    """Cut a line file back to its last complete and intact line (a crash can leave half a line, or zeros)."""
    if not path.exists():
        return
    content = path.read_bytes()
    end = len(content)
    while end:
        start = content.rfind(b"\n", 0, end - 1) + 1
        if content[end - 1 : end] == b"\n" and _is_good(content[start : end - 1], check):
            break
        end = start
    if end < len(content):
        os.truncate(path, end)


def _complete_lines(path: Path) -> list[bytes]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    end = content.rfind(b"\n")
    return content[:end].split(b"\n") if end >= 0 else []


def _is_good(line: bytes, check: Callable[[dict[str, Any]], object]) -> bool:
    try:
        check(parse_checked(line))
    except ValueError:
        return False
    return True
