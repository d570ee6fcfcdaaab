"""A run's metric files: JSON lines, one a logged step, that survive `kill -9` of their one writer."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from obowlab.files.opening import open_file
from obowlab.files.records import append_whole, cut_torn_tail, read_all, read_lines, with_checksum


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
            UserError: a line in the middle is damaged.
        """
        self.path = path
        self.last_step = -1
        cut_torn_tail(path, check=parse_point)
        for line in read_lines(path, check=parse_point):
            self.last_step = int(line["step"])
        self._file = open_file(path, "ab", buffering=0)

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
        append_whole(self._file, with_checksum(json.dumps(line, allow_nan=False, separators=(",", ":"))).encode() + b"\n")
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


def read_points(path: Path) -> list[Point]:
    """Return every complete line of a metric file.

    Raises:
        UserError: as `read_lines`.
    """
    try:
        return [parse_point(line) for line in read_all(path)]
    except ValueError:  # an intact line that is no point: reported with its number, or left out at the end
        return [parse_point(line) for line in read_lines(path, check=parse_point)]


def _to_json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
