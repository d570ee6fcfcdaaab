"""Collect what is known of a study, from its storage and its run folders, and pass it on to `study.json` and to MLflow."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, get_args

import optuna
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from obowlab.config import Machine
from obowlab.errors import UserError
from obowlab.files.replacing import write_atomic
from obowlab.runs.folder import RunFolder
from obowlab.runs.info import DAMAGED, TRAINED
from obowlab.runs.listing import damage_of
from obowlab.runs.metrics import lookup
from obowlab.runs.records import warn_once
from obowlab.runs.results import unpack
from obowlab.studies.overview import findings
from obowlab.studies.schema import (
    FORMAT,
    STUDY_FILE,
    StudyDifference,
    StudyFigure,
    StudyParameter,
    StudyReport,
    StudyRun,
    StudyTrial,
    TrialStatus,
    read_study,
)
from obowlab.studies.spec import Tuning
from obowlab.studies.trial import GIVEN, PAPER, RECIPE, objective_of
from obowlab.studies.trial_locks import TrialLocks
from obowlab.tables.statistics import Matrix, estimate, stacked
from obowlab.tracking.publish import publish
from obowlab.tracking.server import shown_uri

MIN_TRIALS_FOR_IMPORTANCE = 4
MAX_SLICE_PARAMETERS = 4
NUM_COLOURS = 10
"""Steps of a contour's colours."""

GROWTH = 1.1
"""Importances take half a minute of 1000 trials: during a study they are computed again when it has grown by so much."""

POINT = "%{text}<br>%{xaxis.title.text} %{x}<br>%{yaxis.title.text} %{y}<extra></extra>"
"""What hovering a trial in the plane of two parameters shows."""

