"""Ablations carried out for real: small runs in their own processes, killed, continued, side by side, and one that fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from obowlab.report.pages import build_site
from obowlab.report.read import gather, read_store, tables_at
from obowlab.runs.folder import RunFolder
from obowlab.runs.listing import list_runs
from obowlab.tables.plan import make_plan
from obowlab.tables.spec import load_table
from tests.runs import SMALL_RECIPE

TABLE = """
title = "A small table"
base = "small.toml"
primary = "fewshot_2shot"

[columns]
fewshot_2shot = "2-shot"
linear_top1 = "linear"

[[row]]
key = "hard"
label = "hard codes"
set = { "method.codes" = "hard" }
paper = { fewshot_2shot = 50.0, linear_top1 = 40.0 }

[[row]]
key = "soft"
label = "soft codes"
paper = { fewshot_2shot = 60.0, linear_top1 = 45.0 }
"""

FAILING = """
[[row]]
key = "broken"
label = "a learning rate that explodes"
set = { "optimizer.learning_rate" = 1e30 }
"""


def write_table(folder: Path, *, epochs: int = 3, more: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "small.toml").write_text(SMALL_RECIPE.format(dataset="small", epochs=epochs, batch_size=8))
    path = folder / "mine.toml"
    path.write_text(TABLE + more)
    return path


def start(table: Path, *, data_root: Path, words: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "obowlab.cli", "ablate", str(table), "--seeds", "1", "--jobs", "2", "--loader", "torch"]
    command += ["--workers", "0", "--device", "cpu", "--data-root", str(data_root), "--runs-root", str(table.parent / "runs")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *words], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finished(table: Path) -> list[RunFolder]:
    runs = list_runs(table.parent / "runs")
    return [RunFolder(run.path, run.info) for run in runs if run.state.status == "finished"]


def steps(folder: RunFolder) -> list[int]:
    return [point.step for point in folder.metrics()]


def test_a_table_is_trained_killed_and_continued(tmp_path: Path, data_root: Path) -> None:
    table = write_table(tmp_path / "t", epochs=12)
    first = start(table, data_root=data_root)
    runs_root = table.parent / "runs"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not any(run.state.step > 3 for run in list_runs(runs_root)):
        time.sleep(0.1)
    first.kill()
    first.wait()
    before = {run.info.run_id: run.info.created_at for run in list_runs(runs_root)}
    assert before
    second, third = start(table, data_root=data_root), start(table, data_root=data_root)  # and two at once
    for process in (second, third):
        out, said = process.communicate(timeout=240)
        assert process.returncode == 0, said
        assert "hard codes" in out
        assert "1/1" in out
    done = finished(table)
    assert len(done) == len(list_runs(runs_root)) == 2, "no run twice, none lost"
    for folder in done:
        assert folder.info.created_at == before.get(folder.run_id, folder.info.created_at)
        assert steps(folder) == list(range(1, folder.state.step + 1)), "every step once"
    labels = {folder.info.recipe.method.codes: folder.labels() for folder in done}
    assert labels["hard"]["obowlab.mine"] == "hard"
    assert labels["soft"] == {"obowlab.mine": "soft", "obowlab.scale": "paper"}

    before_steps = {folder.run_id: steps(folder) for folder in done}
    again = start(table, data_root=data_root, words=("--set", "evaluation.fewshot.num_episodes=10"))
    out, said = again.communicate(timeout=240)
    assert again.returncode == 0, said
    assert "2 to be measured with other settings" in out
    assert said.count("Measuring ") == 2
    for folder in finished(table):
        assert steps(folder) == before_steps[folder.run_id], "nothing is trained for a measurement"
        episodes = {r["details"]["num_episodes"] for r in folder.results() if r["protocol"] == "fewshot"}
        assert episodes == {10, 20}

    table.unlink()
    store = read_store(runs_root)
    found = tables_at([], store=store)
    assert {(shown.name, shown.changes) for shown in found.tables} == {
        ("mine", ()),
        ("mine", ("evaluation.fewshot.num_episodes=10",)),
    }
    values = [[cell.ours for cell in row.cells if cell.metric == "fewshot_2shot"] for shown in found.tables for row in shown.rows]
    assert all(value is not None for row in values for value in row)
    build_site(gather(store, tables=found), out=tmp_path / "site")
    assert "hard codes" in (tmp_path / "site" / "mine-paper.html").read_text(encoding="utf-8")


def test_a_failing_row_stops_no_other(tmp_path: Path, data_root: Path) -> None:
    table = write_table(tmp_path / "t", epochs=1, more=FAILING)
    process = start(table, data_root=data_root, words=("--records", str(tmp_path / "records")))
    out, said = process.communicate(timeout=240)
    assert process.returncode == 1, said
    assert len(finished(table)) == 2
    assert "broken, seed 0: failed: The loss is not finite" in out
    assert "failed: The loss is not finite" in said
    records = [json.loads(path.read_text()) for path in (tmp_path / "records").glob("*.json")]
    assert sorted(record["status"] for record in records) == ["failed", "finished", "finished"]


def test_what_is_recorded_is_not_trained_again(tmp_path: Path, data_root: Path) -> None:
    table, records = write_table(tmp_path / "t", epochs=1), tmp_path / "records"
    shown = []
    for number_trained in (2, 1, 0):
        process = start(table, data_root=data_root, words=("--records", str(records)))
        out, said = process.communicate(timeout=240)
        assert process.returncode == 0, said
        assert said.count("Training ") == number_trained
        assert ("has the results" in out) == (number_trained < 2)
        shown.append(out[out.index("A small table") :])
        shutil.rmtree(table.parent / "runs")  # as on another machine
        if number_trained == 2:
            one = next(path for path in records.iterdir() if "soft" in path.read_text())
            one.unlink()
        else:  # begun here, and finished elsewhere
            job = make_plan([load_table(str(table), scale="paper")], seeds=[0], rows={}).jobs[0]
            RunFolder.create(job.loaded, seed=0, runs_root=table.parent / "runs")
    assert len(set(shown)) == 1, "the same table from two machines as from one"


@pytest.mark.long
def test_seeds_auto_trains_what_it_proposes(tmp_path: Path, data_root: Path) -> None:
    table = write_table(tmp_path / "t", epochs=1)
    words = ("--seeds", "auto", "--max-seeds", "2", "--effect", "30")
    for proposed, trained in (("the same command proposes", 4), ("Proposed: --seeds 2", 0)):
        process = start(table, data_root=data_root, words=words)
        out, said = process.communicate(timeout=240)
        assert process.returncode == 0, said
        assert proposed in out
        assert said.count("Training ") == trained
    assert sorted(folder.info.seed for folder in finished(table)) == [0, 0, 1, 1]


def test_ctrl_c_stops_within_seconds_and_says_that_it_goes_on(tmp_path: Path, data_root: Path) -> None:
    table = write_table(tmp_path / "t", epochs=300)
    process = start(table, data_root=data_root)
    runs_root = table.parent / "runs"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and sum(run.state.step > 0 for run in list_runs(runs_root)) < 2:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 130, said
    assert "the same command continues" in said
    runs = list_runs(runs_root)
    assert [run.state.status for run in runs] == ["interrupted", "interrupted"]
    assert all((run.path / "checkpoint.pt").is_file() for run in runs)


def test_the_plan_knows_what_is_there(tmp_path: Path, data_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from obowlab.cli import main

    table = write_table(tmp_path / "t")
    assert len(make_plan([load_table(str(table), scale="demo")], seeds=range(2), rows={}).jobs) == 4
    words = [
        "ablate",
        str(table),
        "--seeds",
        "2",
        "--dry-run",
        "--data-root",
        str(data_root),
        "--runs-root",
        str(tmp_path / "runs"),
    ]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "2 rows at scale paper, 2 seed(s): 4 trainings; 0 done, 0 running, 4 missing." in out
    assert not (tmp_path / "runs").exists()
    assert main([*words, "--rows", "softt"]) == 2
    assert "Did you mean 'soft'?" in capsys.readouterr().err
