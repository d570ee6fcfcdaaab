"""The figures of a report: which curves stand in one chart, and what is written beside them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from obowlab import text
from obowlab.report.chart import Axis, Bar, Interval, Line, bar_chart, interval_chart, line_chart
from obowlab.report.curves import Curve, over_seeds
from obowlab.report.model import Figure, Run, Site
from obowlab.report.parameter_map import Mark, Spot, parameter_map
from obowlab.report.studies import Parameter, Study
from obowlab.runs.metrics import unit_of
from obowlab.tables.model import Row, Table

LINES_PER_CHART = 6
"""Beside the base row; more are hard to tell apart."""

TRAINING = ("loss", "monitor_accuracy", "fewshot")
VOCABULARY = ("perplexity_image", "perplexity_batch", "words_used", "word_age", "distance")

TITLES = {
    "loss": "Loss",
    "monitor_accuracy": "Online monitor, top-1",
    "perplexity_image": "Words in one image's bag (perplexity)",
    "perplexity_batch": "Words in the batch's mean bag (perplexity)",
    "words_used": "Words used in a batch",
    "word_age": "Mean age of the words",
    "distance": "Distance to the nearest word",
}
LOGARITHMIC = ("distance", "perplexity_image")

START = 25
"""The first one of so many parts of a training does not decide where the axis of the loss ends."""

FLAT = 0.02
"""Curves of a vocabulary whose later half moves by less than this share of its highest value are left out."""


@dataclass(frozen=True)
class Group:
    """All seeds of one recipe: one line of a chart.

    Attributes:
        label: at the end of its line.
        runs: one per seed.
        base: whether the others are compared with it.
    """

    label: str
    runs: tuple[Run, ...]
    base: bool = False


@dataclass(frozen=True)
class Family:
    """All runs of one recipe name.

    Attributes:
        shared: what all of them change of the recipe, `key=value, ...`; empty when some run changes nothing of that.
        groups: which differ in more than their seed; the unchanged recipe is the base.
    """

    shared: str
    groups: tuple[Group, ...]


def families(runs: Iterable[Run]) -> dict[str, Family]:
    """Return the runs by the name of their recipe, each line named after what parts it from the others."""
    found: dict[str, dict[str, list[Run]]] = {}
    for run in sorted(runs, key=lambda run: (run.recipe, run.variant, run.seed)):
        found.setdefault(run.recipe, {}).setdefault(run.family, []).append(run)
    result = {}
    for recipe, members in found.items():
        lists = list(members.values())
        shared = set(lists[0][0].changes.items()).intersection(*(group[0].changes.items() for group in lists))
        if len(lists) == 1:
            shared = set()  # its line is named after them
        groups = []
        for group in lists:
            own = [f"{key.rpartition('.')[2]}={value}" for key, value in group[0].changes.items() if (key, value) not in shared]
            groups.append(Group(", ".join(own) or recipe, tuple(group), base=not group[0].changes))
        result[recipe] = Family(", ".join(f"{key}={value}" for key, value in sorted(shared)), tuple(groups))
    return result


def groups_of(table: Table, *, site: Site) -> dict[str, tuple[Group, ...]]:
    """Return the rows of a table that have runs, by their heading in the table, each with the base row in front."""
    base = _group(table.base, site=site)
    found: dict[str, list[Group]] = {}
    for row in table.rows:
        if not row.is_base and (group := _group(row, site=site)) is not None:
            found.setdefault(row.group, []).append(group)
    if not found and base is not None:
        found[""] = []
    return {heading: tuple(([base] if base else []) + groups) for heading, groups in found.items()}


def curve_figures(groups: Sequence[Group], *, metrics: Sequence[str], heading: str = "") -> list[Figure]:
    """Draw every metric that some group has, few lines to a chart.

    Args:
        groups: lines, the base among them.
        metrics: beginnings of metric names, in the order of drawing.
        heading: of the groups, for the charts' titles.
    """
    figures = []
    names = {name for group in groups for run in group.runs for name in run.curves}
    for name in sorted((n for n in names if base_name(n) in metrics), key=lambda n: (metrics.index(base_name(n)), n)):
        lines = [line for group in groups if (line := _line(group, metric=name)) is not None]
        if not lines or (base_name(name) in VOCABULARY and is_flat(lines)):
            continue
        base, others = [line for line in lines if line.base][:1], [line for line in lines if not line.base]
        parts = [others[i : i + LINES_PER_CHART] for i in range(0, len(others), LINES_PER_CHART)] or [[]]
        for place, part in enumerate(parts, start=1):
            count = f"part {place} of {len(parts)}" if len(parts) > 1 else ""
            title = ", ".join(text for text in (title_of(name), heading, count) if text)
            axis, caption = _axis(name, [*base, *part])
            drawn = line_chart([*base, *part], title=title, x=Axis("epochs", low=0.0), y=axis)
            figures.append(Figure(title, drawn, caption))
    return figures


def run_figures(curves: Mapping[str, Curve], *, metrics: Sequence[str]) -> list[Figure]:
    """Draw the curves of one run, its levels in one chart."""
    by_name: dict[str, list[tuple[str, Curve]]] = {}
    for name, curve in curves.items():
        if base_name(name) in metrics:
            key, level = _without_level(name)
            by_name.setdefault(key, []).append((level or key, curve))
    figures = []
    for key in sorted(by_name, key=lambda name: (metrics.index(base_name(name)), name)):
        lines = [
            Line(label, curve.epoch, curve.mean, *_band(curve), band="lowest and highest value logged")
            for label, curve in sorted(by_name[key])
        ]
        if base_name(key) in VOCABULARY and is_flat(lines):
            continue
        levels = ", ".join(level for level, _ in sorted(by_name[key]) if level != key) if len(lines) == 1 else ""
        title = ", ".join(text for text in (title_of(key), levels) if text)
        axis, caption = _axis(key, lines)
        figures.append(Figure(title, line_chart(lines, title=title, x=Axis("epochs", low=0.0), y=axis), caption))
    return figures


def table_figure(table: Table) -> Figure | None:
    """Draw the differences to the base row in the primary column, with their intervals; None when there are fewer than two."""
    column = next(i for i, column in enumerate(table.columns) if column.metric == table.primary)
    base = table.base.cells[column].paper
    intervals = []
    for row in table.rows:
        cell = row.cells[column]
        if row.is_base or cell.against_base is None:
            continue
        paper = cell.paper - base if table.comparable and cell.paper is not None and base is not None else None
        intervals.append(Interval(row.label, cell.against_base.value, cell.against_base.interval, paper))
    if len(intervals) < 2:
        return None
    label = table.columns[column].label
    title = f"{label}: difference to the base row"
    caption = f"Dots are ours with their 95 % intervals; the line at 0 is the base row, {table.base.label}. "
    caption += "Diamonds are the paper's differences." if table.comparable else "The paper's differences belong to another scale."
    return Figure(title, interval_chart(intervals, title=title, x=Axis("percentage points")), caption)


def study_figures(study: Study) -> list[Figure]:
    """Draw a study: the plane of its two most important numbers, its history, the parameters' importance."""
    value = ", ".join(text for text in (study.metric or "value", study.unit) if text)
    numeric = [parameter for parameter in study.ranked if _is_searched_number(study, parameter.key)]
    figures = []
    if study.completed and len(numeric) >= 2:
        figures.append(_map(study, x=numeric[0], y=numeric[1], value=value))
    elif study.completed and len(numeric) == 1:
        key = numeric[0].key
        pairs = sorted((float(trial.params[key]), trial.reached or 0.0) for trial in study.completed)
        line = Line("trials", [a for a, _ in pairs], [b for _, b in pairs], kind="points")
        title = f"{value} over {key}"
        figures.append(Figure(title, line_chart([line], title=title, x=_param_axis(numeric[0]), y=Axis(value))))
    if len(study.completed) >= 2:
        figures.append(_history(study, value=value))
    bars = [
        Bar(parameter.key, float(round(100 * parameter.importance)))
        for parameter in study.ranked
        if parameter.importance is not None
    ]
    if len(bars) >= 2:
        caption = "Share of the variation between trials that a parameter explains; with few trials a rough figure."
        figures.append(Figure("Importance", bar_chart(bars, title="Importance of the parameters", unit="%"), caption))
    return figures


