"""What everybody uses who shares a run store: files and folders directly below its root, made by whoever came first.

They get the root's group and its right to write (`files.share`). A store of an earlier version, or one whose group was changed,
may hold some that others cannot write to: that is found before a training, and not by its last step.
"""

from __future__ import annotations

import grp
import os
import shlex
from collections.abc import Iterable
from pathlib import Path

from obowlab.errors import UserError
from obowlab.files.opening import user_name
from obowlab.files.sharing import share

TRACKING = ("mlflow.db", "mlflow.db-journal", "mlflow.db-wal", "mlflow.db-shm", "mlartifacts", ".mlflow.db.lock")
"""What the MLflow store of a run store consists of."""

TURNS = (".publish.lock", ".report.lock", ".logs", ".trash", ".jobs", ".studies", ".weights")
"""What commands need to take turns, and to keep what they say and what runs begin with."""

FEATURES = ".features"
CACHES = (FEATURES, ".drawn", ".hashed", ".tables", ".costs.json")
"""What only saves time: where it cannot be written, it is computed again."""


def closed(root: Path, names: Iterable[str]) -> list[Path]:
    """Return which of these are there and cannot be written to by this user."""
    found = (path for path in (root / name for name in names) if os.path.lexists(path))
    return [path for path in found if not os.access(path, os.W_OK | (os.X_OK if path.is_dir() else 0))]


def open_to_group(root: Path) -> None:
    """Let the group of a run store write to what this user made in it, before it was the group's or with an earlier version."""
    for path in (root / name for name in (*TRACKING, *TURNS, *CACHES)):
        if os.path.lexists(path):
            share(path)


def opening(root: Path, paths: Iterable[Path]) -> str:
    """Return the command with which their owner opens files of a run store to its group."""
    names = " ".join(shlex.quote(str(path)) for path in paths)
    return f"chgrp -R {shlex.quote(group_of(root))} {names} && chmod -R g+rwX {names}"


def group_of(root: Path) -> str:
    """Return the name of a folder's group, or its number where this machine does not know it."""
    gid = root.stat().st_gid
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def check_store(root: Path, *, tracking: bool) -> None:
    """Refuse a run store in which this user could train, and not keep what follows.

    Args:
        root: of the store, which need not be there yet.
        tracking: whether its own `mlflow.db` is used.

    Raises:
        UserError: names the files, their owner and the command that they type.
    """
    if not root.is_dir():
        there = next(place for place in (root, *root.absolute().parents) if os.path.lexists(place))
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            raise UserError(f"The run store {root} cannot be made, as {there} takes no folder: choose another --runs-root.")
        return
    if not os.access(root, os.W_OK | os.X_OK):
        raise UserError(
            f"You may not write to the run store {root}: let {user_name(root.stat().st_uid)} type "
            f"`chmod g+rwxs {shlex.quote(str(root))}` and become a member of its group {group_of(root)}, or choose another "
            "--runs-root."
        )
    found = closed(root, (*(TRACKING if tracking else ()), *TURNS))
    if found:
        owners = dict.fromkeys(user_name(path.lstat().st_uid) for path in found)
        raise UserError(
            f"You may not write to {', '.join(map(str, found))}: let {' and '.join(owners)} type `{opening(root, found)}`, "
            "or choose another --runs-root."
        )
