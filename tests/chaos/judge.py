"""What "nothing lost" means: comparisons of a run with an undisturbed one, and of a run store with MLflow."""

from __future__ import annotations

import hashlib
import math
import re
import sqlite3
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from obowlab.runs.folder import RunFolder
from obowlab.runs.listing import list_runs
from obowlab.runs.metrics import METRIC_FILES, mlflow_name
from obowlab.tracking.outbox import Outbox
from tests.chaos.forks import Child, obowlab
from tests.chaos.ledger import BrokenError, Case
from tests.chaos.stage import SEED
from tests.runs import points, weights

Query = Callable[[str], Iterable[Sequence[Any]]]

PASSING = ("log.txt", "state.json", "machine.json", "terminal.txt", "attempts.jsonl", "system.jsonl", "mirror.json")
"""Files of a run that a refused command may write: they say what happened."""


# ------------------------------------------------------------------------------------------------------ equal, or a sentence


def unmeasured(child: Child) -> set[int]:
    """Return the epochs of which a training says that it could not measure them, and that it continues."""
    return {int(epoch) for epoch in re.findall(r"epoch (\d+) is not measured", " ".join(child.said().split()))}


def equal(found: RunFolder, expected: RunFolder, *, missed: Collection[int] = ()) -> None:
    """Compare weights, metrics, results and encoder bit by bit.

    Args:
        found: the run that was disturbed.
        expected: the one that was not.
        missed: epochs whose measurement during training may be absent, and nothing else; what is there has to be equal.

    Raises:
        BrokenError: names the first difference.
    """
    if found.state.status != "finished":
        raise BrokenError(f"the run is {found.state.status}: {found.state.message}")
    ours, theirs = weights(found), weights(expected)
    different = [name for name, value in theirs.items() if name not in ours or not torch.equal(value, ours[name])]
    if different or ours.keys() != theirs.keys():
        raise BrokenError(f"{len(different)} of {len(theirs)} tensors differ from the undisturbed run's, {different[:1]}")
    online = _values(found)
    wanted = [point for point in _values(expected) if point in online or point[1]["epoch"] not in missed]
    for name, one, other in (
        ("metrics.jsonl", points(found), points(expected)),
        ("online.jsonl", online, wanted),
        ("results", _measured(found), _measured(expected)),
    ):
        if one != other:
            raise BrokenError(f"{name} differs from the undisturbed run's: {len(one)} entries, not {len(other)}, or other values")
    if (found.path / "encoder.safetensors").read_bytes() != (expected.path / "encoder.safetensors").read_bytes():
        raise BrokenError("encoder.safetensors differs from the undisturbed run's")


def _values(folder: RunFolder) -> list[tuple[int, dict[str, float]]]:
    return [(point.step, point.values) for point in folder.metrics("online")]


def _measured(folder: RunFolder) -> list[tuple[str, str, Any]]:
    return sorted((result["subject"], result["protocol"], result["measurements"]) for result in folder.results())


def sentence(child: Child) -> str:
    """Return the one sentence a refused command ended with.

    Raises:
        BrokenError: there was a traceback, no sentence or several, or another exit code than 2.
    """
    code = child.wait()
    said = child.said()
    lines = [line for line in child.complaints().splitlines() if line.startswith("Error: ")]
    if code != 2 or "Traceback" in said or len(lines) != 1 or not clear(lines[0].removeprefix("Error: ")):
        raise BrokenError(f"exit code {code} and not one clear sentence: {said.strip()[-700:]!r}")
    return lines[0]


def clear(text: str) -> bool:
    """Return whether a complaint reads like one: some words, a full stop or question mark, no trace, no control characters."""
    return len(text.split()) >= 3 and text.rstrip()[-1:] in (".", "?", ")") and not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text)


def ended_well(child: Child, *, codes: tuple[int, ...] = (0,)) -> int:
    """Wait for a command that must succeed, or complain in one sentence where 2 is among the codes; return its code.

    Raises:
        BrokenError: it ended otherwise.
    """
    code = child.wait()
    if code == 2 and 2 in codes:
        sentence(child)
    elif code not in codes or "Traceback" in child.said():
        raise BrokenError(f"exit code {code}: {child.said().strip()[-700:]!r}")
    return code


def valuables(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a run that must not be lost."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in PASSING and not path.name.startswith(".") and not path.name.endswith("lock")
    }


# ------------------------------------------------------------------------------------------------------------ run stores


@dataclass(frozen=True)
class Audit:
    """What a store has of the runs of a run store.

    Attributes:
        lost: points, results, runs and model versions it lacks.
        doubled: those it has more than once.
        told: examples of both.
    """

    lost: int
    doubled: int
    told: tuple[str, ...]


