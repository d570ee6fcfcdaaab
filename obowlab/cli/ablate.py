"""`obowlab ablate`: train what the rows of tables need, then show them; `obowlab table`: show them from the run store alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from obowlab.cli.measured_tables import measure_rows, show_measured, time_rows
from obowlab.cli.options import (
    CLUSTER,
    HARDWARE,
    PATH,
    ROOTS,
    MachineOptions,
    dry_run_option,
    machine_options,
    set_option,
    submitter_of,
    would,
)
from obowlab.cli.output import print_lines, print_obstacles, print_table, refuse_target, send_to_mlflow, write_out
from obowlab.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from obowlab.config import Machine
    from obowlab.launch.cost import CostBook
    from obowlab.runs.listing import RunSummary
    from obowlab.runs.records import Records
    from obowlab.tables.execute import Execution
    from obowlab.tables.model import Table
    from obowlab.tables.plan import Plan
    from obowlab.tables.render import Format
    from obowlab.tables.spec import PlannedTable

AUTO = "auto"
POWER, MAX_SEEDS = 0.8, 10
FORMATS = ("rich", "md", "verdicts", "json", "csv", "html")

scale_option = click.option(
    "--scale", default="paper", show_default=True, metavar="paper|tiny|demo", help="Which images and networks: see `config list`."
)
names_argument = click.argument("names", nargs=-1, required=True, metavar="TABLE...|all")


def _number_of_seeds(_: click.Context, __: click.Parameter, value: str) -> int | None:
    """Return N of `--seeds`, or None for `auto`."""
    if value == AUTO:
        return None
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise click.BadParameter(f"{value!r} is neither a number of seeds, 1 or more, nor '{AUTO}'.")
    return number


@click.command()
@names_argument
@click.option("--rows", "row_keys", multiple=True, metavar="KEY,...", help="Only these rows (and the base row); repeatable.")
@click.option(
    "--seeds",
    default="1",
    callback=_number_of_seeds,
    show_default=True,
    metavar="N|auto",
    help="Seeds 0 to N-1 of every row; auto: as many as the spread between seeds asks for, 3 where none is known.",
)
@click.option(
    "--power", type=float, metavar="SHARE", help=f"With --seeds auto: chance to find a true difference. [default: {POWER}]"
)
@click.option(
    "--effect", type=float, metavar="POINTS", help="With --seeds auto: the difference to find. [default: the paper's, else ours]"
)
@click.option(
    "--max-seeds", type=click.IntRange(min=2), metavar="N", help=f"With --seeds auto: no more seeds. [default: {MAX_SEEDS}]"
)
@scale_option
@set_option
@click.option("--gpus", type=click.IntRange(min=1), metavar="N", help="N trainings at a time, each on a GPU of its own.")
@click.option("--jobs", type=click.IntRange(min=1), metavar="N", help="Trainings at a time on the CPU. [default: one per core]")
@click.option(
    "--records",
    type=PATH,
    metavar="DIR",
    help="Keep the results of the runs in a folder (small JSON files); what it holds already is not trained again.",
)
@click.option(
    "--weights",
    multiple=True,
    metavar="ROW=RUN|FILE",
    help="Of table6 and table9: measure this encoder in a row; repeatable, and remembered.",
)
@machine_options(*CLUSTER, *HARDWARE, *ROOTS)
@dry_run_option
def ablate(
    names: tuple[str, ...],
    row_keys: tuple[str, ...],
    seeds: int | None,
    power: float | None,
    effect: float | None,
    max_seeds: int | None,
    scale: str,
    overrides: tuple[str, ...],
    gpus: int | None,
    jobs: int | None,
    records: Path | None,
    weights: tuple[str, ...],
    options: MachineOptions,
    dry_run: bool,
) -> int:
    """Train what the rows of tables need and lack, then show the tables.

    TABLE is a table of the paper (table1 to table5, table7), `all`, or a TOML file. Rows with the same recipe are trained once.
    Interrupted and typed again, the command continues; a row that fails does not stop the others. --set holds for all rows: a
    table of its own, with runs of its own. --seeds auto says how many seeds it takes to find a row's difference, and trains them.
    Three tables are of other kinds, which `all` leaves out. table8 is what training costs: its rows are timed side by side on
    this machine, in a few minutes. table6 and table9 are transfer: their rows are encoders, of finished runs or given with
    --weights, and what is missing of their columns is measured (--seeds: of the classifiers' trainings, which --gpus N share N
    GPUs).
    """
    from obowlab.tables.spec import COSTS, TRANSFER, load_tables, one_kind

    if gpus is not None and (jobs is not None or options.device not in (None, "cuda")):
        raise UserError("--gpus N runs one training on each of N GPUs; leave --jobs and --device out.")
    if seeds is not None and (power, effect, max_seeds) != (None, None, None):
        raise UserError("--power, --effect and --max-seeds are for `--seeds auto`: add it, or leave them out.")
    kind = one_kind(names)
    if weights and kind != TRANSFER:
        raise UserError("--weights gives encoders to rows of a table of transfer, such as table6: leave it out.")
    if kind == COSTS:
        return time_rows(
            names,
            scale=scale,
            overrides=overrides,
            row_keys=row_keys,
            machine=options.machine(procs=1),
            records=records,
            dry_run=dry_run,
        )
    machine = (replace(options, device="cuda") if gpus is not None else options).machine(procs=gpus)
    if kind == TRANSFER:
        if overrides or jobs is not None or seeds is None:
            raise UserError(
                f"{names[0]} takes no --set, --jobs and `--seeds auto`: `obowlab eval RUN --protocol P --set ...` does."
            )
        return measure_rows(
            names,
            scale=scale,
            row_keys=row_keys,
            seeds=seeds,
            weights=weights,
            machine=machine,
            options=options,
            records=records,
            dry_run=dry_run,
        )
    return _train_rows(
        load_tables(names, scale=scale, overrides=overrides),
        row_keys=row_keys,
        seeds=seeds or _Auto(POWER if power is None else power, effect, max_seeds or MAX_SEEDS),
        gpus=gpus,
        jobs=jobs,
        machine=machine,
        options=options,
        records=records,
        dry_run=dry_run,
    )


@click.command()
@names_argument
@scale_option
@set_option
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
    overrides: tuple[str, ...],
    seeds: int | None,
    form: Format,
    with_runs: bool,
    records: Path | None,
    out: Path | None,
    options: MachineOptions,
    dry_run: bool,
) -> None:
    """Show tables of the paper beside what the run store has; trains nothing.

    TABLE as for `ablate`; --set shows what `ablate --set` trained.
    """
    from obowlab.runs.records import check_records, read_records
    from obowlab.tables import render
    from obowlab.tables.build import build_from_store, build_table, finished_seeds
    from obowlab.tables.kept import keep_table
    from obowlab.tables.spec import load_tables, one_kind

    machine = options.machine()
    kind = one_kind(names)
    if out is not None:
        refuse_target(out, option="--out")
    if records is not None:
        check_records(records)
    source = records or machine.runs_root
    if kind is not None:
        return show_measured(
            names, kind=kind, scale=scale, overrides=overrides, source=source, form=form, out=out, dry_run=dry_run
        )
    tables = load_tables(names, scale=scale, overrides=overrides)
    if dry_run:
        return would(f"build {', '.join(planned.name for planned in tables)} at scale {scale} from {source}")
    wanted = None if seeds is None else range(seeds)
    if records is None:
        built = [build_from_store(planned, runs_root=machine.runs_root, seeds=wanted) for planned in tables]
        for planned, each in zip(tables, built, strict=True):
            if any(run.status != "missing" for row in each.rows for run in row.runs):
                _warn(keep_table(planned, runs_root=machine.runs_root))
    else:
        known = read_records(records)
        built = [build_table(each, seeds=wanted or finished_seeds(each, records=known), records=known) for each in tables]
    if out is not None:
        write_out(out, render.as_text(built, form=form))
    elif form == "rich":
        for each in built:
            show(each, with_runs=with_runs)
    else:
        click.echo(render.as_text(built, form=form), nl=False)
    return None


def show(table: Table, *, with_runs: bool = False) -> None:
    """Print a table on the terminal."""
    from obowlab.tables import render

    columns, rows = render.overview(table)
    numbers = [column for column in columns if column not in ("row", "direction")]
    print_table(columns, rows, title=render.heading(table), right=numbers, names=("row",), hide=render.expendable(table))
    print_lines((render.legend(table), *render.remarks(table)))
    if with_runs:
        click.echo()
        runs, lines = render.runs_overview(table)
        values = [column.label for column in table.columns]
        origins = ("data hash", "MLflow run", "commit", "recipe hash", *reversed(values[1:]))
        print_table(runs, lines, right=("seed", *values), names=("row", "run"), prose=("status",), hide=origins)
    click.echo()


# -------------------------------------------------------------------------------------------------------------- helpers


class _Auto(NamedTuple):
    """What `--seeds auto` aims at: see --power, --effect and --max-seeds."""

    power: float
    effect: float | None
    most: int


def _train_rows(
    tables: Sequence[PlannedTable],
    *,
    row_keys: Sequence[str],
    seeds: int | _Auto,
    gpus: int | None,
    jobs: int | None,
    machine: Machine,
    options: MachineOptions,
    records: Path | None,
    dry_run: bool,
) -> int:
    """Say what the rows of tables need and lack, train it here or in jobs, and show the tables; return the exit code."""
    from obowlab.launch.cost import CostBook
    from obowlab.launch.gpu_leases import check_gpus
    from obowlab.launch.stages import find_obstacles
    from obowlab.runs.provenance import num_cores
    from obowlab.runs.records import open_records, read_records, store_runs
    from obowlab.tables.execute import Execution
    from obowlab.tables.kept import keep_table
    from obowlab.tables.plan import (
        OVERVIEW_COLUMNS,
        check_images,
        due_jobs,
        make_plan,
        overview,
        select_rows,
        unmeasured,
        without_recorded,
    )
    from obowlab.tables.submit import submit_plan

    on_cluster = machine.launcher == "slurm"
    if records is not None:
        open_records(records, dry_run=dry_run)
    if not dry_run and not on_cluster:
        check_gpus(machine)
    machine = machine.model_copy(update={"procs": 1})
    runs = store_runs(machine.runs_root)
    book = CostBook(machine, runs=runs.values())
    rows = select_rows(row_keys, tables=tables)
    known = read_records(records) if records is not None and records.is_dir() else {}
    if isinstance(seeds, _Auto):
        seeds = _proposed(tables, rows=rows, aim=seeds, runs=runs, known=known, book=book)
    whole = make_plan(tables, seeds=range(seeds), rows=rows)
    plan = without_recorded(whole, records=known, runs=runs)
    slots = gpus or jobs or (len(plan.jobs) if on_cluster else max(1, num_cores() // (machine.threads or 1)))
    again = unmeasured(plan, runs=runs, machine=machine)
    if not dry_run and not on_cluster and any(job.fingerprint not in runs for job in plan.jobs):
        check_images(plan.jobs, machine=machine, say=click.echo)  # it is timed on them
        _say("Timing a few steps of the recipes that were never trained here.")
        if problem := book.measure([job.loaded.recipe for job in plan.jobs]):
            _warn(f"not every recipe could be timed ({problem}).")
    trainings, lines = overview(plan, runs=runs, book=book, slots=slots, on_cluster=on_cluster, again=again)
    print_table(OVERVIEW_COLUMNS, trainings, right=("steps",), names=("run", "rows"), hide=("steps", "rows", "training"))
    if len(plan.jobs) < len(whole.jobs):
        lines.append(f"Left out, as {records} has the results: {len(whole.jobs) - len(plan.jobs)} trainings, stages included.")
    print_lines(lines)
    due = due_jobs(plan, runs=runs, again=again)
    if dry_run:
        recipes = [job.loaded for job in due]
        return print_obstacles(find_obstacles(recipes, machine=machine, say=click.echo, at_a_time=gpus or 1))
    for planned in tables:
        _warn(keep_table(planned, runs_root=machine.runs_root))
    if on_cluster:
        left = submit_plan(plan, submitter=submitter_of(machine, options=options), at_a_time=slots, again=again)
        return left if left is not None else _present(plan, machine=machine, records=records, known=known)
    check_images(due, machine=machine, say=click.echo)
    execution = Execution(plan, machine=machine, slots=slots, say=_say, machine_file=options.machine_file, again=again)
    return _execute(execution, records=records, known=known)


def _proposed(
    tables: Sequence[PlannedTable],
    *,
    rows: Mapping[str, Sequence[str]],
    aim: _Auto,
    runs: Mapping[str, RunSummary],
    known: Records,
    book: CostBook,
) -> int:
    """Print how many seeds every row needs by what is there, and return how many all of them get."""
    from obowlab.runs.info import TRAINED
    from obowlab.runs.records import read_each
    from obowlab.tables.power import COLUMNS, num_seeds, overview, propose

    seeds = {run.info.seed for run in runs.values()}
    needed = {key for table in tables for row in table.rows for key in row.loaded.recipe.fingerprints(seeds=seeds).values()}
    known = {**known, **read_each({key: runs[key] for key in needed & runs.keys() if runs[key].state.status in TRAINED})}
    proposal = propose(tables, records=known, rows=rows, power=aim.power, effect=aim.effect)
    lines, remarks = overview(proposal, power=aim.power, most=aim.most, runs=runs, book=book)
    print_table(COLUMNS, lines, right=COLUMNS[1:], names=("row",), hide=("training left", "difference", "seeds"))
    print_lines(remarks)
    click.echo()
    return num_seeds(proposal, most=aim.most)


def _execute(execution: Execution, *, records: Path | None, known: Records) -> int:
    """Train what is missing, write the records of every run that ends well if asked, and show the tables."""
    if records is not None:
        execution.finished = lambda job: _write_records(execution.machine, records=records, fingerprints={job.fingerprint})
    outcomes = execution.run()
    send_to_mlflow(execution.labelled, machine=execution.machine)
    code = _present(execution.plan, machine=execution.machine, records=records, known=known)
    for outcome in outcomes:
        if outcome.status == "failed":
            _say(f"{outcome.job.run_id} failed: {outcome.message}")
    if execution.signals.received:
        _say("Stopped; the same command continues.")
        return 128 + execution.signals.received[0]
    return code


def _write_records(machine: Machine, *, records: Path, fingerprints: Collection[str]) -> Records:
    """Write the records of runs of the store, and return them."""
    from obowlab.runs.records import store_records, write_records

    found = store_records(machine.runs_root, fingerprints=fingerprints)
    write_records(found.values(), folder=records)
    return found


def _present(plan: Plan, *, machine: Machine, records: Path | None, known: Records) -> int:
    """Show the tables of a plan, keep them in MLflow, and write their records if asked; 1 when runs are missing.

    Args:
        plan: what there was to train.
        machine: whose run store has it.
        records: folder for the records; None for none.
        known: those that were there before.
    """
    from obowlab.runs.records import store_records, store_runs
    from obowlab.tables.build import build_table
    from obowlab.tables.publish import publish_tables

    if records is None:
        known = store_records(machine.runs_root, fingerprints=plan.fingerprints)
    else:
        written = _write_records(machine, records=records, fingerprints=plan.fingerprints)
        known = {**known, **written}
        _say(f"Wrote {len(written)} records to {records}.")
    click.echo()
    tables = [build_table(planned, seeds=plan.seeds, records=known) for planned in plan.tables]
    for each in tables:
        show(each)
    _warn(publish_tables(tables, machine=machine))
    runs = store_runs(machine.runs_root, fingerprints=plan.fingerprints)
    missing = [job.run_id for job in plan.jobs if job.fingerprint not in runs or runs[job.fingerprint].state.status != "finished"]
    if missing:
        _say(f"Not finished: {', '.join(missing)}; `obowlab jobs` says why.")
    return int(bool(missing))


def _say(line: str) -> None:
    click.echo(line, err=True)


def _warn(warning: str | None) -> None:
    if warning is not None:
        _say(f"Warning: {warning}")
