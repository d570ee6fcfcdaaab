"""The chaos suite itself: its plan, its table, its judges, and a handful of faults; `make chaos` injects hundreds."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from obowlab.runs.folder import RunFolder
from tests.chaos import forks, judge, ledger
from tests.chaos.kinds import KINDS, fuzz
from tests.chaos.ledger import BrokenError, Case, Kind, Outcome
from tests.chaos.stage import Stage, prepare

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks and signals as on Linux")

HANDFUL = 14 if os.environ.get("OBOWLAB_TEST_ALL") else 6


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chaos")


def chaos(work: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Play faults as `make chaos` does: in a process without threads, which may fork."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    environment.pop("PYTHONOPTIMIZE", None)  # the suite keeps its own asserts; `optimized` takes those of the package
    command = [sys.executable, "-m", "tests.chaos", "--work", str(work), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def test_a_handful_of_faults_of_the_cheap_kinds(work: Path) -> None:
    played = chaos(work, "--kinds", "worker,records,archives", "--faults", str(HANDFUL), "--jobs", "1", "--seed", "1")
    assert played.returncode == 0, played.stdout + played.stderr
    (total,) = (line for line in played.stdout.splitlines() if "total" in line)
    cells = [cell.strip() for cell in total.replace("┃", "│").split("│") if cell.strip()]
    injected, survived, equal, sentences, lost, doubled = map(int, cells[1:7])
    assert injected >= HANDFUL
    assert survived == injected == equal + sentences
    assert (lost, doubled) == (0, 0)


@pytest.fixture
def finished(work: Path, tmp_path: Path) -> RunFolder:
    if not (work / "stage" / "finished" / "whole").exists():
        prepare(work / "stage", say=print)
    return Stage(work / "stage").copy("finished", tmp_path)


def test_judges_find_what_is_lost_and_doubled(finished: RunFolder) -> None:
    root = finished.path.parent
    query = judge.sqlite_query(root)
    whole = judge.audit(root, query)
    assert (whole.lost, whole.doubled) == (0, 0), whole.told
    with sqlite3.connect(root / "mlflow.db") as database:
        database.execute("DELETE FROM metrics WHERE rowid IN (SELECT rowid FROM metrics WHERE key = 'train/loss' LIMIT 3)")
        twice = "SELECT key, value, timestamp + 1, run_uuid, step, is_nan FROM metrics WHERE key = 'eval/student/knn_top1'"
        database.execute(f"INSERT INTO metrics (key, value, timestamp, run_uuid, step, is_nan) {twice}")
        database.execute("DELETE FROM model_versions")
    database.close()
    found = judge.audit(root, query)
    assert (found.lost, found.doubled) == (4, 1)


def test_judges_find_a_run_that_is_not_equal(finished: RunFolder, work: Path) -> None:
    expected = Stage(work / "stage").reference()
    judge.equal(finished, expected)
    path = finished.path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(BrokenError, match=r"metrics.jsonl differs"):
        judge.equal(finished, expected)
    path.write_bytes(b"".join(lines))
    content = torch.load(finished.path / "checkpoint.pt", weights_only=True)
    name = next(name for name, value in content["method"].items() if value.dtype == torch.float32)
    content["method"][name] = torch.nextafter(content["method"][name], torch.tensor(9.0))
    torch.save(content, finished.path / "checkpoint.pt")
    with pytest.raises(BrokenError, match="tensors differ"):
        judge.equal(finished, expected)


@pytest.mark.parametrize(
    ("script", "well"),
    [
        ("echo 'Error: Lower the number of --gpus.' >&2; exit 2", True),
        ("echo 'Error: Lower the number of --gpus.' >&2; exit 1", False),
        ("echo 'Error: No.' >&2; exit 2", False),
        ("echo 'Traceback (most recent call last):' >&2; echo 'Error: Lower the number of --gpus.' >&2; exit 2", False),
        ("echo 'Error: One thing is wrong.' >&2; echo 'Error: Another one is, too.' >&2; exit 2", False),
    ],
)
def test_one_clear_sentence_is_told_from_anything_else(script: str, well: bool, tmp_path: Path) -> None:
    child = forks.fork(lambda: os.execv("/bin/sh", ["sh", "-c", script]), place=tmp_path)
    if well:
        assert judge.sentence(child) == "Error: Lower the number of --gpus."
    else:
        with pytest.raises(BrokenError):
            judge.sentence(child)


def test_a_fork_can_be_killed_with_all_below_it(tmp_path: Path) -> None:
    child = forks.fork(lambda: subprocess.call(["sleep", "600"]), place=tmp_path)
    while len(child.family()) < 2:
        pass
    below = child.family()[1]
    assert child.kill_family()
    assert child.wait() == -signal.SIGKILL
    assert not child.send(signal.SIGKILL)
    end = time.monotonic() + 240
    while is_running(below):
        assert time.monotonic() < end, "it outlived its parent"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""  # empty: dead, and nobody has asked how it ended
    except (FileNotFoundError, ProcessLookupError):
        return False


def kind(title: str, *, share: int, per_case: int = 1, apart: bool = False) -> Kind:
    return Kind(title, lambda case: None, share=share, per_case=per_case, apart=apart)


def test_a_plan_has_every_kind_and_enough_faults_and_depends_on_its_arguments_alone() -> None:
    planned = ledger.plan(KINDS, faults=200, seed=0)
    assert planned == ledger.plan(KINDS, faults=200, seed=0)
    assert planned != ledger.plan(KINDS, faults=200, seed=1)
    assert {name for name, _, _ in planned} == set(KINDS)
    assert sum(size for name, _, size in planned if not KINDS[name].apart) >= 200
    assert len({case[:2] for case in planned}) == len(planned)
    assert [case for case in planned if case[0] == "fuzz"] == [("fuzz", 0, 1)]


def test_what_a_case_raises_is_its_failure_alone(tmp_path: Path) -> None:
    def broken(case: Case) -> None:
        case.fault("first")
        case.fault("second")
        raise ValueError("nobody expected this")

    case = Case(kind="one", seed=7, place=tmp_path, stage=Stage(tmp_path), num_faults=2)
    outcome = ledger.play(Kind("one thing", broken, share=1), case)
    assert outcome.failed
    assert (outcome.injected, outcome.survived) == (2, 1)
    (told,) = ledger.failures([outcome])
    assert "nobody expected this" in told
    assert "second" in told
    assert told.endswith("again: python -m tests.chaos --only one --seed 7")


def test_the_state_file_survives_a_torn_line_and_the_table_adds_up(tmp_path: Path) -> None:
    kinds = {"a": kind("a thing", share=1), "b": kind("b thing", share=1), "c": kind("generated", share=0, apart=True)}
    outcomes = [
        Outcome("a", 0, 5, 2, 0, 0, 0, 3.0),
        Outcome("a", 1, 5, 1, 0, 0, 0, 4.0),
        Outcome("b", 0, 3, 0, 2, 1, 0, 1.0),
        Outcome("c", 0, 0, 90, 0, 0, 100, 9.0),
    ]
    for one in outcomes:
        ledger.append(tmp_path / "state.jsonl", one)
    with (tmp_path / "state.jsonl").open("a") as file:
        file.write('{"kind": "a", "se')
    assert ledger.read(tmp_path / "state.jsonl") == outcomes
    assert ledger.rows(kinds, outcomes) == [
        ("a thing", "10", "10", "7", "3", "0", "0", "4.0 s"),
        ("b thing", "3", "2", "2", "0", "2", "1", "1.0 s"),
        ("total", "13", "12", "9", "3", "2", "1", "4.0 s"),
        ("generated", "100", "100", "10", "90", "-", "-", "9 s"),
    ]


def test_fuzzed_recipes_are_recipes_or_sentences(tmp_path: Path) -> None:
    made, valid = fuzz.play(tmp_path, examples=150, seed=5)
    assert made >= 150
    assert 10 < valid < made


def test_unknown_kinds_are_refused(work: Path) -> None:
    played = chaos(work, "--only", "everything")
    assert played.returncode == 2
    assert "invalid choice" in played.stderr
