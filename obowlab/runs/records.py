"""What tables and reports need of a run, small enough to be committed beside the table it appears in.

A record is read from a run folder, or from the JSON file that `obowlab ablate --records DIR` wrote: a table rebuilt from either
is the same to the byte.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from obowlab.errors import UserError
from obowlab.files.opening import read_file
from obowlab.files.replacing import write_atomic
from obowlab.runs.folder import RunFolder
from obowlab.runs.info import DAMAGED, Status
from obowlab.runs.listing import RunSummary, damage_of, read_runs

logger = logging.getLogger(__name__)

FACTS = (
    "commit",
    "branch",
    "dirty",
    "dataset",
    "data_hash",
    "loader",
    "device",
    "procs",
    "threads",
    "python",
    "platform",
    "cpu_model",
)
"""The facts of a run's starts that say where its numbers come from."""


class Record(BaseModel):
    """One run in short.

    Attributes:
        run_id: name of its folder and of its MLflow run.
        name: of its recipe.
        seed: of weights and data.
        fingerprint: hash of recipe and seed.
        recipe: every setting, resolved.
        version: of obowlab that created it.
        status: as `obowlab runs list` shows it.
        step: optimiser updates done.
        total_steps: updates of the whole training; None when unknown.
        message: why it failed or stopped.
        facts: where its numbers come from, see `FACTS`, and the versions of packages.
        results: its evaluation results, the oldest first.
        mlflow_run_id: in the tracking store; None when it was never sent.
        trained_s: seconds of training; None when unknown.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    run_id: str
    name: str
    seed: int
    fingerprint: str
    recipe: dict[str, Any]
    version: str
    status: Status
    step: int
    total_steps: int | None
    message: str
    facts: dict[str, Any]
    results: list[dict[str, Any]]
    mlflow_run_id: str | None
    trained_s: float | None

    @classmethod
    def of(cls, run: RunSummary) -> Record:
        """Read the record of a run from its folder."""
        folder = RunFolder(run.path, run.info)
        facts = folder.facts()
        return cls(
            run_id=run.info.run_id,
            name=run.info.name,
            seed=run.info.seed,
            fingerprint=run.info.fingerprint,
            recipe=run.info.recipe_values,
            version=run.info.version,
            status=run.state.status,
            step=run.state.step,
            total_steps=run.state.total_steps,
            message=run.state.message,
            facts={key: facts[key] for key in (*FACTS, "versions") if key in facts},
            results=folder.results(),
            mlflow_run_id=folder.mlflow_run_id(),
            trained_s=folder.trained_s(),
        )


Records = Mapping[str, Record]
"""Fingerprint -> record."""


def store_runs(runs_root: Path, *, fingerprints: Collection[str] | None = None) -> dict[str, RunSummary]:
    """Return the runs of a store by fingerprint, all or those of the given fingerprints; see `by_fingerprint`.

    Of every folder that cannot be read there is a warning, once.
    """
    runs, problems = read_runs(runs_root)
    for problem in problems:
        warn_once(problem)
    return by_fingerprint(run for run in runs if fingerprints is None or run.info.fingerprint in fingerprints)


def by_fingerprint(runs: Iterable[RunSummary]) -> dict[str, RunSummary]:
    """Return runs by fingerprint; of several with the same one (a recipe under two names) the most advanced counts.

    Args:
        runs: the newest first, as `read_runs` has them.
    """
    found: dict[str, RunSummary] = {}
    for run in reversed(list(runs)):  # the oldest first, so that ties go to it
        key = run.info.fingerprint
        if key not in found or _rank(run) > _rank(found[key]):
            found[key] = run
    return found


def store_records(runs_root: Path, *, fingerprints: Collection[str] | None = None) -> dict[str, Record]:
    """Return the records of `store_runs`; of a run whose folder is damaged there is a warning instead."""
    return read_each(store_runs(runs_root, fingerprints=fingerprints))


def read_each(runs: Mapping[str, RunSummary]) -> dict[str, Record]:
    """Return the record of every run, by the same keys, and warn of those whose folder is damaged."""
    records = {}
    for key, run in runs.items():
        try:
            records[key] = Record.of(run)
        except DAMAGED as error:
            warn_once(damage_of(run.path, error))
    return records


@functools.cache
def warn_once(sentence: str) -> None:
    """Warn of something, the first time."""
    logger.warning("%s", sentence)


def check_records(folder: Path) -> None:
    """Raise UserError unless there is such a folder."""
    if not folder.is_dir():
        raise UserError(f"There is no folder of records {folder} (--records).")


def open_records(folder: Path, *, dry_run: bool) -> None:
    """Make a folder for records, unless it is there; a dry run only asks whether a file is in its place.

    Raises:
        UserError: it cannot be made, or nothing may be written to it.
    """
    try:
        if not dry_run:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot write records to {folder} (--records): {error.strerror}; name another folder.") from None
    if os.path.lexists(folder) and not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise UserError(f"Cannot write records to {folder} (--records): name a folder that may be written to.")


def read_records(folder: Path) -> dict[str, Record]:
    """Return the records that `write_records` left in a folder.

    Raises:
        UserError: the folder is not there, or one of its files is damaged.
    """
    check_records(folder)
    records = {}
    for path in sorted(folder.glob("*.json")):
        try:
            record = Record.model_validate_json(read_file(path).decode("utf-8-sig"))
        except (OSError, ValueError):
            raise UserError(f"{path} is not a run record; remove it or restore it.") from None
        records[record.fingerprint] = record
    return records


def write_records(records: Iterable[Record], *, folder: Path) -> int:
    """Write every record as RUN_ID.json and return how many there are; the same records give the same bytes.

    Raises:
        UserError: the disk refuses.
    """
    count = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for record in records:
            text = json.dumps(record.model_dump(mode="json"), indent=1, sort_keys=True, ensure_ascii=False)
            write_atomic(folder / f"{record.run_id}.json", text + "\n")
            count += 1
    except OSError as error:
        raise UserError(f"Cannot write records to {folder} (--records): {error.strerror}.") from None
    return count


def _rank(run: RunSummary) -> tuple[bool, bool, int]:
    return run.state.status == "finished", run.state.status == "running", run.state.step
