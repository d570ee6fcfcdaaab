"""Files that outlive their writer: lines that are appended, whole files and folders that are replaced.

A line file survives `kill -9` of its writer up to the last complete line; a replaced file is the old one or the new one.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic_core import from_json

from obowlab.errors import UserError
from obowlab.track.sealed import is_whole, seal, unseal


@dataclass(frozen=True)
class Point:
    """One line of a metric file: what was logged at one step.

    Attributes:
        step: the optimiser step (training), or seconds since the run was created (system).
        time: seconds since 1970.
        values: metric name to value; may be NaN or infinite.
    """

    step: int
    time: float
    values: dict[str, float]


class MetricLog:
    """Append-only metric file (JSON lines); one writer.

    Opening cuts off a torn last line. Steps up to the last one in the file are ignored: a resumed run repeats them bit for
    bit, so no point is ever doubled. Every append reaches the operating system at once and so survives the death of the
    process; `sync` makes it survive the death of the machine: call it before a checkpoint is written.
    """

    def __init__(self, path: Path) -> None:
        """Open or create the file.

        Raises:
            UserError: a line in the middle is damaged, and what stands behind it cannot be trusted to be all.
        """
        self.path = path
        self.last_step = -1
        cut_torn_tail(path, check=parse_point)
        for line in read_lines(path, check=parse_point):
            self.last_step = int(line["step"])
        self._file = path.open("ab", buffering=0)

    def append(self, step: int, values: Mapping[str, float], *, time_s: float | None = None) -> bool:
        """Write one line unless this step is already there.

        Args:
            step: at least 0.
            values: name to value; Python floats come back exactly. NaN and infinities are kept as the strings `nan`,
                `inf` and `-inf`, so that every line stays valid JSON.
            time_s: seconds since 1970; now if absent.

        Returns:
            Whether the line was written.
        """
        if step <= self.last_step:
            return False
        line = {
            "step": step,
            "time": round(time.time() if time_s is None else time_s, 3),
            "metrics": {name: _to_json(float(value)) for name, value in values.items()},
        }
        append_whole(self._file, seal(json.dumps(line, allow_nan=False, separators=(",", ":"))).encode() + b"\n")
        self.last_step = step
        return True

    def sync(self) -> None:
        """Return once every line is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close; closing twice is fine."""
        if not self._file.closed:
            self.sync()
            self._file.close()

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def parse_point(line: Mapping[str, Any]) -> Point:
    """Turn a parsed line of a metric file into a Point.

    Raises:
        ValueError: it is no such line.
    """
    try:
        values = {str(name): float(value) for name, value in line["metrics"].items()}
        return Point(step=int(line["step"]), time=float(line["time"]), values=values)
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"no line of a metric file: {error!r}") from None


def append_whole(file: FileIO, line: bytes) -> None:
    """Append a line to a file of one writer, whole or not at all: a full disk takes a part of it and only then complains.

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


@contextmanager
def folder_written(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`; when the block ends well it takes that place, replacing a folder that is there.

    A block that is left by an error or by Ctrl-C leaves what was there before, and nothing else.
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


def read_lines(path: Path, *, check: Callable[[dict[str, Any]], object] = len) -> Iterator[dict[str, Any]]:
    """Yield every complete line; one that is still being written is left for the next reading.

    Damaged lines at the end are left out: a crash of the machine leaves such, and the writer cuts them off when it goes on.

    Args:
        path: a line file; one that is not there has no lines.
        check: raises ValueError for a line of another shape.

    Raises:
        UserError: a line is damaged and a whole one follows it.
    """
    damaged = 0
    for number, line in enumerate(_complete_lines(path), start=1):
        try:
            value = unseal(line)
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
    if all(is_whole(line) for line in lines):
        try:
            values: list[dict[str, Any]] = from_json(b"[" + b",".join(lines) + b"]")
        except ValueError:
            return list(read_lines(path))
        if len(values) == len(lines) and all(isinstance(value, dict) for value in values):
            return values
    return list(read_lines(path))


def read_points(path: Path) -> list[Point]:
    """Return every complete line of a metric file.

    Raises:
        UserError: as `read_lines`.
    """
    try:
        return [parse_point(line) for line in read_all(path)]
    except ValueError:  # a whole line that is no point: found with its number, or left out at the end
        return [parse_point(line) for line in read_lines(path, check=parse_point)]


def damaged_line(path: Path, number: int) -> UserError:
    """Return the complaint about a line of a line file, from 1."""
    return UserError(f"{path} is damaged at line {number}: put a copy of the file back, or delete that line to go on without it.")


def cut_torn_tail(path: Path, *, check: Callable[[dict[str, Any]], object] = len) -> None:
    """Cut a line file back to its last complete line that is whole (a crash can leave half a line, or zeros)."""
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
        check(unseal(line))
    except ValueError:
        return False
    return True


def _to_json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
