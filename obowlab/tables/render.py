"""A results table as text: rows for a terminal, Markdown, JSON, CSV, HTML. The same table gives the same bytes."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from obowlab import text
from obowlab.pages import environment, templates
from obowlab.runs.info import TRAINED
from obowlab.tables.model import Cell, Column, Estimate, Row, RunRef, Table

Format = Literal["rich", "md", "verdicts", "json", "csv", "html"]

Grid = tuple[str, Sequence[str], list[list[str]], list[str]]
"""Title, headings, rows and remarks of another kind of table."""

MARKS = {"agrees": "✓", "disagrees": "✗", "higher": "↑", "lower": "↓", "indistinguishable": "≈", "one seed": "○"}
NOT_COMPARABLE = "not comparable"
HASH_DIGITS = 12
CSV_COLUMNS = (
    *("table", "scale", "row", "label", "recipe", "metric", "ours", "interval", "seeds", "random", "paper"),
    *("against_paper", "against_base", "against_base_interval", "against_base_seeds", "p", "p_holm", "verdict"),
    *("run_ids", "fingerprints", "mlflow_run_ids", "commits", "data_hashes"),
)


def heading(table: Table) -> str:
    """Return the title with scale, data set and the badge of tables that are not at the paper's scale."""
    badge = "" if table.comparable or not table.has_paper else f" · {NOT_COMPARABLE} with the paper's values"
    changes = f" · all rows with {', '.join(table.changes)}" if table.changes else ""
    return f"{table.title} · scale {table.scale} ({table.dataset}){changes}{badge}"


def legend(table: Table) -> str:
    """Return what the marks of a table mean."""
    known = {cell.paper is not None for row in table.rows for cell in row.cells}
    meanings = [
        *(["✓ as in the paper, ✗ the opposite"] if True in known else []),
        *(["↑ higher, ↓ lower" + (" (no value in the paper)" if True in known else "")] if known != {True} else []),
    ]
    one_seed = any(cell.verdict == "one seed" for row in table.rows for cell in row.cells)
    return (
        f"direction against the base row: {', '.join(meanings)}, ≈ not distinguishable (paired test, 5 % after Holm's correction "
        f"over the rows){', ○ one seed, which cannot tell' if one_seed else ''}"
    )


def overview(table: Table) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows for a terminal: ours with a mark of its direction, what stands beside it, the row's verdict."""
    columns = ["row", "seeds"]
    for column in table.columns:
        columns += [column.label, *_beside(column, table=table)]
    rows = []
    for group, row in _grouped(table):
        if group is not None:
            rows.append([group, *[""] * len(columns)])
        cells = [f"{row.label}{_superscript(row.notes)}", _seeds(row)]
        for column, cell in zip(table.columns, row.cells, strict=True):
            values = [estimate_text(cell.ours), *(value(cell) for value in _beside(column, table=table).values())]
            if cell.verdict:
                values[0 if table.has_paper else 1] += f" {MARKS[cell.verdict]}"
            cells += values
        rows.append([*cells, verdict_text(row)])
    return [*columns, "direction"], rows


def expendable(table: Table) -> list[str]:
    """Return the headings of `overview` that a narrow terminal can do without, in this order."""
    (primary,) = (column for column in table.columns if column.metric == table.primary)
    others = [column for column in reversed(table.columns) if column.metric != table.primary]
    beside = [heading for column in others for heading in reversed(_beside(column, table=table))]
    *first, p, p_holm = _beside(primary, table=table)
    left = [*reversed(first), p_holm] if table.has_paper else [p_holm]  # else the mark stands at the difference
    return ["seeds", p, *beside, "direction", *(column.label for column in others), *left]


def _beside(column: Column, *, table: Table) -> dict[str, Callable[[Cell], str]]:
    """Return what stands beside our values of a metric on a terminal: heading and a cell's text.

    What decides a row's verdict is shown of the primary metric alone; the other forms of a table have it of all.
    """
    parts = _parts(table)
    if column.metric != table.primary:
        decides = ("p", "p (Holm)", *(["Δ base row"] if table.has_paper else []))
        parts = {name: part for name, part in parts.items() if name not in decides}
    return {f"{column.label} {name}": part for name, part in parts.items()}


def _parts(table: Table) -> dict[str, Callable[[Cell], str]]:
    """Return what a cell has beside our value: heading and text."""
    paper: dict[str, Callable[[Cell], str]] = {"paper": lambda cell: _number(cell.paper)} if table.has_paper else {}
    if table.has_paper and table.comparable:
        paper["Δ paper"] = lambda cell: _signed(cell.against_paper)
    return {
        **paper,
        "Δ base row": lambda cell: estimate_text(cell.against_base, signed=True),
        "p": lambda cell: p_text(cell.against_base.p if cell.against_base else None),
        "p (Holm)": lambda cell: p_text(cell.p_holm),
    }


def remarks(table: Table) -> list[str]:
    """Return what is printed below a table: its footnotes, and what is wrong with runs and cells."""
    lines = [f"{_superscript((number,))} {text}" for number, text in enumerate(table.footnotes, start=1)]
    return [*lines, *problems(table)]