_STATUSES: dict[TrialState, TrialStatus] = {
    TrialState.COMPLETE: "completed",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


def collect(
    study: optuna.Study,
    *,
    tuning: Tuning,
    machine: Machine,
    locks: TrialLocks,
    budget: int,
    storage: str,
    analyse: bool = True,
    earlier: StudyReport | None = None,
) -> StudyReport:
    """Return what is known of a study now, from its storage and its run folders.

    Args:
        study: in its storage.
        tuning: what it searches.
        machine: where its runs are.
        locks: who works on which trial.
        budget: completed trials wanted.
        storage: its address.
        analyse: whether to have importances and figures; of 1000 trials they take half a minute.
        earlier: a report whose importances and figures are kept while the study has not grown by `GROWTH`.
    """
    frozen = study.get_trials(deepcopy=False)
    folders = {trial.number: _folders(trial, machine=machine) for trial in frozen}
    measured = {number: _measurements(found, tuning=tuning) for number, found in folders.items()}
    trials = tuple(_trial(t, tuning=tuning, folders=folders[t.number], locks=locks, measured=measured[t.number]) for t in frozen)
    completed = [trial for trial in trials if trial.status == "completed" and trial.value is not None]
    best = _best(completed, maximize=tuning.maximize) if completed else None
    paper = next((trial for trial in completed if trial.is_paper), None)
    counts = {status: sum(trial.status == status for trial in trials) for status in get_args(TrialStatus)}
    counts |= {
        "resumed": sum(trial.resumed > 0 for trial in trials),
        "repeated": sum(trial.repeat_of is not None for trial in trials),
    }
    objective = lookup(tuning.spec.objective)
    figures: dict[str, StudyFigure] = {}
    analysed = 0
    if analyse and earlier is not None and earlier.analysed <= len(completed) < GROWTH * earlier.analysed:
        known = {parameter.key: parameter.importance for parameter in earlier.parameters}
        parameters, figures, analysed = _parameters(tuning, importances=known), earlier.figures, earlier.analysed
    elif not analyse:
        parameters = _parameters(tuning, importances={})
    else:
        parameters = _parameters(tuning, importances=_importances(study, num_completed=len(completed)))
        analysed = len(completed)
        target = f"{tuning.spec.objective} [{objective.unit}]"
        figures = study_figures(study, parameters=parameters, trials=completed, objective=target, maximize=tuning.maximize)
    return StudyReport(
        name=tuning.name,
        title=tuning.spec.title,
        study=tuning.file.name,
        scale=tuning.scale,
        recipe=tuning.base.name,
        overrides=tuning.overrides,
        fixed=tuning.fixed,
        storage=shown_uri(storage),
        metric=tuning.spec.objective,
        unit=objective.unit,
        direction=objective.direction,
        online_metric=tuning.online_metric,
        seeds=tuning.spec.seeds,
        budget=budget,
        counts=counts,
        parameters=parameters,
        trials=trials,
        best=best.number if best else None,
        paper=paper.number if paper else None,
        best_against_paper=_difference(measured[best.number], measured[paper.number]) if best and paper else None,
        problems=_problems(completed, measured=measured),
        analysed=analysed,
        figures=figures,
        sampler={"kind": "tpe", **tuning.spec.sampler.model_dump(mode="json")},
        pruner=tuning.spec.pruner.model_dump(mode="json"),
    )


def send_report(report: StudyReport, *, machine: Machine) -> str | None:
    """Show the study in MLflow as a run of its own; return one sentence when that was not possible."""
    counts = {f"study/{status}": float(number) for status, number in report.counts.items()}
    values = {trial.number: trial.value for trial in report.trials}
    best = values[report.best] if report.best is not None else None
    metrics = counts | ({f"study/best_{report.metric}": best} if best is not None else {})
    published = publish(
        "study",
        name=report.name,
        machine=machine,
        files={
            STUDY_FILE: report.model_dump_json(indent=1),
            **{f"figures/{name}.plotly.json": figure.model_dump_json() for name, figure in report.figures.items()},
        },
        tags={
            "mlflow.note.content": "\n\n".join(filter(None, [report.title, *findings(report)])),
            "obowlab.study": report.name,
            "obowlab.recipe": report.recipe,
            "obowlab.scale": report.scale,
            "obowlab.storage": report.storage,
        },
        metrics=metrics,
    )
    return published.warning


# --------------------------------------------------------------------------------------------------------------- trials


def _measurements(folders: Mapping[int, RunFolder | None], *, tuning: Tuning) -> dict[int, dict[str, Any]]:
    """Return the objective's measurement on every finished run of a trial that is here, by seed."""
    found = {}
    for seed, folder in folders.items():
        if folder is not None and folder.state.status in TRAINED:
            try:
                found[seed] = objective_of(folder, tuning=tuning)
            except UserError:
                continue  # measured with another protocol since; the storage keeps the value
    return found


def _folders(trial: FrozenTrial, *, machine: Machine) -> dict[int, RunFolder | None]:
    folders: dict[int, RunFolder | None] = {}
    for seed, name in trial.user_attrs.get("run_folders", {}).items():
        path = machine.runs_root / name
        try:
            folders[int(seed)] = RunFolder.open(path) if os.path.lexists(path / "run.json") else None
        except DAMAGED as error:
            warn_once(damage_of(path, error))
            folders[int(seed)] = None
    return folders


def _trial(
    trial: FrozenTrial,
    *,
    tuning: Tuning,
    folders: Mapping[int, RunFolder | None],
    locks: TrialLocks,
    measured: Mapping[int, Mapping[str, Any]],
) -> StudyTrial:
    status = _STATUSES[trial.state]
    if status == "running" and not locks.is_held(trial.number):
        status = "stopped"
    attributes = trial.user_attrs
    runs = tuple(_run(seed, folder, attributes=attributes, measured=measured.get(seed)) for seed, folder in folders.items())
    value = trial.value if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) else None
    return StudyTrial(
        number=trial.number,
        status=status,
        params={key: tuning.value_of(key, param) for key, param in trial.params.items() if key in tuning.spec.parameters},
        value=value,
        interval=_interval(list(measured.values())) if trial.state == TrialState.COMPLETE else None,
        online=tuple(sorted(trial.intermediate_values.items())),
        is_paper=bool(attributes.get(PAPER)),
        is_recipe=bool(attributes.get(RECIPE)),
        is_given=bool(attributes.get(GIVEN)),
        resumed=len(attributes.get("resumed", [])),
        repeat_of=attributes.get("repeat_of"),
        message=str(attributes.get("message", "")),
        started_at=trial.datetime_start.timestamp() if trial.datetime_start else None,
        finished_at=trial.datetime_complete.timestamp() if trial.datetime_complete else None,
        runs=runs,
    )


def _run(seed: int, folder: RunFolder | None, *, attributes: Mapping[str, Any], measured: Mapping[str, Any] | None) -> StudyRun:
    state = folder.current_state() if folder is not None else None
    return StudyRun(
        seed=seed,
        run_id=attributes["runs"][str(seed)],
        status=state.status if state else "missing",
        step=state.step if state else 0,
        total_steps=state.total_steps if state else None,
        mlflow_run_id=attributes.get("mlflow_runs", {}).get(str(seed)),
        value=measured["value"] if measured else None,
        interval=measured["interval"] if measured else None,
    )


def _interval(measured: Iterable[Mapping[str, Any]]) -> float | None:
    """Return the half-width over seeds and episodes (or images), as tables have it."""
    observations = _observations(measured)
    return estimate(observations).interval if observations is not None else None


