"""Commands as jobs of a cluster: what `run`, `eval`, `ablate` and `tune` share when they are submitted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from obowlab.config import Loaded, Machine
from obowlab.errors import UserError
from obowlab.launch import jobs as cluster_jobs
from obowlab.launch import slurm
from obowlab.launch.slurm import JobRequest, Resources, SlurmJob, check_slurm, live_runs
from obowlab.runs.folder import RunFolder
from obowlab.runs.listing import has_run
from obowlab.runs.names import run_id_of
from obowlab.runs.trash import put_aside

logger = logging.getLogger(__name__)
FOLLOW = "`obowlab jobs --watch` shows how far they are, `obowlab jobs logs RUN` what they print."


@dataclass(frozen=True)
class Submitter:
    """How the commands of one command line become jobs.

    Attributes:
        machine: where and with what.
        complete: adds the options of this command line to the arguments of a job's command.
        wait: whether the command waits until its jobs are over.
        say: prints one line.
    """

    machine: Machine
    complete: Callable[[Sequence[str]], tuple[str, ...]]
    wait: bool
    say: Callable[[str], None]

    def submit(
        self,
        requests: Sequence[JobRequest],
        *,
        resources: Resources,
        name: str,
        at_a_time: int | None = None,
        after: Sequence[SlurmJob] = (),
    ) -> list[SlurmJob]:
        """Submit commands and print the numbers of their jobs."""
        jobs = slurm.submit(requests, machine=self.machine, resources=resources, name=name, at_a_time=at_a_time, after=after)
        what = requests[0].what if len(requests) == 1 else f"{len(requests)} jobs"
        numbers = jobs[0].id if len(jobs) == 1 else f"{jobs[0].id} to {jobs[-1].id}"
        limit = f", {at_a_time} at a time" if at_a_time is not None and at_a_time < len(jobs) else ""
        nodes = f" on {resources.nodes} nodes" if resources.nodes > 1 else ""
        with_gpus = f", {resources.procs} GPU{'s' * (resources.procs > 1)} each" if resources.gpus else ""
        self.say(f"Submitted {what} as job {numbers}{nodes}{with_gpus}{limit}.")
        return jobs

    def wait_for(self, jobs: Sequence[SlurmJob]) -> int:
        """Wait until jobs are over; Ctrl-C ends only the waiting. Return 0, or 130 after Ctrl-C."""
        try:
            cluster_jobs.wait_for(jobs, runs_root=self.machine.runs_root)
        except KeyboardInterrupt:
            logger.info("The jobs continue; `obowlab jobs cancel RUN` ends them.")
            return 130
        return 0

    def follow(self, jobs: Sequence[SlurmJob], *, hint: str = "") -> int:
        """Wait for jobs with --wait; else print how to follow them, and a hint. Return the exit code."""
        if self.wait:
            return self.wait_for(jobs)
        self.say(f"{FOLLOW} {hint}".rstrip())
        return 0


def spread(machine: Machine, *, nodes: int | None) -> Machine:
    """Return the machine with as few nodes as its GPUs need, unless their number was given.

    Raises:
        UserError: a node of the cluster has fewer GPUs than it would be asked for.
    """
    most = machine.slurm.gpus_per_node
    if nodes is None and machine.nodes == 1 and machine.device != "cpu":
        fewest = -(-machine.procs // most)
        enough = next(count for count in range(fewest, machine.procs + 1) if machine.procs % count == 0)
        machine = machine.model_copy(update={"nodes": enough})
    if machine.device != "cpu" and machine.procs // machine.nodes > most:
        raise UserError(f"A node has {most} GPUs (slurm.gpus_per_node), not {machine.procs // machine.nodes}: raise --nodes.")
    return machine


def submit_run(
    arguments: Sequence[str],
    due: Sequence[Loaded],
    *,
    seed: int,
    fresh: bool,
    submitter: Submitter,
) -> int:
    """Submit what is due of a recipe as one job, unless a job has it already.

    Args:
        arguments: the command, without the options of machine and places.
        due: the stages that are not finished, the run itself last.
        seed: of all of them.
        fresh: put the present folder of the last one aside first.
        submitter: makes the job; with `wait`, this returns when it is over.

    Returns:
        0; when waiting, 1 if the run did not finish and 130 after Ctrl-C.

    Raises:
        UserError: there is no Slurm, it refuses the job, or a job has the run that is to start again.
    """
    machine = submitter.machine
    check_slurm()
    runs = [run_id_of(each, seed=seed) for each in due]
    job = live_runs(machine.runs_root).get(runs[-1])
    if job is not None and fresh:
        raise UserError(f"Run '{runs[-1]}' belongs to job {job.id}: `obowlab jobs cancel {job.id}` ends it first.")
    if job is not None:
        submitter.say(f"Run {runs[-1]} has job {job.id} already.")
        jobs = [job]
    else:
        if fresh and has_run(machine.runs_root / runs[-1]):
            put_aside(RunFolder.open(machine.runs_root / runs[-1]))
        for each in due:
            RunFolder.create(each, seed=seed, runs_root=machine.runs_root)
        command = [*arguments, "--procs", str(machine.procs), "--nodes", str(machine.nodes), "--no-progress"]
        request = JobRequest(arguments=submitter.complete(command), runs=tuple(runs), what=runs[-1])
        resources = Resources(nodes=machine.nodes, procs=machine.procs, gpus=machine.device != "cpu")
        jobs = submitter.submit([request], resources=resources, name=runs[-1])
    if (code := submitter.follow(jobs)) or not submitter.wait:
        return code
    for run in runs:
        state = RunFolder.open(machine.runs_root / run).current_state()
        if state.status != "finished":
            logger.info("Run %s did not finish (%s): %s.", run, state.status, state.message or "see its log")
            return 1
    return 0
