"""`obowlab report`: everything there is to see of the run store, as a folder of pages."""

from __future__ import annotations

from pathlib import Path

import click

from obowlab.cli.options import PATH, dry_run_option, machine_from, machine_option, runs_root_option, would

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
@click.option("--open", "opened", is_flag=True, help="Show it in the browser.")
@runs_root_option
@machine_option
@dry_run_option
def report(
    scales: tuple[str, ...], out: Path, opened: bool, runs_root: Path | None, machine_file: Path | None, dry_run: bool
) -> None:
    """Write tables, curves, vocabulary health, studies and provenance as a static site.

    The pages need no network and no server: open index.html, copy the folder anywhere. MLflow gets the same as one file, in a run
    tagged obowlab.kind = report.
    """
    from obowlab.lab.report.build import build_site, refuse_foreign
    from obowlab.lab.report.gather import gather, read_store, tables_at

    machine = machine_from(machine_file=machine_file, runs_root=runs_root)
    index = out.absolute() / "index.html"
    refuse_foreign(out)
    if dry_run:
        from obowlab.track.store import shown_uri, store_uri

        would(f"write a report of the runs in {machine.runs_root} to {index}")
        return would(f"send it to {shown_uri(store_uri(machine.tracking_uri, runs_root=machine.runs_root))}")
    store = read_store(machine.runs_root)
    site = gather(store, tables=tables_at(scales, store=store))
    pages = build_site(site, out=out)
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
    from obowlab.lab.report.send import send_report

    published = send_report(site, folder=out, machine=machine)
    if published.warning is not None:
        click.echo(f"Warning: {published.warning}", err=True)
    return None


def _counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"
