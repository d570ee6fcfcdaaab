"""The progress of a run: a live bar on a terminal, elsewhere a plain line now and then."""

from __future__ import annotations

import io
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from obowlab import text
from obowlab.files.opening import open_file
from obowlab.launch.compute_command import NO_PROGRESS_VARIABLE

PLAIN_LINE_EVERY_S = 15.0
BAR_WIDTH = 10
PLAIN_WIDTH = 80
"""Columns of a plain line; a live one has those of its terminal."""


class Reporter:
    """Prints on rank 0 and logs every line to the run folder's log.txt; silent on other ranks."""

    def __init__(self, log: Path | None) -> None:
        """Open the log; `None` makes a silent reporter."""
        self._log = io.TextIOWrapper(open_file(log, "ab"), encoding="utf-8") if log is not None else None
        self._console = Console(stderr=True, quiet=log is None, soft_wrap=True, highlight=False)
        self._bar: Progress | None = None
        self._last_line = 0.0

    def say(self, line: str) -> None:
        """Print one line and log it with the time."""
        if self._log is None:
            return
        try:
            self._console.print(line, markup=False)
        except OSError:  # no file is left for what rich reads before its first line
            print(line, file=sys.stderr)
        self.log(line)

    def log(self, line: str) -> None:
        """Log one line with the time, without printing it."""
        if self._log is not None:
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
            self._log.flush()

    @contextmanager
    def steps(self, *, done: int, total: int) -> Iterator[None]:
        """Show the progress of training steps for as long as the context lasts."""
        live = self._console.is_terminal and not os.environ.get(NO_PROGRESS_VARIABLE)
        if live and self._log is not None:
            columns = (TextColumn("{task.fields[left]}"), BarColumn(BAR_WIDTH), TextColumn("{task.fields[facts]}"))
            with Progress(*columns, console=self._console, transient=True) as self._bar:
                self._bar.add_task("train", total=total, completed=done, left="Training", facts="")
                yield
            self._bar = None
        else:
            self._last_line = time.monotonic()
            yield

    def step(self, *, done: int, left_s: float, facts: Sequence[str]) -> None:
        """Show how long it will take still, and as many facts as fit, the most important first."""
        left = f"{text.duration(left_s)} left"
        if self._bar is not None:
            room = self._console.width - len(left) - BAR_WIDTH - 2
            self._bar.update(self._bar.task_ids[0], completed=done, left=left, facts=progress_line(facts, columns=room))
        elif time.monotonic() - self._last_line >= PLAIN_LINE_EVERY_S and not os.environ.get(NO_PROGRESS_VARIABLE):
            self._last_line = time.monotonic()
            self.say(progress_line([left, *facts]))


def training_facts(
    *, epoch: float, epochs: int, step: int, steps: int, images_per_s: float, values: Mapping[str, float]
) -> list[str]:
    """Return what a line of progress says of a training, the most important first.

    Args:
        epoch: epochs seen so far, with fraction.
        epochs: of the whole training.
        step: steps done.
        steps: of the whole training.
        images_per_s: the speed.
        values: a few metrics.
    """
    return [
        f"epoch {min(epochs, max(1, math.ceil(epoch)))}/{epochs}",
        f"step {step}/{steps}",
        f"{images_per_s:.0f} img/s",
        *(f"{name} {value:.4g}" for name, value in values.items()),
    ]


def progress_line(facts: Sequence[str], *, columns: int = PLAIN_WIDTH) -> str:
    """Return facts in one line, as many from the first as fit into so many columns."""
    line = ""
    for fact in facts:
        longer = f"{line} · {fact}" if line else fact
        if len(longer) > columns:
            break
        line = longer
    return line
