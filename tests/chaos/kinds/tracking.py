"""Tracking services that die, are not there, or come back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from obowlab.runs.folder import RunFolder
from tests.chaos import forks, services
from tests.chaos.judge import BrokenError, Query, ended_well, equal, reconcile, settle
from tests.chaos.ledger import Case, Kind
from tests.chaos.services import Services

VICTIMS = ("server", "database", "objects")


def killed(case: Case) -> None:
    """Kill -9 the MLflow server, its database and its object store while a run is sent to it, and start them again."""
    with services.running(case.place, template=case.stage.root / "services") as there:
        folder = case.stage.new_run(case.place)
        training = forks.train(folder.path, place=case.place)
        for _ in range(case.num_faults):
            sync = _sync(case, folder, there)
            time.sleep(case.dice.uniform(0.2, 1.5))
            victim = case.dice.choice(VICTIMS)
            if there.kill(victim):
                case.fault(f"{victim} killed {'while sending' if sync.poll() is None else 'after sending'}")
            time.sleep(case.dice.random())
            ended_well(sync, codes=(0, 1))
            there.start(victim)
        ended_well(training)
        settle(case, folder, expected=case.stage.reference(), uri=there.uri, query=there.query)
        _artifacts_are_there(folder, there)


def absent(case: Case) -> None:
    """Let no server be there from the start, from the middle or at the end; training must not notice, and later all is sent."""
    with services.running(case.place, template=case.stage.root / "services", names=("database", "objects")) as there:
        for number in range(case.num_faults):
            when = ("start", "middle", "end")[(case.seed + number) % 3]
            runs = case.place / f"store-{number}"
            runs.mkdir()
            folder = case.stage.new_run(runs)
            if when != "start":
                there.start("server")
            command = forks.obowlab(case.stage.words(runs), place=runs, environment={"MLFLOW_TRACKING_URI": there.uri})
            wanted = {"start": 0, "middle": 12, "end": 42}[when]
            while command.poll() is None and folder.state.step < wanted:
                time.sleep(0.01)
            alive = command.poll() is None
            if alive and (when == "start" or there.kill("server")):
                case.fault(f"no server from the {when} on")
            ended_well(command)
            there.kill("server")
            equal(folder, case.stage.reference())
            there.start("server")
            reconcile(case, folder, uri=there.uri, query=_only(folder, there))
            there.kill("server")


# --------------------------------------------------------------------------------------------------------------- helpers


def _sync(case: Case, folder: RunFolder, there: Services) -> forks.Child:
    words = ["runs", "sync", "--timeout", "6", "--runs-root", str(folder.path.parent)]
    return forks.obowlab(words, place=case.place, name="sync", environment={"MLFLOW_TRACKING_URI": there.uri})


def _only(folder: RunFolder, there: Services) -> Query:
    """Return a way to ask the database about the runs of one store: several stores have runs of the same name in it."""
    started = str(folder.info.created_at)
    ours = f"SELECT run_uuid FROM tags WHERE key = 'obowlab.created_at' AND value = '{started}'"

    def ask(statement: str) -> list[Sequence[Any]]:
        column = "run_id" if "model_versions" in statement else "run_uuid"
        joint = "AND" if "WHERE" in statement else "WHERE"
        return there.query(f"{statement} {joint} {column} IN ({ours})")

    return ask


def _artifacts_are_there(folder: RunFolder, there: Services) -> None:
    """Compare the results and the model in the object store with those of the run folder, byte by byte."""
    objects = {path.name: path for path in (there.place / "objects").rglob("*") if path.is_file() and path.name[0] != "."}
    wanted = [*sorted((folder.path / "results").glob("*.json")), folder.path / "run.json"]
    lost = [path.name for path in wanted if path.name not in objects or objects[path.name].read_bytes() != path.read_bytes()]
    if lost or "MLmodel" not in objects:
        raise BrokenError(f"the object store lacks {lost or 'the model'}")


KINDS = {
    "services": Kind(
        "kill -9 of MLflow server, PostgreSQL, object store", killed, share=60, per_case=5, lacking=services.lacking
    ),
    "absent": Kind(
        "no tracking server: from the start, mid-run, at the end", absent, share=15, per_case=3, lacking=services.lacking
    ),
}
