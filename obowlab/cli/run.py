"""`obowlab run`: pretrain a recipe, then evaluate its encoder."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import click

from obowlab.cli.options import (
    CLUSTER,
    HARDWARE,
    ROOTS,
    MachineOptions,
    absolute,
    dry_run_option,
    machine_options,
    set_option,
    submitter_of,
    would,
)
from obowlab.cli.output import print_results
from obowlab.errors import UserError
from obowlab.launch.preflight import check_data, check_nodes

if TYPE_CHECKING:
    from obowlab.config import Loaded, Machine, Recipe
    from obowlab.launch.cost import Cost
    from obowlab.launch.local import Plan
    from obowlab.runs.folder import RunFolder


@click.command()
@click.argument("name")
@click.option("--gpus", type=click.IntRange(min=1), metavar="N", help="Train on N GPUs: --device cuda --procs N.")
@click.option("--seed", type=click.IntRange(min=0, max=2**31 - 1), default=0, show_default=True, help="Seed of weights and data.")
@set_option
@click.option(
    "--resume/--fresh", "resume", default=None, help="Insist on continuing a run, or begin again. [default: continue if there]"
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
    stage: int | None,
    quote: bool,
    options: MachineOptions,
    dry_run: bool,
) -> int:
    """Pretrain a recipe, then evaluate the encoder; the same command again continues.

    NAME is a recipe (`obowlab config list`) or a TOML file. The run is identified by the resolved recipe and the seed: typed
    again, the command continues an unfinished run, and prints the results of a finished one.

    A recipe with a [teacher] has several stages, each a run of its own; those before the last are trained first where they are
    missing. --fresh begins the last one again.
    """
    from obowlab.config import load_recipe

    if gpus is not None:
        if options.device not in (None, "cuda") or procs not in (None, gpus):
            raise UserError("--gpus N stands for --device cuda --procs N; leave those out.")
        options, procs = replace(options, device="cuda"), gpus
    loaded = load_recipe(name, overrides=overrides)
    machine = options.machine(procs=procs, nodes=nodes)
    from obowlab.launch.gpu_leases import check_gpus
    from obowlab.launch.local import launch, plan
    from obowlab.launch.submit import spread, submit_run
    from obowlab.report.read import cache_curves
    from obowlab.runs.folder import RunFolder, run_id_of
    from obowlab.runs.lineage import stages_of

    if machine.launcher == "slurm":
        machine = spread(machine, nodes=nodes)
    else:
        check_nodes(machine)
        check_gpus(machine)
    stages = stages_of(loaded, seed=seed, runs_root=machine.runs_root)
    if stage is not None and stage > len(stages):
        raise UserError(f"Recipe '{loaded.name}' has {len(stages)} stage{'s' * (len(stages) > 1)}, not {stage}: lower --stage.")
    chosen = stages[:stage]
    folders = [_folder(each, seed=seed, machine=machine) for each in chosen]
    if resume and not any(folders):
        run_id = run_id_of(chosen[-1], seed=seed)
        raise UserError(f"There is no run '{run_id}' in {machine.runs_root} to resume; `obowlab runs list` shows what is there.")
    fresh = resume is False
    due = [
        each for each, folder in zip(chosen, folders, strict=True) if not _is_finished(folder) or (fresh and each is chosen[-1])
    ]
    for each in due:
        each.recipe.check_procs(machine.procs)
    different = [each for number, each in enumerate(due) if each.recipe.data not in [one.recipe.data for one in due[:number]]]
    for each in different:
        check_data(each, machine=machine, dry_run=dry_run, say=click.echo)
    if machine.launcher == "slurm" and due and not dry_run:
        words = ["run", absolute(name), "--seed", str(seed), *(word for text in overrides for word in ("--set", text))]
        words += ["--stage", str(stage)] if stage is not None else []
        submitter = submitter_of(machine, options=options)
        code = submit_run(words, due, seed=seed, fresh=fresh, submitter=submitter)
        if submitter.wait and code == 0:
            print_results(RunFolder.open(machine.runs_root / run_id_of(chosen[-1], seed=seed)))
        return code
    for number, each in enumerate(chosen, start=1):
        if len(stages) > 1:
            click.echo(f"Stage {number} of {len(stages)}: {each.recipe.title}")
        folder = folders[number - 1]
        last = number == len(chosen)
        if folder is not None and each not in due:
            _say_finished(folder, each, machine=machine, last=last)
            continue
        again = fresh and last
        is_new = folder is None or again or not folder.attempts()
        cost = quoted(each.recipe, machine=machine, measure=not dry_run) if quote and is_new else None
        if dry_run:
            _print_plan(each, plan=plan(each, seed=seed, machine=machine, fresh=again), machine=machine, cost=cost)
            continue
        if code := launch(each, seed=seed, machine=machine, fresh=again, progress=not no_progress, cost=cost):
            return code
        folder = RunFolder.open(machine.runs_root / run_id_of(each, seed=seed))
        cache_curves(folder)
        print_results(folder)
    return 0


def quoted(recipe: Recipe, *, machine: Machine, measure: bool) -> Cost:
    """Return, and say, what a training will cost.

    Args:
        recipe: of the training.
        machine: where and with what.
        measure: time a few steps if nothing is known yet; else say only what is known.
    """
    from obowlab.launch.cost import CostBook
    from obowlab.launch.system import count_gpus
    from obowlab.runs.records import store_runs

    book = CostBook(machine, runs=store_runs(machine.runs_root).values())
    if measure and book.cost(recipe).source == "unknown":
        problem = book.measure([recipe])
        if problem:
            click.echo(f"Warning: no cost can be quoted ({problem}).", err=True)
    cost = book.cost(recipe)
    if measure and cost.seconds is not None:
        on_cpu = machine.device == "cpu" or (machine.device == "auto" and count_gpus() == 0)
        click.echo(cost.words(procs=machine.procs, device="cpu" if on_cpu else machine.device), err=True)
    return cost


def _folder(loaded: Loaded, *, seed: int, machine: Machine) -> RunFolder | None:
    """Return the folder of a run; None when there is none yet."""
    from obowlab.runs.folder import RunFolder, run_id_of

    path = machine.runs_root / run_id_of(loaded, seed=seed)
    return RunFolder.open(path) if (path / "run.json").is_file() else None


def _is_finished(folder: RunFolder | None) -> bool:
    return folder is not None and folder.current_state().status == "finished"


def _say_finished(folder: RunFolder, loaded: Loaded, *, machine: Machine, last: bool) -> None:
    """Say that there is nothing to train, and of the last stage how it was measured."""
    if not last:
        click.echo(f"Run {folder.run_id} is finished.")
        return
    click.echo(f"Run {folder.run_id} is finished; --fresh would train it again.")
    _say_if_evaluation_differs(folder, loaded)
    print_results(folder)
    _say_if_pending(folder, machine)


def _print_plan(loaded: Loaded, *, plan: Plan, machine: Machine, cost: Cost | None) -> None:
    recipe = loaded.recipe
    verbs = {"new": "train", "resume": "continue", "fresh": "put aside and train again"}
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
        + (", random initialisation beside it" if recipe.evaluation.random_baseline else ""),
    ]
    if cost is not None:
        words = cost.words(procs=machine.procs, device=machine.device).rstrip(".")
        facts.append(f"{words[:1].lower()}{words[1:]}")
    for fact in facts:
        click.echo(f"  {fact}")


def _say_if_pending(folder: RunFolder, machine: Machine) -> None:
    from obowlab.tracking.mirror import Mirror

    pending = Mirror(folder, tracking_uri=machine.tracking_uri).pending()
    if pending:
        click.echo(f"MLflow lacks {pending} values, files or facts of it; `obowlab runs sync {folder.run_id}` sends them.")


def _say_if_evaluation_differs(folder: RunFolder, loaded: Loaded) -> None:
    from obowlab.config import flatten

    before, now = flatten(folder.info.recipe.evaluation), flatten(loaded.recipe.evaluation)
    changed = [f"evaluation.{key}" for key in now if before.get(key) != now[key] and key != "every_epochs"]
    if changed:
        click.echo(
            f"Measured with other settings than the recipe has now ({', '.join(changed)}); "
            f"`obowlab eval {folder.run_id} --set KEY=VALUE` measures again."
        )
