"""`obowlab eval`: measure the encoder of a run or of a weights file."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from obowlab import text
from obowlab.cli.options import (
    CLUSTER,
    HARDWARE,
    PATH,
    ROOTS,
    MachineOptions,
    absolute,
    absolute_recipe,
    dry_run_option,
    machine_options,
    submitter_of,
    when_interrupted,
    would,
)
from obowlab.cli.output import json_line, print_lines, print_measurements, print_obstacles, refuse_target, send_to_mlflow
from obowlab.cli.run import Wanted
from obowlab.cli.transfer import add_results, train_beginning_with, why_not_comparable
from obowlab.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from obowlab.config import Machine, Recipe
    from obowlab.evaluation import Result
    from obowlab.runs.folder import RunFolder
    from obowlab.weights.subject import Subject

TRAININGS = ("linear-imagenet", "places205", "semi-1", "semi-10", "voc-detection", "coco-detection")
PROTOCOLS = ("fewshot", "linear", "knn", "voc07-svm", *TRAININGS)


@click.command("eval")
@click.argument("subject", metavar="RUN|FILE")
@click.option(
    "--protocol", "protocols", type=click.Choice(PROTOCOLS), multiple=True, help="Protocol; repeatable. [default: the recipe's]"
)
@click.option("--dataset", help="Another prepared data set than the recipe's.")
@click.option("--recipe", "recipe_name", metavar="NAME", help="For a weights file: the recipe whose evaluation settings apply.")
@click.option("--preset", metavar="NAME", help="Of a protocol that is a training: authors, tiny, demo, ...")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change one evaluation.* setting, or any of a protocol that is a training; repeatable.",
)
@click.option("--list", "list_file", type=PATH, metavar="FILE", help="Of semi-1 and semi-10: the names of the labelled images.")
@click.option("--seed", type=click.IntRange(min=0, max=2**31 - 1), help="Of a protocol that is a training. [default: 0]")
@click.option("--procs", type=click.IntRange(min=1), metavar="N", help="Processes of a protocol that is a training. [default: 1]")
@click.option(
    "--random/--no-random",
    "untrained",
    default=None,
    help="For a run: measure its untrained weights too. [default: the recipe's]",
)
@click.option("--json", "json_file", type=PATH, metavar="FILE", help="Write the results to a file as well.")
@machine_options(*CLUSTER, *HARDWARE, *ROOTS)
@dry_run_option
def evaluate(
    subject: str,
    protocols: tuple[str, ...],
    dataset: str | None,
    recipe_name: str | None,
    preset: str | None,
    overrides: tuple[str, ...],
    list_file: Path | None,
    seed: int | None,
    procs: int | None,
    untrained: bool | None,
    json_file: Path | None,
    options: MachineOptions,
    dry_run: bool,
) -> int:
    """Measure the encoder of a run or of a weights file.

    RUN is a run id, the beginning of one, or a run folder: its results are added to the run and mirrored to MLflow. FILE is a
    weights file (ours, torchvision's or the authors') or a model version in MLflow, models:/NAME/VERSION: its results are
    printed.

    Some protocols train a classifier, a detector or the whole network, for hours: linear-imagenet, places205, semi-1, semi-10,
    voc-detection, coco-detection. Each is a recipe, and its training a run of its own, which the same command continues.
    """
    trainings = [name for name in protocols if name in TRAININGS]
    if trainings:
        if len(protocols) > 1 or recipe_name is not None or untrained is not None or json_file is not None:
            raise UserError(
                f"--protocol {trainings[0]} is a training: give it a command of its own, without --recipe, --random and --json."
            )
        from obowlab.config.protocols import recipe_of

        changes = (*([f'data.dataset="{dataset}"'] if dataset is not None else []), *overrides)
        wanted = Wanted(recipe_of(trainings[0], preset=preset), seed or 0, changes, list_file=list_file)
        return _by_training(subject, wanted, protocol=trainings[0], procs=procs, options=options, dry_run=dry_run)
    if any(option is not None for option in (preset, list_file, seed, procs)):
        raise UserError(f"--preset, --list, --seed and --procs are for protocols that are trainings: {', '.join(TRAININGS)}.")
    return _measure(
        _Asked(subject, protocols, dataset, recipe_name, overrides, untrained, json_file), options=options, dry_run=dry_run
    )


class _Asked(NamedTuple):
    """What is to be measured, as it was typed; see the options of `evaluate`."""

    subject: str
    protocols: tuple[str, ...]
    dataset: str | None
    recipe_name: str | None
    overrides: tuple[str, ...]
    untrained: bool | None
    json_file: Path | None


def _measure(asked: _Asked, *, options: MachineOptions, dry_run: bool) -> int:
    """Measure an encoder here or in a job, and print the results; return the exit code."""
    from obowlab.launch.preflight import check_protocols
    from obowlab.launch.stages import obstacles_of
    from obowlab.runs.results import LEARNED
    from obowlab.weights.subject import find_subject

    machine = options.machine()
    chosen = find_subject(
        asked.subject,
        recipe_name=asked.recipe_name,
        overrides=asked.overrides,
        runs_root=machine.runs_root,
        tracking_uri=machine.tracking_uri,
    )
    json_file, recipe = asked.json_file, chosen.recipe
    if json_file is not None:
        refuse_target(json_file, option="--json")
    if asked.untrained and chosen.folder is None:
        raise UserError("--random needs a run: of other encoders the initialisation is not known.")
    protocols = asked.protocols or recipe.evaluation.protocols
    if not protocols:
        raise UserError(f"The recipe of {chosen.name} measures nothing by itself: add --protocol fewshot, linear or knn.")
    learned = [name for name in protocols if name in LEARNED]
    if learned and (chosen.folder is None or asked.dataset not in (None, recipe.data.dataset)):
        raise UserError(
            f"{', '.join(learned)}: measured is what a run has learned on its own images. Name that run and leave --dataset "
            "out, or choose a --protocol."
        )
    dataset = asked.dataset or _usual_dataset(protocols, recipe, data_root=machine.data_root)
    untrained = recipe.evaluation.random_baseline if asked.untrained is None else asked.untrained
    with_random = chosen.folder is not None and untrained
    check = partial(check_protocols, recipe, protocols=protocols, dataset=dataset, machine=machine)
    if dry_run:
        beside = " and of its random initialisation" if with_random else ""
        would(f"measure {', '.join(protocols)} of {chosen.name}{beside} on {dataset or recipe.data.dataset}")
        if asked.recipe_name is not None and chosen.source.backbone is None:
            click.echo(
                f"  not known before {chosen.name} is read: whether its network is the one of recipe '{asked.recipe_name}'"
            )
        return print_obstacles(obstacles_of([check]))
    if machine.launcher == "slurm":
        return _submit(asked._replace(dataset=dataset), chosen=chosen, machine=machine, options=options)
    if chosen.folder is not None:
        _check_writable(chosen.folder.path)
    check()
    added = "what was measured is added to the run; " if chosen.folder is not None else "no result was written; "
    when_interrupted(f"{added}the same command measures again, with the features that are kept.")
    values = measure_here(chosen, protocols=protocols, dataset=dataset, with_random=with_random, machine=machine)
    print_measurements(values)
    print_lines(_not_comparable(values, recipe=recipe))
    if chosen.folder is not None:
        say_added(chosen.folder, machine=machine)
    if json_file is not None:
        from obowlab.files.replacing import write_atomic

        try:
            write_atomic(json_file, json_line(values) + "\n")
        except OSError as error:
            raise UserError(f"Cannot write --json {json_file}: {error.strerror}.") from None
    return 0


def measure_here(
    chosen: Subject, *, protocols: Sequence[str], dataset: str | None, with_random: bool, machine: Machine
) -> list[dict[str, Any]]:
    """Measure an encoder in this process, and return the results as JSON values; those of a run are added to it one by one."""
    from obowlab.launch.gpu_leases import using_gpus

    def keep(result: Result) -> None:
        if chosen.folder is not None:
            chosen.folder.add_result(result.to_json())

    with using_gpus(machine.model_copy(update={"procs": 1, "nodes": 1})):
        from obowlab.training.measure import measure  # imports torch, which must not see GPUs of others

        results = measure(
            chosen, protocols=protocols, dataset=dataset, with_random=with_random, machine=machine, report=_say, keep=keep
        )
    return [result.to_json() for result in results]


def _not_comparable(values: Sequence[dict[str, Any]], *, recipe: Recipe) -> list[str]:
    """Return why VOC07's value is not to be held against the paper's, if it is not."""
    from obowlab.config.protocols import unlike_the_paper

    counts = {each["count"] for value in values for each in value["measurements"] if value["protocol"] == "voc07-svm"}
    sentences = (unlike_the_paper("voc07-svm", recipe, num_images=count) for count in counts)
    return [sentence for sentence in sentences if sentence]


def say_added(folder: RunFolder, *, machine: Machine) -> None:
    """Say that results were added to a run, and send them to MLflow."""
    click.echo(f"Added to run {folder.run_id}.")
    send_to_mlflow([folder], machine=machine)


def _by_training(
    subject: str, wanted: Wanted, *, protocol: str, procs: int | None, options: MachineOptions, dry_run: bool
) -> int:
    """Measure an encoder by a training that begins with it, and add the result to its run; return the exit code."""
    from obowlab.weights.source import find_source

    when_interrupted("the same command continues from what is saved.")
    machine = options.machine(procs=procs)
    source = find_source(subject, runs_root=machine.runs_root, tracking_uri=machine.tracking_uri)
    code, trained = train_beginning_with(source, wanted=wanted, machine=machine, options=options, dry_run=dry_run)
    if trained is None:
        return code
    print_lines([sentence] if (sentence := why_not_comparable(trained, protocol=protocol)) else [])
    if source.folder is not None:
        add_results(trained, to=source.folder, protocol=protocol, machine=machine)
    return code


def _usual_dataset(protocols: Sequence[str], recipe: Recipe, *, data_root: Path) -> str | None:
    """Return the data set that a protocol measures on when none is named; None for the recipe's.

    Raises:
        UserError: the protocols measure on different ones.
    """
    from obowlab.data.manifest import read_manifest

    manifest = read_manifest(data_root, recipe.data.dataset, "train")
    if "voc07-svm" not in protocols or (manifest is not None and manifest.targets):
        return None
    if len(set(protocols)) > 1:
        raise UserError("--protocol voc07-svm measures on other images than the other protocols: give it a command of its own.")
    return "voc07"


def _check_writable(path: Path) -> None:
    """Refuse before hours of measuring what could not be kept.

    Raises:
        UserError: results cannot be added to the run.
    """
    for place in (path, path / "results"):
        if place.exists() and not os.access(place, os.W_OK | os.X_OK):
            raise UserError(
                f"Results are added to the run, and you may not write to {place}: ask its owner for the right to, "
                f"or measure its file, `obowlab eval {path / 'encoder.safetensors'}`."
            )


def _submit(asked: _Asked, *, chosen: Subject, machine: Machine, options: MachineOptions) -> int:
    """Measure in a job of the cluster."""
    from obowlab.launch.slurm import JobRequest, Resources

    arguments = text.arguments(
        "eval",
        str(chosen.folder.path) if chosen.folder is not None else absolute(asked.subject),
        protocol=asked.protocols,
        set=asked.overrides,
        dataset=asked.dataset,
        recipe=None if asked.recipe_name is None else absolute_recipe(asked.recipe_name),
        random=asked.untrained,
        json=None if asked.json_file is None else asked.json_file.absolute(),
    )
    submitter = submitter_of(machine, options=options)
    request = JobRequest(arguments=submitter.complete(arguments), runs=(), what=f"eval {chosen.name}")
    return submitter.follow(submitter.submit([request], resources=Resources(gpus=machine.device != "cpu"), name="eval"))


def _say(line: str) -> None:
    click.echo(line, err=True)
