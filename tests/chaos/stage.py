"""What all cases share: a small data set, a recipe that trains in seconds, and the undisturbed run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import obowlab
from obowlab.config import Loaded, Machine, load_recipe
from obowlab.runs.folder import RunFolder
from obowlab.tracking.outbox import Outbox
from obowlab.tracking.server import shown_uri
from tests.chaos import forks

SEED = 3
TOTAL_STEPS = 42
RECIPE = """
title = "Chaos"

[data]
dataset = "small"

[views]
original_size = 24
original_resize = 27
num_crops = 1
crop_size = 16

[backbone]
stem = "small"
width = 4

[method]
levels = ["conv4", "conv5"]
num_words = 40
border = 0
delta_base = 0.05
msd_start = "first_batch"
teacher_momentum = 0.9

[training]
epochs = 6
batch_size = 8

[evaluation]
protocols = ["fewshot", "knn"]
every_epochs = 2

[evaluation.fewshot]
num_ways = 3
shots = [1, 2]
num_episodes = 20
"""


@dataclass(frozen=True)
class Stage:
    """The shared folder of a chaos run: `data/small`, `data/other`, `small.toml`, and runs in several states."""

    root: Path

    @property
    def data_root(self) -> Path:
        """Where the data sets are."""
        return self.root / "data"

    @property
    def recipe(self) -> Path:
        """The recipe file."""
        return self.root / "small.toml"

    def loaded(self) -> Loaded:
        """Return the recipe."""
        return load_recipe(str(self.recipe))

    def machine(self, runs_root: Path, *, procs: int = 1, data_root: Path | None = None) -> Machine:
        """Return a machine that saves after every few steps."""
        return Machine(
            data_root=data_root or self.data_root,
            runs_root=runs_root,
            device="cpu",
            loader="torch",
            workers=0,
            threads=1,
            procs=procs,
            checkpoint_every_s=0.05,
        )

    def new_run(self, place: Path, *, procs: int = 1, data_root: Path | None = None) -> RunFolder:
        """Make the folder of a new run in `place/runs`, beside an empty MLflow store."""
        runs_root = place / "runs"
        runs_root.mkdir(parents=True, exist_ok=True)
        if not (runs_root / "mlflow.db").exists():
            self.copy_store(self.root / "empty", runs_root)
        folder = RunFolder.create(self.loaded(), seed=SEED, runs_root=runs_root)
        folder.write_machine(self.machine(runs_root, procs=procs, data_root=data_root))
        return folder

    def words(self, place: Path, *, procs: int = 1, data_root: Path | None = None) -> list[str]:
        """Return the command line that trains the run in `place/runs`."""
        roots = ["--runs-root", str(place / "runs"), "--machine", str(place / "machine.toml")]
        (place / "machine.toml").write_text(
            f'data_root = "{data_root or self.data_root}"\ndevice = "cpu"\nloader = "torch"\nworkers = 0\nthreads = 1\n'
            f"procs = {procs}\ncheckpoint_every_s = 0.05\n"
        )
        return ["run", str(self.recipe), "--seed", str(SEED), *roots]

    # ---------------------------------------------------------------------------------------------- runs as they were

    def reference(self, procs: int = 1) -> RunFolder:
        """Return the finished undisturbed run, which MLflow has as well."""
        return self._only_run("finished" if procs == 1 else f"finished-{procs}")

    def copy(self, state: str, place: Path) -> RunFolder:
        """Copy the run `finished` or `halfway`, and its MLflow store, into `place/runs`; they belong there afterwards."""
        source, target = self.root / state / "runs", place / "runs"
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("mlflow.db*", ".feature*"), symlinks=True)
        self.copy_store(source, target)
        run = self._only_run(state)
        before = Outbox(run, store=shown_uri(f"sqlite:///{source / 'mlflow.db'}")).load()
        folder = RunFolder.open(target / run.run_id)
        folder.write_machine(self.machine(target))
        folder.mirror_path.unlink()
        outbox = Outbox(folder, store=shown_uri(f"sqlite:///{target / 'mlflow.db'}"))
        for path in (*outbox.results(), *outbox.artifacts()):  # copying keeps the times, but machine.json is new
            shutil.copystat(run.path / path.relative_to(folder.path), path)
        outbox.save(before)
        return folder

    def copy_store(self, source: Path, target: Path) -> None:
        """Copy an MLflow store; its artifacts belong to the new place."""
        shutil.copyfile(source / "mlflow.db", target / "mlflow.db")
        with sqlite3.connect(target / "mlflow.db") as database:
            for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri"), ("model_versions", "source")):
                database.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (str(source), str(target)))
        database.close()

    def _only_run(self, state: str) -> RunFolder:
        (path,) = (path.parent for path in (self.root / state / "runs").glob("*/run.json"))
        return RunFolder.open(path)


def prepare(root: Path, *, say: Callable[[str], None]) -> Stage:
    """Make whatever of the stage is not there yet; each part appears whole or not at all."""
    stage, code = Stage(root), _code_hash()
    if root.exists() and (not (root / "code").exists() or (root / "code").read_text() != code):
        shutil.rmtree(root)  # runs of other code prove nothing about this one
    root.mkdir(parents=True, exist_ok=True)
    (root / "code").write_text(code)
    stage.recipe.write_text(RECIPE)
    for name, first_seed in (("small", 0), ("other", 1000)):
        if not (stage.data_root / name / "train.json").exists():
            say(f"drawing the images of '{name}'")
            _prepare_data(root, name=name, first_seed=first_seed)
    _once(root / "empty", say=lambda: say("making an empty MLflow store"), make=lambda place: _make_store(place))
    _once(root / "finished", say=lambda: say("training the undisturbed run"), make=lambda place: _finish(stage, place))
    _once(root / "halfway", say=lambda: say("training a run to the half"), make=lambda place: _half(stage, place))
    return stage


def prepare_group(stage: Stage, *, procs: int = 2) -> RunFolder:
    """Return the undisturbed run of several processes, training it if it is not there yet."""
    _once(stage.root / f"finished-{procs}", say=lambda: None, make=lambda place: _finish(stage, place, procs=procs))
    return stage.reference(procs)


def _code_hash() -> str:
    """Return a hash of everything that a run depends on: obowlab, and this file with its recipe."""
    digest = hashlib.sha256()
    for path in sorted((*Path(obowlab.__file__).parent.rglob("*.py"), Path(__file__))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _once(folder: Path, *, say: Callable[[], None], make: Callable[[Path], None]) -> None:
    if (folder / "whole").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    say()
    make(folder)
    (folder / "whole").touch()


def _prepare_data(root: Path, *, name: str, first_seed: int) -> None:
    from obowlab.data.datasets import prepare as prepare_images
    from tests.conftest import draw_photo

    images = root / "images" / name
    seed = first_seed
    for split, count in (("train", 12), ("val", 6)):
        for label in range(5):
            class_dir = images / split / f"class_{label}"
            class_dir.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                seed += 1
                photo = draw_photo(seed, height=40 + 5 * (seed % 9), width=40 + 7 * (seed % 7))
                photo.save(class_dir / f"image_{number:02}.jpg", quality=90)
    prepare_images(name, source=images, data_root=root / "data", workers=1)


def _make_store(place: Path) -> None:
    from obowlab.tracking.server import prepare_store

    child = forks.fork(lambda: prepare_store(f"sqlite:///{place / 'mlflow.db'}") or 0, place=place)
    assert child.wait() == 0, child.said()


def _finish(stage: Stage, place: Path, *, procs: int = 1) -> None:
    folder = stage.new_run(place, procs=procs)
    command = stage.words(place, procs=procs)
    child = forks.train(folder.path, place=place) if procs == 1 else forks.obowlab(command, place=place)
    assert child.wait() == 0, child.said()
    _sync(place)


def _half(stage: Stage, place: Path) -> None:
    folder = stage.new_run(place)
    child = forks.train(folder.path, place=place)
    while child.poll() is None and folder.state.step < TOTAL_STEPS // 2:
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait() == 128 + signal.SIGTERM, child.said()
    assert folder.state.status == "interrupted", child.said()
    assert (folder.path / "checkpoint.previous.pt").exists()
    _sync(place)


def _sync(place: Path) -> None:
    child = forks.obowlab(["runs", "sync", "--runs-root", str(place / "runs")], place=place, name="sync")
    assert child.wait() == 0, child.said()
    (folder,) = (path for path in (place / "runs").glob("*/mirror.json"))
    assert json.loads(folder.read_bytes())["stores"]
