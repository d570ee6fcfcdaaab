"""Who works on which trial: file locks in the study's folder, which the kernel gives back when a worker dies.

A storage cannot tell a trial that is being trained from one whose worker was killed: Optuna's heartbeats exist for some
storages, and only inside its own loop. So a worker holds one lock per trial it works on, and all workers of a study take
turns when they decide what to do next. Workers on several machines share the run store, and with it these locks.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from obowlab.errors import UserError
from obowlab.files.locks import file_lock, is_held, locked
from obowlab.files.sharing import shared_folder

if TYPE_CHECKING:
    from filelock import FileLock

TRY_S = 0.3
"""Longest time to try for a trial, because a worker that only looks holds it for an instant."""


TURN_S = 600.0
"""Longest time to wait for another worker's turn, which may send a report to MLflow."""


class TrialLocks:
    """The locks of one study, as one process sees them; its threads share it."""

    def __init__(self, folder: Path) -> None:
        """Make the folder, `RUNS_ROOT/.studies/NAME`.

        Raises:
            UserError: the disk refuses.
        """
        self.folder = folder
        self._turn = threading.Lock()
        self._held: dict[int, FileLock] = {}
        try:
            shared_folder(shared_folder(folder.parent) / folder.name)
        except OSError as error:
            raise UserError(f"Cannot create {folder} (--runs-root): {error.strerror}.") from None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other worker of the study is deciding, and keep them waiting for as long as the context lasts."""
        with self._turn, locked(self.folder / "turn.lock", patience_s=TURN_S):
            yield

    def take(self, number: int) -> bool:
        """Hold a trial until `release` or the end of this process; False when a worker, this one included, has it."""
        if self.is_held(number):
            return False
        lock = file_lock(self._path(number), timeout_s=TRY_S)
        try:
            lock.acquire()
        except TimeoutError:
            return False
        self._held[number] = lock
        return True

    def release(self, number: int) -> None:
        """Let a trial go."""
        self._held.pop(number).release()

    def is_held(self, number: int) -> bool:
        """Return whether any worker, this one included, has a trial."""
        return is_held(self._path(number))

    def _path(self, number: int) -> Path:
        return self.folder / f"trial-{number}.lock"
