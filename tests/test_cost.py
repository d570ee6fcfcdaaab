"""What a training is expected to cost: from the data set, a micro-benchmark, and finished runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from obowlab.config import Machine, load_recipe
from obowlab.errors import UserError
from obowlab.launch import cost as cost_module
from obowlab.launch import system
from obowlab.launch.cost import (
    COSTS,
    NO_BFLOAT16,
    Cost,
    CostBook,
    Measured,
    num_steps,
    quoted,
    write_actual_cost,
    write_quote,
)
from obowlab.launch.local import launch
from obowlab.launch.system import computes_bfloat16
from obowlab.runs.folder import RunFolder
from obowlab.runs.listing import list_runs
from obowlab.tracking.outbox import Outbox, Sent
from obowlab.training.benchmark import through
from tests.runs import small_recipe


def test_steps_are_those_of_the_prepared_images_or_of_what_is_known(data_root: Path, tmp_path: Path) -> None:
    small = small_recipe(tmp_path, dataset="small", epochs=3, batch_size=8).recipe
    assert num_steps(small, data_root=data_root) == 3 * (60 // 8)
    vanilla = load_recipe("imagenet20-vanilla").recipe
    assert num_steps(vanilla, data_root=tmp_path) == 80 * (260_000 // 128)
    assert num_steps(load_recipe("full").recipe, data_root=tmp_path) == 200 * (1_281_167 // 256)
    unknown = small_recipe(tmp_path, dataset="never-heard-of").recipe
    assert num_steps(unknown, data_root=tmp_path) is None


def test_a_benchmark_is_kept_and_a_finished_run_knows_better(data_root: Path, tmp_path: Path) -> None:
    loaded = small_recipe(tmp_path, dataset="small", epochs=3, batch_size=8)
    machine = Machine(data_root=data_root, runs_root=tmp_path / "runs", device="cpu")
    book = CostBook(machine, runs=[])
    assert book.cost(loaded.recipe).source == "unknown"
    assert book.measure([loaded.recipe, loaded.recipe]) == ""
    measured = CostBook(machine, runs=[]).cost(loaded.recipe)
    assert (measured.source, measured.steps) == ("benchmark", 21)
    (stored,) = json.loads((machine.runs_root / COSTS).read_text()).values()
    assert measured == expected_cost(stored, steps=21)
    assert all(value > 0 for name, value in stored.items() if name not in ("metrics_s", "start_s"))
    assert list_runs(machine.runs_root) == [], "the steps were taken in a run folder that is gone"
    folder = RunFolder.create(loaded, seed=5, runs_root=machine.runs_root)
    folder.append_attempt({"device": "cpu"})
    folder.set_state(status="finished", step=21, total_steps=21, trained_s=12.5)
    runs = list_runs(machine.runs_root)
    known = CostBook(machine, runs=runs).cost(loaded.recipe)
    assert (known.source, known.seconds) == ("run", 12.5)
    on_gpu = CostBook(machine.model_copy(update={"device": "cuda"}), runs=runs).cost(loaded.recipe)
    assert on_gpu.source == "unknown", "another device, another time"


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512bw\n", False),
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16\n", True),
        ("processor\t: 0\nflags\t\t: fpu amx_bf16 amx_tile\n", True),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", True),  # ARM: not asked
        (None, True),
    ],
)
def test_whether_a_processor_computes_bfloat16_is_read_from_its_flags(tmp_path: Path, text: str | None, known: bool) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    if text is not None:
        cpuinfo.write_text(text)
    assert computes_bfloat16(cpuinfo) is known


@pytest.mark.parametrize(
    ("precision", "has", "said"), [("bfloat16", False, True), ("bfloat16", True, False), ("float32", False, False)]
)
def test_a_quote_says_where_bfloat16_is_the_slower_choice(
    data_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    precision: str,
    has: bool,
    said: bool,
) -> None:
    monkeypatch.setattr(cost_module, "computes_bfloat16", lambda: has)
    loaded = small_recipe(tmp_path, dataset="small", epochs=3, batch_size=8, overrides=(f"training.precision={precision}",))
    machine = Machine(data_root=data_root, runs_root=tmp_path / "runs", device="cpu")
    folder = RunFolder.create(loaded, seed=0, runs_root=machine.runs_root)
    folder.append_attempt({"device": "cpu"})
    folder.set_state(status="finished", step=21, total_steps=21, trained_s=12.5)
    with caplog.at_level("INFO", logger="obowlab"):
        quoted(loaded.recipe, machine=machine, measure=True)
    assert (NO_BFLOAT16 in caplog.messages) is said


STORED = {
    "step_s": 0.5,
    "metrics_s": 0.25,
    "load_s": 0.125,
    "start_s": 2.0,
    "save_s": 1.2,
    "memory_mib": 120.0,
    "checkpoint_mib": 8.0,
    "encoder_mib": 1.5,
    "gradient_mib": 500.0,
    "collectives": 40.0,
}


def test_a_quote_is_arithmetic_on_the_measured_numbers() -> None:
    machine = Machine(device="cpu", checkpoint_every_s=120.0)
    measured = Measured.model_validate(STORED)
    assert measured.seconds(21, machine=machine) == pytest.approx((2.0 + 21 * 0.75) * 1.01)
    seldom = machine.model_copy(update={"log_points": 7})
    assert measured.seconds(21, machine=seldom) == pytest.approx((2.0 + 21 * (0.5 + 0.25 / 3)) * 1.01)
    slow_loader = measured.model_copy(update={"load_s": 3.0})
    assert slow_loader.seconds(21, machine=machine) == pytest.approx((2.0 + 21 * 3.25) * 1.01)
    nodes = machine.model_copy(update={"procs": 4, "nodes": 2})
    assert measured.seconds(21, machine=nodes) == pytest.approx((2.0 + 21 * (0.75 + 0.05 + 0.002)) * 1.01)


def test_what_would_take_too_long_is_on_the_line_through_two_batches() -> None:
    assert through(3.0, 5.0, images=16) == 5.0
    assert through(3.0, 5.0, images=256) == 5.0 + 0.25 * 240
    assert through(5.0, 4.0, images=256) == 4.0, "noise gives no time back"


def test_measurements_are_of_one_machine_and_number_of_processes(data_root: Path, tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, dataset="small", epochs=3, batch_size=8).recipe
    machine = Machine(data_root=data_root, runs_root=tmp_path, device="cpu", procs=2, threads=1)
    (tmp_path / COSTS).write_text(json.dumps({CostBook(machine, runs=[])._place(recipe): STORED}))
    assert CostBook(machine, runs=[]).cost(recipe) == expected_cost(STORED, steps=21)
    for other in ({"procs": 1}, {"threads": 2}, {"loader": "torch"}, {"workers": 3}, {"channels_last": False}):
        assert CostBook(machine.model_copy(update=other), runs=[]).cost(recipe).source == "unknown", other


def expected_cost(stored: dict[str, float], *, steps: int) -> Cost:
    """Two checkpoints, two encoders and 3 MiB of small files; every step of a short training is logged."""
    step_s = max(stored["step_s"], stored["load_s"]) + stored["metrics_s"]
    seconds = (stored["start_s"] + steps * step_s) * (1.0 + stored["save_s"] / 120.0)
    disk_mib = round(2 * stored["checkpoint_mib"] + 2 * stored["encoder_mib"] + 3.0, 1)
    return Cost(steps, seconds, "benchmark", memory_mib=round(stored["memory_mib"], 1), disk_mib=disk_mib)


@pytest.mark.long
def test_several_processes_are_timed_together(data_root: Path, tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, dataset="small", epochs=3, batch_size=8).recipe
    book = CostBook(Machine(data_root=data_root, runs_root=tmp_path / "runs", device="cpu", procs=2), runs=[])
    assert book.measure([recipe]) == ""
    assert book.cost(recipe).source == "benchmark"


def test_several_processes_share_the_time(data_root: Path, tmp_path: Path) -> None:
    loaded = small_recipe(tmp_path, dataset="small", epochs=3, batch_size=8)
    machine = Machine(data_root=data_root, runs_root=tmp_path / "runs", device="cpu")
    folder = RunFolder.create(loaded, seed=5, runs_root=machine.runs_root)
    folder.append_attempt({"device": "cpu", "procs": 2})
    folder.set_state(status="finished", step=21, total_steps=21, trained_s=10.0, memory_mib=300.0)
    runs = list_runs(machine.runs_root)
    for procs, seconds in ((1, 20.0), (2, 10.0), (4, 5.0)):
        several = machine.model_copy(update={"procs": procs})
        cost = CostBook(several, runs=runs).cost(loaded.recipe)
        assert (cost.seconds, cost.memory_mib) == (seconds, 300.0)
        assert f"{procs * seconds / 3600:.2g} CPU-hours" in cost.sentence(several)
        on_gpus = cost.sentence(several.model_copy(update={"device": "cuda"}))
        assert f"300 MiB of GPU memory for each of {procs} process(es)" in on_gpus


@pytest.mark.parametrize(("launcher", "gpus", "hours"), [("local", 0, "CPU"), ("local", 1, "GPU"), ("slurm", 0, "GPU")])
def test_auto_is_what_the_run_will_compute_on(monkeypatch: pytest.MonkeyPatch, launcher: str, gpus: int, hours: str) -> None:
    """A node of a cluster may have GPUs where the machine that submits has none."""
    monkeypatch.setattr(system, "count_gpus", lambda: gpus)
    machine = Machine.model_validate({"device": "auto", "launcher": launcher})
    assert f"{hours}-hours" in Cost(10, 3600.0, "run").sentence(machine)


def test_a_training_whose_files_do_not_fit_is_refused_before_it_begins(data_root: Path, tmp_path: Path) -> None:
    machine = Machine(data_root=data_root, runs_root=tmp_path / "runs", device="cpu")
    loaded = small_recipe(tmp_path, dataset="small")
    with pytest.raises(UserError, match=r"small-s0-\w+ needs about 976562500.0 GiB on disk, and \S+/runs has \S+ GiB left: make"):
        launch(loaded, seed=0, machine=machine, fresh=False, progress=False, cost=Cost(1, 1.0, "run", disk_mib=1e12))
    assert not (tmp_path / "runs").exists()


def test_quote_and_truth_stand_side_by_side(data_root: Path, tmp_path: Path) -> None:
    loaded = small_recipe(tmp_path, dataset="small")
    folder = RunFolder.create(loaded, seed=5, runs_root=tmp_path / "runs")
    assert folder.cost() == {}
    write_quote(folder, cost=Cost(21, 7200.0, "benchmark", memory_mib=100.0, disk_mib=8.0), procs=2)
    write_quote(folder, cost=Cost(21, 1.0, "run"), procs=1)  # the first one stands
    folder.append_attempt({"device": "cpu", "procs": 2})
    folder.set_state(status="finished", trained_s=3600.0, memory_mib=120.0)
    folder.write_artifact("encoder", b"x" * 2**20)
    write_actual_cost(folder)
    told = folder.cost()
    assert told["quote"] == {"hours": 4.0, "seconds": 7200.0, "memory_mib": 100.0, "disk_mib": 8.0, "source": "benchmark"}
    assert told["truth"] == {"hours": 2.0, "seconds": 3600.0, "memory_mib": 120.0, "disk_mib": 1.0}
    tags = Outbox(folder, store="there").tags(Sent())
    assert tags["obowlab.quote.hours"] == "4.0"
    assert tags["obowlab.truth.memory_mib"] == "120.0"
    (folder.path / "cost.json").write_text("{torn")
    assert folder.cost() == {}


def test_what_cannot_be_timed_is_said(data_root: Path, tmp_path: Path) -> None:
    good = small_recipe(tmp_path, dataset="small", batch_size=8).recipe
    bad = small_recipe(tmp_path, dataset="small", batch_size=8, overrides=("method.border=2",)).recipe
    book = CostBook(Machine(data_root=data_root, runs_root=tmp_path / "runs", device="cpu"), runs=[])
    assert "method.border" in book.measure([bad, good])
    assert book.cost(bad).seconds is None
    assert book.cost(good).source == "benchmark", "the others are timed all the same"
