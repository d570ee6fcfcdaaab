"""`obowlab eval`: measure the encoder of a run or of a weights file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from obowlab.cli.options import (
    CLUSTER,
    HARDWARE,
    PATH,
    ROOTS,
    MachineOptions,
    absolute,
    dry_run_option,
    machine_options,
    submitter_of,
    would,
)
from obowlab.cli.output import print_measurements
from obowlab.errors import UserError

if TYPE_CHECKING:
    from obowlab.config import Machine, Recipe
    from obowlab.evaluation import Result
    from obowlab.runs.folder import RunFolder

PROTOCOLS = ("fewshot", "linear", "knn")
MIRROR_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        recipe: says how; of a run its own, of a file the one named by --recipe.
        folder: the run's folder; None for a file.
        file: the weights file; None for a run.
    """

    recipe: Recipe
    folder: RunFolder | None
    file: Path | None

    @property
    def name(self) -> str:
        """The run id or the file's path."""
        return self.folder.run_id if self.folder is not None else str(self.file)


@click.command("eval")
@click.argument("subject", metavar="RUN|FILE")
@click.option(
    "--protocol", "protocols", type=click.Choice(PROTOCOLS), multiple=True, help="Protocol; repeatable. [default: the recipe's]"
)
@click.option("--dataset", help="Another prepared data set than the recipe's.")
@click.option("--recipe", "recipe_name", metavar="NAME", help="For a weights file: the recipe whose evaluation settings apply.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one evaluation.* setting; repeatable.")
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
    overrides: tuple[str, ...],
    untrained: bool | None,
    json_file: Path | None,
    options: MachineOptions,
    dry_run: bool,
) -> int:
    """Measure the encoder of a run or of a weights file.

    RUN is a run id, the beginning of one, or a run folder: its results are added to the run and mirrored to MLflow. FILE is a
    weights file (ours, torchvision's or the authors'): its results are printed.
    """
    machine = options.machine()
    chosen = _subject(subject, recipe_name=recipe_name, overrides=overrides, machine=machine)
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise UserError(f"The folder of --json {json_file} does not exist.")
    if untrained and chosen.folder is None:
        raise UserError("--random needs a run: a weights file does not tell its initialisation.")
    names = protocols or chosen.recipe.evaluation.protocols
    with_random = chosen.folder is not None and (chosen.recipe.evaluation.random_baseline if untrained is None else untrained)
    if dry_run:
        beside = " and of its random initialisation" if with_random else ""
        would(f"measure {', '.join(names)} of {chosen.name}{beside} on {dataset or chosen.recipe.data.dataset}")
        return 0
    if machine.launcher == "slurm":
        words = ["eval", str(chosen.folder.path) if chosen.folder is not None else absolute(subject)]
        words += [word for protocol in protocols for word in ("--protocol", protocol)]
        words += [word for text in overrides for word in ("--set", text)]
        words += ["--dataset", dataset] if dataset is not None else []
        words += ["--recipe", absolute(recipe_name)] if recipe_name is not None else []
        words += [] if untrained is None else ["--random" if untrained else "--no-random"]
        words += ["--json", str(json_file.absolute())] if json_file is not None else []
        return _submit(words, name=chosen.name, machine=machine, options=options)
    from obowlab.launch.gpu_leases import using_gpus

    with using_gpus(machine.model_copy(update={"procs": 1, "nodes": 1})):
        results = _measure(chosen, names=names, dataset=dataset, with_random=with_random, machine=machine)
    values = [result.to_json() for result in results]
    print_measurements(values)
    if json_file is not None:
        from obowlab.files import write_atomic

        try:
            write_atomic(json_file, json.dumps(values, indent=1))
        except OSError as error:
            raise UserError(f"Cannot write --json {json_file}: {error.strerror}.") from None
    if chosen.folder is not None:
        _file_results(chosen.folder, values, machine=machine)
    return 0


