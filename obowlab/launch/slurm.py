"""Jobs of a Slurm cluster, through submitit, which is imported nowhere else.

A job carries out an `obowlab` command, the same that could be typed on the node. So a job that is started again, after its time
was up, after it was preempted or after its node died, does what the same command typed again does: it goes on from the newest
valid checkpoint. What this module adds is the handling of signals: Slurm announces the end of a start some time before it; the
command is then asked to save itself and stop, and the job is put into the queue again.
"""

from __future__ import annotations

import json
import os
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
from obowlab.files import write_atomic
from obowlab.launch.compute_command import PATIENCE_VARIABLE
from obowlab.launch.nodes import MEETING_VARIABLE, Meeting
from obowlab.launch.processes import shell_code, start

JOBS = ".jobs"
"""Folder of the run store that has a folder for every submission: order.json, and what submitit and the jobs write."""

ORDER = "order.json"
PATIENCE_S = 600
GRACE_S = 120.0
"""After it has saved itself, a job that was told to end waits so long for whoever told it: Slurm may still want to requeue it."""

ANNOUNCED = (signal.SIGUSR1, signal.SIGUSR2)
"""The start is nearly over, by its time limit or by preemption: save, and queue again."""

TOLD = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
"""Somebody ends the job, by scancel for instance, or Slurm does and requeues it itself: save, and wait for what comes."""

SLURM_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Errand:
    """One command to be carried out as a job.

    Attributes:
        words: the words after `obowlab`.
        runs: ids of the runs it trains, as far as they are known.
        what: what to call it.
    """

    words: tuple[str, ...]
    runs: tuple[str, ...]
    what: str


