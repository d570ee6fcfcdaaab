"""What is queued, running and over, on this machine and on the cluster, and how to stop it or tidy up after it.

The run folders say how far each run is, their locks which process trains it here, Slurm what waits and where its jobs run.
Nothing else is stored, so nothing can be out of date.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from obowlab.errors import UserError
from obowlab.files.locks import lock_holder, process_name
from obowlab.files.opening import user_name
from obowlab.files.sharing import is_others
from obowlab.launch.slurm import SlurmJob, SlurmState, cancel, log_files, states, submitted_jobs
from obowlab.runs.folder import RunFolder
from obowlab.runs.info import DAMAGED, Status
from obowlab.runs.listing import RunSummary, damage_of, list_runs, read_runs
from obowlab.runs.locks import LAUNCHER, holder_of, is_locked

RECENT_S = 24 * 3600.0
POLL_S = 3.0
LOG_EVERY_S = 60.0
SILENCE_S = 1800.0
STATUSES: dict[Status, str] = {
    "created": "queued",
    "running": "running",
    "interrupted": "interrupted",
    "failed": "failed",
    "unevaluated": "unevaluated",
    "finished": "done",
}
LOGS = ("terminal.txt", "log.txt")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One line of `obowlab jobs`.

    Attributes:
        what: the run id, or the command of a job that is not one run.
        launcher: `local` or `slurm`.
        job: Slurm's number, or the process id of the launcher; empty when nothing runs.
        status: `queued`, `running`, `done`, `interrupted`, `failed`, `unevaluated` or `over` (of a command that is not one run).
        where: host or nodes.
        step: how far it is, in steps.
        total_steps: how far it goes; None while unknown.
        left_s: seconds of training left at the speed so far; None while unknown.
        message: why it waits or how it ended.
        changed_at: when its state last changed.
    """

    what: str
    launcher: str
    job: str
    status: str
    where: str
    step: int
    total_steps: int | None
    left_s: float | None
    message: str
    changed_at: float

    @property
    def is_active(self) -> bool:
        """Whether it is queued or running."""
        return self.status in ("queued", "running")


@dataclass(frozen=True)
class Overview:
    """All jobs of a run store, running ones first, what could not be found out, and a sentence on each run that is damaged."""

    jobs: tuple[Job, ...]
    problem: str = ""
    damaged: tuple[str, ...] = ()


def overview(runs_root: Path, *, everything: bool = False) -> Overview:
    """Return what is queued and running, and what ended in the last day, or ever."""
    submitted = submitted_jobs(runs_root)
    alive: dict[str, SlurmState] = {}
    problem = ""
    if submitted:
        try:
            alive = states(submitted)
        except UserError as error:
            problem = str(error)
    newest: dict[str, SlurmJob] = {}
    for job in reversed(submitted):  # a live one counts, else the newest
        newest.update({run: job for run in job.request.runs if newest.get(run) is None or newest[run].id not in alive})
    runs, damaged = read_runs(runs_root)
    jobs = []
    for run in runs:
        try:
            jobs.append(_of_run(run, job=newest.get(run.info.run_id), alive=alive))
        except DAMAGED as error:
            damaged.append(damage_of(run.path, error))
    jobs += [_of_command(job, alive=alive) for job in submitted if not job.request.runs]
    since = 0.0 if everything else time.time() - RECENT_S
    shown = [job for job in jobs if job.is_active or job.changed_at >= since]
    order = ("running", "queued")
    shown.sort(key=lambda job: (order.index(job.status) if job.status in order else 2, -job.changed_at))
    return Overview(jobs=tuple(shown), problem=problem, damaged=tuple(damaged))


