"""How commands print: tables on a terminal, plain unwrapped lines in a pipe."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import click

from obowlab import text
from obowlab.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from obowlab.config import Machine
    from obowlab.launch.stages import Obstacles
    from obowlab.runs.folder import RunFolder

MIRROR_TIMEOUT_S = 60.0
GAP = 2
MIN_NAME, MIN_PROSE = 24, 20
"""Columns that a name and prose keep on the narrowest terminal."""


def print_json(value: Any) -> None:
    """Print a value as one line of JSON, in ASCII, so that it survives every terminal and pipe."""
    click.echo(json_line(value))


def json_line(value: Any) -> str:
    """Return a value as one line of JSON, in ASCII."""
    return json.dumps(value, separators=(",", ":"))


def warn(sentences: Sequence[str]) -> None:
    """Print warnings, a line each."""
    for sentence in sentences:
        click.echo(f"Warning: {sentence}", err=True)


def refuse_target(path: Path, *, option: str) -> None:
    """Refuse, before anything is computed, a file that could not be written.

    Args:
        path: of the file.
        option: that named it.

    Raises:
        UserError: says what to change.
    """
    folder = path.absolute().parent
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder: name a file in it.")
    if not folder.is_dir():
        raise UserError(f"The folder of {option} {path} does not exist.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"Cannot write {option} {path}: nothing may be written to {folder}; choose another folder.")


def write_out(path: Path, content: str) -> None:
    """Write the file of `--out`, and say so.

    Raises:
        UserError: the disk refuses.
    """
    from obowlab.files.replacing import write_atomic

    try:
        write_atomic(path, content)
    except OSError as error:
        raise UserError(f"Cannot write --out {path}: {error.strerror}.") from None
    click.echo(f"Wrote {path}.", err=True)


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str = "",
    right: Sequence[str] = (),
    names: Sequence[str] = (),
    prose: Sequence[str] | None = None,
    hide: Sequence[str] = (),
) -> None:
    """Print rows under their columns; nothing where there are none.

    In a pipe nothing is wrapped, cut or coloured: a row is a line, columns are separated by two spaces or more. On a terminal the
    table fits its width as far as it can: first prose is wrapped and names are shortened, then columns are left out, and a line
    says which. No number is ever broken.

    Args:
        columns: headings.
        rows: one text per column.
        title: printed above when given.
        right: the headings of columns that hold numbers.
        names: of those whose texts may lose their middle.
        prose: of those whose texts may take several lines; where absent, of all but the first that hold no numbers.
        hide: of those that a narrow terminal can do without, in this order.
    """
    lines = [[_spelled(text.printable(cell)) for cell in row] for row in rows]
    if not lines:
        return
    on_terminal = sys.stdout.isatty()
    if prose is None:
        prose = [head for head in columns[1:] if head not in (*right, *names)]
    kinds = [_Kind(head in right, head in names, head in prose, hide.index(head) if head in hide else None) for head in columns]
    widths = {i: max(text.width(line[i]) for line in [columns, *lines]) for i in range(len(columns))}
    if on_terminal:
        widths = _fitted(widths, room=terminal_width(), kinds=kinds, columns=columns, lines=lines)
    if title:
        for words in text.wrap(title, terminal_width()) if on_terminal else [title]:
            click.echo(click.style(words, italic=True) if on_terminal else words)
    for number, line in enumerate([columns, *lines]):
        cells = []
        for i, space in widths.items():
            shown = text.shorten(line[i], space, mark=_spelled("…")) if number and kinds[i].is_name else line[i]
            cells.append(text.wrap(shown, space) if on_terminal else [shown])
        for part in zip_longest(*cells, fillvalue=""):
            padded = (_pad(cell, widths[i], right=kinds[i].is_number) for i, cell in zip(widths, part, strict=True))
            whole = "  ".join(padded).rstrip()
            click.echo(click.style(whole, bold=True) if on_terminal and number == 0 else whole)
    hidden = [column for i, column in enumerate(columns) if i not in widths and any(line[i] for line in lines)]
    if hidden:
        print_lines([f"Not shown in {terminal_width()} columns: {', '.join(hidden)}."])


@dataclass(frozen=True)
class _Kind:
    """What a narrow terminal may do with a column; `rank` says when it is left out."""

    is_number: bool
    is_name: bool
    is_prose: bool
    rank: int | None


def _spelled(words: str) -> str:
    """Return words as the terminal gets them: one that is not UTF-8 needs three letters for `±`."""
    encoding, errors = sys.stdout.encoding or "utf-8", sys.stdout.errors or "strict"
    return words if words.isascii() else words.encode(encoding, errors).decode(encoding)


def terminal_width() -> int:
    """Return the columns of the terminal; COLUMNS counts before what it says itself."""
    return shutil.get_terminal_size().columns


def _fitted(
    natural: Mapping[int, int], *, room: int, kinds: Sequence[_Kind], columns: Sequence[str], lines: Sequence[Sequence[str]]
) -> dict[int, int]:
    """Return the widths of the columns that are shown, by their number."""

    def least_of(i: int) -> int:
        heading = max(map(text.width, columns[i].split()), default=0)
        if kinds[i].is_name or kinds[i].is_prose:
            return min(natural[i], max(heading, MIN_NAME if kinds[i].is_name else MIN_PROSE))
        return max([heading, *(text.width(line[i]) for line in lines)])

    def excess() -> int:
        return sum(width + GAP for width in widths.values()) - GAP - room

    widths, least = dict(natural), {i: least_of(i) for i in natural}
    hideable = [(any(line[i] for line in lines), kind.rank, i) for i, kind in enumerate(kinds) if kind.rank is not None]
    for _, _, i in sorted(hideable):  # those without any text first
        if sum(least[shown] + GAP for shown in widths) - GAP <= room:
            break
        del widths[i]
    for kind in ((False, False), (False, True), (True, False)):  # headings of numbers, prose, names
        group = [i for i in widths if (kinds[i].is_name, kinds[i].is_prose) == kind]
        while excess() > 0 and (above := [i for i in group if widths[i] > least[i]]):
            widths[max(above, key=widths.__getitem__)] -= 1
    return widths


def _pad(cell: str, columns: int, *, right: bool) -> str:
    space = " " * (columns - text.width(cell))
    return f"{space}{cell}" if right else f"{cell}{space}"


def show_progress(line: str) -> None:
    """Show a line on standard error in place of the last one, and an empty one to take it away; on a terminal only."""
    if sys.stderr.isatty():
        click.echo(f"\r\033[K{text.shorten(line, terminal_width() - 1)}", err=True, nl=False)


def coloured(word: str, colour: str) -> str:
    """Return a word in a colour of the terminal, unless NO_COLOR is set; in a pipe click takes it away."""
    return word if os.environ.get("NO_COLOR") else click.style(word, fg=colour)


def print_lines(lines: Iterable[str]) -> None:
    """Print sentences; on a terminal those that are too long continue below, and no number is broken."""
    for line in lines:
        for part in text.wrap(line, terminal_width()) if sys.stdout.isatty() else [line]:
            click.echo(part)


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Print names with what they are; on a terminal, long facts continue below their beginning."""
    lines = list(facts)
    indent = max((text.width(name) for name, _ in lines), default=0) + 1
    for name, fact in lines:
        parts = text.wrap(fact, max(MIN_PROSE, terminal_width() - indent)) if sys.stdout.isatty() else [fact]
        for number, part in enumerate(parts):
            click.echo(f"{'' if number else name:<{indent}}{part}".rstrip())


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
        nothing = "The recipe measures nothing (evaluation.protocols)."
        click.echo("No results yet." if folder.info.recipe.evaluation.protocols else nothing)
        return
    print_measurements(results)


