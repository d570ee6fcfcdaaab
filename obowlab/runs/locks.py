"""The two byte locks of a run folder's file `lock`: one of the launcher, one of the compute process it starts.

They are POSIX record locks, which network file systems know, and which the kernel gives back when their process dies.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from obowlab.errors import UserError

HOLDER_BYTE, WORKER_BYTE = 0, 1
HELD: set[str] = set()
"""Run folders locked by this process. Such a lock is lost when the process closes the file anywhere: never open it again."""
HELD_GUARD = threading.Lock()
"""Of `HELD`, and of opening lock files just to look: between threads of one process the kernel's locks mean nothing."""


def is_locked(path: Path) -> bool:
    """Return whether any process holds the run of this folder."""
    with HELD_GUARD:
        if str(path.resolve()) in HELD:
            return True
        try:
            fd = os.open(path / "lock", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB, 2, HOLDER_BYTE)
        except OSError:
            return True
        finally:
            os.close(fd)
        return False


def holder_of(path: Path) -> dict[str, Any]:
    """Return who held the run of this folder last: pid and host; empty when nobody ever did."""
    with HELD_GUARD:
        if str(path.resolve()) in HELD:
            return {"pid": os.getpid(), "host": socket.gethostname()}
        try:
            fd = os.open(path / "lock", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return {}
        try:
            return read_holder(fd)
        finally:
            os.close(fd)


def try_lock(fd: int, byte: int) -> bool:
    """Take one byte of an open lock file; False when another process has it.

    Raises:
        UserError: the file system knows no locks.
    """
    for attempt in range(5):  # `is_locked` of another process may hold it for an instant
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
            return True
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"The file system of the run store knows no locks ({error.strerror}); use another --runs-root."
                ) from None
            time.sleep(0.02 * (attempt + 1))
    return False


def read_holder(fd: int) -> dict[str, Any]:
    """Return what the holder wrote into an open lock file: pid, host and token; empty when nobody did."""
    try:
        holder = json.loads(os.pread(fd, 4096, 0))
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}
