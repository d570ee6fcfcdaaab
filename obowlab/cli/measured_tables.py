"""Tables that are measured and not trained, for `obowlab ablate` and `obowlab table`: time, measure, show."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from obowlab.cli.beginning import keep_encoder
from obowlab.cli.options import when_interrupted, would
from obowlab.cli.output import print_lines, print_table, write_out
from obowlab.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from obowlab.cli.options import MachineOptions
    from obowlab.config import Machine
    from obowlab.tables.costs import Costs, CostTable
    from obowlab.tables.render import Format, Grid
    from obowlab.tables.transfer import Transfers, TransferTable
    from obowlab.tables.transfer_measuring import Due, Outcome


def time_rows(
    names: Sequence[str],
    *,
    scale: str,
    overrides: Sequence[str],
    row_keys: Sequence[str],
    machine: Machine,
    records: Path | None,
    dry_run: bool,
) -> int:
    """Time the rows of tables of costs, show the tables, and keep what was measured among the records if asked."""
    from obowlab.launch.gpu_leases import check_gpus
    from obowlab.tables.costs import ROUNDS, SECONDS, load_costs, measure_costs, select
    from obowlab.tables.measured import write_kept

    if machine.launcher == "slurm":
        raise UserError(f"{names[0]} is timed where the command runs: leave --launcher out, and start it in a job of its own.")
    tables = [load_costs(name, scale=scale, overrides=overrides) for name in names]
    chosen = [select(row_keys, table=table) for table in tables]
    for table, keys in zip(tables, chosen, strict=True):
        rows = [[key, table.recipes[key], ", ".join(table.overrides[key])] for key in keys]
        print_table(("row", "recipe", "with"), rows, title=table.file.title, names=("recipe", "with"))
    if dry_run:
        seconds = ROUNDS * SECONDS * sum(map(len, chosen))
        would(f"time each row {ROUNDS} times, which takes {seconds / 60:.0f} minutes or more")
        return 0
    check_gpus(machine)
    when_interrupted("the same command continues.")
    for table, keys in zip(tables, chosen, strict=True):
        costs = measure_costs(table, rows=keys, machine=machine, say=lambda line: click.echo(line, err=True))
        if records is not None:
            write_kept(costs, records / table.file_name)
        click.echo()
        _print(_costs_shown(table, costs=costs))
    return 0


def measure_rows(
    names: Sequence[str],
    *,
    scale: str,
    row_keys: Sequence[str],
    seeds: int,
    weights: Sequence[str],
    machine: Machine,
    options: MachineOptions,
    records: Path | None,
    dry_run: bool,
) -> int:
    """Measure what tables of transfer ask of the encoders there are, show the tables, and keep the records if asked.

    Returns:
        The exit code: 1 when something could not be measured.

    Raises:
        UserError: there is no such table, row or encoder, or nothing of it can be measured here.
    """
    from obowlab.tables.measured import write_kept
    from obowlab.tables.transfer import load_transfer
    from obowlab.tables.transfer_measuring import Measuring

    if machine.launcher == "slurm":
        raise UserError(f"{names[0]} is measured where the command runs: leave --launcher out, and start it in a job of its own.")
    tables = [load_transfer(name, scale=scale) for name in names]
    code = 0
    for table in tables:
        if not table.protocols:
            raise UserError(
                f"{table.name} has the paper's values alone so far: nothing of it can be measured. Show it with `table`."
            )
        keep = partial(keep_encoder, runs_root=machine.runs_root, dry_run=dry_run)
        measuring = Measuring(table, machine=machine, keep=keep, dry_run=dry_run)
        chosen = measuring.select(row_keys)
        measuring.give(weights)
        due = measuring.due(chosen, seeds=seeds)
        refused = measuring.refusals(due)
        rows = measuring.overview(chosen, due=due, refused=refused)
        print_table(("row", "encoder", *table.protocols), rows, title=table.file.title, names=("encoder",), prose=())
        print_lines([f"Left out: {protocol}: {why}" for protocol, why in refused.items()])
        due = [each for each in due if each.protocol not in refused]
        if refused and not due and not any(measuring.transfers.of_row(key) for key in chosen):
            raise UserError(f"Nothing of {table.name} can be measured here, see above.")
        if dry_run:
            would(f"measure {len(due)} times")
            continue
        when_interrupted("the same command continues.")
        measured = partial(_measured, table=table, machine=machine, options=options)
        code = max(code, measuring.measure(due, measured=measured, say=lambda line: click.echo(line, err=True)))
        if code >= 128:
            return code
        if records is not None:
            write_kept(measuring.transfers, records / table.file_name)
        click.echo()
        _print(_transfers_shown(table, transfers=measuring.transfers))
    return code


def show_measured(
    names: Sequence[str],
    *,
    kind: str,
    scale: str,
    overrides: Sequence[str],
    source: Path,
    form: Format,
    out: Path | None,
    dry_run: bool,
) -> None:
    """Show tables of a kind, `COSTS` or `TRANSFER`, as `source` has them, a run store or a folder of records."""
    from obowlab.tables.costs import Costs, load_costs
    from obowlab.tables.measured import find_kept
    from obowlab.tables.render import grids_text
    from obowlab.tables.spec import COSTS
    from obowlab.tables.transfer import Transfers, load_transfer

    if form == "verdicts":
        raise UserError(f"{names[0]} has no directions: show it with another --format.")
    if kind == COSTS:
        timed = [load_costs(name, scale=scale, overrides=overrides) for name in names]
        shown = [_costs_shown(each, costs=find_kept(Costs, each.file_name, folder=source)) for each in timed]
    else:
        if overrides:
            raise UserError(f"{names[0]} takes no --set.")
        tables = [load_transfer(name, scale=scale) for name in names]
        shown = [
            _transfers_shown(each, transfers=find_kept(Transfers, each.file_name, folder=source) or Transfers())
            for each in tables
        ]
    if dry_run:
        return would(f"build {', '.join(names)} at scale {scale} from {source}")
    if form == "rich" and out is None:
        for each in shown:
            _print(each)
        return None
    names_scales, contents = [(each.name, scale) for each in shown], [each.content for each in shown]
    content = grids_text([each.grid for each in shown], names=names_scales, values=contents, form=form)
    return click.echo(content, nl=False) if out is None else write_out(out, content)


# -------------------------------------------------------------------------------------------------------------- helpers


def _measured(due: Due, *, table: TransferTable, machine: Machine, options: MachineOptions) -> Outcome:
    """Measure what is due, and add it to the run whose encoder it is."""
    from obowlab.cli.eval import measure_here, say_added
    from obowlab.cli.run import Wanted
    from obowlab.cli.transfer import add_results, train_beginning_with
    from obowlab.runs.results import LEARNED
    from obowlab.tables.transfer_measuring import Outcome
    from obowlab.weights.subject import find_subject

    folder, training = due.source.folder, table.trainings.get(due.protocol)
    if training is not None:
        wanted = Wanted(training.name, due.seed, table.changes[due.protocol])
        code, trained = train_beginning_with(due.source, wanted=wanted, machine=machine, options=options, dry_run=False)
        if trained is None:
            return Outcome(code)
        if folder is not None:
            add_results(trained, to=folder, protocol=due.protocol, machine=machine)
        results = [result for result in trained.results() if result["protocol"] in LEARNED]
        return Outcome(code, results[-1] if results else None, trained.run_id)
    ref = str(folder.path if folder is not None else due.source.path)
    chosen = find_subject(ref, recipe_name=None, overrides=(), runs_root=machine.runs_root)
    one, dataset = machine.model_copy(update={"procs": 1}), table.datasets[due.protocol]
    values = measure_here(chosen, protocols=(due.protocol,), dataset=dataset, with_random=False, machine=one)
    if folder is not None:
        say_added(folder, machine=one)
    return Outcome(0, values[0])


class _Shown(NamedTuple):
    """A table with what was measured for it: as text, with headings that a narrow terminal can do without, and for JSON."""

    name: str
    grid: Grid
    hide: Sequence[str]
    content: Any


def _costs_shown(table: CostTable, *, costs: Costs | None) -> _Shown:
    from obowlab.tables import costs_render as render

    content = None if costs is None else costs.model_dump(mode="json")
    return _Shown(table.name, render.grid(table, costs=costs), render.EXPENDABLE, content)


def _transfers_shown(table: TransferTable, *, transfers: Transfers) -> _Shown:
    from obowlab.tables import transfer_render as render

    content = transfers.model_dump(mode="json")
    return _Shown(table.name, render.grid(table, transfers=transfers), render.expendable(table), content)


def _print(shown: _Shown) -> None:
    title, columns, rows, remarks = shown.grid
    print_table(columns, rows, title=title, right=columns[1:], names=("row",), hide=shown.hide)
    print_lines(remarks)
    click.echo()