def print_measurements(results: Iterable[Mapping[str, Any]]) -> None:
    """Print evaluation results: one row per metric, data set and protocol; student and random initialisation side by side.

    Values are percent with their 95 % interval; n counts the episodes or images it was taken over.
    """
    from obowlab.runs.results import tabulate

    def shown(measurement: Mapping[str, Any] | None, unit: str) -> str:
        return f"{text.measurement(measurement)} {unit}" if measurement is not None else text.ABSENT

    lines = []
    for row in tabulate(results):
        values = [shown(each, row.unit) for each in (row.student, row.random)]
        lines.append([row.metric, *values, str(row.count), row.dataset, row.protocol])
    columns = ["metric", "student", "random initialisation", "n", "data set", "protocol"]
    numbers = ("student", "random initialisation", "n")
    print_table(columns, lines, right=numbers, hide=("protocol", "n", "data set"), names=("data set",), prose=())


def print_obstacles(obstacles: Obstacles) -> int:
    """Print, at the end of a dry run, what this machine lacks and what would be refused; return the exit code."""
    for sentence in obstacles.absent:
        click.echo(f"  not on this machine: {sentence}")
    for sentence in obstacles.refused:
        click.echo(f"Would be refused: {sentence}")
    return 2 if obstacles.refused else 0
