"""A study as its file `RUNS_ROOT/.studies/NAME/study.json` tells it; knows nothing of how studies are carried out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

STUDIES = ".studies"
FILE = "study.json"


class Part(BaseModel):
    """Reads what it knows of a file that says more, and is content with less."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class StudyRun(Part):
    """The run behind one seed of a trial."""

    run_id: str
    seed: int = 0


class Trial(Part):
    """One point that was tried.

    Attributes:
        number: from 0.
        status: `completed`, `pruned`, `failed`, `running`, `stopped` or `waiting`.
        params: dotted key to value.
        value: what was reached; of a trial that is not completed, the last result during training.
        interval: half-width of its 95 % interval; None when unknown.
        is_paper: whether it is the paper's point.
        resumed: how many times it was gone on with.
        repeat_of: the earlier trial, or `finished runs`, whose value it has; None when it was trained itself.
        message: why it was stopped or failed.
        runs: one per seed.
    """

    number: int
    status: str = ""
    params: dict[str, Any] = {}
    value: float | None = None
    interval: float | None = None
    is_paper: bool = False
    resumed: int = 0
    repeat_of: int | str | None = None
    message: str = ""
    runs: tuple[StudyRun, ...] = ()

    @property
    def reached(self) -> float | None:
        """The final value; None while there is none."""
        return self.value if self.status == "completed" else None


class Parameter(Part):
    """One searched setting: its dotted key, whether by its logarithm, the paper's value, its share of the variance, 0 to 1."""

    key: str
    log: bool = False
    paper: Any = None
    importance: float | None = None


class Difference(Part):
    """A paired difference with the half-width of its 95 % interval."""

    value: float
    interval: float


class Study(Part):
    """All that a report shows of a study.

    Attributes:
        name: of the study.
        title: what it looks for.
        recipe: base recipe.
        overrides: what all trials change of it.
        metric: what is optimised; empty when the file does not say.
        unit: of its values.
        direction: `max` or `min`.
        seeds: of every trial.
        budget: completed trials wanted; None when unknown.
        parameters: the search space.
        trials: by number.
        best: number of the best trial; None while there is none.
        best_against_paper: best minus the paper's point on the same episodes or images; None when either is missing.
        problems: sentences on what is not comparable, or that the file cannot be read.
    """

    name: str
    title: str = ""
    recipe: str = ""
    overrides: tuple[str, ...] = ()
    metric: str = ""
    unit: str = ""
    direction: str = "max"
    seeds: tuple[int, ...] = ()
    budget: int | None = None
    parameters: tuple[Parameter, ...] = ()
    trials: tuple[Trial, ...] = ()
    best: int | None = None
    best_against_paper: Difference | None = None
    problems: tuple[str, ...] = ()

    @property
    def completed(self) -> tuple[Trial, ...]:
        """The trials that reached a value."""
        return tuple(trial for trial in self.trials if trial.reached is not None)

    @property
    def best_trial(self) -> Trial | None:
        """The best trial; None while there is none."""
        return next((trial for trial in self.completed if trial.number == self.best), None)

    @property
    def paper_trial(self) -> Trial | None:
        """The paper's own point, measured here; None while it is not."""
        return next((trial for trial in self.completed if trial.is_paper), None)

    @property
    def ranked(self) -> tuple[Parameter, ...]:
        """The parameters, the most important first."""
        return tuple(sorted(self.parameters, key=lambda parameter: (-(parameter.importance or 0.0), parameter.key)))


def read_studies(runs_root: Path) -> tuple[Study, ...]:
    """Return every study of a run store, by name; one whose file is damaged says so."""
    return tuple(read_study(path) for path in sorted((runs_root / STUDIES).glob(f"*/{FILE}")))


def read_study(path: Path) -> Study:
    """Read one study's file."""
    name = path.parent.name
    try:
        return Study.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return Study(name=name, problems=(f"{STUDIES}/{name}/{FILE} cannot be read: {where or 'it'}: {first['msg']}.",))
    except OSError as error:
        return Study(name=name, problems=(f"{STUDIES}/{name}/{FILE} cannot be read: {error.strerror}.",))
