"""The progress of a run: a live bar on a terminal, elsewhere a plain line now and then."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from obowlab.files import open_file
from obowlab.launch.compute_command import NO_PROGRESS_VARIABLE

PLAIN_LINE_EVERY_S = 15.0


class Reporter:
    """Prints on rank 0 and logs every line to the run folder's log.txt; silent on other ranks."""

    def __init__(self, log: Path | None) -> None:
        """Open the log; `None` makes a silent reporter."""
        self._log = io.TextIOWrapper(open_file(log, "ab"), encoding="utf-8") if log is not None else None
        self._console = Console(stderr=True, quiet=log is None, soft_wrap=True, highlight=False)
        self._bar: Progress | None = None
        self._last_line = 0.0

    def say(self, text: str) -> None:
        """Print one line and log it with the time."""
        if self._log is None:
            return
        self._console.print(text, markup=False)
        self.log(text)

    def log(self, text: str) -> None:
        """Log one line with the time, without printing it."""
        if self._log is not None:
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            self._log.flush()

    @contextmanager
    def steps(self, *, done: int, total: int) -> Iterator[None]:
        """Show the progress of training steps for as long as the context lasts."""
        live = self._console.is_terminal and not os.environ.get(NO_PROGRESS_VARIABLE)
        if live and self._log is not None:
            columns = (
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[facts]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=self._console, transient=True) as self._bar:
                self._bar.add_task("train", total=total, completed=done, facts="")
                yield
            self._bar = None
        else:
            self._last_line = time.monotonic()
            yield

    def step(self, *, done: int, total: int, images_per_s: float, left_s: float, values: Mapping[str, float]) -> None:
        """Show the steps done, the speed and a few metrics."""
        facts = f"{images_per_s:.0f} img/s" + "".join(f" · {name} {value:.4g}" for name, value in values.items())
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, facts=facts)
        elif time.monotonic() - self._last_line >= PLAIN_LINE_EVERY_S and not os.environ.get(NO_PROGRESS_VARIABLE):
            self._last_line = time.monotonic()
            self.say(f"step {done}/{total} · {facts} · {left_s / 60:.0f} min left")
