"""A run that is killed and continued is the run that was not, to the bit."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from obowlab.config import Machine
from obowlab.errors import UserError
from obowlab.runs.folder import RunFolder
from obowlab.training import checkpoint
from tests.runs import complete, points, small_recipe, start, weights

NUM_KILLS = 20 if os.environ.get("OBOWLAB_TEST_ALL") else 5
EPOCHS = 3 * NUM_KILLS


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> RunFolder:
    folder = tmp_path_factory.mktemp("uninterrupted")
    machine = Machine(data_root=data_root, runs_root=folder / "runs", device="cpu", loader="torch", workers=0)
    return complete(small_recipe(folder, dataset="small", epochs=EPOCHS), machine=machine)


def assert_same_run(one: RunFolder, other: RunFolder) -> None:
    expected, found = weights(one), weights(other)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    assert points(one) == points(other)
    measured = [(r["subject"], r["protocol"], r["measurements"]) for r in one.results()]
    assert measured == [(r["subject"], r["protocol"], r["measurements"]) for r in other.results()]


def test_killed_at_random_moments(tmp_path: Path, data_root: Path, uninterrupted: RunFolder) -> None:
    machine = Machine(
        data_root=data_root, runs_root=tmp_path / "runs", device="cpu", loader="torch", workers=0, checkpoint_every_s=0.05
    )
    loaded = small_recipe(tmp_path, dataset="small", epochs=EPOCHS)
    total = uninterrupted.state.total_steps
    assert total is not None
    dice = random.Random(0)
    killed_at = []
    for kill in range(NUM_KILLS):
        folder, process = start(loaded, machine=machine)
        # Somewhere in the next part of the run: steps differ, and so does the place within a step.
        wanted = min((kill + 1) * total // (NUM_KILLS + 1) + dice.randint(-1, 1), total - 1)
        while process.poll() is None and len(folder.metrics()) < wanted:
            time.sleep(0.005)
        time.sleep(dice.random() * 0.05)
        process.kill()
        process.communicate()
        killed_at.append(len(folder.metrics()))
    assert process.returncode == -signal.SIGKILL
    assert len(set(killed_at)) > NUM_KILLS // 2
    assert_same_run(complete(loaded, machine=machine), uninterrupted)


def test_stopped_politely(tmp_path: Path, data_root: Path, uninterrupted: RunFolder) -> None:
    machine = Machine(data_root=data_root, runs_root=tmp_path / "runs", device="cpu", loader="torch", workers=0)
    loaded = small_recipe(tmp_path, dataset="small", epochs=EPOCHS)
    folder, process = start(loaded, machine=machine)
    while process.poll() is None and len(folder.metrics()) < 30:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=240)
    assert process.returncode == 128 + signal.SIGTERM
    assert folder.state.status == "interrupted"
    assert (folder.path / "checkpoint.pt").exists()
    assert_same_run(complete(loaded, machine=machine), uninterrupted)


def test_damaged_checkpoint_falls_back(tmp_path: Path, data_root: Path, uninterrupted: RunFolder) -> None:
    machine = Machine(
        data_root=data_root, runs_root=tmp_path / "runs", device="cpu", loader="torch", workers=0, checkpoint_every_s=0.05
    )
    loaded = small_recipe(tmp_path, dataset="small", epochs=EPOCHS)
    folder, process = start(loaded, machine=machine)
    while process.poll() is None and not (folder.path / "checkpoint.previous.pt").exists():
        time.sleep(0.01)
    process.kill()
    process.communicate()
    path = folder.path / "checkpoint.pt"
    if path.exists():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    assert_same_run(complete(loaded, machine=machine), uninterrupted)
    assert "damaged" in (folder.path / "log.txt").read_text()


def test_a_newer_versions_checkpoint_is_refused_and_left(tmp_path: Path) -> None:
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        path = tmp_path / name
        torch.save({"format": checkpoint.FORMAT + 1, "weights": {}}, path)
        written = path.read_bytes()
        with pytest.raises(UserError, match=rf"{name} was written by a newer version of obowlab: update obowlab"):
            checkpoint.newest(tmp_path, fingerprint="", map_location=torch.device("cpu"))
        assert path.read_bytes() == written
        path.unlink()
