"""`obowlab run`: pretrain a recipe, then evaluate its encoder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from obowlab.cli.options import dry_run_option, hardware, machine_from, roots, set_option, would
from obowlab.cli.output import print_results
from obowlab.errors import UserError

if TYPE_CHECKING:
    from obowlab.config import Loaded, Machine
    from obowlab.lab.launch import Plan
    from obowlab.track.folder import RunFolder


@click.command()
@click.argument("name")
@click.option("--gpus", type=click.IntRange(min=1), metavar="N", help="Train on N GPUs of this machine: --device cuda --procs N.")
@click.option("--seed", type=click.IntRange(min=0, max=2**31 - 1), default=0, show_default=True, help="Seed of weights and data.")
@set_option
@click.option(
    "--resume/--fresh", "resume", default=None, help="Insist on continuing a run, or begin again. [default: continue if there]"
)
@click.option("--procs", type=click.IntRange(min=1), metavar="N", help="Processes that share every batch. [default: 1]")
@hardware
@roots
@click.option("--no-progress", is_flag=True, help="Print no progress; the run's log.txt has it.")
@dry_run_option
def run(
    name: str,
    gpus: int | None,
    seed: int,
    overrides: tuple[str, ...],
    resume: bool | None,
    procs: int | None,
    device: str | None,
    workers: int | None,
    loader: str | None,
    data_root: Path | None,
    runs_root: Path | None,
    machine_file: Path | None,
    no_progress: bool,
    dry_run: bool,
) -> int:
    """Pretrain a recipe, then evaluate the encoder; the same command again continues.

    NAME is a recipe (`obowlab config list`) or a TOML file. The run is identified by the resolved recipe and the seed: typed
    again, the command continues an unfinished run, and prints the results of a finished one.
    """
    from obowlab.config import load_recipe
    from obowlab.track.folder import RunFolder, run_id_of

    if gpus is not None:
        if device not in (None, "cuda") or procs not in (None, gpus):
            raise UserError("--gpus N stands for --device cuda --procs N; leave those out.")
        device, procs = "cuda", gpus
    loaded = load_recipe(name, overrides=overrides)
    machine = machine_from(
        machine_file=machine_file,
        data_root=data_root,
        runs_root=runs_root,
        device=device,
        procs=procs,
        workers=workers,
        loader=loader,
    )
    from obowlab.lab.launch import check_gpus, launch, plan

    check_gpus(machine)
    run_id = run_id_of(loaded, seed=seed)
    path = machine.runs_root / run_id
    there = (path / "run.json").is_file()
    if resume and not there:
        raise UserError(f"There is no run '{run_id}' in {machine.runs_root} to resume; `obowlab runs list` shows what is there.")
    if there and resume is not False:
        folder = RunFolder.open(path)
        if folder.current_state().status == "finished":
            click.echo(f"Run {run_id} is finished; --fresh would train it again.")
            _say_if_evaluation_differs(folder, loaded)
            print_results(folder)
            _say_if_pending(folder, machine)
            return 0
    check_data(loaded, machine=machine, dry_run=dry_run)
    if dry_run:
        _print_plan(loaded, plan=plan(loaded, seed=seed, machine=machine, fresh=resume is False), machine=machine)
        return 0
    code = launch(loaded, seed=seed, machine=machine, fresh=resume is False, progress=not no_progress)
    if code == 0:
        print_results(RunFolder.open(path))
    return code


def check_data(loaded: Loaded, *, machine: Machine, dry_run: bool) -> None:
    """Refuse a run whose images or class lists would be missed hours later; draw the synthetic images on first use.

    Raises:
        UserError: a split is not prepared or damaged, or a class list is absent.
    """
    from obowlab.data.datasets import open_split

    recipe = loaded.recipe
    folder = machine.data_root / recipe.data.dataset
    if recipe.data.dataset == "synthetic" and not (folder / "train.json").is_file():
        if dry_run:
            return would(f"draw the synthetic images into {folder}")
        click.echo(f"Drawing the synthetic images into {folder}, this once.")
    open_split(recipe.data.dataset, "train", data_root=machine.data_root)
    measured = {*recipe.evaluation.protocols, *(("fewshot",) if recipe.evaluation.every_epochs else ())}
    if measured:
        split = open_split(recipe.data.dataset, "val", data_root=machine.data_root)
        if "fewshot" in measured and recipe.evaluation.fewshot.classes != "all":
            from obowlab.evaluation.fewshot import class_list

            class_list(recipe.evaluation.fewshot.classes, class_names=split.class_names, folder=folder)
    return None


def _print_plan(loaded: Loaded, *, plan: Plan, machine: Machine) -> None:
    recipe = loaded.recipe
    verbs = {"new": "train", "resume": "continue", "fresh": "put aside and train again"}
    would(f"{verbs[plan.action]} run {plan.run_id}")
    facts = [
        *plan.lines(),
        f"training: {recipe.training.epochs} epochs of {recipe.data.dataset} in {machine.data_root}, "
        f"{recipe.training.batch_size} images a step, device {machine.device}, loader {machine.loader}",
        f"evaluation: {', '.join(recipe.evaluation.protocols) or 'none'}"
        + (", random initialisation beside it" if recipe.evaluation.random_baseline else ""),
    ]
    for fact in facts:
        click.echo(f"  {fact}")


def _say_if_pending(folder: RunFolder, machine: Machine) -> None:
    from obowlab.track.mirror import Mirror

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
