"""Jobs of a Slurm cluster, through submitit, which is imported nowhere else.

A job runs an `obowlab` command, the same that could be typed on the node. So a job that Slurm starts again, after its time limit,
a preemption or the death of its node, does what the same command typed again does: it resumes from the newest valid checkpoint.
What this module adds is the handling of signals: Slurm announces the end of a start some time before it; the command is then
asked to save itself and stop, and the job is put into the queue again.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from obowlab.config import Machine, Slurm
from obowlab.errors import UserError
from obowlab.files.opening import read_file
from obowlab.files.records import parse_checked
from obowlab.files.replacing import write_atomic
from obowlab.files.sharing import is_others, only_we_write, private_folder, shared_folder
from obowlab.launch.compute_command import PATIENCE_VARIABLE
from obowlab.launch.nodes import RENDEZVOUS_VARIABLE, Rendezvous
from obowlab.launch.processes import shell_code, start
from obowlab.log import log_to_stderr
from obowlab.signals import on_signals

JOBS = ".jobs"
"""Folder of the run store with a folder for every submission: its jobs, and what submitit and the jobs write."""

SUBMISSION = "order.json"
PATIENCE_S = 600
GRACE_S = 120.0
"""Grace period after saving on a SIGTERM from outside; Slurm may still requeue the job."""

ANNOUNCED = (signal.SIGUSR1, signal.SIGUSR2)
"""The start is nearly over, by its time limit or by preemption: save, and queue again."""

ENDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
"""A user ends the job, by scancel for instance, or Slurm does and requeues it itself: save, and wait for Slurm."""

SLURM_TIMEOUT_S = 30.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobRequest:
    """One command to be run as a job.

    Attributes:
        arguments: the command line after `obowlab`.
        runs: ids of the runs it trains, as far as they are known.
        what: its name in lists.
    """

    arguments: tuple[str, ...]
    runs: tuple[str, ...]
    what: str


@dataclass(frozen=True)
class Resources:
    """What each job of a submission gets.

    Attributes:
        nodes: machines.
        procs: training processes on all nodes together.
        gpus: whether each has a GPU.
    """

    nodes: int = 1
    procs: int = 1
    gpus: bool = False


@dataclass(frozen=True)
class SlurmJob:
    """A submitted job, as `SUBMISSION` remembers it; `is_ours` when this user submitted it."""

    id: str
    folder: Path
    request: JobRequest
    submitted_at: float
    is_ours: bool = True


@dataclass(frozen=True)
class SlurmState:
    """Slurm's state of a job that is not over.

    Attributes:
        name: PENDING, RUNNING, COMPLETING, ...
        nodes: where it runs.
        reason: why it waits.
    """

    name: str
    nodes: str
    reason: str


# ------------------------------------------------------------------------------------------------------------- submitting


def check_slurm() -> None:
    """Refuse to submit where there is no Slurm.

    Raises:
        UserError: sbatch is missing.
    """
    if shutil.which("sbatch") is None:
        raise UserError("There is no Slurm here (no sbatch on the PATH): use --launcher local, or run this on a login node.")


def submit(
    requests: Sequence[JobRequest],
    *,
    machine: Machine,
    resources: Resources,
    name: str,
    at_a_time: int | None = None,
    after: Sequence[SlurmJob] = (),
) -> list[SlurmJob]:
    """Submit commands as one job, or as one array of jobs, and return at once.

    Args:
        requests: the commands; they run in the current folder.
        machine: its run store keeps the submission, its `slurm` section says how to submit.
        resources: of every job.
        name: of the jobs in Slurm's lists.
        at_a_time: at most so many jobs of the array run together.
        after: jobs that have to be over first, successful or not.

    Raises:
        UserError: there is no Slurm, or it refuses the jobs.
    """
    check_slurm()
    import submitit
    from submitit.core.utils import FailedJobError, UncompletedJobError

    folder = shared_folder(machine.runs_root / JOBS) / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    folder.mkdir(parents=True)
    place = _place_of_code(folder)
    executor = submitit.SlurmExecutor(folder=place, python=_python(machine.slurm), max_num_timeout=0)
    executor.update_parameters(
        **_parameters(machine.slurm, resources=resources),
        job_name=name,
        array_parallelism=at_a_time or len(requests),
        **({"dependency": f"afterany:{':'.join(dict.fromkeys(job.id.partition('_')[0] for job in after))}"} if after else {}),
    )
    tasks = [NodeTask(request.arguments, folder=place, cwd=Path.cwd(), nodes=resources.nodes) for request in requests]
    try:
        submitted = [executor.submit(tasks[0])] if len(tasks) == 1 else executor.map_array(NodeTask.__call__, tasks)
    except (FailedJobError, UncompletedJobError, subprocess.CalledProcessError) as error:
        for made in {folder, place}:
            shutil.rmtree(made, ignore_errors=True)
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        errors = [line for line in lines if "error:" in line or "fatal:" in line]
        reason = (errors or lines or [type(error).__name__])[-1]
        raise UserError(f"Slurm refuses the job: {reason.removeprefix('sbatch: ')}; see [slurm] of the machine file.") from None
    now = round(time.time(), 3)
    jobs = [SlurmJob(job.job_id, place, request, now) for job, request in zip(submitted, requests, strict=True)]
    where = {} if place == folder else {"place": str(place)}
    submission = {"submitted_at": now, **where, "jobs": [{"id": job.id, **asdict(job.request)} for job in jobs]}
    write_atomic(folder / SUBMISSION, json.dumps(submission, indent=1))
    return jobs


def _place_of_code(folder: Path) -> Path:
    """Return where submitit keeps what a job runs: beside the submission, or in the home of a store that others may write to.

    submitit stores calls as pickles. Whoever could replace one would run code as the user who submitted it.
    """
    if only_we_write(folder):
        return folder
    place = private_folder("jobs") / folder.name
    place.mkdir(mode=0o700)
    return place


def _python(slurm: Slurm) -> str:
    return f"{slurm.container} python3" if slurm.container else sys.executable


def _parameters(slurm: Slurm, *, resources: Resources) -> dict[str, Any]:
    """Return the parameters of submitit's executor; those left to the cluster are absent."""
    here = resources.procs // resources.nodes
    cpus = slurm.cpus_per_process * here
    values: dict[str, Any] = {
        "nodes": resources.nodes,
        "ntasks_per_node": 1,  # one launcher per node, whose torchrun starts the processes
        "cpus_per_task": cpus,
        "time": slurm.time,
        "signal_delay_s": slurm.save_before_s,
        "stderr_to_stdout": True,
        # Slurm 22.05 stopped passing the cores of a job on to srun; and no node may survive the failure of another.
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={cpus}"],
        "gpus_per_node": (f"{slurm.gpu_type}:{here}" if slurm.gpu_type else here) if resources.gpus else None,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "mem": _memory(slurm.memory_per_process, here),
        "setup": list(slurm.setup) or None,
        "additional_parameters": {"requeue": True, **dict(_option(option) for option in slurm.options)},
    }
    return {key: value for key, value in values.items() if value is not None}