@dataclass(frozen=True)
class Needs:
    """What each job of a submission needs.

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
    """A submitted job, as `order.json` remembers it."""

    id: str
    folder: Path
    errand: Errand
    submitted_at: float


@dataclass(frozen=True)
class SlurmState:
    """What Slurm says of a job that is not over.

    Attributes:
        word: PENDING, RUNNING, COMPLETING, ...
        nodes: where it runs.
        reason: why it waits.
    """

    word: str
    nodes: str
    reason: str


# ------------------------------------------------------------------------------------------------------------- submitting


def check_slurm() -> None:
    """Refuse to submit where there is no Slurm.

    Raises:
        UserError: sbatch is missing.
    """
    if shutil.which("sbatch") is None:
        raise UserError("There is no Slurm here (no sbatch on the PATH): use --launcher local, or type this on a login node.")


def submit(
    errands: Sequence[Errand],
    *,
    machine: Machine,
    needs: Needs,
    name: str,
    at_a_time: int | None = None,
    after: Sequence[SlurmJob] = (),
) -> list[SlurmJob]:
    """Submit commands as one job, or as one array of jobs, and return at once.

    Args:
        errands: the commands; they are carried out in the present folder.
        machine: its run store keeps the submission, its `slurm` section says how to submit.
        needs: of every job.
        name: of the jobs in Slurm's lists.
        at_a_time: at most so many jobs of the array run together.
        after: jobs that have to be over first, whatever came of them.

    Raises:
        UserError: there is no Slurm, or it refuses the jobs.
    """
    check_slurm()
    import submitit
    from submitit.core.utils import FailedJobError, UncompletedJobError

    folder = machine.runs_root / JOBS / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    folder.mkdir(parents=True)
    executor = submitit.SlurmExecutor(folder=folder, python=_python(machine.slurm), max_num_timeout=0)
    executor.update_parameters(
        **_parameters(machine.slurm, needs=needs),
        job_name=name,
        array_parallelism=at_a_time or len(errands),
        **({"dependency": f"afterany:{':'.join(dict.fromkeys(job.id.partition('_')[0] for job in after))}"} if after else {}),
    )
    tasks = [NodeTask(errand.words, folder=folder, cwd=Path.cwd(), nodes=needs.nodes) for errand in errands]
    try:
        submitted = [executor.submit(tasks[0])] if len(tasks) == 1 else executor.map_array(NodeTask.__call__, tasks)
    except (FailedJobError, UncompletedJobError, subprocess.CalledProcessError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        complaints = [line for line in lines if "error:" in line or "fatal:" in line]
        reason = (complaints or lines or [type(error).__name__])[-1]
        raise UserError(f"Slurm refuses the job: {reason.removeprefix('sbatch: ')}; see [slurm] of the machine file.") from None
    now = round(time.time(), 3)
    jobs = [SlurmJob(job.job_id, folder, errand, now) for job, errand in zip(submitted, errands, strict=True)]
    order = {"submitted_at": now, "jobs": [{"id": job.id, **asdict(job.errand)} for job in jobs]}
    write_atomic(folder / ORDER, json.dumps(order, indent=1))
    return jobs


def _python(slurm: Slurm) -> str:
    return f"{slurm.container} python3" if slurm.container else sys.executable


def _parameters(slurm: Slurm, *, needs: Needs) -> dict[str, Any]:
    """Return the parameters of submitit's executor; those of the cluster's choice are left out."""
    here = needs.procs // needs.nodes
    cpus = slurm.cpus_per_process * here
    values: dict[str, Any] = {
        "nodes": needs.nodes,
        "ntasks_per_node": 1,  # one launcher per node, whose torchrun starts the processes
        "cpus_per_task": cpus,
        "time": slurm.time,
        "signal_delay_s": slurm.save_before_s,
        "stderr_to_stdout": True,
        # Slurm 22.05 stopped handing the cores of a job on to srun by itself; and no node may survive the others' failure.
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={cpus}"],
        "gpus_per_node": (f"{slurm.gpu_type}:{here}" if slurm.gpu_type else here) if needs.gpus else None,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "mem": _memory(slurm.memory_per_process, here),
        "setup": list(slurm.setup) or None,
        "additional_parameters": {"requeue": True, **dict(_option(word) for word in slurm.options)},
    }
    return {key: value for key, value in values.items() if value is not None}


def _memory(each: str | None, count: int) -> str | None:
    if each is None:
        return None
    number, unit = each.rstrip("KMGTkmgt"), each[len(each.rstrip("KMGTkmgt")) :]
    return f"{int(number) * count}{unit}"


def _option(word: str) -> tuple[str, str | bool]:
    key, equals, value = word.partition("=")
    return key, value if equals else True


# -------------------------------------------------------------------------------------------------------- looking at jobs


def submitted_jobs(runs_root: Path) -> list[SlurmJob]:
    """Return every job that was submitted from this run store, the newest first."""
    jobs = []
    for file in sorted((runs_root / JOBS).glob(f"*/{ORDER}"), reverse=True):
        order = json.loads(file.read_bytes())
        for job in order["jobs"]:
            errand = Errand(words=tuple(job["words"]), runs=tuple(job["runs"]), what=job["what"])
            jobs.append(SlurmJob(id=job["id"], folder=file.parent, errand=errand, submitted_at=order["submitted_at"]))
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
    return {number: SlurmState(word, nodes, reason) for number, word, nodes, reason in rows if number in wanted}


def live_runs(runs_root: Path) -> dict[str, SlurmJob]:
    """Return the runs that a queued or running job will train, and that job.

    Raises:
        UserError: Slurm does not answer.
    """
    jobs = submitted_jobs(runs_root)
    alive = states(jobs)
    return {run: job for job in reversed(jobs) if job.id in alive for run in job.errand.runs}


def log_files(job: SlurmJob) -> list[Path]:
    """Return what the nodes of a job have printed, node 0 first; all its starts follow each other in one file."""
    return sorted(job.folder.glob(f"{job.id}_*_log.out"), key=lambda path: int(path.name.split("_")[-2]))


def cancel(job: SlurmJob) -> None:
    """Tell Slurm to end a job; it saves itself first.

    Raises:
        UserError: Slurm refuses.
    """
    done = subprocess.run(["scancel", job.id], capture_output=True, text=True, timeout=SLURM_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise UserError(f"Slurm does not cancel job {job.id}: {' '.join(done.stderr.split())[:200]}")


# --------------------------------------------------------------------------------------------------------- within the job


class NodeTask:
    """What each node of a job does; submitit stores it when the job is submitted and calls it at every start."""

    def __init__(self, words: Sequence[str], *, folder: Path, cwd: Path, nodes: int) -> None:
        self.words = tuple(words)
        self.folder = folder
        self.cwd = cwd
        self.nodes = nodes
        self._announced = False
        self._told = 0

    def __call__(self) -> None:
        """Carry the command out, or follow node 0; end the process with the command's exit code."""
        node = int(os.environ.get("SLURM_NODEID", "0"))
        restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        os.chdir(self.cwd)
        meeting = Meeting(self.folder / f"meeting-{os.environ['SLURM_JOB_ID']}-{restarts}")
        if self.nodes == 1:
            code = self._run(self._command())
        elif node == 0:
            with meeting.held():
                code = self._run(self._command(), **{MEETING_VARIABLE: str(meeting.folder)})
        else:
            code = self._run([sys.executable, "-m", "obowlab.launch.follower", str(meeting.folder), str(node)])
        if code > 128 and (self._announced or self._told):
            self._leave(node)
        raise SystemExit(code)

    def _command(self) -> list[str]:
        return [sys.executable, "-m", "obowlab.cli", *self.words]

    def _run(self, command: list[str], **variables: str) -> int:
        environment = {**os.environ, PATIENCE_VARIABLE: str(PATIENCE_S), "PYTHONUNBUFFERED": "1", **variables}
        child: subprocess.Popen[bytes] | None = None

        def stop(number: int, frame: FrameType | None) -> None:
            first = not (self._announced or self._told)
            self._announced = self._announced or number in ANNOUNCED
            self._told = self._told or (number if number in TOLD else 0)
            if first and child is not None:  # a second signal would make the command give up what it is saving
                child.terminate()

        for number in (*ANNOUNCED, *TOLD):  # in place of submitit's, which know nothing of the command
            signal.signal(number, stop)
        child = start(command, environment=environment, output=None)
        if self._announced or self._told:
            child.terminate()
        return shell_code(child.wait())

    def _leave(self, node: int) -> None:
        """Put the job into the queue again if this start was to end, and wait for Slurm to end it."""
        job = os.environ["SLURM_JOB_ID"]
        if self._announced and node == 0:
            _say(f"Everything is saved; job {job} goes back into the queue.")
            done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
            if done.returncode != 0:
                _say(f"Slurm does not requeue job {job}: {' '.join(done.stderr.split())}; submit the command again.")
                return
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline:
            time.sleep(1.0)


def _say(text: str) -> None:
    print(text, flush=True)
