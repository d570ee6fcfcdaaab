"""From run records to a results table: means over seeds, intervals, differences and verdicts.

Everything shown is computed here from the records alone, so that a table can be rebuilt at any time, to the byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from obowlab.config import Recipe
from obowlab.errors import UserError
from obowlab.runs.info import TRAINED
from obowlab.runs.metrics import lookup
from obowlab.runs.names import run_id_of
from obowlab.runs.records import Record, Records, store_records, store_runs
from obowlab.runs.results import is_alike, unpack
from obowlab.tables.model import Cell, Column, Estimate, Row, RunRef, Table
from obowlab.tables.spec import PlannedRow, PlannedTable, also_differs, load_table
from obowlab.tables.statistics import Matrix, estimate, holm, stacked, verdict

COMPARABLE = "paper"
"""The scale at which our numbers may be held against the paper's."""

NOTICE = "At this scale values cannot be compared with the paper's; a row's direction against the base row can."
OTHER_SETTINGS = "Measured with other evaluation settings than the table's recipe has now; `obowlab ablate` measures again."
FEWER_PAIRS = "Δ base row and direction are of the seeds that the base row has too, which are fewer than the row's."
ONE_SEED = (
    "One seed, or one in common with the base row: the interval speaks for the episodes (or images) alone, other seeds may "
    "differ by more, and no direction is stated."
)


@dataclass(frozen=True)
class _Measured:
    """One metric of one run.

    Attributes:
        value: percent.
        observations: per episode or image, percent; None in results of older versions.
        basis: what must be equal for two observations to be a pair: protocol, settings and images.
    """

    value: float
    observations: Matrix | None
    basis: str


def build_table(planned: PlannedTable, *, seeds: Sequence[int], records: Records, at_paper: PlannedTable | None = None) -> Table:
    """Return a table as the records have it.

    Args:
        planned: the table at its scale.
        seeds: the seeds a row should have.
        records: of the run store.
        at_paper: the same table at the paper's scale; loaded when it is absent.
    """
    comparable = planned.scale == COMPARABLE
    runs_of = [_runs_of(row, seeds=seeds, records=records) for row in planned.rows]
    columns = [_column(metric, planned=planned, runs=runs_of) for metric in planned.file.columns]
    footnotes: list[str] = [NOTICE] if not comparable and any(row.row.paper for row in planned.rows) else []
    footnotes += planned.file.footnotes
    rows = []
    differing = also_differing(planned, at_paper=at_paper)
    for row, runs, cells, also in zip(planned.rows, runs_of, zip(*columns, strict=True), differing, strict=True):
        own = [*row.footnotes, *also]
        if any(_is_measured_otherwise(record, row=row, columns=planned.file.columns) for record in runs.values()):
            own.append(OTHER_SETTINGS)
        trained = sum(run is not None and run.status in TRAINED for run in runs.values())
        if trained == 1 or any(cell.verdict == "one seed" for cell in cells):
            own.append(ONE_SEED)
        if any(cell.ours and cell.against_base and cell.against_base.seeds < cell.ours.seeds for cell in cells):
            own.append(FEWER_PAIRS)
        for text in own:
            if text not in footnotes:
                footnotes.append(text)
        rows.append(
            Row(
                key=row.row.key,
                label=row.row.label,
                group=row.row.group,
                recipe=row.loaded.name,
                overrides=row.overrides,
                epochs=sum(stage.recipe.training.epochs for stage in row.loaded.stages()),
                is_base=row.is_base,
                cells=cells,
                runs=tuple(_reference(row, seed=seed, record=record) for seed, record in runs.items()),
                verdict=next(cell.verdict for cell in cells if cell.metric == planned.file.primary),
                notes=tuple(footnotes.index(text) + 1 for text in own),
            )
        )
    return Table(
        name=planned.name,
        title=planned.file.title,
        scale=planned.scale,
        comparable=comparable,
        dataset=planned.base.loaded.recipe.data.dataset,
        primary=planned.file.primary,
        columns=tuple(Column(metric, label, lookup(metric).unit) for metric, label in planned.file.columns.items()),
        rows=tuple(rows),
        footnotes=tuple(footnotes),
        changes=planned.changed,
    )


