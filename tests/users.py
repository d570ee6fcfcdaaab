"""Real users: commands that start as they do on a terminal, with the rights of somebody else.

Python or the checkout may lie where only root may go, below /root for instance. Such a folder is covered, for the process and
what it starts, by an empty one in which there is nothing but them.
"""

from __future__ import annotations

import os
import shlex
import shutil
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

PROGRAMS = ("mount", "setpriv", "unshare")
GROUP = 50000
"""Id of the group that shares a store."""
STAGE = Path("/mnt")
"""A folder of any Unix, covered for the process and what it starts alone."""


@dataclass(frozen=True)
class Done:
    """What became of a command: its exit code, what it printed and what it complained of."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class User:
    """A user of a group, with a home of their own.

    Attributes:
        uid: user id, which is the id of the user's own group too.
        umask: which rights new files do not have.
        home: folder that is theirs alone, made by `settle`.
    """

    uid: int
    umask: int
    home: Path

    def settle(self) -> None:
        """Make the home."""
        self.home.mkdir(mode=0o700)
        os.chown(self.home, self.uid, self.uid)

    def start(self, *words: str, machine: Path) -> subprocess.Popen[str]:
        """Start a command of obowlab in the home.

        Args:
            words: of the command line.
            machine: machine file, which OBOWLAB_MACHINE names.
        """
        return _start(self, [sys.executable, "-m", "obowlab.cli", *words], machine=machine)

    def become(self, *words: str, machine: Path) -> NoReturn:
        """Let this process be a command of obowlab in the home; arguments as of `start`."""
        command, environment = _as(self, [sys.executable, "-m", "obowlab.cli", *words], machine=machine)
        os.execvpe(command[0], command, environment)


def ended(process: subprocess.Popen[str], *, timeout_s: float = 100.0) -> Done:
    """Wait for the end of a command."""
    out, err = process.communicate(timeout=timeout_s)
    return Done(process.returncode, out, err)


def lacking() -> str | None:
    """Return why no command can be started as another user, or None."""
    if os.geteuid() != 0:
        return "two real users need tests that run as root"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"there is no program {', '.join(absent)}"
    anybody = User(50001, 0o022, Path("/"))
    tried = ended(_start(anybody, [sys.executable, "-c", "import obowlab"], machine=Path(os.devnull)))
    return None if tried.code == 0 else f"no other user can start Python here: {tried.err.strip()[-200:]}"


def _start(user: User, command: list[str], *, machine: Path) -> subprocess.Popen[str]:
    words, environment = _as(user, command, machine=machine)
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _as(user: User, command: list[str], *, machine: Path) -> tuple[list[str], dict[str, str]]:
    """Return the command, and its environment, with which root starts a command as a user: one process from first to last."""
    covered = _covered()
    lines = ["set -e", f"umask {user.umask:03o}"]
    if covered:
        lines += [f"mount -t tmpfs -o mode=755 none {shlex.quote(str(STAGE))}"]
    needed = [path for paths in covered.values() for path in paths]
    for number, path in enumerate(needed):
        kept = f"{STAGE}/{number}"
        lines += [f"mkdir {kept}", f"mount --rbind {shlex.quote(str(path))} {kept}"]
    for folder in covered:
        lines.append(f"mount -t tmpfs -o mode=755 none {shlex.quote(str(folder))}")
    for number, path in enumerate(needed):
        place = shlex.quote(str(path))
        lines += [f"(umask 022; mkdir -p {place})", f"mount --rbind {STAGE}/{number} {place}"]
    lines += [
        f"cd {shlex.quote(str(user.home))}",
        f"exec setpriv --reuid {user.uid} --regid {user.uid} --groups {GROUP} {shlex.join(command)}",
    ]
    environment = {
        **os.environ,
        "HOME": str(user.home),
        "PATH": os.defpath,
        "OBOWLAB_MACHINE": str(machine),
        "OBOWLAB_NO_PROGRESS": "1",
    }
    return ["unshare", "--mount", "sh", "-c", "\n".join(lines)], environment


def _covered() -> dict[Path, list[Path]]:
    """Return the folders that others may not go through, with what of Python and obowlab lies in each."""
    found: dict[Path, list[Path]] = {}
    for path in (Path(sys.base_prefix), Path(sys.prefix), Path(__file__).resolve().parents[1]):
        closed = [folder for folder in reversed(path.parents) if not folder.stat().st_mode & stat.S_IXOTH]
        if closed and path not in found.setdefault(closed[0], []):
            found[closed[0]].append(path)
    return found
