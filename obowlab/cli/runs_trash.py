"""`obowlab runs delete`, `restore` and `trash`: runs that nobody wants any more, for a while or for good."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from obowlab import text
from obowlab.cli.options import (
    MachineOptions,
    confirm,
    dry_run_option,
    json_flag,
    machine_options,
    nearest_of,
    would,
    yes_option,
)
from obowlab.cli.output import print_json, print_table, send_to_mlflow
from obowlab.errors import UserError

if TYPE_CHECKING:
    from obowlab.config import Machine
    from obowlab.runs.trash import Trashed


@click.command("delete")
@click.argument("names", metavar="RUN...", nargs=-1, required=True)
@yes_option
@machine_options("runs_root", "machine_file")
@dry_run_option
def delete(names: tuple[str, ...], yes: bool, options: MachineOptions, dry_run: bool) -> int:
    """Move runs to the trash of their store, after asking; MLflow shows them as deleted.

    `obowlab runs restore RUN` brings one back; `obowlab runs trash --empty` removes them for good.
    """
    from obowlab.launch.slurm import live_runs, submitted_jobs
    from obowlab.runs.folder import RunFolder
    from obowlab.runs.lineage import waiting_students
    from obowlab.runs.trash import check_deletable, find_trashed, put_aside
    from obowlab.tracking.mirror import Mirror
    from obowlab.tracking.sending import DELETED_TAG

    machine = options.machine()
    folders: dict[str, RunFolder] = {}
    gone = []
    waiting = live_runs(machine.runs_root) if submitted_jobs(machine.runs_root) else {}
    for name in names:
        try:
            folder = RunFolder.find(name, runs_root=machine.runs_root)
        except UserError:
            there = [run for run in find_trashed(name, runs_root=machine.runs_root) if run.was_deleted]
            if len(there) != 1:
                raise
            gone += there
            continue
        check_deletable(folder, ref=name, runs_root=machine.runs_root)
        if folder.run_id in waiting:
            job = waiting[folder.run_id]
            raise UserError(f"Job {job.id} of the cluster trains '{folder.run_id}': `obowlab jobs cancel {job.id}` first.")
        folders[folder.run_id] = folder
    if dry_run:
        for folder in folders.values():
            would(f"move run '{folder.run_id}' to the trash of {machine.runs_root}")
        return 0
    for run in gone:
        click.echo(f"{run.run_id} is in the trash already.")
    for student, teacher in waiting_students(folders.values(), runs_root=machine.runs_root):
        click.echo(f"Note: {student} is not finished and reads {teacher}, its teacher, which it would train again.", err=True)
    if folders and not confirm(f"Move {', '.join(folders)} to the trash?", yes=yes):
        click.echo("Nothing was deleted.")
        return 1
    moved = [run.path for run in gone]
    for folder in folders.values():
        moved.append(put_aside(folder, deleted=True))
        click.echo(f"{folder.run_id} is in the trash; `obowlab runs restore {folder.run_id}` brings it back.")
    send_to_mlflow([RunFolder.open(path) for path in moved], machine=machine)
    for outbox in (Mirror(RunFolder.open(path), tracking_uri=machine.tracking_uri).outbox for path in moved):
        if version := outbox.load().model_version:
            stays = f"The model version {outbox.model_name}/{version} of {outbox.folder.run_id} stays in MLflow"
            click.echo(f"{stays}, tagged {DELETED_TAG}; it can still be loaded.")
    return 0


def _still_in_mlflow(runs: list[Trashed], *, machine: Machine) -> list[Trashed]:
    """Tell MLflow which runs were deleted, and return those that it could not be told of."""
    from obowlab.tracking.mirror import Mirror

    deleted = [run for run in runs if run.was_deleted and run.is_intact()]
    send_to_mlflow([run.folder() for run in deleted], machine=machine)
    return [run for run in deleted if Mirror(run.folder(), tracking_uri=machine.tracking_uri).pending()]


@click.command("restore")
@click.argument("run")
@machine_options("runs_root", "machine_file")
@dry_run_option
def restore(run: str, options: MachineOptions, dry_run: bool) -> None:
    """Bring a run back from the trash, in MLflow too; of several of one name the latest."""
    from obowlab.runs.trash import find_trashed, trashed_runs
    from obowlab.runs.trash import restore as bring_back

    machine = options.machine()
    found = find_trashed(run, runs_root=machine.runs_root)
    if not found:
        known = sorted({each.run_id for each in trashed_runs(machine.runs_root)})
        raise UserError(f"There is no run '{run}' in the trash of {machine.runs_root}.{nearest_of(run, known)}")
    if len({each.run_id for each in found}) > 1:
        raise UserError(f"'{run}' fits several runs in the trash: {', '.join(sorted({each.run_id for each in found}))}.")
    if dry_run:
        return would(f"bring run '{found[0].run_id}' back from the trash")
    folder = bring_back(found[0], runs_root=machine.runs_root)
    click.echo(f"{folder.run_id} is back.")
    if folder.mlflow_run_id() is not None:
        send_to_mlflow([folder], machine=machine)
    return None


@click.command("trash")
@click.argument("names", metavar="[RUN]...", nargs=-1)
@click.option("--empty", is_flag=True, help="Remove what is in it, or the runs named, for good.")
@yes_option
@machine_options("runs_root", "machine_file")
@json_flag
@dry_run_option
def trash(names: tuple[str, ...], empty: bool, yes: bool, as_json: bool, options: MachineOptions, dry_run: bool) -> int:
    """List what is in the trash, of deleted runs and of those that --fresh put aside; or empty it."""
    from obowlab.files.sharing import is_others
    from obowlab.runs.trash import find_trashed, remove_for_good, size_of, trashed_runs

    machine = options.machine()
    root = machine.runs_root
    there = trashed_runs(root)
    for name in names:
        if not find_trashed(name, runs_root=root):
            raise UserError(
                f"There is no run '{name}' in the trash of {root}.{nearest_of(name, sorted({t.run_id for t in there}))}"
            )
    if names:
        there = [run for name in names for run in find_trashed(name, runs_root=root)]
    if empty:
        own = [run for run in there if not is_others(run.path)]
        for run in there if names else ():
            run.refuse_others("remove")
        if len(own) < len(there):
            click.echo(f"{len(there) - len(own)} run(s) of other users are left to them.")
        there = own
    sizes = [size_of(run.path) for run in there]
    if dry_run:
        would(f"{'remove' if empty else 'list'} {len(there)} run(s) in the trash of {root}, {text.size(sum(sizes))}")
        return 0
    if empty:
        if there and not confirm(f"Remove {len(there)} run(s), {text.size(sum(sizes))}, for good?", yes=yes):
            click.echo("Nothing was removed.")
            return 1
        unknown = _still_in_mlflow(there, machine=machine)
        gone = [run for run in there if run not in unknown]
        freed = sum(num_bytes for run, num_bytes in zip(there, sizes, strict=True) if run in gone)
        remove_for_good(gone, runs_root=root)
        click.echo(f"Removed {len(gone)} run(s) for good, {text.size(freed)}.")
        if unknown:
            click.echo(f"Kept {len(unknown)} that MLflow still shows: the same command removes them once it answers.")
        return int(bool(unknown))
    if as_json:
        print_json(
            [
                {"run_id": run.run_id, "path": str(run.path), "since": run.since, "deleted": run.was_deleted, "bytes": num_bytes}
                for run, num_bytes in zip(there, sizes, strict=True)
            ]
        )
        return 0
    if not there:
        click.echo(f"The trash of {root} is empty.")
        return 0
    rows = [
        (run.run_id, text.timestamp(run.since), "deleted" if run.was_deleted else "by --fresh", text.size(num_bytes))
        for run, num_bytes in zip(there, sizes, strict=True)
    ]
    print_table(("run", "since", "how", "size"), rows, right=("size",), names=("run",), prose=(), hide=("how",))
    return 0