def also_differing(planned: PlannedTable, *, at_paper: PlannedTable | None = None) -> list[tuple[str, ...]]:
    """Return for every row what separates it from the base row at this scale alone, in a sentence, or nothing.

    Args:
        planned: the table at its scale; the copy that a run store keeps has these sentences among its footnotes.
        at_paper: the same table at the paper's scale; loaded when it is absent.
    """
    if planned.scale == COMPARABLE:
        at_paper = None
    elif at_paper is None:
        at_paper = load_table_at_paper(planned)
    if at_paper is None:
        return [()] * len(planned.rows)
    pairs = zip(planned.rows, at_paper.rows, strict=True)
    sentences = [also_differs(row, base=planned.base, paper_row=other, paper_base=at_paper.base) for row, other in pairs]
    return [(sentence,) if sentence else () for sentence in sentences]


def load_table_at_paper(planned: PlannedTable) -> PlannedTable | None:
    """Return the same table at the paper's scale, for comparison of its recipes; None when a row has no recipe there."""
    if planned.path is None:
        return None
    try:
        return load_table(planned.path, scale=COMPARABLE, changes=planned.changes)
    except UserError:
        return None


def build_from_store(planned: PlannedTable, *, runs_root: Path, seeds: Sequence[int] | None) -> Table:
    """Return a table as a run store has it.

    Args:
        planned: the table at its scale.
        runs_root: the store, of which only the runs that the table needs are read.
        seeds: the seeds a row should have; those of which there are runs if absent.
    """
    candidates = sorted({run.info.seed for run in store_runs(runs_root).values()} | set(seeds or ()))
    needed = {key for row in planned.rows for key in row.loaded.recipe.fingerprints(seeds=candidates).values()}
    records = store_records(runs_root, fingerprints=needed)
    return build_table(planned, seeds=finished_seeds(planned, records=records) if seeds is None else seeds, records=records)


def finished_seeds(planned: PlannedTable, *, records: Records) -> tuple[int, ...]:
    """Return the seeds that a table is shown with: `seeds_with_runs`, or (0,) when there are none."""
    return seeds_with_runs(planned, records=records) or (0,)


def seeds_with_runs(planned: PlannedTable, *, records: Records) -> tuple[int, ...]:
    """Return the seeds of which some row has a run, ascending."""
    known = {record.fingerprint for record in records.values()}
    candidates = {record.seed for record in records.values()}
    seeds = {
        seed
        for row in planned.rows
        for seed, fingerprint in row.loaded.recipe.fingerprints(seeds=candidates).items()
        if fingerprint in known
    }
    return tuple(sorted(seeds))


# -------------------------------------------------------------------------------------------------------------- helpers


def _runs_of(row: PlannedRow, *, seeds: Sequence[int], records: Records) -> dict[int, Record | None]:
    return {seed: records.get(fingerprint) for seed, fingerprint in row.loaded.recipe.fingerprints(seeds=seeds).items()}


def _reference(row: PlannedRow, *, seed: int, record: Record | None) -> RunRef:
    if record is None:
        run_id, fingerprint = run_id_of(row.loaded, seed=seed), row.loaded.recipe.fingerprint(seed=seed)
        return RunRef(run_id, seed, "missing", 0, None, "", fingerprint, None, None, None, None, None, {})
    facts = record.facts
    return RunRef(
        run_id=record.run_id,
        seed=seed,
        status=record.status,
        step=record.step,
        total_steps=record.total_steps,
        message=record.message,
        fingerprint=record.fingerprint,
        commit=facts.get("commit"),
        dirty=facts.get("dirty"),
        data_hash=facts.get("data_hash"),
        mlflow_run_id=record.mlflow_run_id,
        elapsed_s=record.trained_s,
        values={
            measurement["name"]: measurement["value"]
            for result in _by_settings(record.results, recipe=row.loaded.recipe)
            if result["subject"] == "student"
            for measurement in result["measurements"]
        },
    )


