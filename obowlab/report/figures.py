"""The curves of a report as plotly takes them: which are in one chart, what hovering shows, the CSV of each.

Figures are plain dicts: importing `plotly.graph_objects` takes longer than writing a report.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic_core import to_json

from obowlab import text
from obowlab.report.curves import Curve, over_seeds
from obowlab.report.labels import LABEL_LENGTH, csv_text, in_short, plain, run_names, shortened
from obowlab.report.model import Figure, Run, Site, Training
from obowlab.report.trainings import one_of_each
from obowlab.runs.info import TRAINED
from obowlab.runs.metrics import lookup, unit_of
from obowlab.tables.model import Row, Table

LINES_PER_CHART = 6
"""Beside the base row; more are hard to distinguish."""

NUM_COLOURS = 8
"""`--c0` to `--c7` of the style sheet."""

MARKERS = 30
"""Curves of fewer points show each of them."""

TRAINING = ("loss", "monitor_accuracy", "fewshot")
VOCABULARY = ("perplexity_image", "perplexity_batch", "words_used", "word_age", "distance")

GROUPS = {
    "Losses and accuracies": (
        *(
            "loss_kl",
            "loss_crops",
            "loss_patches",
            "loss_small_crops",
            "rotation_accuracy",
            "contrast_accuracy",
            "class_accuracy",
        ),
        *("projection_std", "prototypes_used", "queue_age", "monitor_loss"),
    ),
    "Targets and predictions": ("target_entropy", "code_entropy", "prediction_entropy", "kappa", "msd"),
    "Optimiser": ("learning_rate", "teacher_momentum", "grad_norm"),
    "Speed": ("images_per_s", "step_time_s", "data_wait_s"),
}
"""What else is logged, by heading; `group_of` knows where a metric belongs."""

MAIN, MACHINE, OTHERS = "Training and vocabulary", "Machine", "Others"

TITLES = {
    "loss": "Loss",
    "monitor_accuracy": "Online classifier, top-1",
    "perplexity_image": "Words in one image's bag (perplexity)",
    "perplexity_batch": "Words in the batch's mean bag (perplexity)",
    "words_used": "Words used in a batch",
    "word_age": "Mean age of the words",
    "distance": "Distance to the nearest word",
}
LOGARITHMIC = ("distance", "perplexity_image")

START = 25
"""The first one of so many parts of a training does not decide where the axis of the loss ends."""

CURVE_COLUMNS = ("chart", "curve", "runs", "step", "epoch", "value", "lowest", "highest")

FLAT = 0.02
"""Curves of a vocabulary whose later half moves by less than this share of its highest value are left out."""


@dataclass(frozen=True)
class Line:
    """One curve of a chart.

    Attributes:
        label: its name.
        runs: the run that it shows, or the seeds that it is the mean of.
        curve: its points.
        base: whether the others are compared with it: drawn thicker and in the colour of the text.
    """

    label: str
    runs: tuple[str, ...]
    curve: Curve
    base: bool = False


@dataclass(frozen=True)
class Group:
    """All seeds of one recipe: one line of a chart.

    Attributes:
        label: name of its line.
        runs: one per seed.
        base: whether the others are compared with it.
    """

    label: str
    runs: tuple[Run, ...]
    base: bool = False


@dataclass(frozen=True)
class Family:
    """All trainings of one base recipe.

    Attributes:
        shared: what all of them change of the recipe, `key=value, ...`; empty when some training changes nothing of that.
        groups: which differ in more than their seed; the unchanged recipe is the base.
    """

    shared: str
    groups: tuple[Group, ...]


def families(trainings: Iterable[Training]) -> dict[str, Family]:
    """Return the trainings by their base recipe, each line named after what distinguishes it from the others."""
    found: dict[str, list[Training]] = {}
    for training in trainings:
        found.setdefault(training.base_recipe, []).append(training)
    result = {}
    for recipe, members in found.items():
        shared = set(members[0].changes.items()).intersection(*(training.changes.items() for training in members))
        if len(members) == 1:
            shared = set()  # its line is named after them
        groups = []
        for training in members:
            label = training.label
            if shared and label == in_short(training.changes):
                own = {key: value for key, value in training.changes.items() if (key, value) not in shared}
                label = in_short(own) or recipe
            groups.append(Group(label, training.runs, base=not training.changes))
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
    """Return a chart of every metric that some group has, few lines to a chart.

    Args:
        groups: lines, the base among them.
        metrics: beginnings of metric names, in the order of the charts.
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
            title = ", ".join(part for part in (title_of(name), heading, count) if part)
            figures.append(_curve_figure([*base, *part], metric=name, title=title))
    return figures


