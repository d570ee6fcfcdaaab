"""The trash of a run store: run folders that were put aside, by `obowlab runs delete` or by `--fresh`, and can come back.

Every step is one rename inside the store, so that a kill leaves the state before it or the one after it. What MLflow is to think
of a run follows from where its folder lies; the mirror makes it so, now or with the next command that sends.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from obowlab.errors import UserError
from obowlab.files.opening import user_name
from obowlab.files.sharing import is_others, shared_folder
from obowlab.runs.folder import RunFolder
from obowlab.runs.names import meaning_of, split_run_id

TRASH = ".trash"
DELETED = "-deleted"
"""The end of a folder's name in the trash whose run a user deleted; `--fresh` leaves its predecessor visible in MLflow."""
GONE = "."
"""The beginning of a folder's name that is being removed for good."""


@dataclass(frozen=True)
class Trashed:
    """A run in the trash.

    Attributes:
        path: its folder.
        run_id: its name, also when it comes back.
        since: when it was put there, in seconds since 1970.
        was_deleted: by a user; else it made room for `--fresh`.
    """

    path: Path
    run_id: str
    since: float
    was_deleted: bool

    def refuse_others(self, verb: str) -> None:
        """Refuse to do to a run of another user what they alone may do.

        Raises:
            UserError: names its owner.
        """
        if is_others(self.path):
            owner = user_name(self.path.lstat().st_uid)
            raise UserError(f"Run '{self.run_id}' in the trash belongs to {owner}: ask them to {verb} it.")

    def is_intact(self) -> bool:
        """Return whether there is still a run of this user to open in it."""
        try:
            self.folder()
        except UserError:
            return False
        return not is_others(self.path)

    def folder(self) -> RunFolder:
        """Open the run where it lies.

        Raises:
            UserError: its `run.json` is missing or damaged.
        """
        return RunFolder.open(self.path)


def store_of(path: Path) -> Path:
    """Return the run store that a run folder belongs to, also when it is in the trash."""
    parent = path.absolute().parent
    return parent.parent if parent.name == TRASH else parent


def is_deleted(path: Path) -> bool:
    """Return whether a run folder is in the trash because a user deleted it."""
    return path.absolute().parent.name == TRASH and path.name.endswith(DELETED)


def trashed_runs(runs_root: Path) -> list[Trashed]:
    """Return what is in the trash of a run store, the latest first; whatever else lies there is left out.

    Raises:
        UserError: the trash is a link.
    """
    trash = _trash_of(runs_root)
    if not trash.is_dir():
        return []
    found = []
    for entry in trash.iterdir():
        name = re.fullmatch(rf"([^.].*)-(\d{{8}}T\d{{6}})-\d{{6}}({DELETED})?", entry.name)
        if name is not None and entry.is_dir() and not entry.is_symlink():
            try:
                since = time.mktime(time.strptime(name[2], "%Y%m%dT%H%M%S"))
            except (ValueError, OverflowError):  # no time: somebody else's name
                continue
            found.append(Trashed(path=entry, run_id=name[1], since=since, was_deleted=name[3] is not None))
    return sorted(found, key=lambda one: (one.since, one.path.name), reverse=True)


def find_trashed(ref: str, *, runs_root: Path) -> list[Trashed]:
    """Return the runs in the trash that a name stands for, as in `RunFolder.find`, or whose folder it is; the latest first."""
    runs = trashed_runs(runs_root)
    _, matches = meaning_of(ref, known=sorted({run.run_id for run in runs}))
    return [run for run in runs if run.path.name == ref] or [run for run in runs if run.run_id in matches]


