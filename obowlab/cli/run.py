"""`obowlab run`: pretrain a recipe, then evaluate its encoder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from obowlab import text
from obowlab.cli.options import (
    CLUSTER,
    HARDWARE,
    PATH,
    ROOTS,
    MachineOptions,
    absolute_recipe,
    dry_run_option,
    machine_options,
    set_option,
    submitter_of,
    when_interrupted,
    would,
)
from obowlab.cli.output import print_obstacles, print_results, warn
from obowlab.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from obowlab.config import Loaded, Machine
    from obowlab.launch.cost import Cost
    from obowlab.launch.local import Plan
    from obowlab.launch.stages import Stage
    from obowlab.launch.submit import Submitter
    from obowlab.runs.folder import RunFolder


@click.command()
@click.argument("name")
@click.option("--gpus", type=click.IntRange(min=1), metavar="N", help="Train on N GPUs: --device cuda --procs N.")
@click.option("--seed", type=click.IntRange(min=0, max=2**31 - 1), default=0, show_default=True, help="Seed of weights and data.")
@set_option
@click.option(
    "--resume/--fresh", "resume", default=None, help="Require a run to resume, or start again. [default: resume if there is one]"
)
@click.option("--procs", type=click.IntRange(min=1), metavar="N", help="Processes that share every batch. [default: 1]")
@click.option(
    "--nodes",
    type=click.IntRange(min=1),
    metavar="N",
    help="Spread them over N nodes of the cluster. [default: as few as will do]",
)
@machine_options(*CLUSTER, *HARDWARE, *ROOTS)
@click.option("--no-progress", is_flag=True, help="Print no progress; the run's log.txt has it.")
@click.option("--weights", metavar="RUN|FILE", help="Begin with this encoder (a recipe whose method.name is supervised).")
@click.option("--list", "list_file", type=PATH, metavar="FILE", help="Train on the images that a list names, a file name a line.")
@click.option("--stage", type=click.IntRange(min=1), metavar="K", help="Stop after stage K of a recipe with several.")
@click.option("--quote/--no-quote", default=True, help="Say first what it will cost, from earlier runs or a few timed steps.")
@dry_run_option
def run(
    name: str,
    gpus: int | None,
    seed: int,
    overrides: tuple[str, ...],
    resume: bool | None,
    procs: int | None,
    nodes: int | None,
    no_progress: bool,
    weights: str | None,
    list_file: Path | None,
    stage: int | None,
    quote: bool,
    options: MachineOptions,
    dry_run: bool,
) -> int:
    """Pretrain a recipe, then evaluate the encoder; the same command again continues.

    NAME is a recipe (`obowlab config list`), one of your own in this folder (NAME.toml), or the path of a TOML file. The run is
    identified by the resolved recipe and the seed: typed again, the command continues an unfinished run, measures what a finished
    one lacks of the evaluation as it is now, and prints its results.

    A recipe with a [teacher] has several stages, each a run of its own; those before the last are trained first where they are
    missing. --fresh starts the last one again.
    """
    if gpus is not None:
        if options.device not in (None, "cuda") or procs not in (None, gpus):
            raise UserError("--gpus N stands for --device cuda --procs N; leave those out.")
        options, procs = replace(options, device="cuda"), gpus
    when_interrupted("the same command continues from what is saved.")
    machine = options.machine(procs=procs, nodes=nodes)
    if weights is not None:
        from obowlab.cli.beginning import beginning_with, refuse_weights
        from obowlab.weights.source import find_source

        refuse_weights(name, overrides=overrides)
        source = find_source(weights, runs_root=machine.runs_root, tracking_uri=machine.tracking_uri)
        overrides = (*beginning_with(source, runs_root=machine.runs_root, dry_run=dry_run), *overrides)
    wanted = Wanted(name, seed, overrides, resume=resume, nodes=nodes, stage=stage, list_file=list_file)
    return train(wanted, machine=machine, options=options, progress=not no_progress, quote=quote, dry_run=dry_run)


@dataclass(frozen=True)
class Wanted:
    """What is to be trained.

    Attributes:
        name: of the recipe, or its file.
        seed: of weights and data.
        overrides: texts `key=value`.
        resume: True requires a run to resume, False starts again.
        nodes: over which its processes are spread; as few as will do if absent.
        stage: with which to stop; the last if absent.
        list_file: a list of the images to train on; as the recipe says if absent.
    """

    name: str
    seed: int
    overrides: tuple[str, ...]
    resume: bool | None = None
    nodes: int | None = None
    stage: int | None = None
    list_file: Path | None = None

    def changes(self, *, data_root: Path, dry_run: bool) -> tuple[str, ...]:
        """Return the overrides, with what stands for the list, which is kept beside its data set but for a dry run."""
        if self.list_file is None:
            return self.overrides
        from obowlab.config import load_recipe
        from obowlab.data.image_lists import keep_list

        dataset = load_recipe(self.name, overrides=self.overrides).recipe.data.dataset
        digest = keep_list(self.list_file, dataset=dataset, data_root=data_root, dry_run=dry_run)
        return (*self.overrides, f'data.image_list="{digest}"')


def train(wanted: Wanted, *, machine: Machine, options: MachineOptions, progress: bool, quote: bool, dry_run: bool) -> int:
    """Train a recipe here or in a job, and print its results; of one that is trained, measure what is missing.

    Args:
        wanted: recipe, seed and changes.
        machine: where and with what.
        options: of the command line, which a job's command needs.
        progress: whether it is printed.
        quote: whether to say first what it will cost.
        dry_run: only say what would be done.

    Returns:
        The exit code of the command.

    Raises:
        UserError: it cannot be trained, and why.
    """
    from obowlab.config import find_recipe, load_recipe
    from obowlab.config.unused import unused_settings
    from obowlab.data.image_lists import refuse_absent
    from obowlab.launch.local import launch, plan
    from obowlab.launch.stages import check_stages, find_obstacles, open_stages
    from obowlab.launch.submit import spread
    from obowlab.report.read import cache_curves
    from obowlab.runs.folder import RunFolder
    from obowlab.runs.names import run_id_of

    name, seed = wanted.name, wanted.seed
    overrides = wanted.changes(data_root=machine.data_root, dry_run=dry_run)
    loaded = load_recipe(name, overrides=overrides)
    if Path(f"{name}.toml").is_file() and find_recipe(name) != Path(f"{name}.toml"):
        warn([f"{name} is the recipe that obowlab ships. {name}.toml of this folder is another: `obowlab run ./{name}.toml`."])
    unused = unused_settings(loaded.recipe)
    without = {key: source for key, source in loaded.sources.items() if key in unused and source.startswith("--set ")}
    warn([f"{source} changes nothing, as {unused[key]}." for key, source in without.items()])
    if loaded.recipe.data.image_list and wanted.list_file is None:
        refuse_absent(loaded.recipe.data.image_list, folder=machine.data_root / loaded.recipe.data.dataset)
    if machine.launcher == "slurm":
        machine = spread(machine, nodes=wanted.nodes)
    stages = open_stages(loaded, seed=seed, machine=machine, last=wanted.stage, resume=wanted.resume)
    due = [each.loaded for each in stages if each.is_due]
    obstacles = find_obstacles(due, machine=machine, say=click.echo) if dry_run else None
    if obstacles is None:
        check_stages(stages, machine=machine, say=click.echo)
    if machine.launcher == "slurm" and any(each.is_due for each in stages) and not dry_run:
        command = text.arguments("run", absolute_recipe(name), seed=seed, set=overrides, stage=wanted.stage)
        return _submit(command, stages, seed=seed, submitter=submitter_of(machine, options=options))
    for each in stages:
        if len(loaded.stages()) > 1:
            click.echo(f"Stage {each.number} of {len(loaded.stages())}: {each.loaded.recipe.title}")
        if each.folder is not None and not each.is_due:
            _print_finished(each.folder, each.loaded, machine=machine, last=each.is_last)
            continue
        cost = each.cost(machine, measure=not dry_run) if quote else None
        if dry_run:
            planned = plan(each.loaded, seed=seed, machine=machine, fresh=each.fresh)
            _print_plan(each.loaded, plan=planned, machine=machine, cost=cost)
            continue
        if code := launch(each.loaded, seed=seed, machine=machine, fresh=each.fresh, progress=progress, cost=cost):
            return code
        folder = RunFolder.open(machine.runs_root / run_id_of(each.loaded, seed=seed))
        cache_curves(folder)
        print_results(folder)
    return 0 if obstacles is None else print_obstacles(obstacles)


def _submit(command: Sequence[str], stages: list[Stage], *, seed: int, submitter: Submitter) -> int:
    from obowlab.launch.submit import submit_run
    from obowlab.runs.folder import RunFolder
    from obowlab.runs.names import run_id_of

    due = [stage.loaded for stage in stages if stage.is_due]
    code = submit_run(command, due, seed=seed, fresh=stages[-1].fresh, submitter=submitter)
    if submitter.wait and code == 0:
        print_results(RunFolder.open(submitter.machine.runs_root / run_id_of(stages[-1].loaded, seed=seed)))
    return code


def _print_finished(folder: RunFolder, loaded: Loaded, *, machine: Machine, last: bool) -> None:
    """Print that there is nothing to train, and the results of the last stage."""
    if not last:
        click.echo(f"Run {folder.run_id} is finished.")
        return
    click.echo(f"Run {folder.run_id} is finished; --fresh would train it again.")
    _say_what_is_missing(folder, loaded, machine=machine)
    print_results(folder)
    _warn_if_pending(folder, machine)


def _print_plan(loaded: Loaded, *, plan: Plan, machine: Machine, cost: Cost | None) -> None:
    recipe = loaded.recipe
    verbs = {"new": "train", "resume": "continue", "measure": "measure what is missing of", "fresh": "put aside and train again"}
    would(f"{verbs[plan.action]} run {plan.run_id}")
    facts = [
        *plan.lines(),
        f"training: {recipe.training.epochs} epochs of {recipe.data.dataset} in {machine.data_root}, "
        f"{recipe.training.batch_size} images a step, device {machine.device}, loader {machine.loader}",
        *(
            [f"as a job: {machine.procs} processes on {machine.nodes} node(s), {machine.slurm.time} a start"]
            if machine.launcher == "slurm"
            else []
        ),
        f"evaluation: {', '.join(recipe.evaluation.protocols) or 'none'}"
        + (", random initialisation beside it" if recipe.evaluation.protocols and recipe.evaluation.random_baseline else ""),
    ]
    if cost is not None:
        sentence = cost.sentence(machine).rstrip(".")
        facts.append(f"{sentence[:1].lower()}{sentence[1:]}")
    for fact in facts:
        click.echo(f"  {fact}")


def _warn_if_pending(folder: RunFolder, machine: Machine) -> None:
    from obowlab.tracking.mirror import Mirror

    pending = Mirror(folder, tracking_uri=machine.tracking_uri).pending()
    if pending:
        click.echo(f"MLflow lacks {pending} values, files or facts of it; `obowlab runs sync {folder.run_id}` sends them.")


def _say_what_is_missing(folder: RunFolder, loaded: Loaded, *, machine: Machine) -> None:
    """Print what a finished run was not measured with, and why this command does not do it."""
    from obowlab.config import flatten
    from obowlab.data.protocol_needs import left_out_lines
    from obowlab.launch.preflight import left_out
    from obowlab.runs.results import not_measured

    missing = dict.fromkeys(protocol for _, protocol in not_measured(loaded.recipe, results=folder.results()))
    if not missing:
        return
    before, now = flatten(folder.info.recipe.evaluation), flatten(loaded.recipe.evaluation)
    changed = [f"evaluation.{key}" for key in now if before.get(key) != now[key] and key != "every_epochs"]
    because = f" ({', '.join(changed)} changed)" if changed else ""
    click.echo(f"Not measured as the recipe says now{because}: {', '.join(missing)}.")
    unmet = left_out(loaded.recipe, machine=machine)
    if unmet is None:
        click.echo(f"With '{loaded.recipe.data.dataset}' in {machine.data_root} (--data-root), this command measures it.")
    for line in left_out_lines({name: why for name, why in (unmet or {}).items() if name in missing}):
        click.echo(line)
