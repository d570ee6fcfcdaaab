"""Small real runs for the end-to-end tests: a recipe that trains in seconds, started as the launcher starts it."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from obowlab.config import Loaded, Machine, load_recipe
from obowlab.launch.compute_command import compute_command
from obowlab.runs.folder import RunFolder
from obowlab.training.__main__ import main
from obowlab.training.loop import Trainer
from tests.fork_server import Fork

TIMING_METRICS = {"images_per_s", "step_time_s", "data_wait_s"}

SMALL_RECIPE = """
[data]
dataset = "{dataset}"

[views]
original_size = 24
original_resize = 27
num_crops = 2
crop_size = 16
num_patches = 2
patch_source_size = 27
patch_size = 8
patch_jitter = 3

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
epochs = {epochs}
batch_size = {batch_size}
monitor = true

[evaluation]
random_baseline = true

[evaluation.fewshot]
num_ways = 3
shots = [1, 2]
num_episodes = 20

[evaluation.linear]
epochs = 2
"""


def small_recipe(folder: Path, *, dataset: str, epochs: int = 4, batch_size: int = 8, overrides: tuple[str, ...] = ()) -> Loaded:
    """Write and load a recipe whose whole run takes seconds."""
    path = folder / "small.toml"
    path.write_text(SMALL_RECIPE.format(dataset=dataset, epochs=epochs, batch_size=batch_size))
    return load_recipe(str(path), overrides=overrides)


CHAIN = """
extends = "small"
title = "Chain"

[views]
num_patches = 0
crop_extent = "whole"
cutmix_probability = 0.8

[method]
name = "bownet"
num_words = 12
border = 0
kmeans_points = 3

[evaluation]
protocols = ["knn"]
random_baseline = false

[teacher.teacher.method]
name = "rotnet"

[teacher.teacher.views]
cutmix_probability = 0.0

[teacher.teacher.training]
epochs = 2
"""


def chain_recipe(folder: Path, *, dataset: str, epochs: int = 4, overrides: tuple[str, ...] = ()) -> Loaded:
    """Write and load a recipe of three stages: RotNet, BoWNet, BoWNet."""
    small_recipe(folder, dataset=dataset, epochs=epochs)
    path = folder / "chain.toml"
    path.write_text(CHAIN)
    return load_recipe(str(path), overrides=overrides)


def start(loaded: Loaded, *, machine: Machine, seed: int = 3) -> tuple[RunFolder, Fork]:
    """Start the compute process of a run, as the launcher does but for the seconds of imports."""
    folder = create(loaded, machine=machine, seed=seed)
    return folder, Fork(main, [str(folder.path)], environment=quiet())


def complete(loaded: Loaded, *, machine: Machine, seed: int = 3) -> RunFolder:
    """Train and evaluate a run; several processes are started by torchrun."""
    if machine.procs == 1:
        folder, process = start(loaded, machine=machine, seed=seed)
        _, errors = process.communicate(timeout=300)
        code = process.returncode
    else:
        folder = create(loaded, machine=machine, seed=seed)
        command = compute_command(folder.path, machine)
        group = subprocess.run(command, env=quiet(), stderr=subprocess.PIPE, timeout=300, check=False)
        code, errors = group.returncode, group.stderr
    assert code == 0, errors.decode()
    assert folder.state.status == "finished", errors.decode()
    return folder


def quiet() -> dict[str, str]:
    return {**os.environ, "OBOWLAB_NO_PROGRESS": "1"}


def create(loaded: Loaded, *, machine: Machine, seed: int) -> RunFolder:
    """Make the folder of a run that is to be trained on a machine."""
    folder = RunFolder.create(loaded, seed=seed, runs_root=machine.runs_root)
    folder.write_machine(machine)
    return folder


def weights(folder: RunFolder) -> dict[str, torch.Tensor]:
    """Return the method's tensors of the last checkpoint."""
    content = torch.load(folder.path / "checkpoint.pt", weights_only=True)
    return dict(content["method"])


def differing_weights(one: RunFolder, other: RunFolder) -> list[str]:
    """Return the names of the method's tensors that are not equal to the bit, or in one of the runs only."""
    ours, theirs = weights(one), weights(other)
    return [name for name in ours | theirs if not (name in ours and name in theirs and torch.equal(ours[name], theirs[name]))]


def points(folder: RunFolder) -> list[tuple[int, dict[str, float]]]:
    """Return every logged point without the metrics that measure time."""
    return [(point.step, {k: v for k, v in point.values.items() if k not in TIMING_METRICS}) for point in folder.metrics()]


def ask_to_stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a SIGTERM come to a training in this process when it is about to take a step, until the patch is undone."""
    train_step = Trainer.train_step

    def asked(self: Trainer, *arguments: Any, **options: Any) -> tuple[bool, bool]:
        if self.step == step:
            signal.raise_signal(signal.SIGTERM)
        return train_step(self, *arguments, **options)

    monkeypatch.setattr(Trainer, "train_step", asked)