def check_deletable(folder: RunFolder, *, ref: str, runs_root: Path) -> None:
    """Refuse to delete what is not a run of this store, is named by too little, or is being trained.

    Args:
        folder: the run.
        ref: how the user named it; the whole name of its recipe, or its digits, has to be in it.
        runs_root: the store.

    Raises:
        UserError: it lies elsewhere, is a link, a process trains it, here or on another host, or its name is incomplete.
    """
    recipe, _, digits = split_run_id(folder.run_id)
    if not Path(ref).is_dir() and ref != digits and not ref.startswith(recipe):
        raise UserError(f"'{ref}' is only the beginning of a name: `obowlab runs delete {folder.run_id}` deletes that run.")
    if folder.path.is_symlink():
        raise UserError(f"{folder.path} is a link to another place: remove the link itself, or delete the run there.")
    if is_others(folder.path):
        raise UserError(f"Run '{folder.run_id}' belongs to {user_name(folder.owner)}: ask them to delete it.")
    if folder.path.resolve().parent != runs_root.resolve():
        raise UserError(f"{folder.path} does not lie in {runs_root}: name its store with --runs-root.")
    state = folder.current_state()
    if state.status == "running":
        raise UserError(
            f"Run '{folder.run_id}' is being trained by process {state.pid} on {state.host}: "
            f"`obowlab jobs cancel {folder.run_id}` first."
        )


def put_aside(folder: RunFolder, *, deleted: bool = False) -> Path:
    """Move a run folder into RUNS_ROOT/.trash and return where it lies; nothing is removed.

    Args:
        folder: the run.
        deleted: for the user, who wants to see it no more; else to make room for a new run of the same name.

    Raises:
        UserError: another process trains this run, or the disk refuses.
    """
    trash = _trash_of(folder.path.parent)
    with folder.lock():
        now_us = time.time_ns() // 1000
        stamp = f"{time.strftime('%Y%m%dT%H%M%S', time.localtime(now_us // 10**6))}-{now_us % 10**6:06d}"
        target = trash / f"{folder.run_id}-{stamp}{DELETED if deleted else ''}"
        try:
            shared_folder(trash)
            folder.path.rename(target)
        except OSError as error:
            raise UserError(f"Cannot put {folder.path} aside (into {trash}: {error.strerror}); it is left as it is.") from None
    return target


def restore(run: Trashed, *, runs_root: Path) -> RunFolder:
    """Move a run from the trash back to its place and return it.

    Raises:
        UserError: it is another user's, there is a run of the same name, the folder is damaged, or the disk refuses.
    """
    run.refuse_others("restore")
    run.folder()
    target = runs_root / run.run_id
    if target.exists() or target.is_symlink():
        raise UserError(
            f"Run '{run.run_id}' is there again: `obowlab runs delete {run.run_id}` makes room for the one in the trash."
        )
    try:
        run.path.rename(target)
    except OSError as error:
        raise UserError(f"Cannot move {run.path} back to {target}: {error.strerror}.") from None
    return RunFolder.open(target)


def remove_for_good(runs: Iterable[Trashed], *, runs_root: Path) -> None:
    """Remove runs in the trash for good, and what an earlier call that was killed has left of others; links are not followed.

    Raises:
        UserError: a run is another user's, or the disk refuses.
    """
    trash, runs = _trash_of(runs_root), list(runs)
    for run in runs:
        run.refuse_others("remove")
    try:
        for run in runs:
            run.path.rename(trash / f"{GONE}{run.path.name}")  # from here on it is in no list and cannot come back in part
        for rest in trash.glob(f"{GONE}*"):
            if not is_others(rest):
                shutil.rmtree(rest)
    except OSError as error:
        raise UserError(
            f"Cannot remove {error.filename} for good: {error.strerror}; the same command removes what is left."
        ) from None


def size_of(path: Path) -> int:
    """Return the bytes of all files below a folder; links count as themselves."""
    return sum(os.lstat(Path(place) / name).st_size for place, _, names in os.walk(path) for name in names)


def _trash_of(runs_root: Path) -> Path:
    trash = runs_root / TRASH
    if trash.is_symlink():
        raise UserError(f"{trash} is a link to another place: put a folder there, so that deleted runs stay in their store.")
    return trash
