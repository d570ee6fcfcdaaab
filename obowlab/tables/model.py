"""A results table: rows of recipes, columns of metrics, ours beside the paper's, each cell with its origin.

This is what `obowlab table` prints, `obowlab report` draws and MLflow keeps; plain values, built by `tables.build` from the
run store alone and turned into text by `tables.render`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["agrees", "disagrees", "higher", "lower", "indistinguishable", "one seed"]
"""How a row differs from the base row, by a paired test on identical episodes and seeds, corrected for the number of rows.

In the paper's direction or the opposite; higher or lower where the paper has no value. One seed cannot tell, whatever its
episodes say: another seed would be another network.
"""

Status = Literal["missing", "created", "running", "interrupted", "failed", "unevaluated", "finished"]


@dataclass(frozen=True)
class Estimate:
    """A mean with its uncertainty.

    Attributes:
        value: percent.
        interval: half-width of the 95 % interval, percent; over seeds and episodes (or images) when there are several seeds,
            over episodes (or images) alone when there is one.
        seeds: how many seeds it is the mean of.
        p: two-sided p value of the hypothesis that it is 0; in a table only for differences over two or more seeds.
    """

    value: float
    interval: float
    seeds: int
    p: float | None = None


@dataclass(frozen=True)
class Cell:
    """One metric of one row.

    Attributes:
        metric: as in `runs.metrics`, for example `fewshot_5shot`.
        paper: the paper's value, percent; None when it gives none.
        ours: the mean over the finished seeds; None while there is none.
        random: the mean of the untrained weights of the same seeds; None when they were not measured.
        against_paper: ours minus the paper's, percent; only at the paper's scale.
        against_base: ours minus the base row's, over the seeds that both rows have; None for the base row itself.
        verdict: of `against_base`: whether its sign is the paper's, or, where the paper has no value, which it is; None where
            there is no difference here, or none in the paper.
        p_holm: p of `against_base` after Holm's correction over the rows of the table, which decides the verdict; None without p.
        problem: one sentence when there are results that cannot be compared (another protocol, other images).
    """

    metric: str
    paper: float | None
    ours: Estimate | None
    random: Estimate | None
    against_paper: float | None
    against_base: Estimate | None
    verdict: Verdict | None
    p_holm: float | None = None
    problem: str = ""


@dataclass(frozen=True)
class RunRef:
    """The run behind one seed of a row: where a cell's number comes from.

    Attributes:
        run_id: folder name and MLflow run name; what it would be called when it is missing.
        seed: of weights and data.
        status: of the run; `missing` when there is none.
        step: optimiser updates done.
        total_steps: updates of the whole training; None when unknown.
        message: why it failed or stopped.
        fingerprint: hash of recipe and seed.
        commit: of the code; None when unknown.
        dirty: whether that checkout had changes.
        data_hash: of the training images.
        mlflow_run_id: in the tracking store; None when it was never sent.
        elapsed_s: seconds of training, summed over its starts; None when unknown.
        values: metric -> percent, for the student's finished measurements.
    """

    run_id: str
    seed: int
    status: Status
    step: int
    total_steps: int | None
    message: str
    fingerprint: str
    commit: str | None
    dirty: bool | None
    data_hash: str | None
    mlflow_run_id: str | None
    elapsed_s: float | None
    values: dict[str, float]


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        key: short name, as in `--rows`.
        label: as in the paper.
        group: heading above it; empty for none.
        recipe: base recipe at this scale.
        overrides: dotted key -> value, what the row changes of it.
        epochs: of training, all stages together.
        is_base: whether the other rows are compared with this one.
        cells: one per column.
        runs: one per seed, of the last stage.
        verdict: of the table's primary column.
        notes: numbers of the footnotes that belong to the row, from 1.
    """

    key: str
    label: str
    group: str
    recipe: str
    overrides: dict[str, Any]
    epochs: int
    is_base: bool
    cells: tuple[Cell, ...]
    runs: tuple[RunRef, ...]
    verdict: Verdict | None
    notes: tuple[int, ...]


@dataclass(frozen=True)
class Column:
    """One metric.

    Attributes:
        metric: as in `runs.metrics`.
        label: as in the paper.
        unit: of its values.
    """

    metric: str
    label: str
    unit: str


@dataclass(frozen=True)
class Table:
    """A table at one scale.

    Attributes:
        name: `table1`, ...
        title: what it compares, with the paper's number.
        scale: `paper`, `tiny` or `demo`.
        comparable: whether our values may be compared with the paper's: at the paper's scale only.
        dataset: of the base recipe.
        primary: metric that decides a row's verdict.
        columns: the metrics.
        rows: in the paper's order.
        footnotes: numbered from 1.
        changes: what all rows change beside their own settings, as texts `key=value`.
    """

    name: str
    title: str
    scale: str
    comparable: bool
    dataset: str
    primary: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    footnotes: tuple[str, ...]
    changes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the table as JSON values."""
        return asdict(self)

    @property
    def has_paper(self) -> bool:
        """Whether the paper has any of these values; a user's own table has none."""
        return any(cell.paper is not None for row in self.rows for cell in row.cells)

    @property
    def base(self) -> Row:
        """The row that the others are compared with."""
        return next(row for row in self.rows if row.is_base)
