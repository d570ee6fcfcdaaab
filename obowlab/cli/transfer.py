"""`obowlab eval --protocol places205` and its likes: protocols that are trainings of their own, each a recipe of that name."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import click

from obowlab.cli.output import send_to_mlflow
from obowlab.errors import UserError

if TYPE_CHECKING:
    from obowlab.cli.options import MachineOptions
    from obowlab.cli.run import Wanted
    from obowlab.config import Machine
    from obowlab.runs.folder import RunFolder
    from obowlab.weights.source import Source

TRAININGS = ("linear-imagenet", "places205", "semi-1", "semi-10")
"""The protocols, and the recipes that they are; with a preset it is the recipe PROTOCOL-PRESET."""


def recipe_of(protocol: str, *, preset: str | None) -> str:
    """Return the name of the recipe that a protocol is.

    Raises:
        UserError: there is no such preset.
    """
    from obowlab.config import recipe_files

    known = [name.removeprefix(f"{protocol}-") for name in recipe_files() if name.startswith(f"{protocol}-")]
    if preset is None:
        return protocol
    if preset not in known:
        raise UserError(f"--protocol {protocol} has no preset '{preset}'. Known: {', '.join(known) or 'none'}.")
    return f"{protocol}-{preset}"


def measure_by_training(source: Source, *, wanted: Wanted, machine: Machine, options: MachineOptions, dry_run: bool) -> int:
    """Train what the protocol is, and add what it measured to the run whose encoder it began with.

    Args:
        source: the encoder.
        wanted: the protocol's recipe and its changes, without the encoder.
        machine: where and with what.
        options: of the command line.
        dry_run: only say what would be done.

    Returns:
        The exit code of the command.

    Raises:
        UserError: the encoder cannot be read, or the recipe not be trained here.
    """
    from obowlab.cli.beginning import beginning_with
    from obowlab.cli.run import train
    from obowlab.config import load_recipe
    from obowlab.runs.folder import RunFolder
    from obowlab.runs.names import run_id_of

    changes = (*beginning_with(source, runs_root=machine.runs_root, dry_run=dry_run), *wanted.overrides)
    wanted = replace(wanted, overrides=changes)
    if code := train(wanted, machine=machine, options=options, progress=True, quote=True, dry_run=dry_run):
        return code
    changes = wanted.changes(data_root=machine.data_root, dry_run=True)
    path = machine.runs_root / run_id_of(load_recipe(wanted.name, overrides=changes), seed=wanted.seed)
    if dry_run or source.folder is None or not (path / "run.json").is_file():
        return 0
    if (trained := RunFolder.open(path)).current_state().status == "finished":
        _add(trained, to=source.folder)
        click.echo(f"Added to run {source.folder.run_id}.")
        send_to_mlflow([source.folder], machine=machine)
    return 0


def _add(trained: RunFolder, *, to: RunFolder) -> None:
    """Add the results of a training to the run whose encoder it measures."""
    from obowlab.weights.info import peek

    info = peek(to.path / "encoder.safetensors")
    assert info is not None, "a run's own file"
    for result in trained.results():
        if result["protocol"] == "classes":
            facts = {**result["details"], "trained_in": trained.run_id, "seed": trained.info.seed}
            to.add_result({**result, "weights_hash": info.weights_hash, "details": facts})