def is_flat(lines: Sequence[Line]) -> bool:
    """Return whether nothing happens in the later half of any line, all lines taken together; short lines are never flat."""
    later = [value for line in lines for value in line.y[len(line.y) // 2 :]]
    return min(len(line.y) for line in lines) >= 20 and max(later) - min(later) <= FLAT * max(abs(value) for value in later)


def title_of(metric: str) -> str:
    """Return a metric's name for people."""
    key, level = _without_level(metric)
    shots = re.fullmatch(r"fewshot_(\d+)shot", key)
    title = f"{shots[1]}-shot during training" if shots else TITLES.get(key, key)
    return f"{title}, {level}" if level else title


def base_name(metric: str) -> str:
    """Return the name under which a metric is ordered: without its level, its shots."""
    return "fewshot" if metric.startswith("fewshot_") else _without_level(metric)[0]


# -------------------------------------------------------------------------------------------------------------- helpers


def _group(row: Row, *, site: Site) -> Group | None:
    runs = tuple(site.by_id[ref.run_id] for ref in row.runs if ref.run_id in site.by_id)
    return Group(row.label, runs, base=row.is_base) if runs else None


def _line(group: Group, *, metric: str) -> Line | None:
    """Return a group's line: its finished seeds, or all of them while none is finished."""
    finished = [run for run in group.runs if run.status == "finished"]
    curves = [run.curves[metric] for run in finished or group.runs if metric in run.curves]
    if not curves:
        return None
    mean = over_seeds(curves)
    if not mean.epoch:
        return None
    count = len(curves)
    label = group.label if count == 1 else f"{group.label} ×{count}"
    if count == 1:
        return Line(label, mean.epoch, mean.mean, base=group.base)
    return Line(label, mean.epoch, mean.mean, mean.low, mean.high, band=f"range of {count} seeds", base=group.base)


def _band(curve: Curve) -> tuple[Sequence[float], Sequence[float]]:
    return (curve.low, curve.high) if curve.low != curve.high else ((), ())


def _axis(metric: str, lines: Sequence[Line]) -> tuple[Axis, str]:
    """Return the axis of a metric's values, and a sentence when the first steps are cut off because they hide all others."""
    key, _ = _without_level(metric)
    unit = unit_of(metric) or unit_of(f"{metric}_conv5")
    log = key in LOGARITHMIC and all(min(values) > 0 for line in lines for values in (line.y, line.low) if values)
    kind = "squared distance" if key == "distance" else ""
    label = (unit or kind) + (", logarithmic" if log else "")
    if key != "loss":
        return Axis(label, log=log), ""
    edges = [values for line in lines for values in (line.y, line.low, line.high) if values]
    later = [value for values in edges for value in values[len(values) // START :]]
    low, high = min(map(min, edges)), max(map(max, edges))
    room = 0.25 * (max(later) - min(later))
    bottom, top = max(low, min(later) - room), min(high, max(later) + room)
    if (bottom, top) == (low, high):
        return Axis(label), ""
    said = f"The first steps, from {text.number(low)} to {text.number(high)}, are drawn at the edge where they lie beyond it."
    return Axis(label, low=bottom, high=top), said


def _without_level(metric: str) -> tuple[str, str]:
    found = re.fullmatch(r"(.+)_(conv[45])", metric)
    return (found[1], found[2]) if found else (metric, "")


def _map(study: Study, *, x: Parameter, y: Parameter, value: str) -> Figure:
    spots = []
    for trial in study.trials:
        if x.key in trial.params and y.key in trial.params:
            mark: Mark = "paper" if trial.is_paper else "best" if trial.number == study.best else "trial"
            label = f"trial {trial.number}" + (" (the paper's point)" if mark == "paper" else "")
            spots.append(Spot(float(trial.params[x.key]), float(trial.params[y.key]), trial.reached, label, mark))
    title = f"{value} over {x.key} and {y.key}"
    caption = (
        "Circles are trials, the ringed one is the best, a diamond is the paper's point, a cross has no final value. "
        "Colours between them are interpolated (inverse distance) and only guide the eye."
    )
    drawn = parameter_map(spots, title=title, x=_param_axis(x), y=_param_axis(y), value=value)
    return Figure(title, drawn, caption)


def _history(study: Study, *, value: str) -> Figure:
    numbers = [float(trial.number) for trial in study.completed]
    values = [trial.reached or 0.0 for trial in study.completed]
    better = min if study.direction == "min" else max
    best = [better(values[: i + 1]) for i in range(len(values))]
    lines = [Line("trials", numbers, values, kind="points"), Line("best so far", numbers, best, kind="steps")]
    return Figure("History", line_chart(lines, title="Values in the order of the trials", x=Axis("trial"), y=Axis(value)))


def _param_axis(parameter: Parameter) -> Axis:
    name = parameter.key.removeprefix("method.")
    return Axis(f"{name}, logarithmic" if parameter.log else name, log=parameter.log)


def _is_searched_number(study: Study, key: str) -> bool:
    """Return whether a parameter has numbers that are not all the same."""
    values = [trial.params[key] for trial in study.trials if key in trial.params]
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return numbers and len(set(values)) > 1


def counts(runs: Iterable[Run]) -> Mapping[str, int]:
    """Return how many runs are in each state, most telling states first; absent states are left out."""
    order = ("finished", "running", "interrupted", "failed", "created")
    states = [run.status for run in runs]
    return {state: states.count(state) for state in order if state in states}
