"""Small real runs for the end-to-end tests: a recipe that trains in seconds, started as the launcher starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from obowlab.config import Loaded, Machine, load_recipe
from obowlab.runs.folder import RunFolder

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


def start(loaded: Loaded, *, machine: Machine, seed: int = 3) -> tuple[RunFolder, subprocess.Popen[bytes]]:
    """Start the compute process (or the torchrun group) of a run, as the launcher does."""
    folder = RunFolder.create(loaded, seed=seed, runs_root=machine.runs_root)
    folder.write_machine(machine)
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(machine.procs)] if machine.procs > 1 else []
    )
    command = [sys.executable, *torchrun, "-m", "obowlab.training", str(folder.path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OBOWLAB_NO_PROGRESS": "1"}
    return folder, subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)


def complete(loaded: Loaded, *, machine: Machine, seed: int = 3) -> RunFolder:
    """Start a run and wait until it is finished."""
    folder, process = start(loaded, machine=machine, seed=seed)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said.decode()
    assert folder.state.status == "finished", said.decode()
    return folder


def weights(folder: RunFolder) -> dict[str, torch.Tensor]:
    """Return the method's tensors of the last checkpoint."""
    content = torch.load(folder.path / "checkpoint.pt", weights_only=True)
    return dict(content["method"])


def points(folder: RunFolder) -> list[tuple[int, dict[str, float]]]:
    """Return every logged point without the metrics that measure time."""
    return [(point.step, {k: v for k, v in point.values.items() if k not in TIMING_METRICS}) for point in folder.metrics()]
