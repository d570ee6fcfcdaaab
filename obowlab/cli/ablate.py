"""`obowlab ablate`: train what the rows of tables need, then show them; `obowlab table`: show them from the run store alone."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from obowlab.cli.options import (
    CLUSTER,
    HARDWARE,
    PATH,
    ROOTS,
    MachineOptions,
    dry_run_option,
    machine_options,
    submitter_of,
    would,
)
from obowlab.cli.output import print_table
from obowlab.errors import UserError

if TYPE_CHECKING:
    from obowlab.config import Machine
    from obowlab.launch.cost import CostBook
    from obowlab.runs.folder import RunFolder, RunSummary
    from obowlab.runs.records import Records
    from obowlab.tables.execute import Plan
    from obowlab.tables.model import Table
    from obowlab.tables.spec import PlannedTable

Format = Literal["rich", "md", "json", "csv", "html"]
MIRROR_TIMEOUT_S = 60.0
FORMATS: tuple[Format, ...] = ("rich", "md", "json", "csv", "html")

scale_option = click.option(
    "--scale", default="paper", show_default=True, metavar="paper|tiny|demo", help="Which images and networks: see `config list`."
)
names_argument = click.argument("names", nargs=-1, required=True, metavar="TABLE...|all")


@click.command()
@names_argument
@click.option("--rows", "row_words", multiple=True, metavar="KEY,...", help="Only these rows (and the base row); repeatable.")
@click.option(
    "--seeds", type=click.IntRange(min=1), default=1, show_default=True, metavar="N", help="Seeds 0 to N-1 of every row."
)
@scale_option
@click.option("--gpus", type=click.IntRange(min=1), metavar="N", help="N trainings at a time, each on a GPU of its own.")
@click.option("--jobs", type=click.IntRange(min=1), metavar="N", help="Trainings at a time on the CPU. [default: one per core]")
@click.option("--records", type=PATH, metavar="DIR", help="Write what the tables are made of (small JSON files) to a folder.")
@machine_options(*CLUSTER, *HARDWARE, *ROOTS)
@dry_run_option
def ablate(
    names: tuple[str, ...],
    row_words: tuple[str, ...],
    seeds: int,
    scale: str,
    gpus: int | None,
    jobs: int | None,
    records: Path | None,
    options: MachineOptions,
    dry_run: bool,
) -> int:
    """Train what the rows of tables need and lack, then show the tables.

    TABLE is a table of the paper (table1 to table5, table7), `all`, or a TOML file. Rows with the same recipe are trained once.
    Killed and typed again, the command goes on; a row that fails does not stop the others.
    """
    from obowlab.launch.cost import CostBook
    from obowlab.launch.gpu_leases import check_gpus
    from obowlab.runs.records import store_runs
    from obowlab.tables.execute import make_plan
    from obowlab.tables.spec import load_table, resolve_names
    from obowlab.tables.submit import submit_plan

    if gpus is not None and (jobs is not None or options.device not in (None, "cuda")):
        raise UserError("--gpus N runs one training on each of N GPUs; leave --jobs and --device out.")
    tables = [load_table(name, scale=scale) for name in resolve_names(names)]
    rows = _rows(row_words, tables=tables)
    machine = (replace(options, device="cuda") if gpus is not None else options).machine(procs=gpus)
    on_cluster = machine.launcher == "slurm"
    if not dry_run and not on_cluster:
        check_gpus(machine)
    plan = make_plan(tables, seeds=range(seeds), rows=rows)
    slots = gpus or jobs or (len(plan.jobs) if on_cluster else _default_jobs(machine))
    runs = store_runs(machine.runs_root)
    book = CostBook(machine.model_copy(update={"procs": 1}), runs=runs.values())
    if not dry_run and not on_cluster and any(job.fingerprint not in runs for job in plan.jobs):
        click.echo("Timing a few steps of the recipes that were never trained here.", err=True)
        problem = book.measure([job.loaded.recipe for job in plan.jobs])
        if problem:
            click.echo(f"Warning: not every recipe could be timed ({problem}).", err=True)
    _print_plan(plan, runs=runs, book=book, slots=slots, scale=scale, on_cluster=on_cluster)
    if dry_run:
        return 0
    machine = machine.model_copy(update={"procs": 1})
    if on_cluster:
        left = submit_plan(plan, submitter=submitter_of(machine, options=options), at_a_time=slots)
        return left if left is not None else _present(plan, machine=machine, records=records)
    return _carry_out(
        plan,
        machine=machine,
        machine_file=options.machine_file,
        slots=slots,
        gpus=gpus is not None,
        records=records,
    )


@click.command()
@names_argument
@scale_option
@click.option("--seeds", type=click.IntRange(min=1), metavar="N", help="Seeds 0 to N-1. [default: those of which there are runs]")
@click.option("--format", "form", type=click.Choice(FORMATS), default="rich", show_default=True, help="How to print.")
@click.option("--runs", "with_runs", is_flag=True, help="With rich: print the run behind every number too.")
@click.option("--records", type=PATH, metavar="DIR", help="Rebuild from the records of `ablate --records`, not from the store.")
@click.option("--out", type=PATH, metavar="FILE", help="Write to a file.")
@machine_options("runs_root", "machine_file")
@dry_run_option
def table(
    names: tuple[str, ...],
    scale: str,
    seeds: int | None,
    form: Format,
    with_runs: bool,
    records: Path | None,
    out: Path | None,
    options: MachineOptions,
    dry_run: bool,
) -> None:
    """Show tables of the paper beside what the run store has; trains nothing."""
    from obowlab.runs.records import read_records
    from obowlab.tables.spec import load_table, resolve_names

    machine = options.machine()
    tables = [load_table(name, scale=scale) for name in resolve_names(names)]
    if out is not None and not out.absolute().parent.is_dir():
        raise UserError(f"The folder of --out {out} does not exist.")
    source = records or machine.runs_root
    if dry_run:
        return would(f"build {', '.join(planned.name for planned in tables)} at scale {scale} from {source}")
    known = read_records(records) if records is not None else None
    built = [build(planned, machine=machine, known=known, seeds=None if seeds is None else range(seeds)) for planned in tables]
    if out is not None:
        _write(out, text_of(built, form=form))
    elif form == "rich":
        for each in built:
            show(each, with_runs=with_runs)
    else:
        click.echo(text_of(built, form=form), nl=False)
    return None


def build(planned: PlannedTable, *, machine: Machine, known: Records | None, seeds: Sequence[int] | None) -> Table:
    """Build a table from given records, or from those of the run store that its rows need."""
    from obowlab.runs.records import store_records, store_runs
    from obowlab.tables.build import build_table, finished_seeds

    if known is None:
        candidates = sorted({run.info.seed for run in store_runs(machine.runs_root).values()} | set(seeds or ()))
        wanted = {key for row in planned.rows for key in row.loaded.recipe.fingerprints(seeds=candidates).values()}
        known = store_records(machine.runs_root, fingerprints=wanted)
    return build_table(planned, seeds=seeds if seeds is not None else finished_seeds(planned, records=known), records=known)


def text_of(tables: Sequence[Table], *, form: Format) -> str:
    """Return tables as text in a format."""
    from obowlab.tables import render

    if form == "json":
        return render.as_json(tables)
    if form == "csv":
        return render.as_csv(tables)
    if form == "html":
        return render.html(tables)
    return "\n".join(render.markdown(each) for each in tables)


def show(table: Table, *, with_runs: bool = False) -> None:
    """Print a table on the terminal."""
    from obowlab.tables import render

    columns, rows = render.overview(table)
    numbers = [column for column in columns if column not in ("row", "direction")]
    print_table(columns, rows, title=render.heading(table), right=numbers)
    for line in (render.LEGEND, *render.remarks(table)):
        click.echo(line)
    if with_runs:
        click.echo()
        print_table(*render.runs_overview(table))
    click.echo()


# -------------------------------------------------------------------------------------------------------------- helpers


def _rows(words: Sequence[str], *, tables: Sequence[PlannedTable]) -> dict[str, list[str]]:
    """Return the rows wanted of every table: `KEY` in whichever table has it, or `TABLE/KEY`; empty for all rows."""
    from obowlab.config import nearest

    wanted: dict[str, list[str]] = {}
    known = {table.name: [row.row.key for row in table.rows] for table in tables}
    for word in (part for text in words for part in text.split(",") if part):
        table, slash, key = word.rpartition("/")
        found = [name for name, keys in known.items() if key in keys and (not slash or name == table)]
        if not found:
            raise UserError(
                f"No table here has a row '{word}' (--rows).{nearest(key, [k for keys in known.values() for k in keys])}"
            )
        for name in found:
            wanted.setdefault(name, []).append(key)
    return wanted


def _default_jobs(machine: Machine) -> int:
    import os

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // (machine.threads or 1))


def _print_plan(plan: Plan, *, runs: Mapping[str, RunSummary], book: CostBook, slots: int, scale: str, on_cluster: bool) -> None:
    from obowlab import text

    lines, left_s, unknown, counts = [], 0.0, 0, dict.fromkeys(("done", "running", "missing"), 0)
    for job in plan.jobs:
        run = runs.get(job.fingerprint)
        status = str(run.state.status) if run is not None else "missing"
        counts[{"finished": "done", "running": "running"}.get(status, "missing")] += 1
        cost = book.cost(job.loaded.recipe)
        share = 1.0
        if run is not None and run.state.total_steps:
            status = f"{status} {100 * run.state.step // run.state.total_steps} %" if status != "finished" else status
            share -= run.state.step / run.state.total_steps
        if cost.seconds is not None:
            left_s += share * cost.seconds
        elif share:
            unknown += 1
        time_text = f"{text.duration(cost.seconds)} ({cost.source})" if cost.seconds is not None else "unknown"
        places = [f"{place} (stage)" if job.is_stage else place for place in job.places]
        run_id = run.info.run_id if run is not None else job.run_id
        lines.append((run_id, status, str(cost.steps or "?"), time_text, ", ".join(places)))
    print_table(("run", "status", "steps", "training", "rows"), lines, right=("steps",))
    stages = sum(job.is_stage for job in plan.jobs)
    trainings = len(plan.jobs) - stages
    rows = len({place for job in plan.jobs if not job.is_stage for place in job.places})
    staged = f" and {stages} stages before them" if stages else ""
    click.echo(
        f"{rows} rows at scale {scale}, {len(plan.seeds)} seed(s): {trainings} trainings{staged}; "
        f"{counts['done']} done, {counts['running']} running, {counts['missing']} missing."
    )
    for line in _shares(plan):
        click.echo(line)
    if left_s or not unknown:
        click.echo(f"Expected: {text.duration(left_s)} of training left; {slots} at a time: {text.duration(left_s / slots)}.")
    if unknown:
        when = "in their jobs" if on_cluster else "when the command runs"
        click.echo(f"{unknown} of them were never timed here; a few steps of each are {when}.")


def _shares(plan: Plan) -> list[str]:
    """Return a line per table: its rows, and how many trainings it needs beside those of the tables before it."""
    lines, before = [], 0
    seen: set[str] = set()
    for table in plan.tables:
        mine = {job.fingerprint for job in plan.jobs if any(place.startswith(f"{table.name}/") for place in job.places)}
        trainings = {job.fingerprint for job in plan.jobs if not job.is_stage} & mine
        rows = {place for job in plan.jobs if not job.is_stage for place in job.places if place.startswith(f"{table.name}/")}
        shared = f", {len(trainings & seen)} of its trainings shared with the tables before" if trainings & seen else ""
        seen |= trainings
        lines.append(f"  {table.name}: {len(rows)} rows, {len(seen) - before} trainings{' more' if before else ''}{shared}")
        before = len(seen)
    return lines


def _carry_out(plan: Plan, *, machine: Machine, machine_file: Path | None, slots: int, gpus: bool, records: Path | None) -> int:
    from obowlab.launch.preflight import check_data
    from obowlab.tables.execute import Ablation

    for loaded in {job.loaded.recipe.data.dataset: job.loaded for job in plan.jobs}.values():
        check_data(loaded, machine=machine, dry_run=False, say=click.echo)
    ablation = Ablation(
        plan, machine=machine, slots=slots, gpus=gpus, say=lambda line: click.echo(line, err=True), machine_file=machine_file
    )
    outcomes = ablation.carry_out()
    _sync_labels(ablation.labelled, machine=machine)
    code = _present(plan, machine=machine, records=records)
    for outcome in outcomes:
        if outcome.status == "failed":
            click.echo(f"{outcome.job.run_id} failed: {outcome.message}", err=True)
    if ablation.asked_to_stop:
        click.echo("Stopped; the same command goes on.", err=True)
        return 128 + ablation.asked_to_stop
    return code


def _present(plan: Plan, *, machine: Machine, records: Path | None) -> int:
    """Show the tables of a plan, keep them in MLflow, and write their records if asked; 1 when runs are missing."""
    from obowlab.runs.records import store_records, store_runs, write_records

    known = store_records(machine.runs_root, fingerprints={job.fingerprint for job in plan.jobs})
    if records is not None:
        click.echo(f"Wrote {write_records(known.values(), folder=records)} records to {records}.", err=True)
    click.echo()
    tables = [build(planned, machine=machine, known=known, seeds=plan.seeds) for planned in plan.tables]
    for each in tables:
        show(each)
    _publish(tables, machine=machine)
    runs = store_runs(machine.runs_root, fingerprints={job.fingerprint for job in plan.jobs})
    missing = [job.run_id for job in plan.jobs if job.fingerprint not in runs or runs[job.fingerprint].state.status != "finished"]
    if missing:
        click.echo(f"Not finished: {', '.join(missing)}; `obowlab jobs` says why.", err=True)
    return int(bool(missing))


def _publish(tables: Sequence[Table], *, machine: Machine) -> None:
    """Keep each table in MLflow: one run per table and scale, whose artifacts are the rendered table."""
    from obowlab.tables import render
    from obowlab.tracking.publish import publish

    for each in tables:
        published = publish(
            "table",
            name=f"{each.name} {each.scale}",
            machine=machine,
            files={
                f"{each.name}.md": render.markdown(each),
                f"{each.name}.html": render.html([each]),
                f"{each.name}.json": render.as_json([each]),
            },
            tags={"obowlab.scale": each.scale, "mlflow.note.content": render.markdown(each)},
        )
        if published.warning is not None:
            click.echo(f"Warning: {published.warning}", err=True)
            return


def _sync_labels(folders: Sequence[RunFolder], *, machine: Machine) -> None:
    """Send the labels that a run got after its own mirror was done; a store that does not answer gets them with the next sync."""
    from obowlab.tracking.mirror import Mirror

    for folder in folders:
        report = Mirror(folder, tracking_uri=machine.tracking_uri).sync(timeout_s=MIRROR_TIMEOUT_S)
        if report.error is not None:
            click.echo(f"Warning: MLflow lacks tags of these runs ({report.error}); `obowlab runs sync` sends them.", err=True)
            return


def _write(path: Path, text: str) -> None:
    from obowlab.files import write_atomic

    try:
        write_atomic(path, text)
    except OSError as error:
        raise UserError(f"Cannot write --out {path}: {error.strerror}.") from None
    click.echo(f"Wrote {path}.", file=sys.stderr)