def _difference(one: Mapping[int, Mapping[str, Any]], other: Mapping[int, Mapping[str, Any]]) -> StudyDifference | None:
    """Return the mean difference on the same episodes (or images), over the seeds that both have."""
    seeds = sorted(set(one) & set(other))
    first, second = (_observations([measured[seed] for seed in seeds]) for measured in (one, other))
    alike = all(one[seed]["protocol_hash"] == other[seed]["protocol_hash"] for seed in seeds)
    if not alike or first is None or second is None:
        return None
    return StudyDifference.model_validate(asdict(estimate(first - second)))


def _observations(measured: Iterable[Mapping[str, Any]]) -> Matrix | None:
    return stacked([unpack(result["samples"]) if result.get("samples") else None for result in measured])


def _problems(completed: Sequence[StudyTrial], *, measured: Mapping[int, Mapping[int, Mapping[str, Any]]]) -> tuple[str, ...]:
    hashes = {result["protocol_hash"] for trial in completed for result in measured[trial.number].values()}
    problems = []
    if len(hashes) > 1:
        problems.append("Trials were measured on different images or with different protocols: their values do not compare.")
    away = [trial.number for trial in completed if len(measured[trial.number]) < len(trial.runs)]
    if away:
        shown = ", ".join(map(str, away[:10]))
        problems.append(f"The results of trial {shown} are not in this run store: their intervals are not known.")
    return tuple(problems)


# -------------------------------------------------------------------------------------------------------------- figures


def _parameters(tuning: Tuning, *, importances: Mapping[str, float | None]) -> tuple[StudyParameter, ...]:
    return tuple(
        StudyParameter(
            key=key,
            kind=parameter.kind,
            low=getattr(parameter, "low", None),
            high=getattr(parameter, "high", None),
            log=getattr(parameter, "log", False),
            choices=getattr(parameter, "choices", ()),
            paper=tuning.spec.paper.get(key),
            importance=importances.get(key),
        )
        for key, parameter in tuning.spec.parameters.items()
    )


def _importances(study: optuna.Study, *, num_completed: int) -> dict[str, float]:
    if num_completed < MIN_TRIALS_FOR_IMPORTANCE:
        return {}
    try:
        return dict(optuna.importance.FanovaImportanceEvaluator(seed=0).evaluate(_straightened(study)))
    except (ValueError, RuntimeError):  # all values are the same: there is nothing to explain
        return {}


def _straightened(study: optuna.Study) -> optuna.Study:
    """Return a study of the completed trials, parameters that are searched by their logarithm replaced by it.

    Optuna's fANOVA takes a range evenly: of 0.005 to 0.5 it would ask about little but what lies above 0.05.
    """
    straight = optuna.create_study(directions=study.directions)
    for trial in study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]):
        params, space = dict(trial.params), dict(trial.distributions)
        for key, range_ in trial.distributions.items():
            if isinstance(range_, FloatDistribution | IntDistribution) and range_.log:
                params[key] = math.log(params[key])
                space[key] = FloatDistribution(math.log(range_.low), math.log(range_.high))
        straight.add_trial(optuna.trial.create_trial(params=params, distributions=space, values=trial.values))
    return straight


def _known(importances: Mapping[str, float]) -> optuna.importance.BaseImportanceEvaluator:
    """Return an evaluator that answers with importances computed before: Optuna's figure would compute them once more."""

    class Known(optuna.importance.BaseImportanceEvaluator):
        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            return dict(importances)

    return Known()


def study_figures(
    study: optuna.Study, *, parameters: Sequence[StudyParameter], trials: Sequence[StudyTrial], objective: str, maximize: bool
) -> dict[str, StudyFigure]:
    """Return Optuna's figures, with the paper's and the best point in the contour and intervals in the history.

    Args:
        study: in its storage.
        parameters: with their importances.
        trials: the completed ones, in the order of their numbers.
        objective: its name and unit.
        maximize: whether more is better.
    """
    if len(trials) < 2:
        return {}
    from optuna.visualization import plot_contour, plot_optimization_history, plot_param_importances, plot_slice

    ranked = sorted(parameters, key=lambda parameter: -(parameter.importance or 0.0))
    history = plot_optimization_history(study, target_name=objective)
    history.data[0].error_y = {"array": [trial.interval or 0.0 for trial in trials]}
    sliced = plot_slice(study, params=[parameter.key for parameter in ranked[:MAX_SLICE_PARAMETERS]], target_name=objective)
    sliced.update_traces(marker_size=9, hovertemplate="trial %{marker.color}<br>%{x}<br>%{y:.2f}<extra></extra>")
    figures = {"history": history, "slice": sliced}
    varied = [p.key for p in ranked if p.kind != "categorical" and len({trial.params[p.key] for trial in trials}) > 1]
    if len(varied) > 1:
        x, y = sorted(varied[:2])  # Optuna's order
        contour = plot_contour(study, params=[x, y], target_name=objective)
        points = next(contour.select_traces({"type": "scatter"}))
        points.update(text=[f"trial {trial.number}: {trial.value:.2f}" for trial in trials], hovertemplate=POINT)
        contour.update_traces(
            {"colorbar": {"title": {"side": "right"}}, **_colours(trials, maximize=maximize)}, {"type": "contour"}
        )
        figures["contour"] = contour.add_trace(_marks(trials, x=x, y=y, maximize=maximize))
    known = {parameter.key: parameter.importance for parameter in ranked if parameter.importance is not None}
    if known:
        figures["importance"] = plot_param_importances(study, evaluator=_known(known), target_name=objective)
        figures["importance"].update_yaxes(title=None)
        bars = figures["importance"].data[0]
        shares = [known[key] for key in bars.y]  # Optuna's add up to 1, whatever several parameters explain together
        bars.update(x=shares, text=[f"{share:.2f}" for share in shares], hovertemplate="%{y}: %{x:.3f}<extra></extra>")
    for figure in figures.values():
        figure.update_layout(template=None, title=None)
    return {title: StudyFigure.model_validate_json(figure.to_json()) for title, figure in figures.items()}


