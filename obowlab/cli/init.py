"""`obowlab init`: a recipe fitted to the images at hand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from obowlab.cli.options import PATH, MachineOptions, dry_run_option, machine_options, would
from obowlab.errors import UserError

if TYPE_CHECKING:
    from obowlab.config.fitted import ImagesFound

SIZES = ("32", "64", "128", "224")


@click.command()
@click.argument("subject", metavar="SOURCE|NAME")
@click.option("--name", metavar="NAME", help="Name of the data set. [default: from the folder's]")
@click.option("--size", type=click.Choice(SIZES), help="Side of the whole-image view in pixels. [default: by images and machine]")
@click.option(
    "--val-fraction", type=click.FloatRange(min=0, max=1, max_open=True), metavar="F", help="As `obowlab data prepare` has it."
)
@click.option("--no-labels", is_flag=True, help="Take all images without labels.")
@click.option("--out", type=PATH, metavar="FILE", help="Recipe to write. [default: NAME.toml]")
@click.option("--force", is_flag=True, help="Replace it if it is there.")
@machine_options("data_root", "machine_file")
@dry_run_option
def init(
    subject: str,
    name: str | None,
    size: str | None,
    val_fraction: float | None,
    no_labels: bool,
    out: Path | None,
    force: bool,
    options: MachineOptions,
    dry_run: bool,
) -> None:
    """Write a recipe fitted to your images, with the reason for every value.

    SOURCE is a folder of images or anything else that `obowlab data prepare` takes; NAME is a data set that is prepared. The
    size of the views depends on the images and on whether this machine has a GPU; --size chooses another. The commands that
    come next are printed.
    """
    from obowlab.config.fitted import fit_recipe
    from obowlab.data.manifest import check_name, read_manifest
    from obowlab.launch.system import count_gpus

    root = options.machine().data_root
    is_prepared = _could_name(subject) and read_manifest(root, subject, "train") is not None
    dataset = check_name(name or (subject if is_prepared else _name_of(subject)))
    target = out or Path(_file_name(dataset))
    _check_target(target, force=force)
    found = _look_at(subject, dataset=dataset, is_prepared=is_prepared, root=root, labelled=not no_labels, share=val_fraction)
    command = shlex.join(["obowlab", "init", subject, *(["--size", size] if size else [])])
    fitted = fit_recipe(found, has_gpu=count_gpus() > 0, size=int(size) if size else None, command=command)
    if dry_run:
        would(f"write {target}: {fitted.base} fitted to {found.sentence}")
    else:
        try:
            target.write_text(fitted.toml, encoding="utf-8")
        except OSError as error:
            raise UserError(f"Cannot write {target} (--out): {error.strerror}.") from None
        click.echo(f"Wrote {target}: {fitted.base} fitted to {found.sentence}.")
    for warning in fitted.warnings:
        click.echo(f"  note: {warning}")
    click.echo("Next:")
    where = ["--data-root", str(options.data_root)] if options.data_root is not None else []
    if not is_prepared:
        share = ["--val-fraction", f"{val_fraction:g}"] if val_fraction is not None else []
        taken = ["--no-labels"] if no_labels else []
        click.echo(f"  {shlex.join(['obowlab', 'data', 'prepare', dataset, '--source', subject, *share, *taken, *where])}")
    click.echo(f"  {shlex.join(['obowlab', 'run', _recipe_name(target), *where])}")


def _look_at(subject: str, *, dataset: str, is_prepared: bool, root: Path, labelled: bool, share: float | None) -> ImagesFound:
    """Return what there is of images.

    Raises:
        UserError: nothing is, or the options do not suit it.
    """
    from obowlab.data.planning import source_of
    from obowlab.data.survey import survey_prepared, survey_source

    if not is_prepared:
        source = source_of(dataset, subject, labelled=labelled, val_fraction=share, data_root=root)
        return survey_source(source, dataset=dataset)
    if dataset != subject or not labelled or share is not None:
        raise UserError(f"'{subject}' is prepared already: leave --name, --val-fraction and --no-labels out, or give its source.")
    return survey_prepared(subject, data_root=root)


def _could_name(subject: str) -> bool:
    return re.fullmatch(r"[a-z0-9][a-z0-9_-]*", subject) is not None


def _name_of(subject: str) -> str:
    """Return a data set's name for a source: that of the folder or file, in letters that a name may have."""
    from obowlab.data.catalogue import check_spelling

    parts = subject.split(":")
    stem = parts[1] if parts[0] == "torchvision" and len(parts) > 2 else Path(subject).expanduser().absolute().name.split(".")[0]
    name = re.sub(r"[^a-z0-9_]+", "-", stem.lower()).strip("-_") or "images"
    try:
        check_spelling(name)
    except UserError:
        return f"my-{name}"
    return f"my-{name}" if name == "synthetic" else name


def _file_name(dataset: str) -> str:
    """Return the recipe's file; a shipped recipe keeps its name."""
    from obowlab.config import recipe_files

    return f"my-{dataset}.toml" if dataset in recipe_files() else f"{dataset}.toml"


def _recipe_name(target: Path) -> str:
    """Return what `obowlab run` takes for a recipe file."""
    from obowlab.config import recipe_files

    is_found = target.parent == Path() and target.suffix == ".toml" and target.stem not in recipe_files()
    return target.stem if is_found else str(target)


def _check_target(target: Path, *, force: bool) -> None:
    """Refuse a file that cannot be a recipe, or is there.

    Raises:
        UserError: says what to change.
    """
    if target.suffix != ".toml" or not re.fullmatch(r"[A-Za-z0-9._-]+", target.stem):
        raise UserError(
            f"--out {target} cannot be a recipe: its name ends in .toml and has letters, digits, ., - and _ before it."
        )
    if target.exists() and not force:
        raise UserError(f"{target} is there already: add --force to replace it, or choose another --out.")
