"""What a training is expected to cost: from the data set, a micro-benchmark, and finished runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from obowlab.config import Machine, Recipe, load_recipe
from obowlab.lab.cost import CostBook, duration, num_steps
from obowlab.track.folder import RunFolder, list_runs
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
    assert measured.seconds is not None
    assert 0 < measured.seconds < 600
    folder = RunFolder.create(loaded, seed=5, runs_root=machine.runs_root)
    folder.append_attempt({"device": "cpu"})
    folder.set_state(status="finished", step=21, total_steps=21, trained_s=12.5)
    runs = list_runs(machine.runs_root)
    known = CostBook(machine, runs=runs).cost(loaded.recipe)
    assert (known.source, known.seconds) == ("run", 12.5)
    on_gpu = CostBook(machine.model_copy(update={"device": "cuda"}), runs=runs).cost(loaded.recipe)
    assert on_gpu.source == "unknown", "another device, another time"


def test_what_cannot_be_timed_is_said(tmp_path: Path) -> None:
    recipe = Recipe.model_validate_json('{"views": {"original_size": 8, "original_resize": 9, "crop_size": 8}}')
    book = CostBook(Machine(runs_root=tmp_path, device="cpu"), runs=[])
    assert "method.border" in book.measure([recipe])
    assert book.cost(recipe).seconds is None


@pytest.mark.parametrize(("seconds", "text"), [(40, "40 s"), (600, "10 min"), (9000, "2.5 h"), (400_000, "4.6 days")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
