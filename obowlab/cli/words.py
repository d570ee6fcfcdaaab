"""`obowlab words`: what the visual words of a run look like (the paper's figures 5 and 6)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from obowlab.cli.options import HARDWARE, PATH, ROOTS, MachineOptions, dry_run_option, json_flag, machine_options, would
from obowlab.cli.output import print_json, print_obstacles, print_table, send_to_mlflow
from obowlab.errors import UserError

if TYPE_CHECKING:
    from obowlab.config import Level, Machine
    from obowlab.runs.folder import RunFolder

LEVELS = ("conv4", "conv5")
SPLITS = ("train", "val")


@click.command()
@click.argument("run")
@click.option("--level", "levels", type=click.Choice(LEVELS), multiple=True, help="Level; repeatable. [default: all of the run]")
@click.option("--dataset", help="Another prepared data set than the run's.")
@click.option("--split", type=click.Choice(SPLITS), default="train", show_default=True, help="Which of its images.")
@click.option(
    "--per-word", type=click.IntRange(min=1, max=32), default=8, show_default=True, metavar="N", help="Patches of each word."
)
@click.option("--out", type=PATH, metavar="DIR", help="Folder to write, kept apart from the run. [default: words/ of the run]")
@json_flag
@machine_options(*HARDWARE, *ROOTS)
@dry_run_option
def words(
    run: str,
    levels: tuple[str, ...],
    dataset: str | None,
    split: str,
    per_word: int,
    out: Path | None,
    as_json: bool,
    options: MachineOptions,
    dry_run: bool,
) -> int:
    """Show the visual words of a run: the patches that each of them stands for.

    For every word of the run's checkpoint the image patches with the highest assignment score are found, at most one per image,
    and written as a gallery, index.html, with the facts in words.json. In the run's own folder it is mirrored to MLflow as
    well. RUN is a run id, the beginning of one, or a run folder.
    """
    from obowlab.data.datasets import open_split
    from obowlab.launch.stages import obstacles_of
    from obowlab.runs.folder import RunFolder
    from obowlab.tracking.outbox import WORDS_FOLDER

    machine = options.machine()
    folder = RunFolder.find(run, runs_root=machine.runs_root)
    target = (out or folder.path / WORDS_FOLDER).absolute()
    _refuse_target(target)
    chosen, images = _levels(folder, asked=levels), dataset or folder.info.recipe.data.dataset
    if dry_run:
        _check_checkpoints(folder)
        would(f"find the {per_word} best patches of every word of {', '.join(chosen)} of {folder.run_id} in {images}/{split}")
        would(f"write them to {target}")
        drawn = images != "synthetic" or (machine.data_root / images).is_dir()  # synthetic images would be drawn first
        look = partial(open_split, images, split, data_root=machine.data_root, runs_root=machine.runs_root)
        return print_obstacles(obstacles_of([look] if drawn else []))
    facts = _show(folder, machine=machine, levels=chosen, dataset=images, split=split, per_word=per_word, target=target)
    _print(facts, target=target, as_json=as_json)
    if out is None:
        send_to_mlflow([folder], machine=machine)
    return 0


def _refuse_target(target: Path) -> None:
    """Refuse to replace anything but an empty folder or an earlier gallery."""
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; choose another --out.")
    if target.is_dir() and any(target.iterdir()) and not (target / "words.json").is_file():
        raise UserError(f"{target} holds other things than a gallery of words; choose another --out.")


def _show(
    folder: RunFolder,
    *,
    machine: Machine,
    levels: tuple[Level, ...],
    dataset: str,
    split: str,
    per_word: int,
    target: Path,
) -> dict[str, Any]:
    """Find the patches and write the gallery; return its facts."""
    import torch

    from obowlab.evaluation.words.gallery import show_words
    from obowlab.files.replacing import folder_written
    from obowlab.launch.gpu_leases import using_gpus
    from obowlab.report.words_page import render_words
    from obowlab.training.checkpoint import open_method
    from obowlab.training.distributed import join

    def report(line: str) -> None:
        click.echo(line, err=True)

    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    alone = machine.model_copy(update={"procs": 1, "nodes": 1})
    with using_gpus(alone), join(alone) as world:
        method, step, complaints = open_method(folder, map_location=world.device)
        for complaint in complaints:
            report(f"Warning: {complaint} Using the checkpoint before it.")
        found = method.visual_words()
        assert found is not None
        info = folder.info
        about = {"run_id": info.run_id, "title": info.recipe.title, "version": info.version}
        try:
            with folder_written(target) as beside:
                facts = show_words(
                    found,
                    recipe=info.recipe,
                    machine=machine,
                    levels=levels,
                    dataset=dataset,
                    split=split,
                    per_word=per_word,
                    step=step,
                    device=world.device,
                    folder=beside,
                    about=about,
                    report=report,
                )
                (beside / "index.html").write_text(render_words(facts), encoding="utf-8")
        except OSError as error:
            raise UserError(f"Cannot write {target} (--out): {error.strerror or error}.") from None
        return facts


def _levels(folder: RunFolder, *, asked: tuple[str, ...]) -> tuple[Level, ...]:
    """Return the levels to show, in the recipe's order.

    Raises:
        UserError: the run has no words, or none of one of these levels.
    """
    from obowlab.config.methods import word_levels

    method, run_id = folder.info.recipe.method, folder.run_id
    there = word_levels(method)
    if not there:
        raise UserError(f"Run '{run_id}' has no visual words: its method, {method.name}, learns without them.")
    for level in asked:
        if level not in there:
            raise UserError(f"Run '{run_id}' has no words of {level}; choose --level from {', '.join(there)}.")
    return tuple(level for level in there if not asked or level in asked)


def _check_checkpoints(folder: RunFolder) -> None:
    """Refuse a run without a whole checkpoint; whether it is of this version is seen when torch reads it.

    Raises:
        UserError: it has none, or only damaged ones.
    """
    from obowlab.files.replacing import archive_damage
    from obowlab.runs.info import CHECKPOINT_FILES, no_checkpoint

    there = [path for name in CHECKPOINT_FILES if (path := folder.path / name).exists()]
    damages = [damage for path in there if (damage := archive_damage(path)) is not None]
    if len(damages) == len(there):
        missing = f"There is no {CHECKPOINT_FILES[0]} in {folder.path}."
        raise no_checkpoint(folder.info, reason=" ".join(damages) or missing)


def _print(facts: dict[str, Any], *, target: Path, as_json: bool) -> None:
    """Print the facts of every level: a table, or all but the single words as JSON."""
    if as_json:
        levels = {
            name: {key: value for key, value in level.items() if key not in ("words", "sheets")}
            for name, level in facts["levels"].items()
        }
        print_json({"folder": str(target), **facts, "levels": levels})
        return
    columns = ("level", "words", "used", "coherence", "of other words", "patch")
    lines = [
        (
            name,
            str(level["num_words"]),
            f"{100 * level['used'] / level['num_words']:.1f} %",
            _number(level["coherence"]),
            _number(level["coherence_of_others"]),
            f"{level['patch_side']} of {facts['view']['size']} px",
        )
        for name, level in facts["levels"].items()
    ]
    print_table(columns, lines, right=columns[1:])
    click.echo(f"Open {(target / 'index.html').as_uri()}")


def _number(value: Any) -> str:
    return "–" if value is None else f"{cast(float, value):.2f}"
