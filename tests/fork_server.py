"""Processes in milliseconds: one server imports everything heavy, and each process is a fork of it.

To import torch takes seconds of processor time, more than what most of these processes then do. Where the start itself matters,
or what a launcher starts, tests start processes anew. pytest itself cannot fork: it has threads.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

CONTEXT: ForkServerContext = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preloaded"])


class Fork:
    """A process that runs a function of a module; it is used like `subprocess.Popen`."""

    def __init__(
        self,
        work: Callable[..., int | None],
        *arguments: Any,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        """Start it.

        Args:
            work: function of a module; an integer that it returns is the exit code.
            arguments: what it is called with; everything must be picklable.
            environment: the process has these variables and no others; None passes on those of this process.
            cwd: its working folder; None passes on that of this process.
        """
        descriptor, name = tempfile.mkstemp(prefix="fork-", suffix=".err", dir=os.environ["PYTEST_OBOWLAB_HERMETIC"])
        os.close(descriptor)
        self._errors = Path(name)
        variables = dict(os.environ if environment is None else environment)
        self._process = CONTEXT.Process(target=_play, args=(work, arguments, variables, str(Path.cwd()), name))
        self._process.start()

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, minus the signal's number for one that was killed; None while it lives."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return `returncode`."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL, unless it has ended."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 300.0) -> tuple[None, bytes]:
        """Wait for the end; return nothing, for standard output is dropped, and what it wrote to standard error.

        Raises:
            TimeoutError: it did not end in time; it is killed.
        """
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise TimeoutError(f"no end within {timeout:.0f} s; it wrote: {self._errors.read_bytes().decode()}")
        return None, self._errors.read_bytes()


def fork_all(work: Callable[..., int | None], *, ranks: int, arguments: tuple[Any, ...]) -> None:
    """Run `work(rank, *arguments)` in one process for each rank and wait for all of them.

    Raises:
        AssertionError: one of them failed; the message is what it wrote to standard error.
    """
    forks = [Fork(work, rank, *arguments) for rank in range(ranks)]
    try:
        for fork in forks:
            _, errors = fork.communicate()
            assert fork.returncode == 0, errors.decode()
    finally:
        for fork in forks:
            fork.kill()


def _play(work: Callable[..., int | None], arguments: tuple[Any, ...], variables: dict[str, str], cwd: str, errors: str) -> None:
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    for path, stream in ((os.devnull, 1), (errors, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), stream)
    for number in (signal.SIGINT, signal.SIGTERM):  # the server ignores what a terminal sends
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    sys.exit(work(*arguments))
