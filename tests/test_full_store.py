"""The generator of full run stores leaves what trainings leave: every command finds its runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from obowlab.config import Machine
from obowlab.runs.folder import RunFolder
from obowlab.runs.results import unpack
from obowlab.tracking.outbox import Outbox
from tests.benchmarks import store as stores
from tests.command_line import Obowlab


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """The first twelve runs: a seed of Tables 1 and 3, and three of the next."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "MLmodel").write_text("flavors: {}\n")
    machine = Machine(runs_root=tmp_path / "runs", data_root=tmp_path / "no-data")
    for job in stores.planned(12):
        stores.add_run(job, machine=machine, model=model, points=40)
    return tmp_path / "runs"


def test_there_are_two_hundred_different_runs_of_several_recipes_and_seeds() -> None:
    jobs = list(stores.planned(stores.RUNS))
    assert len({job.fingerprint for job in jobs}) == len({job.run_id for job in jobs}) == stores.RUNS
    assert {job.loaded.recipe.method.name for job in jobs} == {"obow", "bownet", "rotnet", "moco"}
    assert {job.seed for job in jobs if "table3/soft_dynamic" in job.places or "table3/hard_dynamic" in job.places} == set(
        range(10)
    )


def test_a_run_of_the_store_is_a_finished_run(full: Path) -> None:
    folder = RunFolder.open(min(full.glob("tiny-*")))
    assert (folder.state.status, folder.state.step) == ("finished", folder.state.total_steps)
    logged = folder.metrics()
    assert 30 <= len(logged) <= 40
    assert {"loss", "epoch", "perplexity_image_conv5", "learning_rate"} <= set(logged[0].values)
    assert len(folder.metrics("system")) > 10
    assert {(result["subject"], result["protocol"]) for result in folder.results()} >= {("student", "fewshot"), ("random", "knn")}
    for result in folder.results():
        for measurement in result["measurements"]:
            assert unpack(measurement["samples"]).mean() == pytest.approx(measurement["value"])
    assert Outbox(folder, store="x").pending() > 500
    assert folder.labels()["obowlab.scale"] == "tiny"


def test_the_same_run_is_drawn_alike(full: Path, tmp_path: Path) -> None:
    (job,) = stores.planned(1)
    machine = Machine(runs_root=tmp_path / "again", data_root=tmp_path / "no-data")
    again = stores.add_run(job, machine=machine, model=tmp_path / "model", points=40)
    first = RunFolder.open(full / job.run_id)
    assert [point.values for point in first.metrics()] == [point.values for point in again.metrics()]
    one, other = (
        {(result["subject"], result["protocol"]): result["measurements"] for result in folder.results()}
        for folder in (first, again)
    )
    assert one == other


@pytest.mark.usefixtures("workplace")
def test_commands_have_something_to_say_of_it(full: Path, obowlab: Obowlab) -> None:
    code, out, _ = obowlab("runs", "list", "--runs-root", str(full))
    assert (code, len(re.findall(r"^\S+ +finished ", out, flags=re.MULTILINE))) == (0, 12)
    tables = [obowlab("table", "table3", "--scale", "tiny", "--format", "json", "--runs-root", str(full)) for _ in range(2)]
    (table,) = json.loads(tables[0][1])
    assert {len([run for run in row["runs"] if run["status"] == "finished"]) for row in table["rows"]} <= {1, 2}
    assert all(row["verdict"] for row in table["rows"] if not row["is_base"])
    assert tables[0] == tables[1]
    code, out, _ = obowlab("report", "--wait", "--runs-root", str(full))
    assert code == 0
    assert re.match(r"22 pages on 12 runs, 6 tables and 0 studies: ", out), out
