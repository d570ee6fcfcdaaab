"""Whose a file is: folders that a group shares, and folders that only their owner may write to."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from obowlab.errors import UserError
from obowlab.files.opening import UnusableFileError, name_beside


def is_others(path: Path) -> bool:
    """Return whether a file or folder belongs to somebody else; one whose owner this machine cannot name, does not.

    That is how a network disk shows what the superuser of a client made there, and a container what is of outside.
    """
    owner = path.lstat().st_uid
    return owner not in (os.geteuid(), _NOBODY)


def leads_astray(path: Path) -> bool:
    """Return whether a path is a link that somebody made to what is not theirs: its user would do what they cannot."""
    try:
        link = path.lstat()
        return stat.S_ISLNK(link.st_mode) and link.st_uid not in (0, os.geteuid(), path.stat().st_uid)
    except FileNotFoundError:
        return False


def shared_folder(path: Path) -> Path:
    """Make a folder that everybody uses who may write to the folder it lies in, and return it.

    Raises:
        UnusableFileError: it is a link to what is not its maker's.
        OSError: it cannot be made.
    """
    if not os.path.lexists(path) and is_shared(path.parent):
        beside = name_beside(path)
        beside.mkdir()
        share(beside)
        with suppress(OSError):  # another user was first, and has files in it
            beside.rename(path)
        with suppress(FileNotFoundError):
            beside.rmdir()
    path.mkdir(parents=True, exist_ok=True)
    if leads_astray(path):
        raise UnusableFileError(path, "it is a link that somebody made to what is not theirs")
    share(path)
    return path


def shared_file(path: Path) -> Path:
    """Let everybody write to a file who may write to the folder it lies in, and return it; an absent one is made, empty.

    It appears with the right to write: another user may open it in the same moment. Where it cannot be made, nothing is: who
    opens it then says why.
    """
    if not os.path.lexists(path) and is_shared(path.parent):
        beside = name_beside(path)
        with suppress(OSError):  # another user was first, or the disk refuses
            beside.open("xb").close()
            share(beside)
            os.link(beside, path)
        with suppress(OSError):
            beside.unlink()
    with suppress(FileNotFoundError):
        share(path)
    return path


def is_shared(folder: Path) -> bool:
    """Return whether a folder is there and its group may write to it."""
    try:
        return bool(folder.stat().st_mode & stat.S_IWGRP)
    except FileNotFoundError:
        return False


def share(path: Path) -> None:
    """Give a file or folder of ours the group of the folder it lies in, and its right to write: whatever the umask says.

    In a folder that its group may not write to, nothing changes, nor does what belongs to somebody else.
    """
    around, facts = path.parent.stat(), path.lstat()
    is_folder = stat.S_ISDIR(facts.st_mode)
    if not around.st_mode & stat.S_IWGRP or facts.st_uid != os.geteuid() or not (is_folder or stat.S_ISREG(facts.st_mode)):
        return
    mode = stat.S_IMODE(facts.st_mode) | (0o2070 if is_folder else 0o060)
    try:
        if facts.st_gid != around.st_gid:
            os.chown(path, -1, around.st_gid, follow_symlinks=False)
        if mode != stat.S_IMODE(path.lstat().st_mode):
            path.chmod(mode)
    except OSError:  # not a member of that group, or a disk without modes: `doctor` says what others may not write
        return


def only_we_write(path: Path) -> bool:
    """Return whether nobody but this user and the superuser can put anything else in the place of a folder or of what is in it.

    So every folder on the way to it belongs to one of them and gives no others the right to write, or keeps them from touching
    what they do not own (as /tmp does). Folders that are not there yet count as ours to make.
    """
    place = path.resolve()
    for folder in (place, *place.parents):
        try:
            facts = folder.stat()
        except FileNotFoundError:
            continue
        if facts.st_uid not in (0, os.geteuid()):
            return False
        if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and (folder == place or not facts.st_mode & stat.S_ISVTX):
            return False
    return True


def private_folder(name: str) -> Path:
    """Return a folder of this user for files that are run as code, made with mode 700 if it is not there.

    Args:
        name: below `$XDG_STATE_HOME/obowlab` (`~/.local/state/obowlab`).

    Raises:
        UserError: it cannot be made, belongs to somebody else, or others may use it.
    """
    base = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "obowlab"
    folder = base / name
    for place in (base, folder):
        try:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            facts = place.lstat()
        except OSError as error:
            raise UserError(f"Cannot make the private folder {place}: {error.strerror}.") from None
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
            raise UserError(f"{place} is to hold files that are run as code, so it has to be yours alone: chmod 700 {place}")
    return folder


def _overflow_uid() -> int:
    try:
        return int(Path("/proc/sys/fs/overflowuid").read_text())
    except (OSError, ValueError):
        return 65534


_NOBODY = _overflow_uid()
