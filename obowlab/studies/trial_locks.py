"""Who works on which trial: file locks in the study's folder, which the kernel gives back when a worker dies.

A storage cannot tell a trial that is being trained from one whose worker was killed: Optuna's heartbeats exist for some
storages, and only inside its own loop. So a worker holds one lock per trial it works on, and all workers of a study take
turns when they decide what to do next. Workers on several machines share the run store, and with it these locks.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path

from obowlab.errors import UserError


class TrialLocks:
    """The locks of one study, as one process sees them; its threads share it."""

    def __init__(self, folder: Path) -> None:
        """Make the folder, `RUNS_ROOT/.studies/NAME`.

        Raises:
            UserError: the disk refuses.
        """
        self.folder = folder
        self._turn = threading.Lock()
        self._held: dict[int, TextIOWrapper] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"Cannot create {folder} (--runs-root): {error.strerror}.") from None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other worker of the study is deciding, and keep them waiting for as long as the context lasts."""
        with self._turn, (self.folder / "turn.lock").open("w") as file:
            _flock(file, fcntl.LOCK_EX)
            yield

    def take(self, number: int) -> bool:
        """Hold a trial until `release` or the end of this process; False when a worker, this one included, has it."""
        if number in self._held:
            return False
        file = self._path(number).open("a+")
        for attempt in range(5):  # somebody's `is_held` may have it for an instant
            if _flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
                break
            time.sleep(0.02 * (attempt + 1))
        else:
            file.close()
            return False
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "time": round(time.time(), 3)}))
        file.flush()
        self._held[number] = file
        return True

    def release(self, number: int) -> None:
        """Let a trial go."""
        self._held.pop(number).close()

    def is_held(self, number: int) -> bool:
        """Return whether any worker, this one included, has a trial."""
        if number in self._held:
            return True
        try:
            with self._path(number).open("r") as file:
                return not _flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False

    def _path(self, number: int) -> Path:
        return self.folder / f"trial-{number}.lock"


def _flock(file: TextIOWrapper, operation: int) -> bool:
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(f"The file system of the run store knows no locks ({error.strerror}); use another --runs-root.") from None
    return True
