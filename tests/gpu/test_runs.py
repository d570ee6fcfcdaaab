"""Whole runs on GPUs: killed and continued, resumed to the bit, two ranks, a first rank that fails."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from obowlab.config import Loaded, Machine
from obowlab.launch.compute_command import compute_command
from obowlab.runs.folder import RunFolder
from tests.processes import wait_until
from tests.runs import complete, create, differing_weights, points, quiet, small_recipe, start

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]
SHORT_DEMO = (
    *("data.images_per_class=20", "training.epochs=3", "evaluation.protocols=['fewshot']", "evaluation.fewshot.num_episodes=20"),
    "evaluation.random_baseline=false",
)
"""60 classes x 20 images // 64 = 18 steps an epoch, 54 in all."""

ENDS_WITHIN_S = 60.0
"""With the start of two processes; NCCL alone would wait ten minutes."""


def machine(tmp_path: Path, data_root: Path, **options: object) -> Machine:
    values = {"data_root": data_root, "runs_root": tmp_path / "runs", "device": "cuda", "loader": "torch", "workers": 0}
    return Machine.model_validate({**values, **options})


def kill_and_continue(loaded: Loaded, *, on: Machine, at: int) -> RunFolder:
    """Kill a run with SIGKILL after so many logged points, and let another process finish it."""
    folder, process = start(loaded, machine=on)
    while process.poll() is None and len(folder.metrics()) < at:
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    return complete(loaded, machine=on)


def test_resumed_to_the_bit(tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "deterministic" not in Machine.model_fields:
        pytest.skip("the machine has no option `deterministic` yet, and without it kernels may add in any order")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    loaded = small_recipe(tmp_path, dataset="small", epochs=6)
    options = {"deterministic": True, "checkpoint_every_s": 0.05}
    whole = complete(loaded, machine=machine(tmp_path / "whole", data_root, **options))
    parts = kill_and_continue(loaded, on=machine(tmp_path / "parts", data_root, **options), at=20)
    assert points(parts) == points(whole)
    assert not differing_weights(whole, parts)


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[list[str]]:
    """The words of `obowlab run demo`, shortened, on the GPU."""
    roots = ["--runs-root", str(tmp_path / "runs"), "--data-root", str(tmp_path / "data")]
    words = [sys.executable, "-m", "obowlab.cli", "run", "demo", "--device", "cuda", "--no-quote", "--no-progress", *roots]
    return [*words, *(word for setting in SHORT_DEMO for word in ("--set", setting))]


def test_killed_demo_is_continued_by_the_same_command(demo: list[str], tmp_path: Path) -> None:
    file = tmp_path / "machine.toml"
    file.write_text("checkpoint_every_s = 0.2\n")
    demo += ["--machine", str(file)]

    def logged() -> int:
        files = list((tmp_path / "runs").glob("demo*/metrics.jsonl"))
        return len(files[0].read_bytes().splitlines()) if files else 0

    with (tmp_path / "log").open("wb") as log:
        first = subprocess.Popen(demo, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_until(lambda: first.poll() is not None or logged() >= 20, timeout_s=90)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(first.pid, signal.SIGKILL)
            first.wait()
    assert first.returncode == -signal.SIGKILL, (tmp_path / "log").read_text()
    second = subprocess.run(demo, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert second.returncode == 0, second.stderr
    (folder,) = (RunFolder.open(path.parent) for path in (tmp_path / "runs").glob("demo*/metrics.jsonl"))
    state = folder.state
    assert (state.status, state.step) == ("finished", state.total_steps)
    logged_steps = [point.step for point in folder.metrics()]
    assert logged_steps == sorted(set(logged_steps)), "no point twice"
    assert logged_steps[-1] == state.total_steps
    attempts = [json.loads(line) for line in (folder.path / "attempts.jsonl").read_text().splitlines()]
    assert [attempt["device"] for attempt in attempts] == ["cuda", "cuda"]
    assert attempts[0]["step"] == 0
    assert attempts[1]["step"] > 0, "it went on from a checkpoint"


@pytest.fixture
def two_gpus() -> None:
    """Skip where there are not two."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two NVIDIA GPUs, torch sees {torch.cuda.device_count()}")


@pytest.mark.usefixtures("two_gpus")
def test_two_ranks_learn_what_one_learns(tmp_path: Path, data_root: Path) -> None:
    loaded = small_recipe(tmp_path, dataset="small", epochs=1)
    one = points(complete(loaded, machine=machine(tmp_path / "one", data_root)))
    two = points(complete(loaded, machine=machine(tmp_path / "two", data_root, procs=2)))
    assert [step for step, _ in one] == [step for step, _ in two]
    # The first steps, before rounding grows: sums over two halves have another order.
    for (_, expected), (_, found) in zip(one[:2], two[:2], strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)


@pytest.mark.usefixtures("two_gpus")
def test_a_failure_of_rank_0_ends_all_ranks(tmp_path: Path, data_root: Path) -> None:
    on = machine(tmp_path, data_root, procs=2)
    folder = create(small_recipe(tmp_path, dataset="small"), machine=on, seed=3)
    (folder.path / "metrics.jsonl").mkdir()  # which rank 0 alone tries to open
    began = time.monotonic()
    done = subprocess.run(compute_command(folder.path, on), env=quiet(), capture_output=True, timeout=300, check=False)
    assert time.monotonic() - began < ENDS_WITHIN_S
    assert folder.state.status == "failed", done.stderr.decode()
    assert "metrics.jsonl" in folder.state.message
