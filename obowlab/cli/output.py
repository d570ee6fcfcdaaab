"""How commands print: tables on a terminal, plain unwrapped lines in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import click

if TYPE_CHECKING:
    from obowlab.runs.folder import RunFolder


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


def print_results(folder: RunFolder) -> None:
    """Print what was measured on a run, with its random initialisation beside it."""
    results = folder.results()
    if not results:
        click.echo("No results yet.")
        return
    print_measurements(results)


def print_measurements(results: Iterable[Mapping[str, Any]]) -> None:
    """Print evaluation results: one row per metric, data set and protocol; student and random initialisation side by side.

    Values are percent with the half-width of their 95 % interval; n counts what the interval was taken over.
    """
    from obowlab.runs.metrics import lookup

    rows: dict[tuple[str, str, str], dict[str, tuple[str, int]]] = {}
    for result in results:
        dataset = str(result.get("details", {}).get("dataset", ""))
        protocol = f"{result['protocol']} v{result['version']} {str(result['protocol_hash'])[:8]}"
        for measurement in result["measurements"]:
            cell = f"{measurement['value']:.2f} ± {measurement['interval']:.2f} {lookup(measurement['name']).unit}"
            row = rows.setdefault((measurement["name"], dataset, protocol), {})
            row[result["subject"]] = (cell, int(measurement["count"]))
    columns = ["metric", "student", "random initialisation", "n", "data set", "protocol"]
    lines = []
    for (name, dataset, protocol), cells in rows.items():
        student, count = cells.get("student", ("–", 0))
        untrained, untrained_count = cells.get("random", ("–", 0))
        lines.append([name, student, untrained, str(count or untrained_count), dataset, protocol])
    print_table(columns, lines, right=("student", "random initialisation", "n"))
