"""What a training is expected to cost: from the data set, a micro-benchmark, and finished runs."""

from __future__ import annotations

import json
import socket
from pathlib import Path

from obowlab.config import Machine, Recipe, load_recipe
from obowlab.launch.cost import COSTS, Cost, CostBook, num_steps, write_actual_cost, write_quote
from obowlab.runs.folder import RunFolder, list_runs
from obowlab.tracking.outbox import Outbox, Sent
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
    assert measured == expected_cost(stored, steps=21, images=8, procs=1)
    assert all(value > 0 for value in stored.values())
    folder = RunFolder.create(loaded, seed=5, runs_root=machine.runs_root)
    folder.append_attempt({"device": "cpu"})
    folder.set_state(status="finished", step=21, total_steps=21, trained_s=12.5)
    runs = list_runs(machine.runs_root)
    known = CostBook(machine, runs=runs).cost(loaded.recipe)
    assert (known.source, known.seconds) == ("run", 12.5)
    on_gpu = CostBook(machine.model_copy(update={"device": "cuda"}), runs=runs).cost(loaded.recipe)
    assert on_gpu.source == "unknown", "another device, another time"


def test_a_quote_is_arithmetic_on_the_measured_numbers(data_root: Path, tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, dataset="small", epochs=3, batch_size=8).recipe
    stored = {"step_s": 0.5, "memory_mib": 100.0, "memory_mib_per_image": 2.5, "checkpoint_mib": 8.0, "encoder_mib": 1.5}
    runs_root = tmp_path / "runs"
    runs_root.mkdir()
    (runs_root / COSTS).write_text(json.dumps({f"{socket.gethostname()} cpu {recipe.fingerprint(seed=0)}": stored}))
    for procs, seconds, memory_mib in ((1, 10.5, 120.0), (2, 5.25, 110.0), (4, 2.625, 105.0)):
        machine = Machine(data_root=data_root, runs_root=runs_root, device="cpu", procs=procs)
        cost = CostBook(machine, runs=[]).cost(recipe)
        assert cost == Cost(21, seconds, "benchmark", memory_mib=memory_mib, disk_mib=22.0)
        assert cost == expected_cost(stored, steps=21, images=8, procs=procs)


def expected_cost(stored: dict[str, float], *, steps: int, images: int, procs: int) -> Cost:
    """Two checkpoints, two encoders and 3 MiB of small files; a share of the batch and of the time for each process."""
    memory_mib = round(stored["memory_mib"] + images / procs * stored["memory_mib_per_image"], 1)
    disk_mib = round(2 * stored["checkpoint_mib"] + 2 * stored["encoder_mib"] + 3.0, 1)
    return Cost(steps, steps * stored["step_s"] / procs, "benchmark", memory_mib=memory_mib, disk_mib=disk_mib)


def test_several_processes_share_the_time(data_root: Path, tmp_path: Path) -> None:
    loaded = small_recipe(tmp_path, dataset="small", epochs=3, batch_size=8)
    machine = Machine(data_root=data_root, runs_root=tmp_path / "runs", device="cpu")
    folder = RunFolder.create(loaded, seed=5, runs_root=machine.runs_root)
    folder.append_attempt({"device": "cpu", "procs": 2})
    folder.set_state(status="finished", step=21, total_steps=21, trained_s=10.0, memory_mib=300.0)
    runs = list_runs(machine.runs_root)
    for procs, seconds in ((1, 20.0), (2, 10.0), (4, 5.0)):
        cost = CostBook(machine.model_copy(update={"procs": procs}), runs=runs).cost(loaded.recipe)
        assert (cost.seconds, cost.memory_mib) == (seconds, 300.0)
        assert f"{procs * seconds / 3600:.2g} CPU-hours" in cost.sentence(procs=procs, device="cpu")
        assert f"300 MiB of GPU memory for each of {procs} process(es)" in cost.sentence(procs=procs, device="cuda")


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


def test_what_cannot_be_timed_is_said(tmp_path: Path) -> None:
    recipe = Recipe.model_validate_json('{"views": {"original_size": 8, "original_resize": 9, "crop_size": 8}}')
    book = CostBook(Machine(runs_root=tmp_path, device="cpu"), runs=[])
    assert "method.border" in book.measure([recipe])
    assert book.cost(recipe).seconds is None
