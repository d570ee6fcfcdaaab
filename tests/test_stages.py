"""Recipes of several stages: trained one after the other, found by fingerprint, continued after a kill -9; and resuming."""

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
import torch

from obowlab.config import Loaded, Machine, load_recipe
from obowlab.files.records import read_checked
from obowlab.methods import build_backbone
from obowlab.runs.folder import RunFolder
from obowlab.runs.lineage import find_run
from obowlab.training.__main__ import main as train_here
from obowlab.weights.encoder_file import read_encoder, save_encoder
from tests.command_line import Obowlab
from tests.runs import chain_recipe, complete, differing_weights, points, small_recipe, start, weights

SEED = 3


def machine_of(runs_root: Path, *, data_root: Path, **values: object) -> Machine:
    given = {"data_root": data_root, "runs_root": runs_root, "device": "cpu", "loader": "torch", "workers": 0}
    return Machine.model_validate({**given, **values})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> tuple[Loaded, Machine, list[RunFolder]]:
    """All three stages, trained without interruption; treat them as read-only."""
    folder = tmp_path_factory.mktemp("chain")
    machine = machine_of(folder / "runs", data_root=data_root)
    loaded = chain_recipe(folder, dataset="small")
    return loaded, machine, [complete(stage, machine=machine, seed=SEED) for stage in loaded.stages()]


def test_a_chain_killed_in_its_second_stage_goes_on_there(
    tmp_path: Path, data_root: Path, trained: tuple[Loaded, Machine, list[RunFolder]]
) -> None:
    chain_recipe(tmp_path, dataset="small")
    runs_root = tmp_path / "runs"
    command = [sys.executable, "-m", "obowlab.cli", "run", str(tmp_path / "chain.toml"), "--seed", str(SEED), "--no-progress"]
    command += [
        "--no-quote",
        "--data-root",
        str(data_root),
        "--runs-root",
        str(runs_root),
        "--device",
        "cpu",
        "--loader",
        "torch",
    ]
    (tmp_path / "machine.toml").write_text("checkpoint_every_s = 0.05\nworkers = 0\n")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(tmp_path), "OBOWLAB_MACHINE": str(tmp_path / "machine.toml")}
    environment.pop("MLFLOW_TRACKING_URI", None)
    launcher = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    second = runs_root / trained[2][1].run_id
    while launcher.poll() is None and not (second / "metrics.jsonl").exists():
        time.sleep(0.01)
    while launcher.poll() is None and len(RunFolder.open(second).metrics()) < 8:
        time.sleep(0.005)
    state = RunFolder.open(second).state
    assert state.pid is not None
    launcher.kill()  # alone, the training process would be started again
    os.kill(state.pid, signal.SIGKILL)
    said, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == -signal.SIGKILL, said
    assert 8 <= len(RunFolder.open(second).metrics()) < (state.total_steps or 0)
    assert not (runs_root / trained[2][2].run_id).exists()

    finished = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert finished.returncode == 0, finished.stdout
    assert f"Run {trained[2][0].run_id} is finished.\nStage 2 of 3: Chain (stage 2 of 3)\n" in finished.stdout
    assert "Resuming from step" in finished.stdout
    assert finished.stdout.count("k-means: 12 words") == 1, "the second stage had its words already"
    for expected in trained[2]:
        found = RunFolder.open(runs_root / expected.run_id)
        assert found.state.status == "finished"
        assert points(found) == points(expected)
        assert not differing_weights(found, expected), expected.run_id
        assert [result["measurements"] for result in found.results()] == [result["measurements"] for result in expected.results()]
        assert found.results(), "every stage is measured"


def test_every_stage_records_its_teacher(trained: tuple[Loaded, Machine, list[RunFolder]]) -> None:
    first, second, last = trained[2]
    assert [folder.info.name for folder in trained[2]] == ["chain-stage1", "chain-stage2", "chain"]
    assert "teacher_run" not in first.attempts()[0]
    for folder, teacher in ((second, first), (last, second)):
        encoder = read_encoder(teacher.path / "encoder.safetensors")
        assert folder.attempts()[0]["teacher_run"] == teacher.run_id
        assert folder.attempts()[0]["teacher_weights"] == encoder.info.weights_hash
        state = weights(folder)
        assert all(torch.equal(value, state[f"teacher.{name}"]) for name, value in encoder.model.state_dict().items())


