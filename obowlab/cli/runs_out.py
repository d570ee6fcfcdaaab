"""`obowlab runs sync` and `export`: runs go to MLflow, and to another run store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from obowlab import text
from obowlab.cli.options import PATH, MachineOptions, dry_run_option, machine_options, when_interrupted, would
from obowlab.cli.output import show_progress, warn
from obowlab.errors import UserError

if TYPE_CHECKING:
    from obowlab.tracking.mirror import Mirror

CHECKPOINT = "checkpoint.pt"


@click.command("sync")
@click.argument("run", nargs=-1)
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(min=1), default=60.0, show_default=True, metavar="S", help="Seconds per run."
)
@click.option("--rebuild", is_flag=True, help="Put a damaged mlflow.db and its files aside, and send everything again.")
@machine_options("runs_root", "machine_file")
@dry_run_option
def sync(run: tuple[str, ...], timeout_s: float, rebuild: bool, options: MachineOptions, dry_run: bool) -> int:
    """Send to MLflow what is not there yet, of all runs of yours or of those named.

    Nothing is sent twice, so it may be repeated at will. The exit code is 1 when something could not be sent.
    """
    from obowlab.files.sharing import is_others
    from obowlab.runs.folder import RunFolder
    from obowlab.runs.listing import read_runs
    from obowlab.runs.trash import trashed_runs
    from obowlab.tracking.local_store import put_aside
    from obowlab.tracking.mirror import Mirror
    from obowlab.tracking.server import shown_uri, store_uri

    machine = options.machine()
    if rebuild:
        if run:
            raise UserError("--rebuild sends all runs of yours: name none.")
        store = store_uri(machine.tracking_uri, runs_root=machine.runs_root)
        if dry_run:
            would(f"put {shown_uri(store)} and its files aside")
        else:
            click.echo(f"What MLflow had is in {put_aside(store)}; remove it once nothing is missed.")
    if run:
        folders = [RunFolder.find(ref, runs_root=machine.runs_root) for ref in run]
    else:
        found, damaged = read_runs(machine.runs_root)
        warn(damaged)
        folders = [RunFolder(summary.path, summary.info) for summary in found if not is_others(summary.path)]
        if len(folders) < len(found):
            others = len(found) - len(folders)
            what = "1 run of another user is" if others == 1 else f"{others} runs of other users are"
            click.echo(f"{what} left to them: each types `obowlab runs sync`.")
        deleted = [run.folder() for run in trashed_runs(machine.runs_root) if run.was_deleted and run.is_intact()]
        folders += [each for each in deleted if Mirror(each, tracking_uri=machine.tracking_uri).pending()]
    if not folders:
        click.echo(f"There are no runs in {machine.runs_root}.")
    failed = False
    when_interrupted("what was sent is kept, and the same command sends the rest.")
    for number, folder in enumerate(folders, start=1):
        if not dry_run:
            show_progress(f"{number} of {len(folders)}: {folder.run_id}")
        mirror = Mirror(folder, tracking_uri=machine.tracking_uri)
        if dry_run:
            would(f"send {_pending(mirror)} values, results, files and facts of run '{folder.run_id}' to {shown_uri(mirror.uri)}")
            continue
        report = mirror.sync(timeout_s=timeout_s)
        failed = failed or report.error is not None
        show_progress("")
        problem = f", {report.pending} pending: {report.error}" if report.error is not None else ""
        click.echo(f"{folder.run_id}: {report.sent} sent{problem}")
        if report.left_out:
            warn([f"{folder.path} has what is never sent: {', '.join(report.left_out)}."])
    return int(failed)


def _pending(mirror: Mirror) -> str:
    from obowlab.runs.info import DAMAGED

    try:
        return str(mirror.pending())
    except DAMAGED as error:
        return f"what can be read ({error}) of the"


@click.command("export")
@click.argument("run")
@click.option("--out", type=PATH, metavar="FILE", help="Where to write. [default: RUN_ID.tar.gz]")
@click.option("--checkpoint", is_flag=True, help="Take the checkpoint along, so that training can continue elsewhere.")
@machine_options("runs_root", "machine_file")
@dry_run_option
def export(run: str, out: Path | None, checkpoint: bool, options: MachineOptions, dry_run: bool) -> None:
    """Write a run into one .tar.gz: recipe, metrics, results, encoder.

    Unpacked into another runs folder it is a run again there: `obowlab runs show` and `obowlab runs sync` work on it.
    """
    from obowlab.runs.bundle import BUNDLED, is_kept, write_bundle
    from obowlab.runs.folder import RunFolder

    folder = RunFolder.find(run, runs_root=options.machine().runs_root)
    target = out or Path(f"{folder.run_id}.tar.gz")
    names = [name for name in (*BUNDLED, *([CHECKPOINT] if checkpoint else [])) if is_kept(folder.path / name)]
    if checkpoint and CHECKPOINT not in names:
        raise UserError(f"Run '{folder.run_id}' has no checkpoint to take along; leave --checkpoint out.")
    if target.exists():
        raise UserError(f"{target} is there already; choose another --out.")
    if not target.absolute().parent.is_dir():
        raise UserError(f"The folder {target.absolute().parent} of --out does not exist.")
    if dry_run:
        return would(f"write {', '.join(names)} of run '{folder.run_id}' to {target}")
    when_interrupted(f"{target} was not written.")
    write_bundle(folder, names=names, target=target)
    click.echo(f"Wrote {target} ({text.size(target.stat().st_size)}): {', '.join(names)}.")
    return None
