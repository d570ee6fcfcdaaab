"""Workers of a study as jobs of a cluster."""

from __future__ import annotations

import os
from collections.abc import Sequence

from obowlab.errors import UserError
from obowlab.launch.preflight import data_checks
from obowlab.launch.slurm import JobRequest, Resources, check_slurm, states, submitted_jobs
from obowlab.launch.submit import Submitter
from obowlab.studies.spec import Tuning
from obowlab.studies.storage import STORAGE_VARIABLE


def submit_workers(arguments: Sequence[str], *, tuning: Tuning, url: str, count: int, submitter: Submitter) -> int:
    """Let jobs of the cluster, with one trial at a time each, work on a study; those already there count.

    Args:
        arguments: the command, without the options for machine and storage.
        tuning: the study.
        url: of its storage.
        count: how many jobs there should be.
        submitter: makes the jobs; with `wait`, this returns when they are over.

    Returns:
        The exit code.

    Raises:
        UserError: there is no Slurm, it refuses the jobs, images are missing, or the storage is not for several nodes.
    """
    machine = submitter.machine
    check_slurm()
    if url.startswith("sqlite"):
        raise UserError("SQLite is no storage for several nodes: use postgresql:// or, on a file system with locks, journal://.")
    for check in data_checks(tuning.base.stages(), machine=machine, dry_run=False, say=submitter.say, required=tuning.protocol):
        check()
    what = f"tune {tuning.name}"
    mine = [job for job in submitted_jobs(machine.runs_root) if job.request.what == what]
    alive = states(mine)
    jobs = [job for job in mine if job.id in alive]
    if jobs:
        submitter.say(f"{len(jobs)} jobs work on study {tuning.name} already.")
    if len(jobs) < count:
        os.environ[STORAGE_VARIABLE] = url  # Slurm hands it on; on a command line everybody could read its password
        requests = [JobRequest(arguments=submitter.complete(arguments), runs=(), what=what)] * (count - len(jobs))
        jobs += submitter.submit(requests, resources=Resources(gpus=machine.device != "cpu"), name=what.replace(" ", "-"))
    return submitter.follow(jobs, hint="`obowlab tune ... --show` shows the trials.")