def interrupted_copy(folder: Path, trained: tuple[Loaded, Machine, list[RunFolder]]) -> list[RunFolder]:
    """Return a copy of the chain whose second stage could go on."""
    copies = []
    for original in trained[2]:
        shutil.copytree(original.path, folder / original.run_id)
        copies.append(RunFolder.open(folder / original.run_id))
    (copies[1].path / "encoder.safetensors").unlink()  # with it, the stage would be trained
    copies[1].set_state(status="interrupted")
    return copies


def test_a_teacher_under_another_name_will_do(tmp_path: Path, trained: tuple[Loaded, Machine, list[RunFolder]]) -> None:
    first, second, _ = interrupted_copy(tmp_path, trained)
    other = first.path.rename(tmp_path / "mine-s3-00000000")
    info = read_checked(other / "run.json")
    (other / "run.json").write_text(json.dumps({**info, "run_id": other.name, "name": "mine"}))
    assert train_here([str(second.path)]) == 0
    assert second.attempts()[-1]["teacher_run"] == "mine-s3-00000000"


@pytest.mark.parametrize("what", ["missing", "unfinished", "changed"])
def test_without_its_teacher_a_stage_stops_with_one_sentence(
    what: str, tmp_path: Path, trained: tuple[Loaded, Machine, list[RunFolder]], capfd: pytest.CaptureFixture[str]
) -> None:
    first, second, _ = interrupted_copy(tmp_path, trained)
    before = (second.path / "checkpoint.pt").read_bytes()
    encoder = first.path / "encoder.safetensors"
    if what == "missing":
        shutil.rmtree(first.path)
    elif what == "unfinished":
        encoder.unlink()
    else:
        recipe = first.info.recipe
        save_encoder(build_backbone(recipe.backbone, seed=99), path=encoder, recipe=recipe, fingerprint=None, source="elsewhere")
    assert train_here([str(second.path)]) == 2
    said = {
        "missing": f"fingerprint {first.info.fingerprint[:8]}), whose run is not there: train it with 'obowlab run'",
        "unfinished": f"whose run ({first.run_id}) has no encoder yet",
        "changed": f"The encoder in {first.path} is not the one that {second.run_id} began with",
    }[what]
    assert said in second.state.message
    assert "\n" not in second.state.message
    assert f"Error: {second.state.message}" in capfd.readouterr().err
    assert (second.path / "checkpoint.pt").read_bytes() == before


