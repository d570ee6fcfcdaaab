"""From the run store to a `Site`: small files only, and of the large metric files just the curves that are shown."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from obowlab import __version__, text
from obowlab.config.scales import SCALES
from obowlab.errors import UserError
from obowlab.files.opening import files_in
from obowlab.report.curves import Curve, cached_curves, with_point
from obowlab.report.model import DetectionSet, Gallery, Run, Site
from obowlab.report.settings import describe
from obowlab.report.trainings import trainings_of
from obowlab.report.vocabulary_health import judge
from obowlab.report.words_page import FACTS
from obowlab.runs import detection_facts
from obowlab.runs.folder import RunFolder
from obowlab.runs.info import DAMAGED, RunInfo
from obowlab.runs.listing import RunSummary, read_runs
from obowlab.runs.metrics import lookup
from obowlab.runs.records import Record, Records, by_fingerprint
from obowlab.runs.results import Measured, tabulate
from obowlab.studies.schema import read_studies
from obowlab.tables import costs_render, transfer_render
from obowlab.tables.build import COMPARABLE, build_table, seeds_with_runs
from obowlab.tables.costs import Costs, CostTable, load_costs
from obowlab.tables.kept import closed_tables, kept_tables
from obowlab.tables.measured import find_kept
from obowlab.tables.model import Table
from obowlab.tables.render import Grid
from obowlab.tables.spec import COSTS, PlannedTable, load_table, one_kind, shipped_files, table_files
from obowlab.tables.transfer import Transfers, TransferTable, load_transfer

MACHINE_FACTS = {
    "host": "host",
    "cpu_model": "processor",
    "cpus": "cores",
    "memory_mib": "memory, MiB",
    "device": "device",
    "procs": "processes",
    "threads": "threads",
    "loader": "loader",
    "python": "Python",
    "platform": "system",
}
"""Fact of an attempt -> its name in a report."""


@dataclass(frozen=True)
class Tables:
    """The tables of some scales, and what is wrong with those that could not be read."""

    tables: tuple[Table, ...] = ()
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Store:
    """A run store, read once for its tables and its pages.

    Attributes:
        root: its folder.
        as_of: day and time of the newest thing in it, UTC; empty when there is none.
        runs: newest first, each with its record.
        problems: sentences on runs that cannot be read.
    """

    root: Path
    as_of: str
    runs: tuple[tuple[RunSummary, Record], ...]
    problems: tuple[str, ...]

    @property
    def records(self) -> Records:
        """The records that count for tables."""
        record_of = {record.run_id: record for _, record in self.runs}
        return {key: record_of[run.info.run_id] for key, run in by_fingerprint(run for run, _ in self.runs).items()}


NO_TABLES = ("obowlab.scale", "obowlab.study", "obowlab.trial", "obowlab.pruned")
"""Labels of a run that do not name a table."""

LOCAL_UI = "http://127.0.0.1:5000"
"""Where `obowlab ui` shows a store without a server."""


def read_store(runs_root: Path) -> Store:
    """Read a run store, all but the metrics."""
    runs, newest = [], 0.0
    summaries, problems = read_runs(runs_root)
    for summary in summaries:
        newest = max(newest, summary.info.created_at, summary.state.updated_at)
        try:
            runs.append((summary, Record.of(summary)))
        except DAMAGED as error:
            problems.append(_cannot_be_shown(summary, error))
    return Store(
        root=runs_root, as_of=text.timestamp(newest, utc=True) if newest else "", runs=tuple(runs), problems=tuple(problems)
    )


def gather(store: Store, *, tables: Tables) -> Site:
    """Read everything a report shows; write nothing but the cache of curves.

    Args:
        store: as `read_store` reads it.
        tables: as `tables_at` builds them.
    """
    grids, unreadable = measured_in(store.root)
    runs, problems = [], [*tables.problems, *store.problems, *unreadable]
    for summary, record in store.runs:
        try:
            runs.append(read_run(summary, record=record))
        except DAMAGED as error:
            problems.append(_cannot_be_shown(summary, error))
    return Site(
        as_of=store.as_of,
        version=__version__,
        tables=tables.tables,
        grids=grids,
        runs=tuple(runs),
        trainings=trainings_of(runs, stored=store.runs),
        studies=read_studies(store.root),
        problems=tuple(problems),
    )


def tables_at(scales: Iterable[str], *, store: Store) -> Tables:
    """Return every shipped table, and every one that the store remembers, at some scales, of the runs there are.

    Args:
        scales: names; when there are none, every scale at which the store has a run of some shipped table, and every table
            that it remembers and has a run of.
        store: as `read_store` reads it.
    """
    asked, records = list(scales), store.records
    planned = {scale: _planned(scale) for scale in {COMPARABLE, *(asked or SCALES)}}
    at_paper = {table.name: table for table in planned[COMPARABLE][0]}
    tables: list[Table] = []
    problems: list[str] = []
    for scale in asked or SCALES:
        found, wrong = planned[scale]
        seeds = {table.name: seeds_with_runs(table, records=records) for table in found}
        if asked or any(seeds.values()):
            tables += [
                build_table(table, seeds=seeds[table.name] or (0,), records=records, at_paper=at_paper.get(table.name))
                for table in found
            ]
            problems += wrong
    closed = closed_tables(store.root)
    own, wrong = kept_tables(store.root)
    for table in own:
        found_seeds = seeds_with_runs(table, records=records)
        if table.scale in asked or (not asked and found_seeds):
            tables.append(build_table(table, seeds=found_seeds or (0,), records=records))
    known = {*table_files(), *(table.name for table in own)}
    unknown = [closed] if closed else _unknown_tables(store, known=known)
    return Tables(tuple(tables), (*problems, *wrong, *unknown))


def measured_in(runs_root: Path) -> tuple[tuple[Grid, ...], list[str]]:
    """Return the shipped tables of costs and of transfer of which this run store has something, at every scale.

    Returns:
        The tables, and a sentence on each that cannot be read; none of either where they are closed, see `closed_tables`.
    """
    grids, problems = [], []
    if closed_tables(runs_root):
        return (), []
    for name in sorted(shipped_files().keys() - table_files().keys()):
        for scale in SCALES:
            with suppress(UserError):  # a table need not be of every scale
                table = load_costs(name, scale=scale) if one_kind([name]) == COSTS else load_transfer(name, scale=scale)
                try:
                    grid = _grid(table, runs_root=runs_root)
                except UserError as error:
                    problems.append(str(error))
                else:
                    grids += [grid] if grid is not None else []
    return tuple(grids), problems


def _grid(table: CostTable | TransferTable, *, runs_root: Path) -> Grid | None:
    """Return a table with what this run store has of it; None where that is nothing."""
    if isinstance(table, CostTable):
        costs = find_kept(Costs, table.file_name, folder=runs_root)
        return None if costs is None else costs_render.grid(table, costs=costs)
    transfers = find_kept(Transfers, table.file_name, folder=runs_root)
    return None if transfers is None or not transfers.entries else transfer_render.grid(table, transfers=transfers)


def read_run(summary: RunSummary, *, record: Record) -> Run:
    """Read one run, as far as its record does not say already.

    Raises:
        UserError: one of its files is damaged.
    """
    info, state = summary.info, summary.state
    folder = RunFolder(summary.path, info)
    attempts, mlflow = folder.attempts(), folder.mlflow_places()
    store, (experiment, mlflow_run_id) = list(mlflow.items())[-1] if mlflow else ("", (None, None))
    facts = {key: value for attempt in attempts for key, value in attempt.items()}
    recipe = describe(info.name, recipe=json.dumps(info.recipe_values), sources=json.dumps(info.sources))
    epochs = _epochs(info)
    measured = tabulate(record.results, dataset=str(info.recipe_values.get("data", {}).get("dataset", "")))
    curves = final_curves(cached_curves(summary.path, epochs=epochs), measured=measured, step=state.step, epochs=epochs)
    return Run(
        run_id=info.run_id,
        recipe=info.name,
        title=str(info.recipe_values.get("title", "")),
        seed=info.seed,
        changes=recipe.changes,
        short=recipe.short,
        base_recipe=recipe.base_recipe,
        family=recipe.family,
        status=state.status,
        message=state.message,
        step=state.step,
        total_steps=state.total_steps,
        epochs=epochs,
        created=text.timestamp(info.created_at, utc=True),
        elapsed_s=record.trained_s,
        fingerprint=info.fingerprint,
        commit=facts.get("commit"),
        dirty=facts.get("dirty"),
        data_hash=facts.get("data_hash"),
        mlflow_run_id=mlflow_run_id,
        tags=tuple(folder.tags()),
        mlflow_page=mlflow_page(mlflow_run_id, experiment=experiment, store=store),
        mlflow_local=not store.startswith("http"),
        starts=len(attempts),
        machine={label: str(facts[key]) for key, label in MACHINE_FACTS.items() if facts.get(key) is not None},
        versions={"obowlab": info.version, **{str(k): str(v) for k, v in facts.get("versions", {}).items()}},
        settings=recipe.settings,
        base=recipe.base,
        measured=measured,
        curves=curves,
        findings=judge({name: curve for name, curve in curves.items() if not is_of_machine(name)}, recipe=info.recipe_values),
        gallery=find_gallery(summary.path / "words"),
        detections=find_detections(summary.path),
    )


def final_curves(curves: Mapping[str, Curve], *, measured: Iterable[Measured], step: int, epochs: int) -> dict[str, Curve]:
    """Return the curves, those of results during training with the final result at their ends.

    Args:
        curves: of one run, by metric.
        measured: its results.
        step: optimiser updates done.
        epochs: of the whole training.
    """
    final = {m.metric: float(m.student["value"]) for m in reversed(list(measured)) if m.student is not None}
    return {
        name: with_point(curve, step=step, epoch=float(epochs), value=final[name])
        if name in final and curve.epoch[-1] < epochs
        else curve
        for name, curve in curves.items()
    }


def cache_curves(folder: RunFolder) -> None:
    """Cache the curves of a run that has just finished, so that the next report is quick; leave a damaged run to the report."""
    with suppress(*DAMAGED):
        cached_curves(folder.path, epochs=_epochs(folder.info))


def mlflow_page(run_id: str | None, *, experiment: str | None, store: str) -> str | None:
    """Return the address of a run's page in MLflow, without a login; None for a run that was never sent.

    Args:
        run_id: MLflow's id.
        experiment: in which the run is; without it MLflow does not show the run among trainings.
        store: where it was sent: the address of a server, or of a database that `obowlab ui` shows.
    """
    if run_id is None or not run_id.isalnum():
        return None
    server = urlsplit(store if store.startswith(("http://", "https://")) else LOCAL_UI)
    place = server.netloc.rpartition("@")[2]
    page = f"runs/{run_id}"
    if experiment is not None and experiment.isalnum():
        page = f"experiments/{experiment}/{page}?workflowType=machine_learning"
    return f"{server.scheme}://{place}{server.path.rstrip('/')}/#/{page}"


def is_of_machine(metric: str) -> bool:
    """Return whether a metric says something of the machine, not of the training."""
    try:
        return lookup(metric).group == "system"
    except KeyError:
        return False


def find_gallery(folder: Path) -> Gallery | None:
    """Return a run's gallery of visual words, unread; None when there is none."""
    owner = folder.parent.stat().st_uid
    return Gallery(folder) if {FACTS, "index.html"} & {path.name for path in files_in(folder, owner=owner)} else None


