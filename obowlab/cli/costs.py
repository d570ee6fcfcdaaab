"""Tables of what training costs, for `obowlab ablate` and `obowlab table`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from obowlab.cli.options import when_interrupted, would
from obowlab.cli.output import print_grids, print_lines, print_table
from obowlab.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from obowlab.config import Machine
    from obowlab.tables.costs import Costs, CostTable
    from obowlab.tables.render import Format


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
    from obowlab.tables.costs import ROUNDS, SECONDS, load_costs, measure_costs, select, write_costs

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
            write_costs(costs, records / table.file_name)
        click.echo()
        _print_costs(table, costs=costs)
    return 0


def show_costs(
    names: Sequence[str],
    *,
    scale: str,
    overrides: Sequence[str],
    source: Path,
    form: Format,
    out: Path | None,
    dry_run: bool,
) -> None:
    """Show tables of costs as a run store or a folder of records has them."""
    from obowlab.tables import costs_render
    from obowlab.tables.costs import find_costs, load_costs

    if form == "verdicts":
        raise UserError(f"{names[0]} has no directions: show it with another --format.")
    tables = [load_costs(name, scale=scale, overrides=overrides) for name in names]
    if dry_run:
        return would(f"build {', '.join(names)} at scale {scale} from {source}")
    measured = [(table, find_costs(table, folder=source)) for table in tables]
    if form == "rich" and out is None:
        for table, costs in measured:
            _print_costs(table, costs=costs)
        return None
    grids = [costs_render.grid(table, costs=costs) for table, costs in measured]
    values = [None if costs is None else costs.model_dump(mode="json") for _, costs in measured]
    return print_grids(grids, names=[(table.name, table.scale) for table in tables], values=values, form=form, out=out)


def _print_costs(table: CostTable, *, costs: Costs | None) -> None:
    from obowlab.tables import costs_render

    columns, rows = costs_render.COLUMNS, costs_render.overview(table, costs=costs)
    print_table(columns, rows, title=costs_render.heading(table), right=columns[1:], names=("row",), hide=costs_render.EXPENDABLE)
    print_lines(costs_render.remarks(table, costs=costs))
    click.echo()
