"""`obowlab report`: everything there is to see of the run store, as a folder of pages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from obowlab.cli.options import PATH, MachineOptions, dry_run_option, machine_options, when_interrupted, would
from obowlab.errors import UserError

if TYPE_CHECKING:
    from obowlab.config import Machine
    from obowlab.report.model import Site

SCALES = ("paper", "tiny", "demo")


@click.command()
@click.option(
    "--scale",
    "scales",
    multiple=True,
    type=click.Choice(SCALES),
    help="Tables of this scale; repeatable. [default: all with runs]",
)
@click.option(
    "--out",
    type=PATH,
    default=Path("report"),
    metavar="DIR",
    help="Folder to write; a report in it is replaced. [default: report]",
)
@click.option("--wait", is_flag=True, help="Return once MLflow has it, not before.")
@click.option("--open", "opened", is_flag=True, help="Show it in the browser.")
@machine_options("runs_root", "machine_file")
@dry_run_option
def report(scales: tuple[str, ...], out: Path, wait: bool, opened: bool, options: MachineOptions, dry_run: bool) -> None:
    """Write tables, curves, vocabulary health, studies and provenance as a static site.

    The pages need no network and no server: open index.html, copy the folder anywhere. MLflow gets the same as one file, in a run
    tagged obowlab.kind = report; a background process sends it and logs the outcome in RUNS_ROOT/.logs/report.log.
    """
    from obowlab.report.pages import build_site, refuse_foreign
    from obowlab.report.read import gather, read_store, tables_at

    machine = options.machine()
    index = out.absolute() / "index.html"
    refuse_foreign(out)
    if index.exists() and not machine.runs_root.is_dir():
        raise UserError(f"There are no runs in {machine.runs_root} (--runs-root): the report in {out} is left as it is.")
    if dry_run:
        from obowlab.tracking.server import shown_uri, store_uri

        would(f"write a report of the runs in {machine.runs_root} to {index}")
        return would(f"send it to {shown_uri(store_uri(machine.tracking_uri, runs_root=machine.runs_root))}")
    when_interrupted(f"what is in {out} stays as it was.")
    store = read_store(machine.runs_root)
    site = gather(store, tables=tables_at(scales, store=store))
    pages = build_site(site, out=out)
    when_interrupted(f"the report is in {out}; MLflow does not have it yet.")
    counts = [_counted(len(site.runs), "run", "runs"), _counted(len(site.tables), "table", "tables")]
    click.echo(f"{pages} pages on {', '.join(counts)} and {_counted(len(site.studies), 'study', 'studies')}: {index}")
    for problem in site.problems:
        click.echo(f"Warning: {problem}", err=True)
    if opened:
        import webbrowser

        if not webbrowser.open(index.as_uri()):
            click.echo(f"Warning: there is no browser to show it; open {index} yourself.", err=True)
    if not site.runs:  # nothing that MLflow should keep, and perhaps no store to keep it in
        return None
    _send(site, folder=out, machine=machine, wait=wait)
    return None


def _send(site: Site, *, folder: Path, machine: Machine, wait: bool) -> None:
    from obowlab.report.publish import prepare_upload, send, send_in_background

    upload = prepare_upload(site, folder=folder, machine=machine)
    if not wait:
        try:
            log = send_in_background(upload)
        except UserError as error:
            return click.echo(f"Warning: MLflow does not get it: {error}", err=True)
        except OSError as error:
            return click.echo(f"Warning: MLflow does not get it ({error.filename}: {error.strerror}).", err=True)
        return click.echo(f"MLflow gets it in the background; {log} says how that went.", err=True)
    published = send(upload)
    if published is None:
        click.echo("Warning: another report took its place before MLflow had it; that one is sent instead.", err=True)
    elif published.warning is not None:
        click.echo(f"Warning: {published.warning}", err=True)
    return None


def _counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"