def find_detections(run: Path) -> tuple[DetectionSet, ...]:
    """Return the tests of detectors in a run's folder, unread."""
    owner, names = run.stat().st_uid, {detection_facts.FACTS, detection_facts.PAGE}
    folders = detection_facts.detection_folders(run)
    return tuple(DetectionSet(each) for each in folders if names & {path.name for path in files_in(each, owner=owner)})


def _epochs(info: RunInfo) -> int:
    return int(info.recipe_values.get("training", {}).get("epochs", 1))


def _planned(scale: str) -> tuple[list[PlannedTable], list[str]]:
    """Return every shipped table at a scale, and a sentence on each that has something wrong with it."""
    found, wrong = [], []
    for name in table_files():
        try:
            found.append(load_table(name, scale=scale))
        except UserError as error:
            wrong.append(f"{name} at scale {scale} cannot be shown: {error}")
    return found, wrong


def _unknown_tables(store: Store, *, known: Collection[str]) -> list[str]:
    """Return a sentence on each table that runs were trained for and that the store does not remember, as of earlier versions."""
    named: set[str] = set()
    for summary, _ in store.runs:
        with suppress(*DAMAGED):
            labels = RunFolder(summary.path, summary.info).labels()
            if "obowlab.scale" in labels:  # beside which every label without a further point is a table, or a study
                named |= {name.removeprefix("obowlab.") for name in labels if name not in NO_TABLES and name.count(".") == 1}
    return [
        f"There are runs of a table '{name}', which this store does not know: `obowlab table FILE` tells it, by the table's file."
        for name in sorted(named - set(known))
    ]


def _cannot_be_shown(run: RunSummary, error: Exception) -> str:
    what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return f"Run {run.info.run_id} cannot be shown: {what}"