def _column(metric: str, *, planned: PlannedTable, runs: Sequence[Mapping[int, Record | None]]) -> list[Cell]:
    """Return the cells of a metric, their verdicts corrected for the number of rows that are tested.

    Args:
        metric: as in `runs.metrics`.
        planned: the table.
        runs: of every row, by seed.
    """
    base, comparable = planned.base, planned.scale == COMPARABLE
    (base_runs,) = (of_row for row, of_row in zip(planned.rows, runs, strict=True) if row.is_base)
    cells = [
        _cell(metric, row=row, base=base, runs=of_row, base_runs=base_runs, comparable=comparable)
        for row, of_row in zip(planned.rows, runs, strict=True)
    ]
    plain = {i: cell.against_base.p for i, cell in enumerate(cells) if cell.against_base and cell.against_base.p is not None}
    corrected = dict(zip(plain, holm(list(plain.values())), strict=True))
    for i, (row, cell) in enumerate(zip(planned.rows, cells, strict=True)):
        if cell.against_base is not None:
            p, theirs = corrected.get(i), paper_difference(row, base=base, metric=metric)
            direction = None if theirs == 0 else verdict(cell.against_base, p=p, paper=theirs)
            cells[i] = replace(cell, p_holm=p, verdict=direction)
    return cells


def paper_difference(row: PlannedRow, *, base: PlannedRow, metric: str) -> float | None:
    """Return how far a row is from the base row in the paper, percent; None where one of them has no value there."""
    ours, theirs = row.row.paper.get(metric), base.row.paper.get(metric)
    return None if ours is None or theirs is None else ours - theirs


def _cell(
    metric: str,
    *,
    row: PlannedRow,
    base: PlannedRow,
    runs: Mapping[int, Record | None],
    base_runs: Mapping[int, Record | None],
    comparable: bool,
) -> Cell:
    """Return a cell without its verdict, which needs those of the other rows."""
    paper = row.row.paper.get(metric)
    ours, problem = _measured(runs, recipe=row.loaded.recipe, metric=metric, subject="student")
    random, _ = _measured(runs, recipe=row.loaded.recipe, metric=metric, subject="random")
    reference, _ = _measured(base_runs, recipe=base.loaded.recipe, metric=metric, subject="student")
    mean = _mean(ours)
    against_base = None
    if not row.is_base and not problem:
        differences, problem = _paired(ours, reference)
        against_base = None if differences is None else _difference(differences)
    return Cell(
        metric=metric,
        paper=paper,
        ours=mean,
        random=_mean(random),
        against_paper=mean.value - paper if comparable and mean is not None and paper is not None else None,
        against_base=against_base,
        verdict=None,
        problem=problem,
    )


def mean_over_seeds(records: Iterable[Record], *, recipe: Recipe, metric: str) -> Estimate | None:
    """Return the mean of a metric over the trained seeds of one training; None for nothing, or if they were measured differently.

    Args:
        records: one per seed.
        recipe: says how it should be measured; other results count where there are none.
        metric: as in `runs.metrics`.
    """
    measured, problem = _measured({record.seed: record for record in records}, recipe=recipe, metric=metric, subject="student")
    return None if problem else _mean(measured)


