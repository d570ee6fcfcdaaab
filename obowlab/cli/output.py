"""How commands print: tables on a terminal, plain unwrapped lines in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import click

if TYPE_CHECKING:
    from obowlab.config import Machine
    from obowlab.launch.stages import Obstacles
    from obowlab.runs.folder import RunFolder

MIRROR_TIMEOUT_S = 60.0


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "", right: Sequence[str] = ()) -> None:
    """Print rows under their columns.

    In a pipe nothing is wrapped, cut or coloured: a row is a line, columns are separated by two spaces or more.

    Args:
        columns: headings.
        rows: one text per column.
        title: printed above when given.
        right: the headings of columns that hold numbers.
    """
    lines = [list(row) for row in rows]
    if not sys.stdout.isatty():
        if title:
            click.echo(title)
        widths = [max(len(line[i]) for line in [columns, *lines]) for i in range(len(columns))]
        for line in [columns, *lines]:
            cells = zip(columns, line, widths, strict=True)
            click.echo("  ".join(text.rjust(w) if head in right else text.ljust(w) for head, text, w in cells).rstrip())
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=Text(title) if title else None, title_justify="left")
    for i, column in enumerate(columns):
        justify: Literal["left", "right"] = "right" if column in right else "left"
        table.add_column(Text(column), justify=justify, overflow="fold", no_wrap=i == 0)
    for line in lines:
        table.add_row(*(Text(cell) for cell in line))
    console.print(table)


def send_to_mlflow(folders: Iterable[RunFolder], *, machine: Machine) -> None:
    """Send what runs got after their own mirror had ended; a store that does not answer gets it with the next sync."""
    from obowlab.tracking.mirror import Mirror

    for folder in folders:
        report = Mirror(folder, tracking_uri=machine.tracking_uri).sync(timeout_s=MIRROR_TIMEOUT_S)
        if report.error is not None:
            click.echo(f"Warning: MLflow lacks this ({report.error}); `obowlab runs sync` sends it.", err=True)
            return


def print_results(folder: RunFolder) -> None:
    """Print what was measured on a run, with its random initialisation beside it."""
    results = folder.results()
    if not results:
        click.echo("No results yet.")
        return
    print_measurements(results)


def print_measurements(results: Iterable[Mapping[str, Any]]) -> None:
    """Print evaluation results: one row per metric, data set and protocol; student and random initialisation side by side.

    Values are percent with their 95 % interval; n counts the episodes or images it was taken over.
    """
    from obowlab import text
    from obowlab.runs.results import tabulate

    def shown(measurement: Mapping[str, Any] | None, unit: str) -> str:
        return f"{text.measurement(measurement)} {unit}" if measurement is not None else text.ABSENT

    lines = []
    for row in tabulate(results):
        values = [shown(each, row.unit) for each in (row.student, row.random)]
        lines.append([row.metric, *values, str(row.count), row.dataset, row.protocol])
    columns = ["metric", "student", "random initialisation", "n", "data set", "protocol"]
    print_table(columns, lines, right=("student", "random initialisation", "n"))


def print_obstacles(obstacles: Obstacles) -> int:
    """Print, at the end of a dry run, what this machine lacks and what would be refused; return the exit code."""
    for sentence in obstacles.absent:
        click.echo(f"  not on this machine: {sentence}")
    for sentence in obstacles.refused:
        click.echo(f"Would be refused: {sentence}")
    return 2 if obstacles.refused else 0