def _memory(each: str | None, count: int) -> str | None:
    if each is None:
        return None
    number, unit = each.rstrip("KMGTkmgt"), each[len(each.rstrip("KMGTkmgt")) :]
    return f"{int(number) * count}{unit}"


def _option(option: str) -> tuple[str, str | bool]:
    key, equals, value = option.partition("=")
    return key, value if equals else True


# -------------------------------------------------------------------------------------------------------- looking at jobs


def submitted_jobs(runs_root: Path) -> list[SlurmJob]:
    """Return every job that was submitted from this run store, the newest first."""
    jobs = []
    for file in sorted((runs_root / JOBS).glob(f"*/{SUBMISSION}"), reverse=True):
        try:
            jobs += _submitted(file)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s cannot be read (%s): its jobs are not shown.", file, getattr(error, "strerror", None) or error)
    return jobs


def _submitted(file: Path) -> list[SlurmJob]:
    submission = parse_checked(read_file(file))
    place = Path(submission.get("place", file.parent))
    jobs, submitted_at = [], float(submission["submitted_at"])
    for job in submission["jobs"]:
        arguments = job["arguments"] if "arguments" in job else job["words"]  # "words": written before 0.2
        request = JobRequest(arguments=tuple(map(str, arguments)), runs=tuple(map(str, job["runs"])), what=str(job["what"]))
        if not re.fullmatch(r"[0-9]+(_[0-9]+)?", str(job["id"])):
            raise ValueError(f"'{job['id']}' is no number of a job")
        jobs.append(SlurmJob(str(job["id"]), place, request, submitted_at, is_ours=not is_others(file)))
    return jobs


