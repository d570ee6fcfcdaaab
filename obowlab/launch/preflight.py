"""Checks before a run starts, without torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

from obowlab.config import Loaded, Machine, Recipe
from obowlab.data.class_lists import class_list
from obowlab.data.datasets import num_training_images, open_split
from obowlab.errors import AbsentError, UserError
from obowlab.launch.nodes import RENDEZVOUS_VARIABLE


def check_nodes(machine: Machine) -> None:
    """Refuse several nodes outside a job of a cluster.

    Raises:
        UserError: says how to submit one.
    """
    if machine.nodes > 1 and RENDEZVOUS_VARIABLE not in os.environ:
        raise UserError("--nodes is for a cluster: add --launcher slurm, or leave --nodes out.")


def check_compiler(machine: Machine) -> None:
    """Refuse `compile` on a machine that has nothing to compile with.

    Raises:
        AbsentError: says what to install or change.
    """
    if machine.compile and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise AbsentError("compile = true needs a C++ compiler, and there is none: install g++, or set compile = false.")


def check_data(loaded: Loaded, *, machine: Machine, dry_run: bool, say: Callable[[str], None]) -> None:
    """Refuse a run whose images or class lists are missing, which would fail hours later; draw the synthetic images on first use.

    Args:
        loaded: the recipe of the run.
        machine: where its data are.
        dry_run: draw nothing, print what would be drawn.
        say: prints one line.

    Raises:
        UserError: a split is not prepared or damaged, or a class list is absent.
    """
    recipe = loaded.recipe
    folder = machine.data_root / recipe.data.dataset
    if recipe.data.dataset == "synthetic" and not (folder / "train.json").is_file():
        if dry_run:
            return say(f"Would draw the synthetic images into {folder}")
        say(f"Drawing the synthetic images into {folder}, this once.")
    open_split(recipe.data.dataset, "train", data_root=machine.data_root, runs_root=machine.runs_root)
    measured = {*recipe.evaluation.protocols, *(("fewshot",) if recipe.evaluation.every_epochs else ())}
    if measured:
        split = open_split(recipe.data.dataset, "val", data_root=machine.data_root, runs_root=machine.runs_root)
        if "fewshot" in measured and recipe.evaluation.fewshot.classes != "all":
            class_list(recipe.evaluation.fewshot.classes, class_names=split.class_names, folder=folder)
    return None


def check_batch(recipe: Recipe, *, machine: Machine) -> None:
    """Refuse a batch that is larger than the training set, as it is prepared or was published; an unknown one passes.

    Raises:
        UserError: names the setting to change.
    """
    data, batch_size = recipe.data, recipe.training.batch_size
    images = num_training_images(data.dataset, data_root=machine.data_root, images_per_class=data.images_per_class)
    if images is not None and images < batch_size:
        raise UserError(f"training.batch_size ({batch_size}) is larger than the training set ({images} images): lower it.")