def group_of(metric: str) -> str:
    """Return the heading under which a page lists a metric."""
    name = base_name(metric)
    if name in (*TRAINING, *VOCABULARY):
        return MAIN
    try:
        if lookup(metric).group == "system":
            return MACHINE
    except KeyError:
        return OTHERS
    return next((heading for heading, names in GROUPS.items() if name in names), OTHERS)


def logged_groups(run: Run) -> dict[str, dict[str, Curve]]:
    """Return all that a run has logged, by heading and metric."""
    found: dict[str, dict[str, Curve]] = {heading: {} for heading in (MAIN, *GROUPS, MACHINE, OTHERS)}
    for name, curve in sorted(run.curves.items()):
        found[group_of(name)][name] = curve
    return {heading: curves for heading, curves in found.items() if curves}


def more_figures(run: Run) -> dict[str, list[Figure]]:
    """Return the charts of one run beside those of its training and vocabulary, by heading."""
    groups = {heading: tuple(map(base_name, curves)) for heading, curves in logged_groups(run).items() if heading != MAIN}
    return {heading: run_figures(run, metrics=tuple(dict.fromkeys(names))) for heading, names in groups.items()}


def run_figures(run: Run, *, metrics: Sequence[str]) -> list[Figure]:
    """Return the charts of one run, its levels in one chart."""
    by_name: dict[str, list[Line]] = {}
    for name, curve in sorted(run.curves.items()):
        if base_name(name) in metrics:
            key, level = _without_level(name)
            by_name.setdefault(key, []).append(Line(level or title_of(key), (run.run_id,), curve))
    figures = []
    for key in sorted(by_name, key=lambda name: (metrics.index(base_name(name)), name)):
        lines = by_name[key]
        if base_name(key) in VOCABULARY and is_flat(lines):
            continue
        level = lines[0].label if len(lines) == 1 and lines[0].label != title_of(key) else ""
        title = ", ".join(part for part in (title_of(key), level) if part)
        figures.append(_curve_figure(lines, metric=key, title=title))
    return figures