def audit(runs_root: Path, query: Query) -> Audit:
    """Compare every point of every run folder with the database of an MLflow store."""
    told: list[str] = []
    lost = doubled = 0
    tagged = Counter(str(row[0]) for row in query("SELECT value FROM tags WHERE key = 'obowlab.run_id'"))
    ids = {str(value): str(run) for value, run in query("SELECT value, run_uuid FROM tags WHERE key = 'obowlab.run_id'")}
    versions = Counter(str(row[0]) for row in query("SELECT run_id FROM model_versions"))
    tags = {(str(run), str(key)): str(value) for run, key, value in query("SELECT run_uuid, key, value FROM tags")}
    there: dict[str, Counter[tuple[str, int, float]]] = {}
    for run, key, step, value in query("SELECT run_uuid, key, step, value FROM metrics"):
        there.setdefault(str(run), Counter())[str(key), int(step), float(value)] += 1
    for summary in list_runs(runs_root):
        folder = RunFolder(summary.path, summary.info)
        run = ids.get(folder.run_id, "")
        expected = expected_points(folder)
        found = there.get(run, Counter())
        missing = expected - found
        places = Counter((key, step) for key, step, _ in found.elements() if not key.startswith("eval/"))
        places += Counter((key, 0) for key, _, _ in found.elements() if key.startswith("eval/"))
        twice = {place: count for place, count in places.items() if count > 1}
        absent = [key for key, text in intervals(folder).items() if tags.get((run, key)) != text]
        wanted = 1 if folder.state.status == "finished" and (folder.path / "model" / "MLmodel").exists() else 0
        lost += missing.total() + len(absent) + (tagged[folder.run_id] == 0) + max(0, wanted - versions[run])
        doubled += sum(twice.values()) - len(twice) + max(0, tagged[folder.run_id] - 1) + max(0, versions[run] - 1)
        told += [f"lost {point}" for point in [*list(missing)[:2], *absent[:2]]] + [
            f"doubled {place}" for place in list(twice)[:2]
        ]
        told += [f"{tagged[folder.run_id]} MLflow runs, {versions[run]} model versions"] * (tagged[folder.run_id] != 1)
    return Audit(lost=lost, doubled=doubled, told=tuple(told))


def expected_points(folder: RunFolder) -> Counter[tuple[str, int, float]]:
    """Return every finite value of the run folder as MLflow should have it: key, step, value."""
    outbox = Outbox(folder, store="none")
    wanted: Counter[tuple[str, int, float]] = Counter()
    for name in METRIC_FILES:
        for point in folder.metrics(name):
            wanted.update((mlflow_name(key, source=name), point.step, v) for key, v in point.values.items() if math.isfinite(v))
    for result in folder.results():
        for measurement in result["measurements"]:
            name = mlflow_name(measurement["name"], source=outbox.place(result))
            wanted[name, 0, float(measurement["value"])] += 1
    return wanted


def intervals(folder: RunFolder) -> dict[str, str]:
    """Return every result with its interval as MLflow should have it, by the metric's name."""
    outbox = Outbox(folder, store="none")
    return {
        mlflow_name(
            measurement["name"], source=outbox.place(result)
        ): f"{measurement['value']:6.2f} ± {measurement['interval']:.2f}"
        for result in folder.results()
        for measurement in result["measurements"]
    }


def sqlite_query(runs_root: Path) -> Query:
    """Return a way to ask the SQLite store of a run store."""

    def ask(statement: str) -> list[Sequence[Any]]:
        database = sqlite3.connect(f"file:{runs_root / 'mlflow.db'}?mode=ro", uri=True, timeout=30)
        try:
            return list(database.execute(statement))
        finally:
            database.close()

    return ask


def settle(
    case: Case,
    folder: RunFolder,
    *,
    expected: RunFolder,
    uri: str | None = None,
    query: Query | None = None,
    missed: Collection[int] = (),
) -> None:
    """Bring a run to its end with the ordinary command, and compare it with the undisturbed run and with MLflow.

    Raises:
        BrokenError: the run does not end, or differs.
    """
    again(case, folder)
    equal(folder, expected, missed=missed)
    reconcile(case, folder, uri=uri, query=query)


def again(case: Case, folder: RunFolder, *, tries: int = 4) -> None:
    """Carry the compute process of a run to its end; several starts may be needed after a fault that lingers."""
    from tests.chaos.forks import train

    for _ in range(tries):
        child = train(folder.path, place=case.place)
        if ended_well(child, codes=(0, 2)) == 0:
            return
    raise BrokenError(f"the run does not go on: {child.said()[-500:]}")


def reconcile(case: Case, folder: RunFolder, *, uri: str | None = None, query: Query | None = None) -> None:
    """Send what MLflow lacks, and count what is lost or doubled in it and in the run store."""
    environment = {} if uri is None else {"MLFLOW_TRACKING_URI": uri}
    runs_root = folder.path.parent
    sync = obowlab(["runs", "sync", "--runs-root", str(runs_root)], place=case.place, name="sync", environment=environment)
    ended_well(sync)
    found = audit(runs_root, query or sqlite_query(runs_root))
    case.lost += found.lost
    case.doubled += found.doubled
    case.notes += found.told
    folders = [path.parent.name for path in runs_root.glob("*/run.json")]
    case.doubled += len(folders) - len({name.rsplit(f"-s{SEED}-", 1)[0] for name in folders})
