"""How a training process is asked to stop: SIGINT and SIGTERM, remembered until it can."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from obowlab.signals import on_signals


class Interrupted(Exception):  # noqa: N818 - not an error: everything up to here is on disk
    """A signal asked the run to stop."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class StopRequest:
    """Remembers SIGINT and SIGTERM until the program comes to a place where it can stop.

    Attributes:
        signum: the signal that came last; 0 for none.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._at_once = False

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Catch the two signals for as long as the context lasts."""
        with on_signals(self._remember):
            yield self

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        if self._at_once:
            raise Interrupted(signum)

    def act_at_once(self) -> None:
        """From now on, raise `Interrupted` wherever a signal finds the program: outside of training nothing is lost."""
        self._at_once = True
        self.check()

    def asked_after_step(self) -> bool:
        """Return whether a signal came; training asks this once in every step, and nothing else does."""
        return self.signum != 0

    def check(self) -> None:
        """Raise `Interrupted` if a signal came."""
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
