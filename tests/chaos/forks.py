"""Real processes in milliseconds: everything heavy is imported once, and every command is a fork of that process.

A fork can be killed, stopped and starved like any other process. Where the start itself matters, or what a launcher starts,
processes are started anew.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from obowlab.cli import main
from obowlab.launch.system import process_tree

STORE_VARIABLES = ("OBOWLAB_MACHINE", "OBOWLAB_DATA_ROOT", "OBOWLAB_RUNS_ROOT", "MLFLOW_TRACKING_URI", "OBOWLAB_RUN_LOCK")


def import_everything() -> None:
    """Import what commands import, so that forks need not; starts no thread and trains nothing."""
    import sklearn.linear_model  # noqa: F401
    import torch

    import obowlab.cli.eval
    import obowlab.cli.runs
    import obowlab.evaluation
    import obowlab.launch.local
    import obowlab.training.__main__
    import obowlab.training.final_evaluation  # noqa: F401

    torch.set_num_threads(1)


@dataclass
class Child:
    """A process in a session of its own, and what it says."""

    pid: int
    out: Path
    err: Path
    code: int | None = None
    began: float = 0.0

    def poll(self) -> int | None:
        """Return the exit code, minus the signal's number for one that was killed; None while it lives."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self, timeout_s: float = 300.0) -> int:
        """Return the exit code once it has ended.

        Raises:
            TimeoutError: it did not; it is killed.
        """
        end = time.monotonic() + timeout_s
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                self.kill_family()
                raise TimeoutError(f"no end after {timeout_s:.0f} s; said: {self.said()[-600:]}")
            time.sleep(0.01)
        return code

    def send(self, number: int) -> bool:
        """Send a signal to this process alone; False when it has ended."""
        if self.poll() is not None:
            return False
        os.kill(self.pid, number)
        return True

    def family(self) -> list[int]:
        """Return the process ids of this process and all below it."""
        return process_tree(self.pid) if self.poll() is None else []

    def kill_family(self) -> bool:
        """Kill this process and all below it at once; False when it has ended."""
        alive = self.poll() is None
        for pid in self.family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.poll() if not alive else self.wait(30.0)
        return alive

    def said(self) -> str:
        """Return what it wrote to both streams."""
        return self.out.read_text(errors="replace") + self.err.read_text(errors="replace")

    def complaints(self) -> str:
        """Return what it wrote to standard error."""
        return self.err.read_text(errors="replace")


def fork(work: Callable[[], int], *, place: Path, name: str = "child", environment: Mapping[str, str] | None = None) -> Child:
    """Do some work in a fork, with its own session, working folder and output files.

    Args:
        work: returns the exit code.
        place: its working folder; output goes to `.NAME.out` and `.NAME.err` there.
        name: of the output files.
        environment: further variables.
    """
    place.mkdir(parents=True, exist_ok=True)
    out, err = place / f".{name}.out", place / f".{name}.err"
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.setsid()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            for path, stream in ((out, 1), (err, 2)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), stream)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.chdir(place)
            for variable in STORE_VARIABLES:
                os.environ.pop(variable, None)
            os.environ["PYTHONPATH"] = str(
                Path(__file__).resolve().parents[2]
            )  # this code, also where processes are started anew
            os.environ.update({"HOME": str(place), "OMP_NUM_THREADS": "1", "OBOWLAB_NO_PROGRESS": "1", **(environment or {})})
            code = work()
        except SystemExit as ending:
            code = ending.code if isinstance(ending.code, int) else 1
        except BaseException:  # as the interpreter does for a program: the trace, and an exit code
            traceback.print_exc()
            code = 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return Child(pid=pid, out=out, err=err, began=time.monotonic())


def obowlab(words: Sequence[str], *, place: Path, name: str = "command", environment: Mapping[str, str] | None = None) -> Child:
    """Start a command line of obowlab."""

    return fork(lambda: main(list(words)), place=place, name=name, environment=environment)


def train(
    folder: Path, *, place: Path, environment: Mapping[str, str] | None = None, first: Callable[[], None] | None = None
) -> Child:
    """Start the compute process of a run, as a launcher does; `first` is done in it before anything else."""
    from obowlab.training.__main__ import main

    def work() -> int:
        if first is not None:
            first()
        return main([str(folder)])

    return fork(work, place=place, name="training", environment=environment)