def problems(table: Table) -> list[str]:
    """Return a line for every run that failed and every cell whose results cannot be compared."""
    lines = []
    for row in table.rows:
        lines += [
            f"{row.key}, seed {run.seed}: {run.status}: {run.message}"
            for run in row.runs
            if run.status in ("failed", "unevaluated")
        ]
        lines += [f"{row.key}, {cell.metric}: {cell.problem}" for cell in row.cells if cell.problem]
    return lines


def runs_overview(table: Table) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of the runs behind a table: where every number comes from."""
    columns = ["row", "seed", "run", "status", *(column.label for column in table.columns), "MLflow run", "recipe hash", "commit"]
    rows = []
    for row in table.rows:
        for run in row.runs:
            values = [_number(run.values.get(column.metric)) for column in table.columns]
            origin = [
                run.mlflow_run_id or "",
                run.fingerprint[:HASH_DIGITS],
                commit_text(run),
                (run.data_hash or "")[:HASH_DIGITS],
            ]
            rows.append([row.key, str(run.seed), run.run_id, _status(run), *values, *origin])
    return [*columns, "data hash"], rows


def markdown(table: Table) -> str:
    """Return the table, its footnotes and the runs behind it as Markdown."""
    columns, parts = ["row", "seeds"], _parts(table)
    for column in table.columns:
        columns += [column.label, *parts, "direction"]
    rows = []
    for group, row in _grouped(table):
        if group is not None:
            rows.append([f"**{group}**", *[""] * (len(columns) - 1)])
        cells = [f"{row.label}{_superscript(row.notes)}", _seeds(row)]
        for cell in row.cells:
            cells += [estimate_text(cell.ours), *(part(cell) for part in parts.values()), _verdict_cell(row, cell)]
        rows.append(cells)
    lines = [
        f"# {heading(table)}",
        "",
        "Percent; ± is the 95 % interval over seeds and episodes (or images).",
        "Direction against the base row: by a paired test on identical episodes (or images) and seeds, at 5 % after Holm's "
        "correction over the rows.",
        "",
        *markdown_table(columns, rows),
        "",
        *(f"{number}. {text}" for number, text in enumerate(table.footnotes, start=1)),
        *(["", *(f"- {line}" for line in problems(table))] if problems(table) else []),
        "",
        "## Random initialisation",
        "",
        *markdown_table(
            ["row", *(column.label for column in table.columns)],
            [[row.label, *(estimate_text(cell.random) for cell in row.cells)] for row in table.rows],
        ),
        "",
        "## Runs",
        "",
        *markdown_table(*runs_overview(table)),
    ]
    return "\n".join(lines) + "\n"


def verdicts(tables: Sequence[Table]) -> str:
    """Return one Markdown table with a line for every row of several: its difference to its base row, the paper's and ours."""
    columns = [
        "table",
        "row",
        "seeds",
        "metric",
        "paper: Δ base row",
        "ours: Δ base row",
        "p (Holm)",
        "direction",
        "other metrics",
    ]
    rows = []
    for table in tables:
        place = next(number for number, column in enumerate(table.columns) if column.metric == table.primary)
        theirs = table.base.cells[place].paper
        for row in table.rows:
            if row.is_base:
                continue
            cell = row.cells[place]
            others = [
                f"{column.label} {MARKS[other.verdict]}"
                for column, other in zip(table.columns, row.cells, strict=True)
                if other is not cell and other.verdict
            ]
            rows.append(
                [
                    table.name,
                    f"{row.group}: {row.label}" if row.group else row.label,
                    _seeds(row),
                    table.columns[place].label,
                    _signed(cell.paper - theirs) if cell.paper is not None and theirs is not None else text.ABSENT,
                    estimate_text(cell.against_base, signed=True),
                    p_text(cell.p_holm),
                    verdict_text(row),
                    ", ".join(others),
                ]
            )
    lines = [
        f"# Directions at scale {tables[0].scale}",
        "",
        "Each row against the base row of its table, in points; ± is the 95 % interval over seeds and episodes (or images).",
        f"The {max(map(legend, tables), key=len)}.",
        "",
        *markdown_table(columns, rows),
    ]
    return "\n".join(lines) + "\n"


