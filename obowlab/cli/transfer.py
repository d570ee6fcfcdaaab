"""`obowlab eval --protocol places205` and its likes: protocols that are trainings of their own (`config.protocols`)."""

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


def train_beginning_with(
    source: Source, *, wanted: Wanted, machine: Machine, options: MachineOptions, dry_run: bool
) -> tuple[int, RunFolder | None]:
    """Train what a protocol is, and return the exit code and the finished run; None while there is none.

    Args:
        source: the encoder.
        wanted: the protocol's recipe and its changes, without the encoder.
        machine: where and with what.
        options: of the command line.
        dry_run: only say what would be done.

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
        return code, None
    changes = wanted.changes(data_root=machine.data_root, dry_run=True)
    path = machine.runs_root / run_id_of(load_recipe(wanted.name, overrides=changes), seed=wanted.seed)
    if dry_run or not (path / "run.json").is_file():
        return 0, None
    trained = RunFolder.open(path)
    return 0, trained if trained.current_state().status == "finished" else None


def why_not_comparable(trained: RunFolder, *, protocol: str) -> str:
    """Return why what a training measured is not to be held against the paper's value; empty where it may be."""
    from obowlab.config.protocols import unlike_the_paper
    from obowlab.runs.results import LEARNED

    counts = [each["count"] for result in trained.results() for each in result["measurements"] if result["protocol"] in LEARNED]
    return unlike_the_paper(protocol, trained.info.recipe, num_images=counts[-1]) if counts else ""


def add_results(trained: RunFolder, *, to: RunFolder, protocol: str, machine: Machine) -> None:
    """Add the results of a training to the run whose encoder it measures, in MLflow as well."""
    from obowlab.runs.results import LEARNED
    from obowlab.weights.info import peek

    info = peek(to.path / "encoder.safetensors")
    assert info is not None, "a run's own file"
    for result in trained.results():
        if result["protocol"] in LEARNED:
            facts = {
                **result["details"],
                "trained_in": trained.run_id,
                "seed": trained.info.seed,
                "not_comparable": why_not_comparable(trained, protocol=protocol),
            }
            to.add_result({**result, "weights_hash": info.weights_hash, "details": facts})
    add_detections(trained, to=to)
    click.echo(f"Added to run {to.run_id}.")
    send_to_mlflow([to], machine=machine)


def add_detections(trained: RunFolder, *, to: RunFolder) -> None:
    """Add the pictures and curves of a detector's test, if there are some, to the run whose encoder it began with."""
    from obowlab.pages.detection import keep_detection
    from obowlab.runs.detection_facts import detection_folders, read_detection

    for folder in detection_folders(trained.path):
        if folder.name != trained.run_id:
            continue
        try:
            facts, pictures = read_detection(folder)
            keep_detection(facts, pictures=pictures, run=to.path)
        except (OSError, UserError) as error:
            click.echo(f"The pictures of {trained.run_id} were not added: {error}", err=True)
