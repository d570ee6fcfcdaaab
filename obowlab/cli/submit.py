"""What `run`, `eval`, `ablate` and `tune` share when they become jobs of a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from obowlab.cli.options import MachineOptions, job_words
from obowlab.cli.output import print_results
from obowlab.errors import UserError

if TYPE_CHECKING:
    from obowlab.config import Loaded, Machine
    from obowlab.lab.ablate import Plan
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
    options: MachineOptions,
) -> int:
    """Submit what is due of a recipe as one job, unless a job has it already.

    Args:
        words: the command, without what options say of machine and place.
        due: the stages that are not finished, the run itself last.
        seed: of all of them.
        fresh: put the present folder of the last one aside first.
        machine: where and with what.
        options: what the command was told; with `wait`, until the job is over: then print the results.

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
        errand = Errand(words=job_words(command, machine=machine, options=options), runs=tuple(runs), what=runs[-1])
        needs = Needs(nodes=machine.nodes, procs=machine.procs, gpus=machine.device != "cpu")
        jobs = submit([errand], machine=machine, needs=needs, name=runs[-1])
    if not options.wait:
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


def submit_plan(plan: Plan, *, machine: Machine, options: MachineOptions, at_a_time: int) -> int | None:
    """Submit what tables lack, as arrays of jobs: first the stages that others need, then those.

    Args:
        plan: of the tables.
        machine: of every job; one process each.
        options: what the command was told; with `wait`, until all jobs are over.
        at_a_time: at most so many jobs of an array run together.

    Returns:
        The exit code when there is nothing to show yet; None when nothing is left, or the waiting is over.

    Raises:
        UserError: there is no Slurm, it refuses the jobs, or images are missing.
    """
    from obowlab.cli.run import check_data
    from obowlab.lab.ablate import labels_of
    from obowlab.lab.engine.slurm import Errand, Needs, check_slurm, live_runs
    from obowlab.lab.records import store_runs
    from obowlab.track.folder import RunFolder

    runs = store_runs(machine.runs_root, fingerprints={job.fingerprint for job in plan.jobs})
    finished = {key for key, run in runs.items() if run.state.status == "finished"}
    left = [job for job in plan.jobs if job.fingerprint not in finished]
    if not left:
        return None
    check_slurm()
    for loaded in {job.loaded.recipe.data.dataset: job.loaded for job in left}.values():
        check_data(loaded, machine=machine, dry_run=False)
    live = live_runs(machine.runs_root)
    names = {job.fingerprint: runs[job.fingerprint].info.run_id if job.fingerprint in runs else job.run_id for job in left}
    jobs = {key: live[name] for key, name in names.items() if name in live}
    if jobs:
        click.echo(f"{len(jobs)} of {len(left)} trainings have a job already.")
    gpus = machine.device != "cpu"
    while ready := [
        job for job in left if job.fingerprint not in jobs and (job.needs is None or job.needs in finished or job.needs in jobs)
    ]:
        for job in ready:
            folder = RunFolder.create(job.loaded, seed=job.seed, runs_root=machine.runs_root)
            folder.add_labels(labels_of(job, plan=plan))
        errands = [
            Errand(
                words=job_words([*job.command, "--no-progress"], machine=machine, options=options),
                runs=(names[job.fingerprint],),
                what=names[job.fingerprint],
            )
            for job in ready
        ]
        after = [jobs[job.needs] for job in ready if job.needs in jobs]
        name = "-".join(table.name for table in plan.tables)
        new = submit(errands, machine=machine, needs=Needs(gpus=gpus), name=name, at_a_time=at_a_time, after=after)
        jobs |= {job.fingerprint: each for job, each in zip(ready, new, strict=True)}
    if options.wait:
        code = wait_for(list(jobs.values()), machine=machine)
        return code or None
    click.echo(f"{FOLLOW} The same command again shows the tables once all is trained.")
    return 0
