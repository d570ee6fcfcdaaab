"""A study as its file `RUNS_ROOT/.studies/NAME/study.json` tells it; knows nothing of how studies are carried out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STUDIES = ".studies"
FILE = "study.json"
STATES = {"fail": "failed"}
"""Words of the tuning library that are not ours."""


@dataclass(frozen=True)
class Trial:
    """One point that was tried.

    Attributes:
        number: from 0.
        state: `complete`, `pruned`, `failed`, `running` or `waiting`, in small letters.
        params: dotted key to value.
        value: what was reached, in the study's unit; None when nothing was.
        interval: half-width of its 95 % interval; None when unknown.
        intermediate: (step, value) during training.
        run_ids: of the runs that make it.
    """

    number: int
    state: str
    params: Mapping[str, Any]
    value: float | None
    interval: float | None
    intermediate: tuple[tuple[float, float], ...]
    run_ids: tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """All that a report shows of a study.

    Attributes:
        name: of the study and its folder.
        title: what it looks for.
        metric: what is optimised; empty when the file does not say.
        direction: `maximize` or `minimize`.
        trials: by number.
        importances: dotted key to its share of the variance, 0 to 1; empty when too few trials are complete.
        paper: dotted key to the paper's value.
        problem: one sentence when the file could not be read; everything else is empty then.
    """

    name: str
    title: str = ""
    metric: str = ""
    direction: str = "maximize"
    trials: tuple[Trial, ...] = ()
    importances: Mapping[str, float] = field(default_factory=dict)
    paper: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""

    @property
    def complete(self) -> tuple[Trial, ...]:
        """The trials that reached a value, the best first."""
        done = [trial for trial in self.trials if trial.state == "complete" and trial.value is not None]
        sign = -1.0 if self.direction == "maximize" else 1.0
        return tuple(sorted(done, key=lambda trial: (sign * (trial.value or 0.0), trial.number)))

    @property
    def params(self) -> tuple[str, ...]:
        """Every parameter, the most important first."""
        names = {name for trial in self.trials for name in trial.params}
        return tuple(sorted(names, key=lambda name: (-self.importances.get(name, 0.0), name)))

    def is_paper(self, trial: Trial) -> bool:
        """Return whether a trial is the paper's point."""
        return bool(self.paper) and all(trial.params.get(name) == value for name, value in self.paper.items())


def read_studies(runs_root: Path) -> tuple[Study, ...]:
    """Return every study of a run store, by name; one whose file is damaged says so."""
    return tuple(read_study(path) for path in sorted((runs_root / STUDIES).glob(f"*/{FILE}")))


def read_study(path: Path) -> Study:
    """Read one study's file."""
    name = path.parent.name
    try:
        return _study(json.loads(path.read_bytes()), name=name)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return Study(name=name, problem=f"{STUDIES}/{name}/{FILE} cannot be read ({error}).")


def _study(content: Mapping[str, Any], *, name: str) -> Study:
    trials = tuple(_trial(trial) for trial in content.get("trials", ()))
    return Study(
        name=str(content.get("name", name)),
        title=str(content.get("title") or ""),
        metric=str(content.get("metric") or ""),
        direction=str(content.get("direction") or "maximize").lower(),
        trials=tuple(sorted(trials, key=lambda trial: trial.number)),
        importances={str(key): float(value) for key, value in (content.get("importances") or {}).items()},
        paper=dict(content.get("paper") or {}),
    )


def _trial(content: Mapping[str, Any]) -> Trial:
    points = content.get("intermediate") or {}
    pairs = points.items() if isinstance(points, Mapping) else points
    state = str(content.get("state", "")).lower()
    return Trial(
        number=int(content["number"]),
        state=STATES.get(state, state),
        params=dict(content.get("params") or {}),
        value=_number(content.get("value")),
        interval=_number(content.get("interval")),
        intermediate=tuple((float(step), float(value)) for step, value in pairs),
        run_ids=tuple(map(str, content.get("run_ids") or ())),
    )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
