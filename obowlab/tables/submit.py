"""The trainings that tables need, as arrays of jobs of a cluster."""

from __future__ import annotations

from collections.abc import Collection

from obowlab.launch.slurm import JobRequest, Resources, check_slurm, live_runs
from obowlab.launch.submit import Submitter
from obowlab.runs.folder import RunFolder
from obowlab.runs.records import store_runs
from obowlab.tables.plan import Plan, check_images, due_jobs, labels_of


def submit_plan(plan: Plan, *, submitter: Submitter, at_a_time: int, again: Collection[str] = ()) -> int | None:
    """Submit the missing trainings of tables as arrays of jobs, earlier stages first.

    Args:
        plan: of the tables.
        submitter: makes the jobs, of one process each; with `wait`, this returns when they are over.
        at_a_time: how many jobs of an array may run together.
        again: fingerprints of finished trainings that are to be measured, see `plan.unmeasured`.

    Returns:
        The exit code when there is nothing to show yet; None when nothing is left, or the waiting is over.

    Raises:
        UserError: there is no Slurm, it refuses the jobs, or images are missing.
    """
    machine = submitter.machine
    runs = store_runs(machine.runs_root, fingerprints=plan.fingerprints)
    finished = {key for key, run in runs.items() if run.state.status == "finished"}
    left = due_jobs(plan, runs=runs, again=again)
    if not left:
        return None
    check_slurm()
    check_images(left, machine=machine, say=submitter.say)
    live = live_runs(machine.runs_root)
    names = {job.fingerprint: runs[job.fingerprint].info.run_id if job.fingerprint in runs else job.run_id for job in left}
    jobs = {key: live[name] for key, name in names.items() if name in live}
    if jobs:
        submitter.say(f"{len(jobs)} of {len(left)} trainings have a job already.")
    gpus = machine.device != "cpu"
    while ready := [
        job for job in left if job.fingerprint not in jobs and (job.needs is None or job.needs in finished or job.needs in jobs)
    ]:
        for job in ready:
            folder = RunFolder.create(job.loaded, seed=job.seed, runs_root=machine.runs_root)
            folder.add_labels(labels_of(job, plan=plan))
        requests = [
            JobRequest(
                arguments=submitter.complete([*job.command, "--no-progress"]),
                runs=(names[job.fingerprint],),
                what=names[job.fingerprint],
            )
            for job in ready
        ]
        after = [jobs[job.needs] for job in ready if job.needs in jobs]
        name = "-".join(table.name for table in plan.tables)
        new = submitter.submit(requests, resources=Resources(gpus=gpus), name=name, at_a_time=at_a_time, after=after)
        jobs |= {job.fingerprint: each for job, each in zip(ready, new, strict=True)}
    code = submitter.follow(list(jobs.values()), hint="The same command again shows the tables once all is trained.")
    return code if code or not submitter.wait else None
