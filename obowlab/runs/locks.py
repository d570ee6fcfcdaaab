"""The locks of a run folder: `lock` of the launcher, `worker.lock` of the training process it starts.

Each is held until its process ends, however it ends: the kernel gives it back. A run is taken as long as either is held, so a
training process whose launcher was killed keeps the run until it has saved itself.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from obowlab.errors import UserError
from obowlab.files.locks import file_lock, is_held, lock_holder, process_name
from obowlab.files.opening import overwrite, read_file
from obowlab.runs.info import read_state

LAUNCHER, WORKER = "lock", "worker.lock"
LOCK_TOKEN_VARIABLE = "OBOWLAB_RUN_LOCK"
"""Set by a launcher for the processes it starts: with its token they may take the worker's lock of the same run."""

TRY_S = 0.3
"""Longest time to try for a lock, because a process that only looks holds it for an instant."""


@dataclass(frozen=True)
class Lock:
    """A held run lock; `token` goes to child processes as the environment variable `LOCK_TOKEN_VARIABLE`."""

    token: str


class RunTakenError(UserError):
    """Another process has the run; the message names it."""


def is_locked(path: Path) -> bool:
    """Return whether any process, this one included, holds the run of this folder."""
    return is_held(path / LAUNCHER) or is_held(path / WORKER)


def holder_of(path: Path) -> dict[str, Any]:
    """Return the pid, host and token of the launcher that took the run of this folder last; empty when none ever did."""
    try:
        holder = json.loads(read_file(path / LAUNCHER))
    except (OSError, ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


@contextmanager
def hold(path: Path) -> Iterator[Lock]:
    """Hold the run of this folder until the context or this process ends, as its launcher or as that launcher's worker.

    Forked loader processes hold nothing: filelock closes its files in a forked child.

    Raises:
        RunTakenError: another process has it.
        UserError: the folder cannot be written to, or its file system has no locks.
    """
    token = os.environ.get(LOCK_TOKEN_VARIABLE, "")
    holder = holder_of(path)
    is_worker = token != "" and token == holder.get("token")
    try:
        lock = file_lock(path / (WORKER if is_worker else LAUNCHER), timeout_s=TRY_S)
        lock.acquire()
    except TimeoutError:
        raise _taken(path, by_worker=is_worker) from None
    except OSError as error:
        raise UserError(
            f"Cannot lock the run folder {path} ({error.strerror}): make it writable, or use a --runs-root that has file locks."
        ) from None
    try:
        # A worker takes its lock and then reads the token; a launcher writes the token and then looks at the worker's lock. So of
        # a worker and a new launcher at the same moment at least one sees the other.
        if is_worker:
            if token != holder_of(path).get("token"):
                raise _taken(path)
        else:
            token = secrets.token_hex(8)
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "token": token}
            overwrite(path / LAUNCHER, json.dumps(holder))
            if is_held(path / WORKER):  # its launcher was killed, it is still saving
                raise _taken(path, by_worker=True)
        yield Lock(token)
    finally:
        lock.release()


def _taken(path: Path, *, by_worker: bool = False) -> RunTakenError:
    state, holder = read_state(path), holder_of(path)
    pid = state.pid if by_worker else holder.get("pid")
    found = lock_holder(path / (WORKER if by_worker else LAUNCHER))
    if found is not None and pid is not None and found != pid and not by_worker:
        return RunTakenError(
            f"The lock of run '{path.name}' is held by {process_name(found)}, which does not train it: end that process, or ask "
            "its user to."
        )
    host = (state.host if by_worker else holder.get("host")) or socket.gethostname()
    who = f"process {pid}" if found in (None, pid) else process_name(found)
    return RunTakenError(f"Run '{path.name}' is being trained by {who} on {host}; wait for it or stop it first.")