def _submit(words: list[str], *, name: str, machine: Machine, options: MachineOptions) -> int:
    """Measure in a job of the cluster."""
    from obowlab.launch.slurm import JobRequest, Resources

    submitter = submitter_of(machine, options=options)
    request = JobRequest(arguments=submitter.complete(words), runs=(), what=f"eval {name}")
    return submitter.follow(submitter.submit([request], resources=Resources(gpus=machine.device != "cpu"), name="eval"))


def _subject(ref: str, *, recipe_name: str | None, overrides: tuple[str, ...], machine: Machine) -> Subject:
    """Find the run or file and resolve how it is measured."""
    from obowlab.config import Recipe, Views, load_recipe
    from obowlab.runs.folder import RunFolder

    path = Path(ref)
    if not path.is_file():
        if path.suffix in (".safetensors", ".pth", ".pt", ".tar"):
            raise UserError(f"There is no weights file '{ref}'.")
        folder = RunFolder.find(ref, runs_root=machine.runs_root)
        if recipe_name is not None:
            raise UserError("--recipe is for weights files; a run has its own (change it with --set).")
        return Subject(recipe=_override(folder.info.recipe, overrides), folder=folder, file=None)
    from obowlab.weights.encoder_file import read_encoder

    info = read_encoder(path).info
    views = Views(original_size=info.original_size, original_resize=info.original_resize)
    recipe = load_recipe(recipe_name).recipe if recipe_name is not None else Recipe(views=views)
    if recipe_name is not None and recipe.backbone != info.backbone:
        raise UserError(
            f"{path} holds a {info.backbone.arch} of another shape than recipe '{recipe_name}' trains; choose another --recipe."
        )
    return Subject(recipe=_override(recipe.model_copy(update={"backbone": info.backbone}), overrides), folder=None, file=path)


def _override(recipe: Recipe, overrides: tuple[str, ...]) -> Recipe:
    """Change evaluation settings of a recipe; every other key is refused, as it would be another training."""
    from obowlab.config import flatten, parse_override, recipe_from_values

    values, sources = flatten(recipe), dict.fromkeys(flatten(recipe), "the run")
    for text in overrides:
        key, value = parse_override(text)
        if key in values and not key.startswith("evaluation."):
            raise UserError(f"--set {key} cannot be changed after training; `obowlab eval` takes evaluation.* keys.")
        values[key], sources[key] = value, f"--set {text}"
    return recipe_from_values(values, sources=sources)


def _measure(
    chosen: Subject, *, names: tuple[str, ...], dataset: str | None, with_random: bool, machine: Machine
) -> list[Result]:
    """Measure the encoder, and the untrained weights of the same seed when asked."""
    import torch

    from obowlab.evaluation import evaluate as measure
    from obowlab.methods import build_backbone
    from obowlab.training.distributed import join
    from obowlab.weights.encoder_file import load_encoder

    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    encoder = load_encoder(str(chosen.folder.path if chosen.folder is not None else chosen.file), runs_root=machine.runs_root)
    results = []
    with join(machine.model_copy(update={"procs": 1})) as world:
        subjects = {"student": encoder.model}
        if with_random:
            assert chosen.folder is not None
            subjects["random"] = build_backbone(chosen.recipe.backbone, seed=chosen.folder.info.seed)
        for subject, model in subjects.items():
            results += measure(
                model,
                recipe=chosen.recipe,
                machine=machine,
                subject=subject,
                cache_dir=machine.runs_root / ".features",
                protocols=names,
                dataset=dataset,
                device=world.device,
                report=lambda line: click.echo(line, err=True),
            )
    return results


def _file_results(folder: RunFolder, values: list[dict[str, Any]], *, machine: Machine) -> None:
    """Add results to a run and send them on; a store that does not answer gets them with the next sync."""
    from obowlab.tracking.mirror import Mirror

    for value in values:
        folder.add_result(value)
    report = Mirror(folder, tracking_uri=machine.tracking_uri).sync(timeout_s=MIRROR_TIMEOUT_S)
    click.echo(f"Added to run {folder.run_id}.")
    if report.error is not None:
        click.echo(f"MLflow does not have them yet: {report.error}; `obowlab runs sync` sends them.", err=True)