def states(jobs: Iterable[SlurmJob]) -> dict[str, SlurmState]:
    """Ask Slurm for the jobs that are not over; those that are, are absent.

    Raises:
        UserError: Slurm does not answer.
    """
    wanted = {job.id for job in jobs}
    if not wanted:
        return {}
    if shutil.which("squeue") is None:
        raise UserError("Slurm cannot be asked from here: there is no squeue on the PATH.")
    fields = ["squeue", "--me", "--noheader", "--array", "--format=%i|%T|%N|%r"]
    try:
        done = subprocess.run(fields, capture_output=True, text=True, timeout=SLURM_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise UserError("Slurm does not answer (squeue took too long): try again later.") from None
    if done.returncode != 0:
        raise UserError(f"Slurm does not answer: {' '.join(done.stderr.split())[:200]}")
    rows = (line.split("|", maxsplit=3) for line in done.stdout.splitlines() if line.count("|") >= 3)
    return {number: SlurmState(name, nodes, reason) for number, name, nodes, reason in rows if number in wanted}


def live_runs(runs_root: Path) -> dict[str, SlurmJob]:
    """Return the runs that a queued or running job will train, and that job.

    Raises:
        UserError: Slurm does not answer.
    """
    jobs = submitted_jobs(runs_root)
    alive = states(jobs)
    return {run: job for job in reversed(jobs) if job.id in alive for run in job.request.runs}


def log_files(job: SlurmJob) -> list[Path]:
    """Return the output files of a job's nodes, node 0 first; all starts of the job are in one file."""
    return sorted(job.folder.glob(f"{job.id}_*_log.out"), key=lambda path: int(path.name.split("_")[-2]))


def cancel(job: SlurmJob) -> None:
    """Ask Slurm to end a job; it saves itself first.

    Raises:
        UserError: Slurm refuses.
    """
    done = subprocess.run(["scancel", job.id], capture_output=True, text=True, timeout=SLURM_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise UserError(f"Slurm does not cancel job {job.id}: {' '.join(done.stderr.split())[:200]}")


# --------------------------------------------------------------------------------------------------------- within the job


class NodeTask:
    """What each node of a job does; submitit stores it when the job is submitted and calls it at every start."""

    def __init__(self, arguments: Sequence[str], *, folder: Path, cwd: Path, nodes: int) -> None:
        self.arguments = tuple(arguments)
        self.folder = folder
        self.cwd = cwd
        self.nodes = nodes
        self._announced = False
        self._ended = False

    def __call__(self) -> None:
        """Run the command, or follow node 0; end the process with the command's exit code."""
        log_to_stderr()
        node = int(os.environ.get("SLURM_NODEID", "0"))
        restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        os.chdir(self.cwd)
        rendezvous = Rendezvous(self.folder / f"rendezvous-{os.environ['SLURM_JOB_ID']}-{restarts}")
        if self.nodes == 1:
            code = self._run(self._command())
        elif node == 0:
            with rendezvous.heartbeat():
                code = self._run(self._command(), **{RENDEZVOUS_VARIABLE: str(rendezvous.folder)})
        else:
            code = self._run([sys.executable, "-m", "obowlab.launch.follower", str(rendezvous.folder), str(node)])
        if code > 128 and (self._announced or self._ended):
            self._leave(node)
        raise SystemExit(code)

    def _command(self) -> list[str]:
        return [sys.executable, "-m", "obowlab.cli", *self.arguments]

    def _run(self, command: list[str], **variables: str) -> int:
        environment = {**os.environ, PATIENCE_VARIABLE: str(PATIENCE_S), "PYTHONUNBUFFERED": "1", **variables}
        child: subprocess.Popen[bytes] | None = None

        def stop(number: int, frame: FrameType | None) -> None:
            first = not (self._announced or self._ended)
            self._announced = self._announced or number in ANNOUNCED
            self._ended = self._ended or number in ENDED
            if first and child is not None:  # a second signal would make the command abandon what it is saving
                child.terminate()

        with on_signals(stop, (*ANNOUNCED, *ENDED)):  # in place of submitit's handlers, which know nothing of the command
            child = start(command, environment=environment, output=None)
            if self._announced or self._ended:
                child.terminate()
            return shell_code(child.wait())

    def _leave(self, node: int) -> None:
        """Put the job into the queue again if this start was to end, and wait for Slurm to end it."""
        job = os.environ["SLURM_JOB_ID"]
        if self._announced and node == 0:
            logger.info("Everything is saved; job %s goes back into the queue.", job)
            done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
            if done.returncode != 0:
                logger.warning("Slurm does not requeue job %s: %s; submit the command again.", job, " ".join(done.stderr.split()))
                return
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline:
            time.sleep(1.0)
