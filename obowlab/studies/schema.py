"""`RUNS_ROOT/.studies/NAME/study.json`: all that is known of a study; written by `studies.summary`, read by the report.

Knows nothing of Optuna. `FORMAT` is raised when a field changes its meaning, or one that some version reads goes away.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from obowlab.files.opening import read_file

STUDIES = ".studies"
"""Folder of the run store for everything about studies."""

STUDY_FILE = "study.json"
LARGEST_STUDY = 2**30
"""Its figures hold every trial."""

FORMAT = 1

TrialStatus = Literal["completed", "pruned", "failed", "running", "stopped", "waiting"]


class _Part(BaseModel):
    """Lenient model: unknown fields are ignored, missing ones get defaults."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class StudyParameter(_Part):
    """One searched setting.

    Attributes:
        key: of the recipe, dotted.
        kind: `float`, `int` or `categorical`.
        low: smallest value; None for a categorical one.
        high: largest value; None for a categorical one.
        log: whether it is searched by its logarithm.
        choices: of a categorical one, else empty.
        paper: the paper's value; None when the study names none.
        importance: share of the objective's variance over the search space that it explains alone, 0 to 1, by a model of the
            completed trials (fANOVA); the rest is of several parameters together. None while there are too few trials.
    """

    key: str
    kind: str = ""
    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: tuple[Any, ...] = ()
    paper: Any = None
    importance: float | None = None


class StudyRun(_Part):
    """The run behind one seed of a trial.

    Attributes:
        run_id: folder name and MLflow run name.
        seed: of weights and data.
        status: of the run; `missing` when its folder is not here.
        step: optimiser updates done.
        total_steps: updates of the whole training; None when unknown.
        mlflow_run_id: in the tracking store; None when it was never sent.
        value: the objective; None while it is not measured.
        interval: half-width of its 95 % interval over episodes or images; None with `value`.
    """

    run_id: str
    seed: int = 0
    status: str = ""
    step: int = 0
    total_steps: int | None = None
    mlflow_run_id: str | None = None
    value: float | None = None
    interval: float | None = None


class StudyTrial(_Part):
    """One trial.

    Attributes:
        number: from 0, as in Optuna.
        status: a `TrialStatus`; `stopped` is one that is open and that no worker works on: the next command resumes it.
        params: key of the recipe to value; empty while it is waiting.
        value: mean of the objective over the seeds; for a pruned trial its last result during training; else None.
        interval: half-width of the 95 % interval over seeds and episodes (or images), as tables have it; over episodes alone
            for one seed; None without a final value.
        online: results during training of the first seed, [epoch, value] in order.
        is_paper: whether it is the paper's own point.
        is_recipe: whether it is the base recipe's own point.
        is_given: whether it is another point that the study file names.
        resumed: how many times another worker resumed it.
        repeat_of: the earlier trial with the same point, or `finished runs` when others had trained it; nothing was trained.
        message: why it was pruned or failed.
        started_at: seconds since 1970; None while waiting.
        finished_at: seconds since 1970; None while open.
        runs: one per seed.
    """

    number: int
    status: str = ""
    params: dict[str, Any] = {}
    value: float | None = None
    interval: float | None = None
    online: tuple[tuple[int, float], ...] = ()
    is_paper: bool = False
    is_recipe: bool = False
    is_given: bool = False
    resumed: int = 0
    repeat_of: int | str | None = None
    message: str = ""
    started_at: float | None = None
    finished_at: float | None = None
    runs: tuple[StudyRun, ...] = ()

    @property
    def final_value(self) -> float | None:
        """The objective of a completed trial; None for all others."""
        return self.value if self.status == "completed" else None


class StudyDifference(_Part):
    """A paired difference.

    Attributes:
        value: in the objective's unit.
        interval: half-width of its 95 % interval.
        seeds: how many seeds it is the mean of.
        p: two-sided p value of the hypothesis that it is 0; None when unknown.
    """

    value: float
    interval: float
    seeds: int = 1
    p: float | None = None


class StudyFigure(_Part):
    """A plotly figure in JSON values."""

    data: tuple[dict[str, Any], ...]
    layout: dict[str, Any] = {}