def test_a_signal_while_words_are_made_stops_at_once_and_they_are_made_again(
    tmp_path: Path, trained: tuple[Loaded, Machine, list[RunFolder]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, _ = interrupted_copy(tmp_path, trained)
    shutil.rmtree(second.path)
    folder = RunFolder.create(trained[0].stages()[1], seed=SEED, runs_root=tmp_path)
    folder.write_machine(trained[1])

    def stopped(points: torch.Tensor, **options: object) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("nobody listened")

    with monkeypatch.context() as patch:
        patch.setattr("obowlab.methods.bownet.kmeans", stopped)
        assert train_here([str(folder.path)]) == 128 + signal.SIGTERM
    assert folder.state.status == "interrupted"
    assert not (folder.path / "checkpoint.pt").exists()
    assert train_here([str(folder.path)]) == 0
    assert [attempt["teacher_run"] for attempt in folder.attempts()] == [first.run_id] * 2
    assert torch.equal(weights(folder)["words"], weights(trained[2][1])["words"])


def test_a_run_is_found_by_fingerprint_a_finished_one_first(tmp_path: Path) -> None:
    loaded = load_recipe("demo")
    assert find_run(loaded.recipe.fingerprint(seed=0), runs_root=tmp_path) is None
    older = RunFolder.create(loaded, seed=0, runs_root=tmp_path)
    older.set_state(status="finished")
    newer = RunFolder.create(load_recipe("demo-vanilla"), seed=0, runs_root=tmp_path)
    RunFolder.create(loaded, seed=1, runs_root=tmp_path)
    found = find_run(loaded.recipe.fingerprint(seed=0), runs_root=tmp_path)
    assert found is not None
    assert found.run_id == older.run_id
    older.set_state(status="interrupted")
    newer.set_state(status="finished")
    found = find_run(loaded.recipe.fingerprint(seed=0), runs_root=tmp_path)
    assert found is not None
    assert found.run_id == newer.run_id


# ---------------------------------------------------------------------------------------------------------- command line


def test_a_dry_run_lists_every_stage(
    tmp_path: Path, trained: tuple[Loaded, Machine, list[RunFolder]], data_root: Path, obowlab: Obowlab
) -> None:
    chain_recipe(tmp_path, dataset="small")
    words = ["run", str(tmp_path / "chain.toml"), "--seed", str(SEED), "--data-root", str(data_root), "--dry-run"]
    ids = [folder.run_id for folder in trained[2]]
    code, out, _ = obowlab(*words, "--runs-root", str(tmp_path / "runs"))
    assert code == 0
    assert [line for line in out.splitlines() if line.startswith("Would")] == [f"Would train run {run_id}" for run_id in ids]
    assert "Stage 1 of 3: Chain (stage 1 of 3)\n" in out
    assert not (tmp_path / "runs").exists()

    code, out, _ = obowlab(*words, "--runs-root", str(tmp_path / "runs"), "--stage", "2")
    assert [line for line in out.splitlines() if line.startswith("Would")] == [f"Would train run {run_id}" for run_id in ids[:2]]

    there = str(trained[1].runs_root)
    code, out, _ = obowlab(*words, "--runs-root", there, "--fresh")
    assert [line for line in out.splitlines() if line.startswith(("Would", "Run"))] == [
        f"Run {ids[0]} is finished.",
        f"Run {ids[1]} is finished.",
        f"Would put aside and train again run {ids[2]}",
    ]
    code, out, _ = obowlab(*words, "--runs-root", there, "--fresh", "--stage", "1")
    assert [line for line in out.splitlines() if line.startswith("Would")] == [f"Would put aside and train again run {ids[0]}"]
    code, out, _ = obowlab(*words, "--runs-root", there)
    assert f"Run {ids[2]} is finished; --fresh would train it again." in out
    assert "knn_top1" in out


def test_a_stage_that_another_recipe_trained_is_continued_under_its_name(
    tmp_path: Path, data_root: Path, obowlab: Obowlab
) -> None:
    first = chain_recipe(tmp_path, dataset="small").stages()[0]
    mine = RunFolder.create(Loaded(name="rotnet", recipe=first.recipe, sources={}), seed=0, runs_root=tmp_path / "runs")
    mine.set_state(status="interrupted", step=3, total_steps=14)
    _, out, _ = obowlab(
        "run",
        str(tmp_path / "chain.toml"),
        "--data-root",
        str(data_root),
        "--runs-root",
        str(tmp_path / "runs"),
        "--dry-run",
        "--resume",
    )
    assert f"Would continue run {mine.run_id}\n" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("chain", "--stage", "4"), "Recipe 'chain' has 3 stages, not 4: lower --stage."),
        (("small", "--stage", "2"), "Recipe 'small' has 1 stage, not 2: lower --stage."),
        (("chain", "--resume"), "to resume"),
    ],
)
def test_stages_that_are_not_there_are_told(
    options: tuple[str, ...], message: str, tmp_path: Path, data_root: Path, obowlab: Obowlab
) -> None:
    chain_recipe(tmp_path, dataset="small")
    name, *rest = options
    roots = ("--data-root", str(data_root), "--runs-root", str(tmp_path / "runs"))
    code, _, err = obowlab("run", str(tmp_path / f"{name}.toml"), *rest, *roots)
    assert code == 2
    assert message in err


# -------------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.long
@pytest.mark.parametrize("changes", ["moco", "rotnet"])
def test_a_killed_run_of_every_method_goes_on_to_the_bit(changes: str, tmp_path: Path, data_root: Path) -> None:
    options = ("method.batchnorm_splits=2", "method.queue_size=30") if changes == "moco" else ()
    overrides = (f"method.name={changes}", "evaluation.protocols=[]", *options)
    loaded = small_recipe(tmp_path, dataset="small", epochs=6, overrides=overrides)
    whole = complete(loaded, machine=machine_of(tmp_path / "whole", data_root=data_root))
    machine = machine_of(tmp_path / "runs", data_root=data_root, checkpoint_every_s=0.05)
    folder, process = start(loaded, machine=machine)
    while process.poll() is None and len(folder.metrics()) < 20:
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    again = complete(loaded, machine=machine)
    assert points(again) == points(whole)
    assert not differing_weights(whole, again)
