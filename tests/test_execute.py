"""The execution of a plan, with stand-ins for trainings: signals, stages, failures and labels."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from obowlab.config import Machine
from obowlab.launch.cost import CostBook
from obowlab.runs.folder import RunFolder
from obowlab.runs.records import store_runs
from obowlab.tables import execute
from obowlab.tables.execute import Execution
from obowlab.tables.plan import Job, Plan, due_jobs, make_plan, overview, unmeasured
from obowlab.tables.spec import load_table
from tests.processes import wait_until
from tests.report_store import add_row_runs, own_table

WAITS_FOR_TWO_SIGNALS = """
import signal, sys, time
received = []
def receive(number, frame):
    received.append(number)
    with open(sys.argv[1], "a") as file:
        file.write("x")
    if len(received) == 2:
        sys.exit(1)
signal.signal(signal.SIGTERM, receive)
open(sys.argv[1], "w").close()
while True:
    time.sleep(0.02)
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "POLL_S", 0.05)


def execution(
    plan: Plan, root: Path, monkeypatch: pytest.MonkeyPatch, *, train: Callable[[Job], list[str]], slots: int = 2
) -> Execution:
    """Return an execution in which `train` gives the command line that stands in for a job's training."""

    def start(command: Sequence[str], *, environment: Any, output: Path) -> subprocess.Popen[bytes]:
        matching = [job for job in plan.jobs if tuple(command[3 : 3 + len(job.command)]) == job.command]
        job = max(matching, key=lambda job: len(job.command))  # a stage has one option more than the whole recipe
        with output.open("ab") as sink:
            return subprocess.Popen(train(job), stdout=sink, stderr=sink)

    monkeypatch.setattr(execute, "start", start)
    said: list[str] = []
    return Execution(plan, machine=Machine(runs_root=root, device="cpu"), slots=slots, say=said.append)


def finish(job: Job, *, root: Path) -> None:
    folder = RunFolder.create(job.loaded, seed=job.seed, runs_root=root)
    folder.set_state(status="finished", step=5, total_steps=5)


def test_every_child_gets_each_signal_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan([load_table("table3", scale="demo")], seeds=[0], rows={})
    files = [tmp_path / job.run_id for job in plan.jobs]

    def train(job: Job) -> list[str]:
        return [sys.executable, "-c", WAITS_FOR_TWO_SIGNALS, str(tmp_path / job.run_id)]

    def interrupt_twice() -> None:
        for text in ("", "x"):
            wait_until(lambda text=text: [file.read_text() for file in files if file.exists()] == [text, text])  # type: ignore[misc]
            os.kill(os.getpid(), signal.SIGINT)

    running = execution(plan, tmp_path / "runs", monkeypatch, train=train)
    killer = threading.Thread(target=interrupt_twice)
    killer.start()
    outcomes = running.run()
    killer.join()
    assert len(plan.jobs) > 2
    assert [outcome.status for outcome in outcomes] == ["stopped"] * len(plan.jobs)
    assert running.signals.received == [signal.SIGINT] * 2
    assert [file.read_text() for file in files if file.exists()] == ["xx", "xx"], "two slots, two children, two signals each"


def test_a_failed_stage_fails_what_needs_it_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan([load_table("table5", scale="demo")], seeds=[0], rows={})
    order: list[Job] = []

    def train(job: Job) -> list[str]:
        order.append(job)
        if job.loaded.recipe.method.name == "rotnet":
            return [sys.executable, "-c", "print('Error: no luck'); raise SystemExit(2)"]
        finish(job, root=tmp_path)
        return ["true"]

    running = execution(plan, tmp_path, monkeypatch, train=train)
    outcomes = {outcome.job.fingerprint: outcome for outcome in running.run()}
    for job in plan.jobs:
        outcome = outcomes[job.fingerprint]
        if job.loaded.recipe.method.name == "rotnet":
            assert (outcome.status, outcome.message) == ("failed", "no luck")
        elif job.needs is not None:
            assert (outcome.status, outcome.message) == ("failed", "the stage before it failed")
            assert job not in order
        else:
            assert outcome.status == "finished"
    assert {folder.run_id for folder in running.labelled} == {job.run_id for job in order if job.needs is None} - {
        job.run_id for job in order if job.loaded.recipe.method.name == "rotnet"
    }


def test_finished_runs_are_not_trained_again_but_labelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan([load_table("table5", scale="demo")], seeds=[0], rows={})
    for job in plan.jobs:
        finish(job, root=tmp_path)
    running = execution(plan, tmp_path, monkeypatch, train=lambda job: pytest.fail(f"trained {job.run_id} again"))
    assert {outcome.status for outcome in running.run()} == {"finished"}
    assert len(running.labelled) == len(plan.jobs)
    labels = [RunFolder.open(tmp_path / job.run_id).labels() for job in plan.jobs if job.is_stage]
    assert all(label["obowlab.table5"].endswith("(stage)") for label in labels)


def test_a_finished_run_is_measured_again_once_when_its_settings_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = load_table("table3", scale="demo")
    plan = make_plan([table], seeds=[0], rows={})
    for job in plan.jobs:
        finish(job, root=tmp_path)
    again, others = plan.jobs[0], plan.jobs[1:]
    started: list[Job] = []

    def train(job: Job) -> list[str]:
        started.append(job)
        return ["true"]

    running = execution(plan, tmp_path, monkeypatch, train=train)
    running.again = {again.fingerprint}
    assert {outcome.status for outcome in running.run()} == {"finished"}
    assert started == [again]
    assert others


def test_what_was_measured_with_other_settings_is_due(tmp_path: Path, data_root: Path) -> None:
    path = own_table(tmp_path)
    (tmp_path / "short.toml").write_text((tmp_path / "short.toml").read_text() + '\n[data]\ndataset = "small"\n')
    machine = Machine(runs_root=tmp_path / "runs", data_root=data_root, device="cpu")
    small = {"evaluation.fewshot.num_ways": 3, "evaluation.random_baseline": False}  # of six classes
    planned = load_table(path, scale="demo", changes=small)
    add_row_runs(planned, runs_root=machine.runs_root, means={"base": 40, "small": 30})
    runs = store_runs(machine.runs_root)
    plan = make_plan([planned], seeds=[0], rows={})
    assert unmeasured(plan, runs=runs, machine=machine) == set()
    assert [job.places for job in due_jobs(plan, runs=runs, again=set())] == [("queue/large",)]
    changed = load_table(path, scale="demo", changes={**small, "evaluation.fewshot.num_episodes": 5})
    plan = make_plan([changed], seeds=[0], rows={})
    again = unmeasured(plan, runs=runs, machine=machine)
    assert again == {job.fingerprint for job in plan.jobs[:2]}
    assert due_jobs(plan, runs=runs, again=again) == list(plan.jobs)
    rows, lines = overview(plan, runs=runs, book=CostBook(machine, runs=()), slots=1, on_cluster=False, again=again)
    assert [row[1] for row in rows] == ["finished, to be measured"] * 2 + ["missing"]
    assert "2 done (2 to be measured with other settings), 0 running, 1 missing." in lines[0]
    elsewhere = machine.model_copy(update={"data_root": tmp_path / "nothing"})
    assert unmeasured(plan, runs=runs, machine=elsewhere) == set(), "without images there is nothing to measure on"
