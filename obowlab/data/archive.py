"""List the files of a plain .tar without unpacking it; whatever would be lost without a word is refused by name."""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from obowlab.errors import UserError

_BLOCK = tarfile.BLOCKSIZE
_PIECE = 1 << 20
_LONGEST_CHAIN = 16
"""Links to links that are followed."""


class Member(NamedTuple):
    """A file of an archive, or a folder, which has no bytes."""

    name: str
    offset: int
    size: int
    is_folder: bool


def list_members(archive: Path) -> Iterator[Member]:
    """Yield every file and folder once; of several members of one name the last counts, as when unpacking.

    Links to files of the archive are files, at the place of what they point to.

    Raises:
        UserError: it is compressed, cut off or damaged, goes on behind its end, or holds what cannot be read in place.
    """
    try:
        with tarfile.open(archive, "r:") as tar:
            members = {posixpath.normpath(member.name): member for member in tar}
            end = tar.offset
    except (tarfile.TarError, EOFError) as error:
        raise _refused(archive, f"is not a plain .tar ({error})") from None
    _check_end(archive, end)
    for name, member in members.items():
        if member.name.startswith("/") or ".." in name.split("/"):
            raise _refused(archive, f"holds '{member.name}', which points outside of the archive")
        found = _followed(member, members)
        if found is None or not (found.isreg() or found.isdir()):
            if member.issym() or member.islnk():
                raise _refused(archive, f"holds '{member.name}', a link to '{member.linkname}', which is no file of it")
            continue  # a device or a pipe
        if found.isdir() and found is not member:
            raise _refused(archive, f"holds '{member.name}', a link to the folder '{member.linkname}'")
        if found.sparse:
            raise _refused(archive, f"holds '{member.name}', a file with holes")
        yield Member(name, offset=found.offset_data, size=found.size, is_folder=found.isdir())


def _followed(member: tarfile.TarInfo, members: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo | None:
    """Return the member that a link stands for in the end, a member that is no link itself, and None for a dead link."""
    for _ in range(_LONGEST_CHAIN):
        if member.issym():
            target = posixpath.join(posixpath.dirname(member.name), member.linkname)
        elif member.islnk():
            target = member.linkname
        else:
            return member
        found = members.get(posixpath.normpath(target))
        if found is None:
            return None
        member = found
    return None


def _check_end(archive: Path, end: int) -> None:
    """Make sure that the members are followed by the end marker, blocks of zeros, and by nothing else."""
    with archive.open("rb") as file:
        file.seek(end)
        first = file.read(_BLOCK)
        if len(first) < _BLOCK:
            raise _refused(archive, "has no end marker: it was cut off, or is still being written", "make it again, or")
        if any(first):
            raise _refused(archive, f"is damaged at byte {end}", "make it again, or")
        while piece := file.read(_PIECE):
            if piece.count(0) != len(piece):
                raise _refused(archive, "goes on behind its end marker, as archives do that were joined with cat")


def _refused(archive: Path, what: str, remedy: str = "") -> UserError:
    unpack = f"unpack it{' with `tar --ignore-zeros -xf`' if 'behind' in what else ''} and give the folder"
    return UserError(f"--source {archive} {what}: {remedy}{' ' if remedy else ''}{unpack}.")
