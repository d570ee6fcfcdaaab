"""Open regular files and nothing else: no link is followed and no pipe waited for.

A run store may be shared, so whatever lies in it may have been put there by somebody else: a link to a file of ours, a pipe that
never ends, JSON that does not fit into memory.
"""

from __future__ import annotations

import errno
import os
import pwd
import secrets
import shutil
import stat
from io import BufferedReader
from pathlib import Path
from typing import cast

LARGEST_RECORD = 64 * 2**20
"""A file of one JSON object is no larger, in bytes: a thousand times a recipe."""

_KINDS = {
    stat.S_IFLNK: "a link, and links are not followed here",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class UnusableFileError(OSError):
    """What has the name of a file is no regular file, is larger than any file of its kind, or is another user's."""

    def __init__(self, path: Path, reason: str) -> None:
        """Say of a path why it is not used, as the rest of a sentence: `it is a pipe`."""
        super().__init__(errno.EPERM, reason, str(path))


def kind_of(mode: int) -> str | None:
    """Return what a mode says in words, `a pipe`; None of a regular file."""
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "no file")


def open_file(path: Path, mode: str = "rb", *, buffering: int = -1) -> BufferedReader:
    """Open a regular file in a binary mode, and nothing else: no link is followed, and no pipe waited for.

    Args:
        path: the file.
        mode: as of `open`.
        buffering: as of `open`.

    Raises:
        UnusableFileError: something else has its name.
        OSError: as `open`.
    """

    def opener(name: str, flags: int) -> int:
        descriptor = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        reason = kind_of(os.fstat(descriptor).st_mode)
        if reason is None:
            return descriptor
        os.close(descriptor)
        raise UnusableFileError(path, f"it is {reason}")

    try:
        return cast(BufferedReader, open(path, mode, buffering=buffering, opener=opener))  # or a writer, with the same methods
    except OSError as error:
        reason = kind_of(path.lstat().st_mode) if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ENODEV) else None
        if reason is None:
            raise
        raise UnusableFileError(path, f"it is {reason}") from None


def read_file(path: Path, *, limit: int = LARGEST_RECORD) -> bytes:
    """Return what is in a regular file.

    Args:
        path: the file.
        limit: of its size, in bytes.

    Raises:
        UnusableFileError: it is no regular file, or larger.
        OSError: it cannot be read.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise UnusableFileError(path, f"it is larger than {limit // 2**20} MiB")
        return file.read(size)  # not more: so many bytes are reserved before the first is read


def copy_file(source: Path, target: Path, *, owner: int | None = None) -> None:
    """Copy a regular file into a new one.

    Args:
        source: the file.
        target: must not be there yet; its folder is made.
        owner: user id that the file has to have; any if absent.

    Raises:
        UnusableFileError: it is no regular file, or another user's.
        OSError: the disk refuses.
    """
    with open_file(source) as file:
        if owner is not None and os.fstat(file.fileno()).st_uid != owner:
            raise UnusableFileError(source, f"it belongs to {user_name(os.fstat(file.fileno()).st_uid)}")
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as copy:
            shutil.copyfileobj(file, copy)


def is_regular(path: Path, *, owner: int | None = None) -> bool:
    """Return whether a path is a regular file and no link, of this user id if one is given."""
    try:
        facts = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(facts.st_mode) and owner in (None, facts.st_uid)


def files_in(folder: Path, *, owner: int | None = None) -> list[Path]:
    """Return the regular files directly in a folder by name, of this user id if one is given; none of a link."""
    if folder.is_symlink() or not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if is_regular(path, owner=owner))


def copy_tree(source: Path, target: Path, *, owner: int) -> None:
    """Copy the regular files of a folder and of the folders in it that are this user's; links are left out.

    Raises:
        OSError: the disk refuses.
    """
    for folder, _, _ in os.walk(source):  # which follows no links
        for path in files_in(Path(folder), owner=owner):
            copy_file(path, target / path.relative_to(source), owner=owner)


def overwrite(path: Path, content: str) -> None:
    """Put another content into a file that stays the same file, for its lock; an absent one is made.

    Raises:
        UnusableFileError: it is no regular file.
        OSError: the disk refuses.
    """
    with open_file(path, "r+b" if os.path.lexists(path) else "xb") as file:
        file.truncate()
        file.write(content.encode())


def name_beside(path: Path) -> Path:
    """Return a name that nothing has, beside a path.

    Raises:
        IsADirectoryError: the path ends in no name, as `.` and `/`.
    """
    if not path.name:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")


def user_name(uid: int) -> str:
    """Return a user's name, or the number of a user that this machine does not know."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"