def _of_run(run: RunSummary, *, job: SlurmJob | None, alive: dict[str, SlurmState]) -> Job:
    state = run.state
    status, message, where, number = STATUSES[state.status], state.message, "", ""
    launcher = "slurm" if job is not None else "local"
    slurm = alive.get(job.id) if job is not None else None
    if job is not None and slurm is not None and state.status != "finished":
        number = job.id
        waits = slurm.name in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED")
        status, where = ("queued", "") if waits else ("running", slurm.nodes)
        message = slurm.reason if waits else ""
    elif is_locked(run.path):
        holder = holder_of(run.path)
        status, number, where, launcher = "running", f"pid {holder.get('pid', '?')}", str(holder.get("host", "")), "local"
    elif status in ("queued", "running"):  # no process has it
        status, message = "interrupted", message or "no process trains it; the same command resumes"
    elif state.host:
        where = state.host
    left_s = None
    if status == "running" and state.total_steps and state.trained_s and state.step:
        left_s = (state.total_steps - state.step) * state.trained_s / state.step
    return Job(
        what=run.info.run_id,
        launcher=launcher,
        job=number,
        status=status,
        where=where,
        step=state.step,
        total_steps=state.total_steps,
        left_s=left_s,
        message=message,
        changed_at=state.updated_at or run.info.created_at,
    )


def _of_command(job: SlurmJob, *, alive: dict[str, SlurmState]) -> Job:
    slurm = alive.get(job.id)
    waits = slurm is not None and slurm.name == "PENDING"
    return Job(
        what=job.request.what,
        launcher="slurm",
        job=job.id,
        status="over" if slurm is None else "queued" if waits else "running",
        where=slurm.nodes if slurm is not None else "",
        step=0,
        total_steps=None,
        left_s=None,
        message=slurm.reason if slurm is not None and waits else "",
        changed_at=job.submitted_at,
    )


# ------------------------------------------------------------------------------------------------------------ acting


def logs_of(ref: str, *, runs_root: Path) -> list[Path]:
    """Return the output files of a run or of a job of the cluster, the most useful one first.

    Raises:
        UserError: there is no such run or job, or it has printed nothing yet.
    """
    job = _slurm_job(ref, runs_root=runs_root)
    files = log_files(job) if job is not None else []
    if not files:
        path = RunFolder.find(ref, runs_root=runs_root).path if job is None or job.request.runs else job.folder
        files = [path / name for name in LOGS if (path / name).is_file()][:1]
    if not files:
        raise UserError(f"'{ref}' has printed nothing yet; `obowlab jobs` shows whether it waits.")
    return files


def stop(ref: str, *, runs_root: Path) -> str:
    """Ask a run, or a job of the cluster, to save itself and end; return a message about it.

    Raises:
        UserError: nothing runs under this name, or it cannot be reached from here.
    """
    job = _slurm_job(ref, runs_root=runs_root, ours=True)
    if job is not None and states([job]):
        cancel(job)
        return f"Cancelled job {job.id} of the cluster ({job.request.what}); what was trained is saved."
    if job is not None and not job.request.runs:
        raise UserError(f"Job {job.id} is over.")
    folder = RunFolder.find(job.request.runs[0] if job is not None else ref, runs_root=runs_root)
    if not is_locked(folder.path):
        raise UserError(f"No process trains {folder.run_id}; there is nothing to cancel.")
    holder = holder_of(folder.path)
    if holder.get("host") != socket.gethostname():
        raise UserError(f"{folder.run_id} is trained on {holder.get('host')}: cancel it there.")
    pid = _launcher(folder, named=holder.get("pid"))
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        raise UserError(
            f"The launcher of {folder.run_id} was killed; its training process is saving itself and will end."
        ) from None
    except PermissionError:
        raise UserError(f"{folder.run_id} is trained by {process_name(pid)}: ask its user to cancel it.") from None
    return f"Asked process {pid} to stop; {folder.run_id} saves itself, and the same command resumes it."


