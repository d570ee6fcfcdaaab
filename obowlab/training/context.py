"""What a compute process works on, and how it is asked to stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from obowlab.config import Machine, Recipe
from obowlab.runs.folder import RunFolder
from obowlab.training.distributed import World
from obowlab.training.reporter import Reporter


class Interrupted(Exception):  # noqa: N818 - not an error: everything up to here is on disk
    """A signal asked the run to stop."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class StopRequest:
    """Remembers SIGINT and SIGTERM until the program comes to a place where it can stop."""

    def __init__(self) -> None:
        self.signum = 0
        self._at_once = False

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Catch the two signals for as long as the context lasts."""

        def remember(signum: int, frame: FrameType | None) -> None:
            self.signum = signum
            if self._at_once:
                raise Interrupted(signum)

        before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def act_at_once(self) -> None:
        """Raise `Interrupted` right where a signal finds the program from now on: nothing is lost outside of training."""
        self._at_once = True
        if self.signum:
            raise Interrupted(self.signum)

    @contextmanager
    def acting_at_once(self) -> Iterator[None]:
        """Do as `act_at_once` does for as long as the context lasts."""
        try:
            self.act_at_once()
            yield
        finally:
            self._at_once = False


@dataclass(frozen=True)
class Work:
    """One run in the hands of one process."""

    folder: RunFolder
    machine: Machine
    world: World
    reporter: Reporter
    stop: StopRequest

    @property
    def recipe(self) -> Recipe:
        """The run's resolved recipe."""
        return self.folder.info.recipe

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.folder.info.seed