class StudyReport(_Part):
    """A study as it stands.

    Attributes:
        format: of this schema.
        name: in the storage.
        title: what is searched.
        study: file it was read from.
        scale: `paper`, `tiny` or `demo`.
        recipe: base recipe.
        overrides: what all trials change of it, as `key=value`.
        fixed: those of them that `--set` gave, beside the study file's own.
        storage: address without passwords.
        metric: the objective; empty when unknown.
        unit: of its values.
        direction: `max` or `min`.
        online_metric: what `online` holds; None without pruning.
        seeds: of every trial.
        budget: completed trials wanted; None when unknown.
        counts: status to number of trials, all statuses; `resumed` and `repeated` count trials across them.
        parameters: the search space.
        trials: by number.
        best: number of the best completed trial; None while there is none.
        paper: number of the paper's own trial, completed; None otherwise.
        best_against_paper: best minus paper on the same episodes or images, with the interval of the paired difference; None
            when either is missing. The best of many is partly luck: its gain is an upper bound until another seed confirms it.
        problems: what keeps values from being comparable, or the file from being read, a sentence each.
        analysed: completed trials that importances and figures are of; fewer than there are while a study is worked on.
        figures: `contour`, `history`, `importance`, `slice`; those that need more completed trials are left out.
        sampler: settings of the sampler.
        pruner: settings of the pruner.
    """

    format: int = FORMAT
    name: str
    title: str = ""
    study: str = ""
    scale: str = ""
    recipe: str = ""
    overrides: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    storage: str = ""
    metric: str = ""
    unit: str = ""
    direction: str = "max"
    online_metric: str | None = None
    seeds: tuple[int, ...] = ()
    budget: int | None = None
    counts: dict[str, int] = {}
    parameters: tuple[StudyParameter, ...] = ()
    trials: tuple[StudyTrial, ...] = ()
    best: int | None = None
    paper: int | None = None
    best_against_paper: StudyDifference | None = None
    problems: tuple[str, ...] = ()
    analysed: int = 0
    figures: dict[str, StudyFigure] = {}
    sampler: dict[str, Any] = {}
    pruner: dict[str, Any] = {}

    @property
    def completed(self) -> tuple[StudyTrial, ...]:
        """The trials with a final value."""
        return tuple(trial for trial in self.trials if trial.final_value is not None)

    @property
    def best_trial(self) -> StudyTrial | None:
        """The best trial; None while there is none."""
        return next((trial for trial in self.completed if trial.number == self.best), None)

    @property
    def paper_trial(self) -> StudyTrial | None:
        """The paper's own point, measured here; None while it is not."""
        return next((trial for trial in self.completed if trial.is_paper), None)

    @property
    def ranked(self) -> tuple[StudyParameter, ...]:
        """The parameters, the most important first."""
        return tuple(sorted(self.parameters, key=lambda parameter: (-(parameter.importance or 0.0), parameter.key)))

    def is_later_than(self, other: StudyReport) -> bool:
        """Return whether this tells more of the same study: trials are added and end, and neither is ever undone."""
        both = (self, other)
        begun = [(report.storage, [trial.started_at for trial in report.trials[:1]]) for report in both]
        told = [(len(report.trials), sum(trial.finished_at is not None for trial in report.trials)) for report in both]
        return begun[0] == begun[1] and told[0] > told[1]

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return self.model_dump(mode="json")


def read_studies(runs_root: Path) -> tuple[StudyReport, ...]:
    """Return every study of a run store, by name; one whose file is damaged names the reason."""
    return tuple(read_study(path) for path in sorted((runs_root / STUDIES).glob(f"*/{STUDY_FILE}")))


def read_study(path: Path) -> StudyReport:
    """Read one `study.json`, of a newer version too as far as it can be read; else return a report of nothing but the reason."""
    content = b""
    try:
        content = read_file(path, limit=LARGEST_STUDY)
        return StudyReport.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}"
        if _is_newer(content):
            reason = "it was written by a newer version of obowlab: update obowlab, and leave the file as it is"
    except OSError as error:
        reason = str(error.strerror)
    name = path.parent.name
    written = FORMAT + 1 if _is_newer(content) else FORMAT
    return StudyReport(format=written, name=name, problems=(f"{STUDIES}/{name}/{STUDY_FILE} cannot be read: {reason}.",))


def _is_newer(content: bytes) -> bool:
    try:
        values = json.loads(content)
        return isinstance(values, dict) and int(values["format"]) > FORMAT
    except (ValueError, TypeError, LookupError, RecursionError):
        return False
