"""The shape of `study.json`: what is known of a study, as plain values that reports are drawn from. Knows nothing of Optuna.

`FORMAT` is raised when a field changes its meaning or goes away.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from obowlab.tables.model import Estimate

FORMAT = 1

TrialStatus = Literal["completed", "pruned", "failed", "running", "stopped", "waiting"]


@dataclass(frozen=True)
class StudyParameter:
    """One searched setting.

    Attributes:
        key: of the recipe, dotted.
        kind: `float`, `int` or `categorical`.
        low: smallest value; None for a categorical one.
        high: largest value; None for a categorical one.
        log: whether it is searched by its logarithm.
        choices: of a categorical one, else empty.
        paper: the paper's value; None when the study names none.
        importance: share of the objective's variance over the completed trials that it explains (fANOVA), 0 to 1; None while
            there are too few trials.
    """

    key: str
    kind: str
    low: float | None
    high: float | None
    log: bool
    choices: tuple[Any, ...]
    paper: Any
    importance: float | None


@dataclass(frozen=True)
class StudyRun:
    """The run behind one seed of a trial.

    Attributes:
        seed: of weights and data.
        run_id: folder name and MLflow run name.
        status: of the run; `missing` when its folder is not here.
        step: optimiser updates done.
        total_steps: updates of the whole training; None when unknown.
        mlflow_run_id: in the tracking store; None when it was never sent.
        value: the objective; None while it is not measured.
        interval: half-width of its 95 % interval over episodes or images; None with `value`.
    """

    seed: int
    run_id: str
    status: str
    step: int
    total_steps: int | None
    mlflow_run_id: str | None
    value: float | None
    interval: float | None


@dataclass(frozen=True)
class StudyTrial:
    """One trial.

    Attributes:
        number: from 0, as in Optuna.
        status: `stopped` is one that is open and that no worker works on: the next command goes on with it.
        params: key of the recipe to value; empty while it is waiting.
        value: mean of the objective over the seeds; for a pruned trial its last result during training; else None.
        interval: half-width of the 95 % interval over seeds and episodes (or images), as tables have it; over episodes alone
            for one seed; None without a final value.
        online: results during training of the first seed, [epoch, value] in order.
        is_paper: whether it is the paper's own point.
        resumed: how many times another worker went on with it.
        repeat_of: the earlier trial with the same point, or `finished runs` when others had trained it; nothing was trained.
        message: why it was pruned or failed.
        started_at: seconds since 1970; None while waiting.
        finished_at: seconds since 1970; None while open.
        runs: one per seed.
    """

    number: int
    status: TrialStatus
    params: dict[str, Any]
    value: float | None
    interval: float | None
    online: tuple[tuple[int, float], ...]
    is_paper: bool
    resumed: int
    repeat_of: int | str | None
    message: str
    started_at: float | None
    finished_at: float | None
    runs: tuple[StudyRun, ...]


@dataclass(frozen=True)
class StudyReport:
    """A study as it stands.

    Attributes:
        format: of this shape.
        name: in the storage.
        title: what is searched.
        study: file it was read from.
        scale: `paper`, `tiny` or `demo`.
        recipe: base recipe.
        overrides: what all trials change of it, as `key=value`.
        storage: address without passwords.
        written_at: seconds since 1970.
        metric: the objective.
        unit: of its values.
        direction: `max` or `min`.
        online_metric: what `online` holds; None without pruning.
        seeds: of every trial.
        budget: completed trials wanted.
        counts: status to number of trials, all statuses; `resumed` and `repeated` count trials across them.
        parameters: the search space.
        trials: by number.
        best: number of the best completed trial; None while there is none.
        paper: number of the paper's own trial, completed; None otherwise.
        best_against_paper: best minus paper on the same episodes or images, with the interval of the paired difference; None
            when either is missing. The best of many is partly luck: its gain is an upper bound until another seed confirms it.
        problems: what keeps values from being comparable, a sentence each.
        figures: `history`, `contour`, `importance`, `slice` as plotly figures in JSON values; those that need more completed
            trials are left out.
        sampler: settings of the sampler.
        pruner: settings of the pruner.
    """

    format: int
    name: str
    title: str
    study: str
    scale: str
    recipe: str
    overrides: tuple[str, ...]
    storage: str
    written_at: float
    metric: str
    unit: str
    direction: str
    online_metric: str | None
    seeds: tuple[int, ...]
    budget: int
    counts: dict[str, int]
    parameters: tuple[StudyParameter, ...]
    trials: tuple[StudyTrial, ...]
    best: int | None
    paper: int | None
    best_against_paper: Estimate | None
    problems: tuple[str, ...]
    figures: dict[str, Any]
    sampler: dict[str, Any]
    pruner: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)
