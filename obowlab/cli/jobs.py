"""`obowlab jobs`: what is queued, running and over, on this machine and on the cluster."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from obowlab import text
from obowlab.cli import Family
from obowlab.cli.options import MachineOptions, dry_run_option, json_flag, machine_options, would
from obowlab.cli.output import print_json, print_table
from obowlab.errors import UserError
from obowlab.files.opening import open_file, read_file
from obowlab.files.records import LARGEST_LINES

if TYPE_CHECKING:
    from obowlab.launch.jobs import Job, Overview

WATCH_S = 5.0
PLAIN_WATCH_S = 60.0
"""Between two lists where no terminal can be drawn on."""

FOLLOW_S = 0.5
MIRROR_TIMEOUT_S = 30.0
COLUMNS = ("job", "launcher", "status", "where", "what", "steps", "left", "since", "remark")


@click.group(cls=Family, invoke_without_command=True)
@click.option("--watch", is_flag=True, help="Refresh the list until nothing is queued or running.")
@click.option("--all", "everything", is_flag=True, help="Also what ended more than a day ago.")
@json_flag
@machine_options("runs_root", "machine_file")
@dry_run_option
@click.pass_context
def jobs(context: click.Context, watch: bool, everything: bool, as_json: bool, options: MachineOptions, dry_run: bool) -> None:
    """Show what is queued, running and over, where, how far and how long it will take.

    Without a command: the list, of this machine and of the cluster that jobs were submitted to.
    """
    if context.invoked_subcommand is not None:
        return None
    if watch and as_json:
        raise UserError("--watch draws a list; leave --json out.")
    root = options.machine().runs_root
    if dry_run:
        return would(f"list the jobs of {root}")
    from obowlab.launch.jobs import overview

    found = overview(root, everything=everything)
    if as_json:
        print_json([asdict(job) for job in found.jobs])
        return _warn(found)
    if watch:
        return _watch(root, everything=everything)
    return _print(found, root=root)


@jobs.command("logs")
@click.argument("what", metavar="RUN|JOB")
@click.option("--follow", "-f", is_flag=True, help="Keep printing new output, until Ctrl-C.")
@machine_options("runs_root", "machine_file")
@dry_run_option
def logs(what: str, follow: bool, options: MachineOptions, dry_run: bool) -> None:
    """Print the output of a run or of a job of the cluster; of several nodes one after the other."""
    root = options.machine().runs_root
    from obowlab.launch.jobs import logs_of

    files = logs_of(what, runs_root=root)
    if dry_run:
        return would(f"print {', '.join(map(str, files))}")
    for file in files:
        if len(files) > 1:
            click.echo(f"== {file.name}")
        click.echo(read_file(file, limit=LARGEST_LINES).decode(errors="replace"), nl=False)
    if follow:
        _follow(files[0])
    return None


@jobs.command("cancel")
@click.argument("what", metavar="RUN|JOB")
@machine_options("runs_root", "machine_file")
@dry_run_option
def cancel(what: str, options: MachineOptions, dry_run: bool) -> None:
    """Ask a run, or a job of the cluster, to save itself and end."""
    root = options.machine().runs_root
    if dry_run:
        return would(f"ask {what} to stop")
    from obowlab.launch.jobs import stop

    return click.echo(stop(what, runs_root=root))


@jobs.command("reap")
@machine_options("runs_root", "machine_file")
@dry_run_option
def reap(options: MachineOptions, dry_run: bool) -> None:
    """Mark runs of dead processes as interrupted, in MLflow too."""
    machine = options.machine()
    if dry_run:
        return would(f"mark the runs of dead processes in {machine.runs_root} as interrupted")
    from obowlab.launch.jobs import reap as mark
    from obowlab.tracking.mirror import Mirror

    reaped = mark(machine.runs_root)
    for folder in reaped:
        report = Mirror(folder, tracking_uri=machine.tracking_uri).sync(timeout_s=MIRROR_TIMEOUT_S)
        suffix = f"; MLflow does not show it yet ({report.error}), `obowlab runs sync` sends it" if report.error else ""
        click.echo(f"{folder.run_id} is interrupted{suffix}.")
    if not reaped:
        click.echo("Every run whose state is running is being trained.")
    return None


# ----------------------------------------------------------------------------------------------------------------- printing


def _print(found: Overview, *, root: Path) -> None:
    if found.jobs:
        print_table(
            COLUMNS,
            [_row(job) for job in found.jobs],
            right=("steps", "left"),
            names=("what",),
            prose=("remark",),
            hide=("launcher", "since", "where", "job", "steps"),
        )
    else:
        click.echo(f"Nothing is queued or running in {root}, and nothing ended in the last day.")
    return _warn(found)


def _row(job: Job) -> tuple[str, ...]:
    steps = f"{job.step}/{job.total_steps}" if job.total_steps else "-"
    left = text.duration(job.left_s) if job.left_s is not None else ""
    return (job.job, job.launcher, job.status, job.where, job.what, steps, left, text.timestamp(job.changed_at), job.message)


def _warn(found: Overview) -> None:
    for sentence in found.damaged:
        click.echo(f"Warning: {sentence}", err=True)
    if found.problem:
        click.echo(f"Warning: {found.problem} The list shows the run folders only.", err=True)


def _watch(root: Path, *, everything: bool) -> None:
    from obowlab.launch.jobs import overview

    on_terminal = sys.stdout.isatty()
    while True:
        found = overview(root, everything=everything)
        if on_terminal:
            click.clear()
            click.echo(f"{root}, {time.strftime('%H:%M:%S')}; Ctrl-C ends the watching.")
        else:
            click.echo(time.strftime("%H:%M:%S"))
        _print(found, root=root)
        if not any(job.is_active for job in found.jobs):
            return
        time.sleep(WATCH_S if on_terminal else PLAIN_WATCH_S)


def _follow(file: Path) -> None:
    position = file.stat().st_size
    while True:
        with open_file(file) as opened:
            opened.seek(position)
            new = opened.read()
        position += len(new)
        click.echo(new.decode(errors="replace"), nl=False)
        time.sleep(FOLLOW_S)