def _colours(trials: Sequence[StudyTrial], *, maximize: bool) -> dict[str, Any]:
    """Return the range of a contour's colours, the better half of the trials and as much again: failures would fill it."""
    values = sorted((trial.value or 0.0 for trial in trials), reverse=maximize)
    best, middle = values[0], values[len(values) // 2]
    ends = sorted((best, 2 * middle - best))
    if ends[0] == ends[1]:
        return {}
    size = (ends[1] - ends[0]) / NUM_COLOURS
    levels = {"start": ends[0], "end": ends[1], "size": size, "coloring": "heatmap"}
    return {"zmin": ends[0], "zmax": ends[1], "autocontour": False, "contours": levels}


def _marks(trials: Sequence[StudyTrial], *, x: str, y: str, maximize: bool) -> dict[str, Any]:
    """Return the trace of the paper's and the best point in the plane of two parameters."""
    marked = [(trial, "the paper's point", "diamond-open") for trial in trials if trial.is_paper][:1]
    marked.append((_best(trials, maximize=maximize), "the best trial", "circle-open"))
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "paper ◇ and best ○",
        "x": [trial.params[x] for trial, _, _ in marked],
        "y": [trial.params[y] for trial, _, _ in marked],
        "text": [f"{label}: trial {trial.number}, {trial.value:.2f}" for trial, label, _ in marked],
        "hovertemplate": POINT,
        "marker": {"symbol": [symbol for _, _, symbol in marked], "size": 16, "color": "#c55300", "line": {"width": 3}},
    }


def _best(trials: Sequence[StudyTrial], *, maximize: bool) -> StudyTrial:
    """Return the best of the completed trials, the first of equal ones."""
    sign = 1.0 if maximize else -1.0
    return max(trials, key=lambda trial: sign * (trial.value or 0.0))


class Reporter:
    """Writes the report after every trial and sends it at the end; the threads of a worker share it."""

    def __init__(
        self, study: optuna.Study, *, tuning: Tuning, machine: Machine, locks: TrialLocks, budget: int, storage: str
    ) -> None:
        self._collect = partial(collect, study, tuning=tuning, machine=machine, locks=locks, budget=budget, storage=storage)
        self._machine = machine
        self._locks = locks
        self._turn = threading.Lock()

    def look(self) -> StudyReport:
        """Return the report of this moment quickly: without importances and figures, and without writing anything."""
        return self._collect(analyse=False)

    def write(self) -> StudyReport:
        """Write `study.json` as things stand, with the importances and figures that are there while they are recent enough."""
        return self._write(earlier=read_study(self._locks.folder / STUDY_FILE))

    def send(self) -> tuple[StudyReport, str | None]:
        """Write the report, all of it new, and show it in MLflow; return one sentence when that was not possible."""
        report = self._write(earlier=None)
        with self._locks.alone():
            return report, send_report(report, machine=self._machine)

    def _write(self, *, earlier: StudyReport | None) -> StudyReport:
        """Write the report; collect it again where another process wrote a later one meanwhile, and leave a newer version's."""
        path, before = self._locks.folder / STUDY_FILE, None
        with self._turn:
            while True:
                report = self._collect(earlier=earlier)
                with self._locks.alone():
                    there = read_study(path)
                    if there.format > FORMAT:
                        return report
                    if there == before or not there.is_later_than(report):  # the former: of a storage that was put back
                        write_atomic(path, report.model_dump_json(indent=1), shared=True)
                        return report
                before = there
