"""Child processes of a launcher: tied to its life, asked to stop by the first signal, killed by the second."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from obowlab.files.opening import open_file
from obowlab.launch.system import process_tree
from obowlab.signals import on_signals

PR_SET_PDEATHSIG = 1
STOPPING_RUNS = "Stopping: the runs save themselves; a second Ctrl-C kills them."


@dataclass
class StopSignals:
    """Passes the first stopping signal on to the child and kills the child and all its descendants at the second.

    Attributes:
        received: the signals, in order.
        reason: why the run is stopped, for its state; empty for a plain signal.
        child: the process that runs, while there is one.
        notice: what the first signal prints at once on standard error.
    """

    received: list[int] = field(default_factory=list)
    reason: str = ""
    child: subprocess.Popen[bytes] | None = None
    notice: str = ""

    def listening(self) -> AbstractContextManager[None]:
        """Receive the signals of this process for as long as the context lasts; outside the main thread, none."""
        return on_signals(self._receive)

    def watch(self, child: subprocess.Popen[bytes]) -> None:
        """Pass signals on to this child from now on, also one that arrived before there was a child."""
        self.child = child
        if self.received:
            child.send_signal(self.received[0])

    def send(self, number: int, *, reason: str = "") -> None:
        """Act as if this signal had arrived; for threads, which receive none."""
        if not self.received:
            self.reason = reason
        self._receive(number, None)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        if self.notice and len(self.received) == 1:
            with suppress(OSError):  # straight to the terminal: the signal may have come while something was printed
                os.write(sys.stderr.fileno(), f"\n{self.notice}\n".encode("ascii", "replace"))
        if self.child is None or self.child.returncode is not None:
            return
        if len(self.received) == 1:
            self.child.send_signal(number)
        else:
            kill_family(self.child)


def start(command: list[str], *, environment: Mapping[str, str], output: Path | None) -> subprocess.Popen[bytes]:
    """Start a process that does not outlive this one.

    Args:
        command: the command line.
        environment: all its variables.
        output: where to append what it prints; the terminal if absent.
    """
    # A session of its own: Ctrl-C reaches the launcher alone, which passes it on once.
    with open_file(output, "ab") if output is not None else nullcontext() as sink:
        return subprocess.Popen(
            command, env=environment, start_new_session=True, preexec_fn=tied_to_this_process(), stdout=sink, stderr=sink
        )


def kill_family(child: subprocess.Popen[bytes]) -> None:
    """Kill a child and all its descendants at once."""
    for pid in process_tree(child.pid) or [child.pid]:
        with suppress(ProcessLookupError):  # it has ended meanwhile
            os.kill(pid, signal.SIGKILL)


def tied_to_this_process() -> Callable[[], None]:
    """Return what a child does between fork and exec so that Linux sends it a SIGTERM when this process dies."""
    parent = os.getpid()
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: little is safe between fork and exec

    def die_with_parent() -> None:
        if libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # it died before the line above
                os.kill(os.getpid(), signal.SIGTERM)

    return die_with_parent


def shell_code(returncode: int) -> int:
    """Return a process's exit code as a shell has it: 128 + N after signal N."""
    return 128 - returncode if returncode < 0 else returncode
