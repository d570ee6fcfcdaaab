"""The figures of results: a table's differences to its base row, and Optuna's of a study."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from obowlab import text
from obowlab.report.labels import LABEL_LENGTH, csv_text, plain, run_names, shortened
from obowlab.report.model import Figure
from obowlab.runs.info import TRAINED
from obowlab.studies.schema import StudyReport
from obowlab.tables.model import Estimate, Table

STUDY_FIGURES = {
    "contour": (
        "Objective over two parameters",
        "Black points are completed trials, a diamond is the paper's point, a circle the best. Colours between them are "
        "interpolated and only guide the eye; all that is far below the better half has one colour.",
    ),
    "history": ("History", "Trials in their order, with their 95 % intervals; of one seed, over its episodes (or images) alone."),
    "importance": (
        "Importance",
        "Share of the variation over the search space that a parameter explains alone; the rest is of several together. Chance "
        "is not taken off: two parameters that do nothing explain 0.7 together after 40 trials.",
    ),
    "slice": ("Objective over each parameter", "Darker points are later trials."),
}
"""Name in `study.json` -> title and caption, in the order of the page."""


@dataclass(frozen=True)
class _Difference:
    """A row against the base row, in percentage points; the paper's is None where it is unknown or of another scale."""

    label: str
    ours: Estimate
    paper: float | None
    runs: tuple[str, ...]


def table_figure(table: Table) -> Figure | None:
    """Return the differences to the base row in the primary column, with their intervals; None for nothing to see."""
    column = next(i for i, column in enumerate(table.columns) if column.metric == table.primary)
    found = list(_differences(table, column=column))
    if len(found) < (2 if table.has_paper else 1):
        return None
    title = f"{table.columns[column].label}: difference to the base row"
    ends = "; ".join(f"{row.label}: {text.estimate(row.ours.value, row.ours.interval, signed=True)}" for row in found)
    data = _dots(found)
    return Figure(
        title=title,
        description=f"{title}. {ends}.",
        data=data,
        layout={
            "xaxis": {"title": {"text": "percentage points"}, "zeroline": True, "zerolinecolor": "--soft", "zerolinewidth": 2},
            "yaxis": {
                "tickvals": list(range(len(found))),
                "ticktext": [plain(shortened(row.label, LABEL_LENGTH // 2)) for row in found],
                "range": [len(found) - 0.5, -0.5],
                "showgrid": False,
            },
            "showlegend": len(data) > 1,
        },
        csv=csv_text(
            ("row", "difference", "interval", "paper", "runs"),
            [(row.label, row.ours.value, row.ours.interval, row.paper, " ".join(row.runs)) for row in found],
        ),
        kind="differences",
        height=110 + 26 * len(found),
        caption=_caption(table, found),
    )


def _differences(table: Table, *, column: int) -> Iterator[_Difference]:
    base = table.base.cells[column].paper
    for row in table.rows:
        cell = row.cells[column]
        if not row.is_base and cell.against_base is not None:
            known = table.comparable and cell.paper is not None and base is not None
            yield _Difference(
                row.label,
                cell.against_base,
                cell.paper - base if known else None,  # type: ignore[operator]
                tuple(run.run_id for run in row.runs if run.status in TRAINED),
            )


def _dots(found: Sequence[_Difference]) -> list[dict[str, Any]]:
    places = list(range(len(found)))
    ours = {
        "type": "scatter",
        "mode": "markers",
        "name": "ours, 95 % interval",
        "x": [row.ours.value for row in found],
        "y": places,
        "error_x": {"array": [row.ours.interval for row in found], "color": "--c0", "thickness": 2},
        "marker": {"size": 9, "color": "--c0", "symbol": ["circle-open" if row.ours.seeds == 1 else "circle" for row in found]},
        "customdata": [[plain(row.label), row.ours.interval, run_names(row.runs)] for row in found],
        "hovertemplate": "<b>%{customdata[0]}</b><br>%{x:+.2f} ± %{customdata[1]:.2f}<br>%{customdata[2]}<extra></extra>",
    }
    if all(row.paper is None for row in found):
        return [ours]
    paper = {
        "type": "scatter",
        "mode": "markers",
        "name": "paper",
        "x": [row.paper for row in found],
        "y": places,
        "marker": {"symbol": "diamond-open", "size": 12, "color": "--ink", "line": {"width": 2}},
        "customdata": [plain(row.label) for row in found],
        "hovertemplate": "<b>%{customdata}</b><br>paper: %{x:+.2f}<extra></extra>",
    }
    return [ours, paper]


def _caption(table: Table, found: Sequence[_Difference]) -> str:
    said = [f"Dots are ours with their 95 % intervals; the line at 0 is the base row, {table.base.label}."]
    if any(row.ours.seeds == 1 for row in found):
        said.append("Open dots have one seed: their intervals speak for its episodes (or images) alone.")
    if table.has_paper:
        said.append(
            "Diamonds are the paper's differences." if table.comparable else "The paper's differences belong to another scale."
        )
    return " ".join(said)


def study_figures(study: StudyReport) -> list[Figure]:
    """Return Optuna's figures of a study as `study.json` holds them."""
    keys = [parameter.key for parameter in study.parameters]
    trials = csv_text(
        ("trial", "status", *keys, study.metric or "value", "interval", "paper", "runs"),
        [
            (
                *(trial.number, trial.status, *(trial.params.get(key) for key in keys), trial.value, trial.interval),
                *("paper" if trial.is_paper else "", " ".join(run.run_id for run in trial.runs)),
            )
            for trial in study.trials
        ],
    )
    importances = csv_text(("parameter", "importance"), [(parameter.key, parameter.importance) for parameter in study.ranked])
    figures = []
    for name, (title, caption) in STUDY_FIGURES.items():
        if (figure := study.figures.get(name)) is None:
            continue
        layout = {key: value for key, value in figure.layout.items() if key not in ("title", "template", "width", "height")}
        if name == "importance":
            layout["margin"] = {"r": 40}  # for the numbers behind the bars
        figures.append(
            Figure(
                title=title,
                description=f"{title}. {caption}",
                data=figure.data,
                layout=layout,
                csv=importances if name == "importance" else trials,
                kind="importance" if name == "importance" else "trials",
                height=360,
                wide=name == "slice",
                caption=caption,
            )
        )
    return figures
