"""All runs of a store, from two small files each; a folder that cannot be read costs one sentence and harms no other."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from obowlab.errors import UserError
from obowlab.files.sharing import leads_astray
from obowlab.runs.info import DAMAGED, RunInfo, State, cannot_be_read, read_info, read_state
from obowlab.runs.locks import is_locked

STALE_AFTER_S = 3600.0
"""A `running` state of another host counts for so long after its last update, once no process holds the lock."""


@dataclass(frozen=True)
class RunSummary:
    """A row of `obowlab runs list`."""

    path: Path
    info: RunInfo
    state: State


def has_run(path: Path) -> bool:
    """Return whether a folder is a run's; not of one that is another user's alone, of which `refuse_others` tells."""
    try:
        return (path / "run.json").is_file()
    except PermissionError:
        return False


def read_runs(runs_root: Path) -> tuple[list[RunSummary], list[str]]:
    """Return every run, newest first, from two small files each, and a sentence for every folder that cannot be read."""
    runs, errors = [], []
    for run_id in run_ids(runs_root):
        path = runs_root / run_id
        try:
            runs.append(_summary(path))
        except DAMAGED as error:
            errors.append(damage_of(path, error))
    return sorted(runs, key=lambda run: run.info.created_at, reverse=True), errors


def list_runs(runs_root: Path) -> list[RunSummary]:
    """Return every run, newest first; folders that cannot be read are left out."""
    return read_runs(runs_root)[0]


def damage_of(path: Path, error: Exception) -> str:
    """Return one sentence on a run whose folder cannot be read as it has to be."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return cannot_be_read(error.filename or path, error)
    return f"{path} cannot be read ({type(error).__name__}: {error}): it is damaged, or of another version of obowlab."


def run_ids(runs_root: Path) -> list[str]:
    """Return the name of every run folder of a store, sorted; also of those that cannot be read."""
    if not runs_root.is_dir():
        return []
    return sorted(entry.name for entry in runs_root.iterdir() if not entry.name.startswith(".") and _is_run(entry))


def believable(state: State, path: Path) -> State:
    """Return the state of a run, `interrupted` when it says `running` but nothing trains the run any more."""
    if state.status != "running":
        return state
    if state.host == socket.gethostname():
        import psutil  # late: most runs are not running

        gone = state.pid is None or not psutil.pid_exists(state.pid)
    else:
        gone = time.time() - state.updated_at > STALE_AFTER_S
    if gone and not is_locked(path):
        return state.model_copy(update={"status": "interrupted", "message": state.message or "its process is gone"})
    return state


def _is_run(entry: Path) -> bool:
    try:
        os.lstat(entry / "run.json")  # whatever it is: reading it says what is wrong with it
    except PermissionError:
        return True  # nobody but its owner can tell; reading it says so
    except OSError:
        return False
    return True


def _summary(path: Path) -> RunSummary:
    """Read what `list_runs` shows of a run.

    Raises:
        UserError: a file is damaged, or not for us to read.
    """
    if leads_astray(path):
        raise UserError(f"{path} is not used: it is a link that somebody made to a folder that is not theirs.")
    info = read_info(path)
    return RunSummary(path=path, info=info, state=believable(read_state(path), path))
