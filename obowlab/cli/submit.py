"""What `run`, `eval`, `ablate` and `tune` share when they become jobs of a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from obowlab.cli.options import job_words
from obowlab.cli.output import print_results
from obowlab.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from obowlab.config import Loaded, Machine
    from obowlab.lab.engine.slurm import Errand, Needs, SlurmJob

FOLLOW = "`obowlab jobs --watch` shows how far they are, `obowlab jobs logs RUN` what they print."


def submit(
    errands: Sequence[Errand],
    *,
    machine: Machine,
    needs: Needs,
    name: str,
    at_a_time: int | None = None,
    after: Sequence[SlurmJob] = (),
) -> list[SlurmJob]:
    """Submit commands and say under which numbers."""
    from obowlab.lab.engine import slurm

    jobs = slurm.submit(errands, machine=machine, needs=needs, name=name, at_a_time=at_a_time, after=after)
    what = errands[0].what if len(errands) == 1 else f"{len(errands)} jobs"
    numbers = jobs[0].id if len(jobs) == 1 else f"{jobs[0].id} to {jobs[-1].id}"
    limit = f", {at_a_time} at a time" if at_a_time is not None and at_a_time < len(jobs) else ""
    nodes = f" on {needs.nodes} nodes" if needs.nodes > 1 else ""
    with_gpus = f", {needs.procs} GPU{'s' * (needs.procs > 1)} each" if needs.gpus else ""
    click.echo(f"Submitted {what} as job {numbers}{nodes}{with_gpus}{limit}.")
    return jobs


def wait_for(jobs: Sequence[SlurmJob], *, machine: Machine) -> int:
    """Wait until jobs are over; Ctrl-C ends the waiting alone. Return 0, or 130 when the user left."""
    from obowlab.lab import jobs as lab_jobs

    try:
        lab_jobs.wait_for(jobs, runs_root=machine.runs_root, say=lambda line: click.echo(line, err=True))
    except KeyboardInterrupt:
        click.echo("The jobs go on; `obowlab jobs cancel RUN` ends them.", err=True)
        return 130
    return 0


def refuse_wait(machine: Machine, *, wait: bool) -> None:
    """Refuse `--wait` where there is nothing to wait for.

    Raises:
        UserError: the command is carried out here.
    """
    if wait and machine.launcher != "slurm":
        raise UserError("--wait is for jobs of a cluster (--launcher slurm): here the command waits anyway.")


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
    words: Sequence[str],
    due: Sequence[Loaded],
    *,
    seed: int,
    fresh: bool,
    machine: Machine,
    machine_file: Path | None,
    wait: bool,
) -> int:
    """Submit what is due of a recipe as one job, unless a job has it already.

    Args:
        words: the command, without what options say of machine and place.
        due: the stages that are not finished, the run itself last.
        seed: of all of them.
        fresh: put the present folder of the last one aside first.
        machine: where and with what.
        machine_file: holds the machine's other settings; None for the usual place.
        wait: until the job is over; then print the results.

    Returns:
        0; when waiting, 1 if the run did not finish and 130 if the user left.

    Raises:
        UserError: there is no Slurm, it refuses the job, or a job has the run that is to begin afresh.
    """
    from obowlab.lab.engine.slurm import Errand, Needs, check_slurm, live_runs
    from obowlab.lab.launch import put_aside
    from obowlab.track.folder import RunFolder, run_id_of

    check_slurm()
    runs = [run_id_of(each, seed=seed) for each in due]
    job = live_runs(machine.runs_root).get(runs[-1])
    if job is not None and fresh:
        raise UserError(f"Run '{runs[-1]}' belongs to job {job.id}: `obowlab jobs cancel {job.id}` ends it first.")
    if job is not None:
        click.echo(f"Run {runs[-1]} has job {job.id} already.")
        jobs = [job]
    else:
        if fresh and (machine.runs_root / runs[-1] / "run.json").is_file():
            put_aside(RunFolder.open(machine.runs_root / runs[-1]))
        for each in due:
            RunFolder.create(each, seed=seed, runs_root=machine.runs_root)
        command = [*words, "--procs", str(machine.procs), "--nodes", str(machine.nodes), "--no-progress"]
        errand = Errand(words=job_words(command, machine=machine, machine_file=machine_file), runs=tuple(runs), what=runs[-1])
        needs = Needs(nodes=machine.nodes, procs=machine.procs, gpus=machine.device != "cpu")
        jobs = submit([errand], machine=machine, needs=needs, name=runs[-1])
    if not wait:
        click.echo(FOLLOW)
        return 0
    if code := wait_for(jobs, machine=machine):
        return code
    for run in runs:
        folder = RunFolder.open(machine.runs_root / run)
        state = folder.current_state()
        if state.status != "finished":
            click.echo(f"Run {run} did not finish ({state.status}): {state.message or 'see its log'}.", err=True)
            return 1
    print_results(folder)
    return 0