def _launcher(folder: RunFolder, *, named: object) -> int:
    """Return the process that holds the lock of a run. The lock file names one, but whoever may write to it could name any.

    Raises:
        UserError: the run is somebody else's, or another process has the lock.
    """
    if is_others(folder.path):
        raise UserError(f"{folder.run_id} belongs to {user_name(folder.owner)}: ask them to cancel it.")
    found = lock_holder(folder.path / LAUNCHER)
    if not isinstance(named, int) or isinstance(named, bool) or named <= 1:
        raise UserError(f"{folder.path / LAUNCHER} names no process: end the one that trains {folder.run_id} by `kill`.")
    if found is not None and found != named:
        raise UserError(f"The lock of {folder.run_id} is held by {process_name(found)}, which does not train it: ask its user.")
    if found is None and not is_launcher(
        named
    ):  # a file system or a system whose locks are not listed, or the worker's lock only
        raise UserError(f"The launcher of {folder.run_id} was killed; its training process is saving itself and will end.")
    return named


def is_launcher(pid: int) -> bool:
    """Return whether a process is one of obowlab's, and of this user."""
    import psutil

    try:
        process = psutil.Process(pid)
        return process.uids().effective == os.geteuid() and any("obowlab" in word for word in process.cmdline())
    except psutil.Error:
        return False


def reap(runs_root: Path) -> list[RunFolder]:
    """Mark one's own runs as interrupted whose state is `running` though no process trains them, and return them."""
    reaped = []
    for run in list_runs(runs_root):
        folder = RunFolder(run.path, run.info)
        if is_others(run.path):
            continue
        if folder.state.status == "running" and not is_locked(run.path):
            folder.set_state(status="interrupted", message="its process is gone; the same command resumes")
            reaped.append(folder)
    return reaped


def _slurm_job(ref: str, *, runs_root: Path, ours: bool = False) -> SlurmJob | None:
    """Return the job of the cluster with this number, or the newest one of this run; None when there is none.

    Args:
        ref: a number, or a run.
        runs_root: from which jobs were submitted.
        ours: only of those that this user submitted: an order of somebody else could name any job.
    """
    jobs = [job for job in submitted_jobs(runs_root) if job.is_ours or not ours]
    found = next((job for job in jobs if job.id == ref), None)
    if found is not None or not jobs:
        return found
    try:
        run_id = RunFolder.find(ref, runs_root=runs_root).run_id
    except UserError:
        if not ref.replace("_", "").isdigit():
            raise
        known = ", ".join(job.id for job in jobs[:5])
        raise UserError(f"No job {ref} was submitted from this run store; the newest: {known}.") from None
    return next((job for job in jobs if run_id in job.request.runs), None)


# ------------------------------------------------------------------------------------------------------------ waiting


def wait_for(jobs: Sequence[SlurmJob], *, runs_root: Path) -> None:
    """Wait until jobs of the cluster are over, and log now and then how far they are.

    Raises:
        UserError: Slurm has not answered for a long time; the jobs continue.
    """
    logged_at, silent_since, before = 0.0, 0.0, ""
    while True:
        try:
            alive = states(jobs)
            silent_since = 0.0
        except UserError:
            silent_since = silent_since or time.monotonic()
            if time.monotonic() - silent_since > SILENCE_S:
                raise
            time.sleep(POLL_S)
            continue
        if not alive:
            return
        counts = Counter("waiting" if state.name == "PENDING" else state.name.lower() for state in alive.values())
        progress = ", ".join(f"{count} {word}" for word, count in sorted(counts.items()))
        if progress != before or time.monotonic() - logged_at > LOG_EVERY_S:
            running = [job for job in overview(runs_root).jobs if job.status == "running" and job.total_steps]
            shares = ", ".join(f"{job.what} {100 * job.step // (job.total_steps or 1)} %" for job in running[:4])
            shares = f"; {shares}" if shares else ""
            logger.info("%d of %d jobs over, %s%s.", len(jobs) - len(alive), len(jobs), progress, shares)
            logged_at, before = time.monotonic(), progress
        time.sleep(POLL_S)
