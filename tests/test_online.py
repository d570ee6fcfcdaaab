"""Few-shot results during training: there at the right steps, once, and without any effect on training."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
import torch

from obowlab.config import Machine
from obowlab.track.folder import RunFolder
from obowlab.track.metrics import lookup, mlflow_name
from tests.runs import complete, points, small_recipe, start, weights

EPOCHS = 5
EVERY = ("evaluation.every_epochs=2", 'evaluation.protocols=["fewshot"]', "evaluation.random_baseline=false")
STEPS = 7  # 60 images in steps of 8


def machine_of(root: Path, *, data_root: Path, checkpoint_every_s: float = 120.0) -> Machine:
    return Machine(
        data_root=data_root,
        runs_root=root / "runs",
        device="cpu",
        loader="torch",
        workers=0,
        checkpoint_every_s=checkpoint_every_s,
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> RunFolder:
    root = tmp_path_factory.mktemp("plain")
    loaded = small_recipe(root, dataset="small", epochs=EPOCHS, overrides=EVERY[1:])
    return complete(loaded, machine=machine_of(root, data_root=data_root))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> RunFolder:
    root = tmp_path_factory.mktemp("measured")
    loaded = small_recipe(root, dataset="small", epochs=EPOCHS, overrides=EVERY)
    return complete(loaded, machine=machine_of(root, data_root=data_root))


def test_measuring_changes_no_bit_of_training(plain: RunFolder, measured: RunFolder) -> None:
    assert plain.run_id == measured.run_id, "measuring is not part of a run's identity"
    expected, found = weights(plain), weights(measured)
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert points(plain) == points(measured)
    assert [r["measurements"] for r in plain.results()] == [r["measurements"] for r in measured.results()]
    assert not (plain.path / "online.jsonl").exists()


def test_points_are_at_whole_epochs_and_the_last_is_left_to_the_final_evaluation(measured: RunFolder) -> None:
    online = measured.metrics("online")
    assert [(point.step, point.values["epoch"]) for point in online] == [(2 * STEPS, 2.0), (4 * STEPS, 4.0)]
    for point in online:
        assert set(point.values) == {"epoch", "fewshot_1shot", "fewshot_2shot"}
        assert all(lookup(name) for name in point.values)
        assert all(0 <= point.values[name] <= 100 for name in ("fewshot_1shot", "fewshot_2shot"))
    assert mlflow_name("fewshot_1shot", online=True) == "online/fewshot_1shot"
    assert not list(measured.path.glob(".online*"))


def test_a_point_is_the_few_shot_result_of_a_run_that_ends_there(tmp_path: Path, data_root: Path, measured: RunFolder) -> None:
    """With a constant learning rate and teacher, a run of two epochs is the beginning of one of three."""
    constant = ("optimizer.end_learning_rate=0.05", "method.teacher_momentum_schedule=constant", *EVERY)
    short = small_recipe(tmp_path, dataset="small", epochs=2, overrides=constant)
    final = complete(short, machine=machine_of(tmp_path, data_root=data_root)).results()
    long = small_recipe(tmp_path, dataset="small", epochs=3, overrides=constant)
    (point,) = complete(long, machine=machine_of(tmp_path, data_root=data_root)).metrics("online")
    (result,) = final
    assert {m["name"]: m["value"] for m in result["measurements"]} == {k: v for k, v in point.values.items() if k != "epoch"}


def test_a_killed_run_repeats_no_point(tmp_path: Path, data_root: Path, measured: RunFolder) -> None:
    machine = machine_of(tmp_path, data_root=data_root, checkpoint_every_s=0.05)
    loaded = small_recipe(tmp_path, dataset="small", epochs=EPOCHS, overrides=EVERY)
    for wanted, number in ((1, signal.SIGKILL), (2, signal.SIGTERM)):
        folder, process = start(loaded, machine=machine)
        while process.poll() is None and len(folder.metrics("online")) < wanted:
            time.sleep(0.005)
        process.send_signal(number)
        process.communicate(timeout=60)
    folder = complete(loaded, machine=machine)
    assert [(p.step, p.values) for p in folder.metrics("online")] == [(p.step, p.values) for p in measured.metrics("online")]
    assert all(torch.equal(value, weights(folder)[name]) for name, value in weights(measured).items())
