"""What is written down of every case, and the table that is made of it."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.stage import Stage


class BrokenError(Exception):
    """obowlab did not survive a fault as it must; the text says what was seen."""


@dataclass
class Case:
    """One scenario with its own folder and dice; what happens is counted here.

    Attributes:
        kind: of fault.
        seed: of the dice.
        place: an empty folder.
        stage: data, recipe and the undisturbed run.
        injected: faults that really hit something.
        sentences: those of them that were answered by one clear sentence; the others went on and came to the same end.
        lost: points that a run folder or MLflow lacks.
        doubled: points, MLflow runs and model versions there are twice.
        examples: generated inputs, for kinds that count them apart.
    """

    kind: str
    seed: int
    place: Path
    stage: Stage
    num_faults: int = 1
    injected: int = 0
    sentences: int = 0
    lost: int = 0
    doubled: int = 0
    examples: int = 0
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dice = random.Random(f"{self.kind} {self.seed}")

    def fault(self, note: str = "") -> None:
        """Count a fault that was injected; the note is shown if the case fails."""
        self.injected += 1
        if note:
            self.notes.append(note)

    def sentence(self, text: str = "") -> None:
        """Count the last fault as answered by a sentence."""
        self.sentences += 1
        if text:
            self.notes.append(f"  {text}")


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
        title: for the table.
        play: injects `num_faults` faults into a case and judges; raises `BrokenError`.
        share: of 1000 faults, how many are of this kind.
        per_case: faults that share one run.
        lacking: returns why this machine cannot play it, or None.
        apart: counted in `examples`, not among the faults.
    """

    title: str
    play: Callable[[Case], None]
    share: int
    per_case: int = 1
    lacking: Callable[[], str | None] = lambda: None
    apart: bool = False


@dataclass(frozen=True)
class Outcome:
    """How one case ended; `problem` is empty when everything survived."""

    kind: str
    seed: int
    injected: int
    sentences: int
    lost: int
    doubled: int
    examples: int
    elapsed_s: float
    problem: str = ""
    notes: tuple[str, ...] = ()

    @property
    def survived(self) -> int:
        """Faults that ended well; a case that failed counts as one that did not."""
        return self.injected if not self.failed else max(0, self.injected - 1)

    @property
    def failed(self) -> bool:
        """Whether anything is wrong."""
        return bool(self.problem or self.lost or self.doubled)


def play(kind: Kind, case: Case) -> Outcome:
    """Play a case and return how it ended; whatever it raises is a failure of this case alone."""
    began = time.monotonic()
    problem = ""
    try:
        kind.play(case)
    except BrokenError as error:
        problem = str(error)
    # The suite goes on with the other cases; the failure is shown with the command that repeats it.
    except Exception as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        where = f" at {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace is not None else ""
        problem = f"{type(error).__name__}{where}: {error}"
    return Outcome(
        kind=case.kind,
        seed=case.seed,
        injected=case.injected,
        sentences=case.sentences,
        lost=case.lost,
        doubled=case.doubled,
        examples=case.examples,
        elapsed_s=round(time.monotonic() - began, 2),
        problem=problem,
        notes=tuple(case.notes),
    )


# --------------------------------------------------------------------------------------------------------- plan and file

MORE = 115
"""So many percent of the faults that are asked for are planned: some find nothing to hit any more."""


def plan(kinds: dict[str, Kind], *, faults: int, seed: int) -> list[tuple[str, int, int]]:
    """Return the cases (kind, seed, faults) that inject at least so many faults, mixed; a function of its arguments.

    Every kind gets at least one case, and kinds that are counted apart get exactly one.
    """
    weight = sum(kind.share for kind in kinds.values() if not kind.apart)
    cases: list[tuple[str, int, int]] = []
    for name, kind in kinds.items():
        wanted = 1 if kind.apart else max(1, -(-faults * kind.share * MORE // (100 * weight)))
        number = -(-wanted // kind.per_case)
        cases += [(name, seed * 1000 + case, -(-wanted // number)) for case in range(number)]
    random.Random(seed).shuffle(cases)
    return cases


def append(path: Path, outcome: Outcome) -> None:
    """Add an outcome to the state file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(outcome)) + "\n")


def read(path: Path) -> list[Outcome]:
    """Return the outcomes of a state file; a last line that was cut by a kill is left out."""
    outcomes = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            values: dict[str, Any] = json.loads(line)
        except ValueError:
            continue
        outcomes.append(Outcome(**{**values, "notes": tuple(values["notes"])}))
    return outcomes


# ---------------------------------------------------------------------------------------------------------------- table

HEADINGS = ("fault", "injected", "survived", "continued, equal", "clear sentence", "points lost", "doubled", "slowest")


def rows(kinds: dict[str, Kind], outcomes: Sequence[Outcome]) -> list[tuple[str, ...]]:
    """Return the cells of the table: a row per kind that was played, then the total; kinds counted apart come last."""
    cells = [_row(kind.title, [one for one in outcomes if one.kind == name]) for name, kind in kinds.items() if not kind.apart]
    cells = [row for row in cells if row[1] != "0" or row[-1] != "-"]
    cells.append(_row("total", [one for one in outcomes if not kinds[one.kind].apart]))
    for name, kind in kinds.items():
        if kind.apart and (ours := [one for one in outcomes if one.kind == name]):
            made, well = sum(one.examples for one in ours), sum(one.examples for one in ours if not one.failed)
            sentences, slowest = sum(one.sentences for one in ours), max(one.elapsed_s for one in ours)
            cells.append((kind.title, str(made), str(well), str(well - sentences), str(sentences), "-", "-", f"{slowest:.0f} s"))
    return cells


def _row(title: str, outcomes: Iterable[Outcome]) -> tuple[str, ...]:
    ours = list(outcomes)
    injected, survived = sum(one.injected for one in ours), sum(one.survived for one in ours)
    sentences = sum(one.sentences for one in ours)
    slowest = f"{max(one.elapsed_s for one in ours):.1f} s" if ours else "-"
    counts = (
        injected,
        survived,
        max(0, survived - sentences),
        sentences,
        sum(o.lost for o in ours),
        sum(o.doubled for o in ours),
    )
    return (title, *map(str, counts), slowest)


def failures(outcomes: Sequence[Outcome]) -> list[str]:
    """Return what went wrong, case by case, each with the command that repeats it alone."""
    told = []
    for one in outcomes:
        if one.failed:
            what = one.problem or f"{one.lost} points lost, {one.doubled} doubled"
            steps = "".join(f"\n    {note}" for note in one.notes[-12:])
            told.append(f"{one.kind}: {what}{steps}\n  again: python -m tests.chaos --only {one.kind} --seed {one.seed}")
    return told
