"""File locks, which the kernel takes back from a process that dies, and who holds one."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from obowlab.errors import UserError
from obowlab.files.opening import UnusableFileError, kind_of, open_file, user_name
from obowlab.files.sharing import is_shared, shared_file

if TYPE_CHECKING:
    from filelock import FileLock

PATIENCE_S = 120.0
"""Longest time to wait for a lock that is held for moments."""


def file_lock(path: Path, *, timeout_s: float = -1.0) -> FileLock:
    """Return an exclusive lock on a file, to be entered with `with`; the kernel gives it back when its process dies.

    The file stays where it is, and its content too. A forked child does not hold the lock of its parent; network file systems
    know it too. Who may write to the folder may take the lock, whatever the umask of who made it.

    Args:
        path: the lock file, made if absent; its folder has to be there.
        timeout_s: longest time to wait when entering, which then raises TimeoutError; negative: without a limit.

    Raises:
        FileNotFoundError: there is no such folder.
        UnusableFileError: something else has its name.
    """
    from filelock import FileLock  # late: importing it takes longer than many a command

    if not path.parent.is_dir():  # filelock would make it, and with it the folder of a run that was just moved away
        raise FileNotFoundError(2, os.strerror(2), str(path.parent))
    with suppress(FileNotFoundError):
        reason = kind_of(path.lstat().st_mode)
        if reason is not None:
            raise UnusableFileError(path, f"it is {reason}")
    shared_file(path)
    lock = partial(FileLock, path, timeout=timeout_s, thread_local=False, fallback_to_soft=False)
    # No fallback to files whose presence is the lock: such a file outlives its process.
    return lock(mode=0o664) if is_shared(path.parent) else lock()


@contextmanager
def locked(path: Path, *, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Hold a `file_lock` that is held for moments only.

    Raises:
        UserError: a process keeps it for longer than that; names the process.
        OSError: as `file_lock`.
    """
    try:
        lock = file_lock(path, timeout_s=patience_s).acquire()
    except TimeoutError:
        raise UserError(
            f"{path} has been locked for {patience_s:.0f} s by {holder_name(path)}: end that process, or ask its user to."
        ) from None
    with lock:
        yield


def lock_holder(path: Path) -> int | None:
    """Return the id of the process of this machine that the kernel says has a lock on a file; None when it knows none."""
    try:
        facts = path.lstat()
        lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    place = f"{os.major(facts.st_dev):02x}:{os.minor(facts.st_dev):02x}:{facts.st_ino}"
    held = (line.split() for line in lines)  # "1: FLOCK ADVISORY WRITE 4242 fe:01:131 0 EOF"; those that wait have an arrow
    return next((int(words[4]) for words in held if len(words) > 5 and words[5] == place and int(words[4]) > 1), None)


def holder_name(path: Path) -> str:
    """Return who has a lock on a file, for a sentence."""
    pid = lock_holder(path)
    return "a process of another machine" if pid is None else process_name(pid)


def process_name(pid: int) -> str:
    """Return a process of this machine with its program and user, for a sentence."""
    place = Path(f"/proc/{pid}")
    try:
        return f"process {pid} ({(place / 'comm').read_text(errors='replace').strip()} of {user_name(place.stat().st_uid)})"
    except OSError:
        return f"process {pid}"


def is_held(path: Path) -> bool:
    """Return whether any process, this one included, holds the `file_lock` of this file; makes no file.

    filelock can only ask by taking the lock, which needs a right to write and disturbs others that ask; a shared flock does not.
    """
    try:
        with open_file(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (FileNotFoundError, UnusableFileError):
        return False
    except BlockingIOError:
        return True
    return False
