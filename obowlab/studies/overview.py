"""A study as text for a terminal: its trials, what is best, and what a command would do."""

from __future__ import annotations

from collections.abc import Mapping

from obowlab import text
from obowlab.config import Machine
from obowlab.launch.cost import CostBook
from obowlab.runs.records import store_runs
from obowlab.studies.schema import StudyReport, StudyTrial
from obowlab.studies.spec import Tuning
from obowlab.tracking.server import shown_uri


def trials_overview(report: StudyReport) -> tuple[list[str], list[list[str]]]:
    """Return headings and a row per trial."""
    rows = [
        [
            str(trial.number),
            trial.status,
            *(_value(trial.params.get(parameter.key)) for parameter in report.parameters),
            text.estimate(trial.value, trial.interval),
            text.duration(trial.finished_at - trial.started_at) if trial.finished_at and trial.started_at else "",
            _remark(trial),
            ", ".join(run.run_id for run in trial.runs),
        ]
        for trial in report.trials
    ]
    objective = f"{report.metric} {report.unit}".strip()
    return ["trial", "status", *parameter_names(report), objective, "time", "remark", "runs"], rows


def parameter_names(report: StudyReport) -> list[str]:
    """Return the last parts of the parameters' keys, or the whole keys where those are not unique."""
    keys = [parameter.key for parameter in report.parameters]
    short = [key.rsplit(".", 1)[-1] for key in keys]
    return short if len(set(short)) == len(short) else keys


def findings(report: StudyReport) -> list[str]:
    """Return lines that say how far a study is, what is best beside the paper's point, and which parameters matter."""
    lines = [counts(report)]
    if report.overrides:
        own = [change for change in report.overrides if change not in report.fixed]
        words = [f"by the file: {', '.join(own)}"] * bool(own) + [f"with --set: {', '.join(report.fixed)}"] * bool(report.fixed)
        lines.append(f"fixed {'; '.join(words)}")
    by_number = {trial.number: trial for trial in report.trials}
    names = parameter_names(report)
    recipe = next((trial.number for trial in report.completed if trial.is_recipe and not trial.is_paper), None)
    for word, number in (("best", report.best), ("paper", report.paper), ("recipe", recipe)):
        if number is not None:
            trial = by_number[number]
            values = [_value(trial.params[parameter.key]) for parameter in report.parameters]
            point = ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))
            lines.append(f"{word}: {text.estimate(trial.value, trial.interval)} {report.unit} at {point} (trial {number})")
    gain = report.best_against_paper
    if gain is not None and report.best != report.paper:
        shown = f"{text.estimate(gain.value, gain.interval, signed=True)} {report.unit}"
        lines.append(
            f"best against paper: {shown} on the same episodes or images; "
            f"the best of {report.counts['completed']} is partly luck: confirm it with other seeds."
        )
    if report.best is not None and len(report.seeds) == 1:
        lines.append("± is over the episodes or images of one seed; another seed moves every value, often by more.")
    importances = [f"{each.key} {each.importance:.2f}" for each in report.parameters if each.importance is not None]
    return [*lines, *([f"importance: {', '.join(importances)}"] if importances else [])]


def counts(report: StudyReport) -> str:
    """Return how many trials ended how, the budget, and how much of it is left."""
    there = {status: number for status, number in report.counts.items() if number or status == "completed"}
    left = max(0, (report.budget or 0) - report.counts["completed"])
    budget = f"; budget {report.budget}{f', {left} left' if left else ''}" if report.budget else ""
    return f"{', '.join(f'{number} {status}' for status, number in there.items())}{budget}"


def plan_lines(tuning: Tuning, *, machine: Machine, url: str, report: StudyReport | None) -> list[str]:
    """Return what a study is made of, for a dry run.

    Args:
        tuning: the study.
        machine: of its runs.
        url: of its storage.
        report: what the storage has of it; None when it has nothing.
    """
    spec, epochs = tuning.spec, tuning.base.recipe.training.epochs
    pruning: str = spec.pruner.kind
    if tuning.online_metric:
        pruning += f", {tuning.online_metric} every {tuning.every_epochs(epochs)} of {epochs} epochs"
    paper = ", ".join(f"{key} = {value}" for key, value in spec.paper.items())
    own = tuning.recipe_point() if tuning.recipe_point() != tuning.paper_point() else None
    given = [", ".join(f"{key} = {value}" for key, value in point.items()) for point in spec.points]
    return [
        f"storage: {shown_uri(url)}",
        f"recipe: {tuning.base.name}",
        *([f"fixed: {', '.join(tuning.overrides)}"] if tuning.overrides else []),
        f"objective: {spec.objective}, {'more' if tuning.maximize else 'less'} is better, mean over seeds {list(spec.seeds)}",
        *(f"parameter: {key} {_range(parameter.model_dump())}" for key, parameter in spec.parameters.items()),
        *([f"first: the paper's {paper}"] if paper else []),
        *([f"{'then' if paper else 'first'}: the recipe's {', '.join(f'{key} = {v}' for key, v in own.items())}"] if own else []),
        *(f"{'then' if paper or own else 'first'}: the file's {point}" for point in given),
        f"pruning: {pruning}",
        f"runs: {machine.runs_root}",
        *([f"trials: {counts(report)}"] if report is not None else []),
    ]


def expected_time(tuning: Tuning, *, machine: Machine, left: int, slots: int) -> str:
    """Return how long the trials that are left will take, from earlier runs of the base recipe; empty when that is not known."""
    cost = CostBook(machine, runs=store_runs(machine.runs_root).values()).cost(tuning.base.recipe)
    if left <= 0 or cost.seconds is None:
        return ""
    trial_s = cost.seconds * len(tuning.spec.seeds)
    together = text.duration(left * trial_s / slots)
    pruned = ", and pruned ones on top" if tuning.online_metric else ""
    return f"{left} trials of about {text.duration(trial_s)} of training are left: {together} with {slots} at a time{pruned}"


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def _range(parameter: Mapping[str, object]) -> str:
    if "choices" in parameter:
        return f"one of {parameter['choices']}"
    return f"from {parameter['low']} to {parameter['high']}" + (" by its logarithm" if parameter["log"] else "")


def _remark(trial: StudyTrial) -> str:
    words = ["paper"] if trial.is_paper else ["recipe"] if trial.is_recipe else ["the file's"] if trial.is_given else []
    if trial.resumed:
        words.append(f"resumed {trial.resumed}×" if trial.resumed > 1 else "resumed")
    if isinstance(trial.repeat_of, int):
        words.append(f"repeats trial {trial.repeat_of}")
    elif trial.message:
        words.append(trial.message)
    return "; ".join(words)
