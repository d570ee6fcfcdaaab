"""JSON objects with a checksum, one to a file or one to a line.

The last entry, `crc`, is the CRC-32 of every byte before it. A torn file is no JSON any more, but a bit that flips inside a
number still is; the checksum tells both from what was written. It protects against accidents of disks and editors, not against
deliberate changes. JSON without one, which earlier versions wrote, is accepted.

A line file survives `kill -9` of its writer up to the last complete line.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import IO, Any

from pydantic_core import from_json

from obowlab.errors import UserError
from obowlab.files.opening import open_file, read_file

KEY = "crc"

_CHECKSUM = re.compile(rb',\s*"crc":\s*("[^"]*"|[^,"]*?)\s*\}\s*$')
_DIGITS = re.compile(rb'"([0-9a-f]{8})"')

_LONGEST = 48
"""No checksum entry is longer, in bytes."""

LARGEST_LINES = 2**32
"""Nor is a line file: a billion numbers."""

DEEPEST = 100
"""JSON nested deeper is nobody's record."""


def with_checksum(text: str) -> str:
    """Return the text of a JSON object of at least one entry, with its checksum as last entry; indented if the text is."""
    body = text.rstrip()
    assert body.startswith("{")
    assert body.endswith("}")
    between = "\n " if body.endswith("\n}") else ""
    body = body[:-1].rstrip()
    return f'{body},{between}"{KEY}":"{zlib.crc32(body.encode()):08x}"{between.rstrip(" ")}}}'


def checksum_fits(content: bytes) -> bool:
    """Return whether the checksum fits the bytes; True without one, False where damage has made it something else."""
    found = _CHECKSUM.search(content, max(0, len(content) - _LONGEST))
    if found is None:
        return True
    digits = _DIGITS.fullmatch(found[1])
    return digits is not None and zlib.crc32(content[: found.start()]) == int(digits[1], 16)


def parse_checked(content: bytes) -> dict[str, Any]:
    """Parse a JSON object and return it without its checksum.

    Raises:
        ValueError: it is no JSON object, or its checksum does not fit.
    """
    if not checksum_fits(content):
        raise ValueError("its checksum does not fit")
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if content.count(b"[") + content.count(b"{") > DEEPEST and _is_deeper(value, DEEPEST):
        raise ValueError("it is nested too deeply")
    if not isinstance(value, dict):
        raise ValueError(f"it holds no object but {type(value).__name__}")
    value.pop(KEY, None)
    return value


def read_checked(path: Path) -> dict[str, Any]:
    """Parse a file of one JSON object with a checksum.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read, or is no file.
        ValueError: it is damaged.
    """
    return parse_checked(read_file(path))


def append_whole(file: FileIO | IO[bytes], line: bytes) -> None:
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
    try:
        content = read_file(path, limit=LARGEST_LINES)
    except FileNotFoundError:
        return
    end = len(content)
    while end:
        start = content.rfind(b"\n", 0, end - 1) + 1
        if content[end - 1 : end] == b"\n" and _is_good(content[start : end - 1], check):
            break
        end = start
    if end < len(content):
        with open_file(path, "r+b") as file:
            file.truncate(end)


def _complete_lines(path: Path) -> list[bytes]:
    try:
        content = read_file(path, limit=LARGEST_LINES)
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


def _is_deeper(value: object, depth: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth < 0 or any(_is_deeper(one, depth - 1) for one in inner)
