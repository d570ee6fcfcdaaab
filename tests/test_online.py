"""Few-shot results during training: there at the right steps, once, and without any effect on training."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from obowlab.config import Machine
from obowlab.errors import UserError
from obowlab.methods import Method
from obowlab.runs.folder import RunFolder
from obowlab.runs.metrics import lookup, mlflow_name
from obowlab.training import online_evaluation as online
from obowlab.training.context import RunContext
from obowlab.training.distributed import join
from obowlab.training.loop import train
from obowlab.training.reporter import Reporter
from obowlab.training.signals import Interrupted, StopRequest
from tests.runs import ask_to_stop_at, points, small_recipe, weights

EPOCHS = 5
EVERY = "evaluation.every_epochs=2"
STEPS = 7  # of one epoch: 60 images, 8 at a time, the rest dropped


def train_here(
    root: Path, *, data_root: Path, epochs: int = EPOCHS, overrides: tuple[str, ...] = (EVERY,)
) -> tuple[RunFolder, dict[str, float]]:
    """Train in this process without what follows training; return the folder and the few-shot result of the end."""
    root.mkdir(exist_ok=True)
    machine = Machine(data_root=data_root, runs_root=root / "runs", device="cpu", loader="torch", workers=0)
    loaded = small_recipe(root, dataset="small", epochs=epochs, overrides=overrides)
    folder = RunFolder.create(loaded, seed=0, runs_root=machine.runs_root)
    (folder.path / ".online.killed" / "entry").mkdir(parents=True, exist_ok=True)  # of a process that was
    with StopRequest().listening() as stop, join(machine) as world:
        run = RunContext(folder, machine=machine, world=world, reporter=Reporter(None), stop=stop)
        method = train(run)
        return folder, online.few_shot(run, method=method)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> RunFolder:
    return train_here(tmp_path_factory.mktemp("measured"), data_root=data_root)[0]


def assert_same_training(one: RunFolder, other: RunFolder) -> None:
    expected, found = weights(one), weights(other)
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert points(one) == points(other)


def test_measuring_changes_no_bit_of_training(tmp_path: Path, data_root: Path, measured: RunFolder) -> None:
    plain, _ = train_here(tmp_path, data_root=data_root, overrides=())
    assert plain.run_id == measured.run_id, "measuring is not part of a run's identity"
    assert_same_training(plain, measured)
    assert not (plain.path / "online.jsonl").exists()


def test_points_are_at_whole_epochs_and_the_last_is_left_to_the_final_evaluation(measured: RunFolder) -> None:
    found = measured.metrics("online")
    assert [(point.step, point.values["epoch"]) for point in found] == [(2 * STEPS, 2.0), (4 * STEPS, 4.0)]
    for point in found:
        assert set(point.values) == {"epoch", "fewshot_1shot", "fewshot_2shot"}
        assert all(lookup(name) for name in point.values)
        assert all(0 <= point.values[name] <= 100 for name in ("fewshot_1shot", "fewshot_2shot"))
    assert mlflow_name("fewshot_1shot", source="online") == "online/fewshot_1shot"
    assert not list(measured.path.glob(".online*")), "features of passing weights are not kept"


def test_a_point_is_the_few_shot_result_of_a_run_that_ends_there(tmp_path: Path, data_root: Path) -> None:
    """With a constant learning rate and teacher, a run of two epochs is the beginning of one of three."""
    constant = ("optimizer.end_learning_rate=0.05", "method.teacher_momentum_schedule=constant", EVERY)
    _, result = train_here(tmp_path / "short", data_root=data_root, epochs=2, overrides=constant)
    folder, later = train_here(tmp_path / "long", data_root=data_root, epochs=3, overrides=constant)
    (point,) = folder.metrics("online")
    assert point.values == {"epoch": 2.0, **result}
    assert later != result


def test_a_run_that_is_stopped_around_a_point_has_it_once(
    tmp_path: Path, data_root: Path, measured: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(run: RunContext, **_: object) -> dict[str, float]:
        raise RuntimeError("a mistake of ours")

    def signalled(run: RunContext, **_: object) -> dict[str, float]:
        with run.stop.acting_at_once():
            signal.raise_signal(signal.SIGTERM)
        raise AssertionError("the signal acts at once")

    few_shot = online.few_shot

    def measures_and_is_told_to_stop(run: RunContext, **keywords: object) -> dict[str, float]:
        values = few_shot(run, **keywords)  # type: ignore[arg-type]
        signal.raise_signal(signal.SIGTERM)
        return values

    for replacement, ending, expected in (
        (dies, RuntimeError, 0),
        (signalled, Interrupted, 0),
        (measures_and_is_told_to_stop, Interrupted, 1),
    ):
        monkeypatch.setattr(online, "few_shot", replacement)
        with pytest.raises(ending):
            train_here(tmp_path, data_root=data_root)
        (folder,) = (RunFolder.open(path) for path in (tmp_path / "runs").iterdir() if path.name.startswith("small"))
        assert len(folder.metrics("online")) == expected
        assert (folder.path / "checkpoint.pt").exists()
    monkeypatch.setattr(online, "few_shot", few_shot)
    folder, _ = train_here(tmp_path, data_root=data_root)
    assert [(p.step, p.values) for p in folder.metrics("online")] == [(p.step, p.values) for p in measured.metrics("online")]
    assert_same_training(folder, measured)


@pytest.mark.parametrize(
    "error",
    [UserError("lists.json is gone."), MemoryError(), OSError(5, "I/O error", "val.beton")],
    ids=lambda error: type(error).__name__,
)
def test_a_measurement_that_fails_costs_its_point_and_nothing_else(
    tmp_path: Path,
    data_root: Path,
    measured: RunFolder,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, calls, said = online.few_shot, [], []

    def failing_once(run: RunContext, *, method: Method[Any]) -> dict[str, float]:
        calls.append(run)
        if len(calls) == 1:
            raise error
        return real(run, method=method)

    monkeypatch.setattr(online, "few_shot", failing_once)
    monkeypatch.setattr(Reporter, "say", lambda self, text: said.append(text))
    folder, _ = train_here(tmp_path, data_root=data_root)
    (warning,) = (line for line in said if line.startswith("Warning"))
    assert warning.startswith("Warning: epoch 2 is not measured, and training continues. ")
    assert_same_training(folder, measured)
    assert [point.step for point in folder.metrics("online")] == [4 * STEPS]


def test_a_mistake_of_ours_in_a_measurement_is_not_swallowed(
    tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(run: RunContext, *, method: Method[Any]) -> dict[str, float]:
        raise KeyError("no such thing")

    monkeypatch.setattr(online, "few_shot", broken)
    with pytest.raises(KeyError):
        train_here(tmp_path, data_root=data_root)


def test_a_run_may_be_measured_otherwise_from_its_middle_on(
    tmp_path: Path, data_root: Path, measured: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        ask_to_stop_at(3 * STEPS, patch)
        with pytest.raises(Interrupted):
            train_here(tmp_path, data_root=data_root, overrides=())
    (folder,) = (RunFolder.open(path) for path in (tmp_path / "runs").iterdir() if path.name.startswith("small"))
    folder.set_evaluation(measured.info.recipe.evaluation)
    folder, _ = train_here(tmp_path, data_root=data_root)
    assert [point.step for point in folder.metrics("online")] == [4 * STEPS], "epoch 2 is over"
    assert_same_training(folder, measured)
