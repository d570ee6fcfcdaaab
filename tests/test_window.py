"""What is logged: means over the steps since the last point, the same after a stop as without one."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
import torch

from obowlab.config import Machine
from obowlab.runs.folder import RunFolder
from obowlab.training.__main__ import main
from obowlab.training.distributed import World
from obowlab.training.window import MetricWindow, Timer
from tests.runs import TIMING_METRICS, ask_to_stop_at, differing_weights, points, small_recipe

ALONE = World(rank=0, world_size=1, device=torch.device("cpu"))
LOGGED_STEP_ALONE = ("_conv4", "_conv5", "grad_norm", "learning_rate", "epoch", "teacher_momentum")


def train_here(root: Path, *, data_root: Path, log_points: int) -> RunFolder:
    """Train 14 steps in this process, or as far as a signal allows."""
    root.mkdir(exist_ok=True)
    machine = Machine(
        data_root=data_root, runs_root=root / "runs", device="cpu", loader="torch", workers=0, log_points=log_points
    )
    loaded = small_recipe(root, dataset="small", epochs=2, overrides=("evaluation.protocols=[]",))
    folder = RunFolder.create(loaded, seed=0, runs_root=machine.runs_root)
    folder.write_machine(machine)
    assert main([str(folder.path)]) in (0, 128 + signal.SIGTERM)
    return folder


def test_a_point_is_the_mean_over_its_window_of_what_every_step_reports(tmp_path: Path, data_root: Path) -> None:
    every = points(train_here(tmp_path / "every", data_root=data_root, log_points=14))
    third = points(train_here(tmp_path / "third", data_root=data_root, log_points=3))
    assert [step for step, _ in every] == list(range(1, 15))
    assert [step for step, _ in third] == [5, 10, 14]
    first = 0
    for step, values in third:
        assert values.keys() == every[step - 1][1].keys()
        for name, value in values.items():
            if name.endswith(LOGGED_STEP_ALONE):
                assert value == every[step - 1][1][name], name
            else:
                assert value == pytest.approx(sum(each[name] for _, each in every[first:step]) / (step - first), rel=1e-12), name
        first = step


def test_a_run_stopped_within_a_window_logs_the_same_points(
    tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_here(tmp_path / "whole", data_root=data_root, log_points=3)
    ask_to_stop_at(7, monkeypatch)
    stopped = train_here(tmp_path / "stopped", data_root=data_root, log_points=3)
    assert (stopped.state.status, [step for step, _ in points(stopped)]) == ("interrupted", [5])
    monkeypatch.undo()
    stopped = train_here(tmp_path / "stopped", data_root=data_root, log_points=3)
    assert points(stopped) == points(whole)
    assert not differing_weights(stopped, whole)
    assert all(point.values[name] > 0 for point in stopped.metrics() for name in TIMING_METRICS)


def test_a_checkpoint_without_sums_is_resumed_as_well(tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train_here(tmp_path, data_root=data_root, log_points=3)
    path = whole.path / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    del content["window"]  # as an earlier version wrote it
    torch.save(content, path)
    again = train_here(tmp_path, data_root=data_root, log_points=3)
    assert points(again) == points(whole)
    assert again.state.status == "finished"


def steps(number: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = [{"loss": torch.rand((), generator=generator), "other": torch.rand((), generator=generator)} for _ in range(number)]
    found[-1]["rare"] = torch.tensor(7.0)
    return found


def test_every_metric_is_averaged_over_the_steps_that_have_it() -> None:
    window, metrics = MetricWindow(), steps(5)
    for each in metrics:
        window.add(each)
    taken = window.take(ALONE)
    assert taken == {
        "loss": pytest.approx(sum(float(each["loss"]) for each in metrics) / 5, rel=1e-12),
        "other": pytest.approx(sum(float(each["other"]) for each in metrics) / 5, rel=1e-12),
        "rare": 7.0,
    }
    window.add({"loss": torch.tensor(2.0)})
    assert window.take(ALONE) == {"loss": 2.0}


@pytest.mark.parametrize("stopped_after", range(1, 6))
def test_a_window_continues_to_the_bit(stopped_after: int) -> None:
    whole, first, second = MetricWindow(), MetricWindow(), MetricWindow()
    metrics = steps(6)
    for each in metrics:
        whole.add(each)
    for each in metrics[:stopped_after]:
        first.add(each)
    second.load(first.state(ALONE), world=ALONE)
    for each in metrics[stopped_after:]:
        second.add(each)
    assert second.take(ALONE) == whole.take(ALONE)


def test_an_empty_window_and_another_number_of_ranks() -> None:
    window = MetricWindow()
    window.load(MetricWindow().state(ALONE), world=ALONE)
    window.load({"counts": {"loss": 2}, "sums": [[3.0], [5.0]]}, world=ALONE)
    assert window.take(ALONE) == {"loss": 2.0}
    third = World(rank=1, world_size=2, device=torch.device("cpu"))
    window.load({"counts": {"loss": 2}, "sums": [[3.0], [5.0]]}, world=third)
    assert window.take(ALONE) == {"loss": 2.5}


def test_the_timer_counts_waiting_and_leaves_out_what_is_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    timer = Timer(trained_s=50.0)

    def batches() -> object:
        for _ in range(2):
            clock[0] += 3.0
            yield None

    for _ in timer.waiting_for(batches()):  # type: ignore[arg-type, var-annotated]
        clock[0] += 1.0
    clock[0] += 10.0
    timer.leave_out(10.0)
    assert timer.lap() == (4.0, 3.0)
    assert timer.trained_s == 58.0
    assert timer.since_save_s == 18.0
    timer.saved()
    assert timer.since_save_s == 0.0
    timer.start()
    for _ in timer.waiting_for(batches()):  # type: ignore[arg-type, var-annotated]
        clock[0] += 2.0
    assert timer.lap() == (5.0, 3.0)
    assert timer.trained_s == 68.0
