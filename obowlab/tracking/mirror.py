"""A run's copy in MLflow, filled from its folder.

The mirror reads what the run wrote and sends what the store does not have yet. After every request it records how far it is
(`mirror.json`), and what it sends twice after a crash the store recognises: a point is identified by its name, step, time and
value, a run and a model version by their tags. A store that does not answer costs nothing but time: `sync` gives up after its
time limit, reports what is pending, and a later call completes it. For that it works in a thread: database drivers and uploads
know no time limit.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from obowlab.errors import UserError
from obowlab.files.locks import file_lock, holder_name
from obowlab.files.opening import user_name
from obowlab.files.sharing import is_others
from obowlab.runs.folder import RunFolder
from obowlab.runs.trash import store_of
from obowlab.tracking.outbox import Outbox
from obowlab.tracking.sending import OutOfTimeError, Sending
from obowlab.tracking.server import REQUEST_TIMEOUT_S, complaint, fail_fast, shown_uri, store_uri

WAITS_S = (0.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)
"""Seconds that `sync_when_due` waits after 0, 1, 2, ... failures in a row."""


@dataclass(frozen=True)
class SyncReport:
    """What one `sync` did.

    Attributes:
        sent: metric values, files and facts sent.
        pending: how many of these are still to be sent; 0 when a damaged file of the run keeps them from being counted.
        left_out: what is never sent of the run's folder, with reasons.
        error: one sentence when the store could not be reached or refused; None when all is well.
    """

    sent: int
    pending: int
    error: str | None = None
    left_out: tuple[str, ...] = ()


class Mirror:
    """Keeps one run of one MLflow store equal to a run folder."""

    def __init__(self, folder: RunFolder, *, tracking_uri: str | None = None) -> None:
        """Check the store's address; nothing is opened yet.

        Args:
            folder: the run.
            tracking_uri: `machine.tracking_uri`; the SQLite file beside the runs if absent.

        Raises:
            UserError: MLflow cannot write to such an address.
        """
        self.folder = folder
        self.runs_root = store_of(folder.path)
        self.uri = store_uri(tracking_uri, runs_root=self.runs_root)
        self.outbox = Outbox(folder, store=shown_uri(self.uri))
        self._sending = Sending(self.outbox, uri=self.uri, runs_root=self.runs_root)
        self._turn = threading.Lock()
        self._worker: threading.Thread | None = None
        self._error: str | None = None
        self._failures = 0
        self._wait_until = 0.0

    def sync(self, *, timeout_s: float = 30.0) -> SyncReport:
        """Send what the store does not have yet; never raises because of the store and returns within the time limit.

        Args:
            timeout_s: longest time this call may take, in seconds. Work that hangs beyond it stays in the background and is
                joined by the next call.
        """
        end = time.monotonic() + timeout_s
        before = self._sending.count
        error: str | None = f"{shown_uri(self.uri)} did not answer within {timeout_s:.0f} s"
        if self._turn.acquire(timeout=timeout_s):  # the launcher's watcher may still be in its last sync
            try:
                if self._pass(end):
                    error = self._error
                self._failures = self._failures + 1 if error else 0
                self._wait_until = time.monotonic() + WAITS_S[min(self._failures, len(WAITS_S) - 1)]
            finally:
                self._turn.release()
        try:
            pending = self.pending()
        except (UserError, OSError) as damage:  # of the run folder: what follows it cannot be counted
            pending, error = 0, error or str(damage)
        left_out = tuple(self.outbox.left_out())
        return SyncReport(sent=self._sending.count - before, pending=pending, error=error, left_out=left_out)

    def sync_when_due(self, *, timeout_s: float = 10.0) -> SyncReport | None:
        """Do as `sync` does, but after failures wait a while first (`WAITS_S`); None while waiting."""
        return self.sync(timeout_s=timeout_s) if time.monotonic() >= self._wait_until else None

    def pending(self) -> int:
        """Return how many metric values, files and facts the store does not have; does not ask it."""
        return self.outbox.pending()

    # ----------------------------------------------------------------------------------------------- one pass

    def _pass(self, end: float) -> bool:
        """Let a background thread send everything; return whether it was done in time."""
        if self._worker is not None:  # an earlier call gave up on it
            self._worker.join(max(0.0, end - time.monotonic()))
        if self._worker is None or not self._worker.is_alive():
            self._error = None
            self._worker = threading.Thread(target=self._work, args=(end,), name="mirror", daemon=True)
            self._worker.start()
            self._worker.join(max(0.0, end - time.monotonic()))
        if self._worker.is_alive():
            return False
        self._worker = None
        return True

    def _work(self, end: float) -> None:
        try:
            fail_fast(request_s=min(REQUEST_TIMEOUT_S, end - time.monotonic()))
            with self._alone():
                self._sending.send_all(end)
        except UserError as error:
            self._error = str(error)
        except OutOfTimeError:
            self._error = f"{shown_uri(self.uri)} is slow; the rest follows with the next sync"
        # No error of a store, a proxy or a driver may reach the training run; it is reported instead.
        except Exception as error:
            self._sending.disconnect()  # the next pass connects anew
            self._error = complaint(error, uri=self.uri)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        try:
            lock = file_lock(self.folder.path / "mirror.lock", timeout_s=0).acquire()
        except TimeoutError:
            holder = holder_name(self.folder.path / "mirror.lock")
            raise UserError(f"{self.folder.run_id} is being mirrored by {holder}, which sends what is pending.") from None
        except PermissionError:
            if not is_others(self.folder.path):
                raise
            owner = user_name(self.folder.owner)
            raise UserError(f"the run belongs to {owner}, who types `obowlab runs sync {self.folder.run_id}`") from None
        with lock:
            yield
