"""Which runs are one training: all seeds of a recipe, whatever it is called, with the mean of what was measured on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from obowlab.errors import UserError
from obowlab.report.labels import in_short
from obowlab.report.model import Run, Training
from obowlab.runs.info import TRAINED
from obowlab.runs.listing import RunSummary
from obowlab.runs.records import Record
from obowlab.tables.build import mean_over_seeds
from obowlab.tables.model import Estimate


def trainings_of(runs: Iterable[Run], *, stored: Iterable[tuple[RunSummary, Record]]) -> tuple[Training, ...]:
    """Return the runs by what was trained: base recipes by name, and of each the unchanged one first.

    Args:
        runs: as a report shows them.
        stored: the same, as the store has them.
    """
    by_id = {record.run_id: (summary, record) for summary, record in stored}
    found: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.seed, run.recipe, run.run_id)):
        found.setdefault(run.family, []).append(run)
    by_base: dict[str, list[list[Run]]] = {}
    for group in found.values():
        nearest = min(group, key=lambda run: (len(run.changes), run.base_recipe))
        by_base.setdefault(nearest.base_recipe, []).append(sorted(group, key=lambda run: (run.seed, run is not nearest)))
    result: list[Training] = []
    for base in sorted(by_base):
        groups = sorted(by_base[base], key=_place)
        labels = _distinct(groups)
        result += [
            Training(label or base, base, _changes(group), tuple(group), _means(group, by_id=by_id))
            for label, group in zip(labels, groups, strict=True)
        ]
    return tuple(result)


def one_of_each(runs: Iterable[Run]) -> tuple[Run, ...]:
    """Return one run of each seed: of one recipe under two names the most advanced."""
    best: dict[str, Run] = {}
    for run in runs:
        known = best.get(run.fingerprint)
        if known is None or (run.status in TRAINED, run.step) > (known.status in TRAINED, known.step):
            best[run.fingerprint] = run
    return tuple(best.values())


def _place(group: Sequence[Run]) -> tuple[bool, str, str, str]:
    changes = _changes(group)
    return bool(changes), _label(group), in_short(changes), group[0].family


def _changes(group: Sequence[Run]) -> Mapping[str, str]:
    """Return what a training changes of its base recipe, as the run that is closest to it says."""
    return min((run.changes for run in group), key=len)


def _label(group: Sequence[Run]) -> str:
    """Return the shortest of what its runs are distinguished by; a title of its own counts before settings."""
    if not _changes(group):
        return ""
    titled = [run.short for run in group if run.short != in_short(run.changes)]
    return min(titled or [run.short for run in group], key=lambda short: (len(short), short))


def _distinct(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Return a label of each training; where two have the same, the settings in which they differ are added."""
    labels = [_label(group) for group in groups]
    result = []
    for label, group in zip(labels, groups, strict=True):
        alike = [other for other, theirs in zip(groups, labels, strict=True) if theirs == label]
        shared = set(_changes(group).items()).intersection(*(_changes(other).items() for other in alike))
        own = in_short({key: value for key, value in _changes(group).items() if (key, value) not in shared})
        result.append(", ".join(part for part in (label, own if len(alike) > 1 else "") if part))
    return [
        label if result.count(label) == 1 else f"{label} ({group[0].recipe}, {group[0].family[:6]})"
        for label, group in zip(result, groups, strict=True)
    ]


def _means(group: Sequence[Run], *, by_id: Mapping[str, tuple[RunSummary, Record]]) -> dict[str, Estimate]:
    summaries, records = zip(*(by_id[run.run_id] for run in one_of_each(group)), strict=True)
    metrics = {m.metric for run in group for m in run.measured if m.student is not None}
    try:
        recipe = max(summaries, key=lambda summary: summary.info.created_at).info.recipe
    except UserError:  # of another version
        return {}
    means = {metric: mean_over_seeds(records, recipe=recipe, metric=metric) for metric in metrics}
    return {metric: mean for metric, mean in means.items() if mean is not None}