def is_flat(lines: Sequence[Line]) -> bool:
    """Return whether nothing happens in the later half of any line, all lines taken together; short lines are never flat."""
    values = [line.curve.mean for line in lines]
    later = [value for each in values for value in each[len(each) // 2 :]]
    return min(map(len, values)) >= 20 and max(later) - min(later) <= FLAT * max(abs(value) for value in later)


def title_of(metric: str) -> str:
    """Return a metric's name for people."""
    key, level = _without_level(metric)
    shots = re.fullmatch(r"fewshot_(\d+)shot", key)
    title = f"{shots[1]}-shot during training" if shots else TITLES.get(key, key.replace("_", " ").capitalize())
    return f"{title}, {level}" if level else title


def base_name(metric: str) -> str:
    """Return the name by which metrics are ordered: without its level or its number of shots."""
    return "fewshot" if metric.startswith("fewshot_") else _without_level(metric)[0]


def counts(runs: Iterable[Run]) -> Mapping[str, int]:
    """Return how many runs are in each state, most informative states first; absent states are left out."""
    order = ("finished", "unevaluated", "running", "interrupted", "failed", "created")
    states = [run.status for run in runs]
    return {state: states.count(state) for state in order if state in states}


# -------------------------------------------------------------------------------------------------------------- helpers


def _group(row: Row, *, site: Site) -> Group | None:
    runs = tuple(site.by_id[ref.run_id] for ref in row.runs if ref.run_id in site.by_id)
    return Group(row.label, runs, base=row.is_base) if runs else None


def _line(group: Group, *, metric: str) -> Line | None:
    """Return a group's line: its finished seeds, or all of them while none is finished."""
    members = one_of_each(group.runs)
    finished = [run for run in members if run.status in TRAINED]
    runs = [run for run in finished or members if metric in run.curves]
    curve = over_seeds([run.curves[metric] for run in runs]) if runs else None
    if curve is None or not curve.epoch:
        return None
    label = group.label if len(runs) == 1 else f"{group.label} ×{len(runs)}"
    if len(runs) == 1:  # the extremes of one run would hide the lines of the others
        curve = replace(curve, low=curve.mean, high=curve.mean)
    return Line(label, tuple(run.run_id for run in runs), curve, base=group.base)


def _curve_figure(lines: Sequence[Line], *, metric: str, title: str) -> Figure:
    """Return the chart of some curves of one metric, each with its band."""
    key, _ = _without_level(metric)
    unit = unit_of(metric) or unit_of(f"{metric}_conv5") or ("squared distance" if key == "distance" else "")
    low, high = min(min(line.curve.low) for line in lines), max(max(line.curve.high) for line in lines)
    y: dict[str, Any] = {"title": {"text": unit}}
    caption = ""
    if key in LOGARITHMIC and low > 0:
        ticks = _log_ticks(low, high)
        y = {"title": {"text": f"{unit}, logarithmic"}, "type": "log", "tickvals": ticks, "ticktext": [*map(text.number, ticks)]}
    elif key == "loss" and (bounds := _bounds(lines)) != (low, high):
        y["range"] = bounds
        caption = f"The first steps, from {text.number(low)} to {text.number(high)}, lie beyond the axis; zoom out for them."
    axis = "seconds" if group_of(metric) == MACHINE else "epochs"
    ends = "; ".join(f"{line.label}: {text.number(line.curve.mean[-1])} at step {line.curve.step[-1]}" for line in lines)
    colours = _colours(lines)
    return Figure(
        title=title,
        description=f"{title}, over {axis}. Last values: {ends}.",
        data=[
            trace
            for line, colour in zip(lines, colours, strict=True)
            for trace in _traces(line, unit=unit, colour=colour, axis=axis)
        ],
        layout={"xaxis": {"title": {"text": axis}, "rangemode": "tozero"}, "yaxis": y, "showlegend": len(lines) > 1},
        csv=_curve_csv(lines, title=title),
        height=280 + (20 * len(lines) if len(lines) > 1 else 0),
        caption=caption,
    )


def _bounds(lines: Sequence[Line]) -> tuple[float, float]:
    """Return the ends of the axis of the loss, which the first steps do not decide: they would hide all others."""
    edges = [values for line in lines for values in (line.curve.low, line.curve.high)]
    later = [value for values in edges for value in values[len(values) // START :]]
    room = 0.25 * (max(later) - min(later))
    return max(min(map(min, edges)), min(later) - room), min(max(map(max, edges)), max(later) + room)


def _log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers for a logarithmic axis, also beyond its ends; the wider it is, the fewer for each power of ten."""
    factors = (1, 1.5, 2, 3, 5, 7) if high < 30 * low else (1, 2, 5) if high < 1000 * low else (1,)
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    return [factor * 10.0**power for power in powers for factor in factors]


def _colours(lines: Sequence[Line]) -> list[str]:
    """Return a colour for each line: that of the text for the base, the palette's in order for the others."""
    places = iter(range(len(lines)))
    return ["--ink" if line.base else f"--c{next(places) % NUM_COLOURS}" for line in lines]


def _traces(line: Line, *, unit: str, colour: str, axis: str = "epochs") -> Iterator[dict[str, Any]]:
    """Yield the band of a line, where it has one, and the line; the legend switches both together."""
    curve, label = line.curve, plain(line.label)
    if curve.low != curve.high:
        yield {
            "type": "scatter",
            "x": (*curve.epoch, *reversed(curve.epoch)),
            "y": (*curve.high, *reversed(curve.low)),
            "mode": "lines",
            "line": {"width": 0},
            "fill": "toself",
            "fillcolor": f"{colour}/33",
            "hoverinfo": "skip",
            "legendgroup": label,
            "showlegend": False,
        }
    value = f"%{{y:.4~g}} {unit}".strip()
    runs = f"mean of {len(line.runs)} seeds: {run_names(line.runs)}" if len(line.runs) > 1 else run_names(line.runs)
    place = "step %{customdata}, epoch %{x:.4~g}" if axis == "epochs" else "after %{x:.0f} s"
    yield {
        "type": "scatter",
        "name": plain(shortened(line.label, LABEL_LENGTH)),
        "x": curve.epoch,
        "y": curve.mean,
        "customdata": curve.step,
        "mode": "lines+markers" if len(curve.epoch) <= MARKERS else "lines",
        "line": {"color": colour, "width": 2.6 if line.base else 1.8},
        "marker": {"size": 5},
        "hovertemplate": f"<b>{label}</b><br>{value}<br>{place}<br>{runs}<extra></extra>",
        "legendgroup": label,
    }


def _curve_csv(lines: Sequence[Line], *, title: str) -> str:
    """Return the points of some curves; a report of 200 runs has so many that `csv` would take most of its time."""
    parts = [csv_text(CURVE_COLUMNS, ())]
    for line in lines:
        curve, name = line.curve, csv_text((title, line.label, " ".join(line.runs)), ()).removesuffix("\n")
        points = to_json(list(zip(curve.step, curve.epoch, curve.mean, curve.low, curve.high, strict=True))).decode()
        parts += [f"{name},{point}\n" for point in points[2:-2].split("],[")]
    return "".join(parts)


def _without_level(metric: str) -> tuple[str, str]:
    found = re.fullmatch(r"(.+)_(conv[45])", metric)
    return (found[1], found[2]) if found else (metric, "")