def as_json(tables: Sequence[Table]) -> str:
    """Return tables as one JSON list."""
    return json.dumps([table.to_json() for table in tables], indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def as_csv(tables: Sequence[Table]) -> str:
    """Return tables as one CSV file, one line per row and metric."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for table in tables:
        for row in table.rows:
            done = [run for run in row.runs if run.status in TRAINED]
            origin = [
                " ".join(run.run_id for run in done),
                " ".join(run.fingerprint for run in done),
                " ".join(run.mlflow_run_id or "-" for run in done),
                " ".join(dict.fromkeys(run.commit or "-" for run in done)),
                " ".join(dict.fromkeys(run.data_hash or "-" for run in done)),
            ]
            for cell in row.cells:
                base = cell.against_base
                values = [
                    cell.ours.value if cell.ours else None,
                    cell.ours.interval if cell.ours else None,
                    cell.ours.seeds if cell.ours else 0,
                    cell.random.value if cell.random else None,
                    cell.paper,
                    cell.against_paper,
                    base.value if base else None,
                    base.interval if base else None,
                    base.seeds if base else None,
                    base.p if base else None,
                    cell.p_holm,
                ]
                written = ["" if value is None else f"{value:.6g}" for value in values]
                writer.writerow(
                    [table.name, table.scale, row.key, row.label, row.recipe, cell.metric, *written, cell.verdict or "", *origin]
                )
    return out.getvalue()


def html(tables: Sequence[Table]) -> str:
    """Return tables as one self-contained page."""
    return html_page(tables=tables)


def html_page(*, tables: Sequence[Table] = (), grids: Sequence[Grid] = ()) -> str:
    """Return one self-contained page of tables, and of others that are title, headings, rows and remarks."""
    from markupsafe import Markup

    parts = {"overview": overview, "runs_overview": runs_overview, "remarks": remarks, "legend": legend}
    style = Markup((templates() / "report" / "style.css").read_text(encoding="utf-8"))  # ours, and the report's: one look
    return environment(templates()).get_template("table.html").render(tables=tables, grids=grids, style=style, **parts) + "\n"


def as_text(tables: Sequence[Table], *, form: Format) -> str:
    """Return tables as the text of a file: JSON, CSV, HTML, the verdicts alone, or else Markdown."""
    if form == "verdicts":
        return verdicts(tables)
    if form == "json":
        return as_json(tables)
    if form == "csv":
        return as_csv(tables)
    if form == "html":
        return html(tables)
    return "\n".join(markdown(each) for each in tables)


def grids_text(grids: Sequence[Grid], *, names: Sequence[tuple[str, str]], values: Sequence[Any], form: Format) -> str:
    """Return tables of another kind as the text of a file: JSON, CSV, HTML, or else Markdown.

    Args:
        grids: the tables.
        names: table and scale of each.
        values: what JSON has of each.
        form: one of `Format`, without the verdicts.
    """
    if form == "json":
        found = [{"table": name, "scale": scale, "measured": each} for (name, scale), each in zip(names, values, strict=True)]
        return json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    if form == "csv":
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        for (name, scale), (_, columns, rows, _) in zip(names, grids, strict=True):
            writer.writerow(["table", "scale", *columns])
            writer.writerows([name, scale, *row] for row in rows)
        return out.getvalue()
    if form == "html":
        return html_page(grids=grids)
    texts = []
    for title, columns, rows, remarks in grids:
        lines = [f"# {title}", "", *markdown_table(columns, rows), ""]
        texts.append("\n".join([*lines, *(f"- {line}" for line in remarks)]) + "\n")
    return "\n".join(texts)


def verdict_text(row: Row) -> str:
    """Return the row's verdict with its mark; `base row` for the base row."""
    if row.is_base:
        return "base row"
    return f"{MARKS[row.verdict]} {row.verdict}" if row.verdict else ""


def commit_text(run: RunRef) -> str:
    """Return the short commit, with a plus where the checkout had changes."""
    return "" if run.commit is None else run.commit[:HASH_DIGITS] + ("+" if run.dirty else "")


# -------------------------------------------------------------------------------------------------------------- helpers


def _grouped(table: Table) -> Iterable[tuple[str | None, Row]]:
    """Yield every row with the heading that begins at it, if one does."""
    last = ""
    for row in table.rows:
        yield (row.group if row.group and row.group != last else None), row
        last = row.group


def _verdict_cell(row: Row, cell: Cell) -> str:
    if row.is_base:
        return "base row"
    return f"{MARKS[cell.verdict]} {cell.verdict}" if cell.verdict else ""


def _seeds(row: Row) -> str:
    done = sum(run.status == "finished" for run in row.runs)
    return f"{done}/{len(row.runs)}"


def _status(run: RunRef) -> str:
    if run.status in ("missing", "finished", "created"):
        return run.status
    return f"{run.status} {run.step}/{run.total_steps or '?'}"


def _number(value: float | None) -> str:
    return text.estimate(value)


def estimate_text(value: Estimate | None, *, signed: bool = False) -> str:
    """Return `8.82 ± 0.50`; a dash where there is nothing."""
    return text.ABSENT if value is None else text.estimate(value.value, value.interval, signed=signed)


def p_text(p: float | None) -> str:
    """Return a p value by three digits, `< 0.001` for less; a dash where there is none."""
    return text.ABSENT if p is None else "< 0.001" if p < 0.001 else f"{p:.3g}"


def _signed(value: float | None) -> str:
    return text.estimate(value, signed=True)


def _superscript(numbers: Iterable[int]) -> str:
    digits = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
    text = " ".join(str(number).translate(digits) for number in numbers)
    return f" {text}" if text else ""


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(text.replace('|', chr(92) + '|') for text in line)} |" for line in lines]