def _measured(
    runs: Mapping[int, Record | None], *, recipe: Recipe, metric: str, subject: str
) -> tuple[dict[int, _Measured], str]:
    """Return a measurement of every trained seed, see `_results`, and a sentence when they were not measured alike."""
    found: dict[int, _Measured] = {}
    for seed, record in runs.items():
        if results := _results(record, recipe=recipe, metric=metric, subject=subject):
            measurement = next(each for each in results[-1]["measurements"] if each["name"] == metric)
            found[seed] = _read(measurement, results[-1])
    if len({each.basis for each in found.values()}) > 1:
        return found, "the seeds were measured with different protocols or images; `obowlab eval RUN` measures again"
    return found, ""


def _results(record: Record | None, *, recipe: Recipe, metric: str, subject: str) -> list[dict[str, Any]]:
    """Return the results of a trained run that measure a metric on its own data set: those with the recipe's settings last."""
    if record is None or record.status not in TRAINED:
        return []
    return [
        result
        for result in _by_settings(record.results, recipe=recipe)
        if result["subject"] == subject
        and result.get("details", {}).get("dataset") == record.recipe["data"]["dataset"]
        and any(measurement["name"] == metric for measurement in result["measurements"])
    ]


def _by_settings(results: Iterable[dict[str, Any]], *, recipe: Recipe) -> list[dict[str, Any]]:
    """Return results, the oldest first, but those that were measured with the settings of a recipe last."""
    return sorted(results, key=lambda result: is_alike(result, recipe=recipe))


def _is_measured_otherwise(record: Record | None, *, row: PlannedRow, columns: Iterable[str]) -> bool:
    """Return whether what a table shows of a run was measured with other settings than those of its row."""
    recipe = row.loaded.recipe
    shown = [_results(record, recipe=recipe, metric=metric, subject="student")[-1:] for metric in columns]
    return any(not is_alike(result, recipe=recipe) for results in shown for result in results)


def _read(measurement: Mapping[str, Any], result: Mapping[str, Any]) -> _Measured:
    samples = measurement.get("samples")
    return _Measured(
        value=float(measurement["value"]),
        observations=unpack(samples) if samples else None,
        basis=f"{result['protocol']} {result['protocol_hash']} {result['data_hash']}",
    )


def _mean(measured: Mapping[int, _Measured]) -> Estimate | None:
    observations = stacked([each.observations for each in measured.values()])
    if observations is None:
        return None
    mean = estimate(observations)
    return Estimate(mean.value, mean.interval, mean.seeds)  # without p: an accuracy is not tested against 0


def paired_differences(row: PlannedRow, *, base: PlannedRow, records: Records, metric: str) -> Matrix | None:
    """Return a row's differences to the base row on identical episodes or images, in percent [S, E].

    Args:
        row: of a table.
        base: its base row.
        records: of all seeds; those that both rows have count.
        metric: as in `runs.metrics`.

    Returns:
        The differences, by seed ascending; None where there are none, or none that can be compared.
    """
    seeds = sorted({record.seed for record in records.values()})
    (ours, problem), (theirs, _) = (
        _measured(_runs_of(each, seeds=seeds, records=records), recipe=each.loaded.recipe, metric=metric, subject="student")
        for each in (row, base)
    )
    return None if problem else _paired(ours, theirs)[0]


def _difference(differences: Matrix) -> Estimate:
    """Return the mean of paired differences; without p if they are of one seed, as p over its episodes is no test of two rows."""
    mean = estimate(differences)
    return mean if mean.seeds > 1 else replace(mean, p=None)


def _paired(ours: Mapping[int, _Measured], base: Mapping[int, _Measured]) -> tuple[Matrix | None, str]:
    """Return our differences to the base row on identical episodes or images [S, E], of the seeds that both have."""
    seeds = [seed for seed in ours if seed in base]
    if not seeds:
        return None, ""
    if any(ours[seed].basis != base[seed].basis for seed in seeds):
        return None, "measured with another protocol or other images than the base row; `obowlab eval RUN` measures again"
    first = stacked([ours[seed].observations for seed in seeds])
    second = stacked([base[seed].observations for seed in seeds])
    if first is None or second is None:
        return None, ""
    return first - second, ""
