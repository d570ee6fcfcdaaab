"""Checks before a run starts, without torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec

from obowlab.config import Data, Evaluation, Loaded, Machine, Recipe
from obowlab.config.compatibility import check_settings
from obowlab.config.methods import learns_from_labels
from obowlab.data.datasets import num_training_images, open_split
from obowlab.data.protocol_needs import left_out_lines, refuse_unlabelled, refuse_unmet, unmet_needs
from obowlab.errors import AbsentError, UserError
from obowlab.launch.nodes import RENDEZVOUS_VARIABLE
from obowlab.runs.folder import RunFolder
from obowlab.runs.results import not_measured
from obowlab.runs.store import check_store, open_to_group
from obowlab.tracking.local_store import database_path
from obowlab.tracking.server import store_uri


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


def check_run_store(machine: Machine, *, dry_run: bool) -> None:
    """Refuse a run store of others in which a run could be trained, and not be kept in MLflow; open what is ours to its group.

    Args:
        machine: names the store.
        dry_run: open nothing.

    Raises:
        UserError: names what cannot be written to, and what its owner types.
    """
    if not dry_run:
        open_to_group(machine.runs_root)
    uri = store_uri(machine.tracking_uri, runs_root=machine.runs_root)
    check_store(machine.runs_root, tracking=database_path(uri) == (machine.runs_root / "mlflow.db").absolute())


def check_data(
    loaded: Loaded, *, machine: Machine, dry_run: bool, say: Callable[[str], None], required: str | None = None
) -> None:
    """Refuse a run whose images or class lists are missing, which would fail hours later; draw the synthetic images on first use.

    A protocol that the images cannot carry is left out of the evaluation, which is said.

    Args:
        loaded: the recipe of the run.
        machine: where its data are.
        dry_run: draw nothing, print what would be drawn.
        say: prints one line.
        required: a protocol that may not be left out.

    Raises:
        UserError: a split is not prepared or damaged, a class list is absent, or the images cannot carry what is required.
    """
    recipe = loaded.recipe
    if not _is_drawn(recipe, machine=machine):
        folder = machine.data_root / recipe.data.dataset
        if dry_run:
            return say(f"Would draw the synthetic images into {folder}")
        say(f"Drawing the synthetic images into {folder}, this once.")
    train = open_split(recipe.data.dataset, "train", data_root=machine.data_root, runs_root=machine.runs_root)
    refuse_unlabelled(recipe, train=train)
    unmet = unmet_needs(recipe, data_root=machine.data_root, runs_root=machine.runs_root)
    refuse_unmet(unmet.get(required or ""))
    for line in left_out_lines(unmet):
        say(line)
    return None


def data_checks(
    due: Sequence[Loaded], *, machine: Machine, dry_run: bool, say: Callable[[str], None], required: str | None = None
) -> Iterator[Callable[[], None]]:
    """Yield the checks of the run store and of the recipes, then `check_data`, once for all that measure the same images alike.

    Each sentence is said once.

    Args:
        due: the recipes.
        machine: where their data are.
        dry_run: draw nothing.
        say: prints one line.
        required: a protocol that may not be left out of the last recipe's evaluation.
    """
    said: set[str] = set()

    def say_once(line: str) -> None:
        if line not in said:
            say(line)
        said.add(line)

    if due:
        yield partial(check_run_store, machine, dry_run=dry_run)
    yield from (partial(check_recipe, loaded.recipe, machine=machine) for loaded in due)
    last = _needs(due[-1]) if due else None
    for position, loaded in enumerate(due):
        needs = _needs(loaded)
        if needs not in map(_needs, due[:position]):
            needed = required if needs == last else None
            yield partial(check_data, loaded, machine=machine, dry_run=dry_run, say=say_once, required=needed)


def _needs(loaded: Loaded) -> tuple[Data, Evaluation, bool]:
    return loaded.recipe.data, loaded.recipe.evaluation, learns_from_labels(loaded.recipe.method)


def to_measure(recipe: Recipe, *, folder: RunFolder, machine: Machine) -> tuple[str, ...]:
    """Return the protocols that a recipe asks for, a trained run lacks, and the images on this machine can carry.

    Raises:
        UserError: the images or a result are damaged, or a class list is absent.
    """
    missing = {protocol: None for _, protocol in not_measured(recipe, results=folder.results())}
    unmet = left_out(recipe, machine=machine) if missing else None
    return () if unmet is None else tuple(protocol for protocol in missing if protocol not in unmet)


def left_out(recipe: Recipe, *, machine: Machine) -> dict[str, str] | None:
    """Return what the images on this machine cannot carry, see `unmet_needs`; None when they are not there."""
    if not _is_drawn(recipe, machine=machine):
        return None
    try:
        return unmet_needs(recipe, data_root=machine.data_root, runs_root=machine.runs_root)
    except AbsentError:
        return None


def check_protocols(recipe: Recipe, *, protocols: Sequence[str], dataset: str | None, machine: Machine) -> None:
    """Refuse what the images cannot carry of what `obowlab eval` is asked for; synthetic ones are drawn later.

    Args:
        recipe: whose evaluation settings apply.
        protocols: to measure.
        dataset: another prepared data set than the recipe's, then with all its training images.
        machine: where the images are.

    Raises:
        UserError: says which setting would do; or as `unmet_needs`.
    """
    data = recipe.data
    if dataset not in (None, data.dataset):
        data = data.model_copy(update={"dataset": dataset, "images_per_class": None, "image_list": ""})
    evaluation = recipe.evaluation.model_copy(update={"protocols": tuple(protocols), "every_epochs": 0})
    measured = recipe.model_copy(update={"data": data, "evaluation": evaluation})
    if _is_drawn(measured, machine=machine):
        unmet = unmet_needs(measured, data_root=machine.data_root, runs_root=machine.runs_root)
        refuse_unmet("; ".join(dict.fromkeys(unmet.values())) or None)


def _is_drawn(recipe: Recipe, *, machine: Machine) -> bool:
    """Return whether the images are there, as far as they are drawn by obowlab itself."""
    return recipe.data.dataset != "synthetic" or (machine.data_root / "synthetic" / "train.json").is_file()


def check_recipe(recipe: Recipe, *, machine: Machine) -> None:
    """Refuse settings that no machine could train with; what depends on the number of images passes while that is unknown.

    Raises:
        UserError: names the setting to change.
    """
    data = recipe.data
    images = num_training_images(data, data_root=machine.data_root)
    check_settings(recipe, num_images=images)


def check_loader(machine: Machine) -> None:
    """Refuse the ffcv loader where ffcv is not installed.

    Raises:
        AbsentError: says what to install or change.
    """
    if machine.loader == "ffcv" and find_spec("ffcv") is None:
        raise AbsentError("--loader is ffcv, which is not installed: install obowlab[ffcv] or choose torch.")
