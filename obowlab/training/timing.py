"""How long something takes that is done again and again: seconds of a piece of work, images a second of a stream."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

WARM_UP = 4
"""Most batches that are not counted: threads start, kernels are chosen, memory is taken."""


def timed(work: Callable[[], object], *, seconds: float, wait: Callable[[], None]) -> float:
    """Return the mean seconds of doing something, once at least and else for so long; the first time is not counted."""
    work()
    wait()
    started, done = time.perf_counter(), 0
    while True:
        work()
        done += 1
        if time.perf_counter() - started > seconds:
            wait()
            return (time.perf_counter() - started) / done


def rate(stream: Iterator[object], *, batch_size: int, seconds: float, wait: Callable[[], None]) -> float:
    """Return images a second over so many seconds, after the first batches, which are not counted; the stream is closed."""
    with contextlib.closing(stream):  # type: ignore[type-var]
        began = time.perf_counter()
        for _ in range(WARM_UP):
            next(stream)
            if time.perf_counter() - began > seconds / 2:
                break
        wait()
        started, done = time.perf_counter(), 0
        for _ in stream:
            done += batch_size
            if time.perf_counter() - started > seconds:
                break
        wait()
        return done / (time.perf_counter() - started)
