"""Signals that a process handles for a while."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM)
"""Ctrl-C, and the usual request to end."""


@contextmanager
def on_signals(handler: Callable[[int, FrameType | None], object], numbers: tuple[int, ...] = STOPPING) -> Iterator[None]:
    """Handle signals for as long as the context lasts, then restore the handlers of before.

    Outside the main thread this does nothing: Python allows handlers there only.

    Args:
        handler: called with the signal's number and the interrupted frame.
        numbers: the signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
