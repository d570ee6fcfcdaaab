"""`obowlab weights`: encoders in and out."""

from __future__ import annotations

import functools
import math
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from obowlab import text
from obowlab.cli import Family
from obowlab.cli.options import PATH, MachineOptions, dry_run_option, machine_options, set_option, would
from obowlab.errors import UserError
from obowlab.weights.releases import RELEASE_KEYS

if TYPE_CHECKING:
    from obowlab.weights.formats import Format

FORMATS = ("torchvision", "timm", "mmpretrain", "detectron2", "onnx", "safetensors", "module")
PADDINGS = ("torchvision", "same")


def _three(_: click.Context, option: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    """Return the numbers of a text `R,G,B`."""
    if value is None:
        return None
    try:
        numbers = tuple(map(float, value.split(",")))
    except ValueError:
        numbers = ()
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)) or (option.name == "std" and min(numbers) <= 0):
        raise UserError(f"--{option.name} {value} is not R,G,B, three numbers of pixels in [0, 1]; a deviation is above 0.")
    return numbers


@click.group(cls=Family)
def weights() -> None:
    """Inspect, import, continue and export weights."""


def _choices(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say what a file of others does not, and hand them on as `choices`."""
    options = (
        click.option(
            "--as", "release", type=click.Choice(RELEASE_KEYS), metavar="FORMAT", help="Format, which names may leave open."
        ),
        click.option("--network", metavar="PART", help="Network, where the file has several: a key, or a part of its names."),
        click.option("--drop", multiple=True, metavar="NAME", help="Leave out what begins so; repeatable."),
        click.option("--mean", callback=_three, metavar="R,G,B", help="Mean of pixels in [0, 1]. [default: the format's]"),
        click.option("--std", callback=_three, metavar="R,G,B", help="Deviation of pixels. [default: the format's]"),
        click.option("--padding", type=click.Choice(PADDINGS), help="Padding it was trained with. [default: the format's]"),
        click.option("--licence", metavar="TEXT", help="Licence of the weights, kept with them and in every export."),
        click.option(
            "--allow-plain-objects", "plain_objects", is_flag=True, help="Read argparse.Namespace and numpy's numbers too."
        ),
    )

    @functools.wraps(command)
    def with_choices(**values: Any) -> None:
        names = ("release", "network", "drop", "mean", "std", "padding", "licence", "plain_objects")
        command(choices={name: values.pop(name) for name in names}, **values)

    return functools.reduce(lambda made, option: option(made), reversed(options), with_choices)


@weights.command("inspect")
@click.argument("file", type=PATH)
@_choices
@dry_run_option
def inspect_file(file: Path, choices: dict[str, Any], dry_run: bool) -> None:
    """Say what a weights file holds: container, network, format, heads, what is left over, and what an import would make of it.

    Nothing is written, and no code of the file is run.
    """
    _refuse_absent(file)
    from obowlab.weights.info import peek

    peek(file)
    if dry_run:
        return would(f"say what {file} holds")
    from obowlab.weights.encoder_file import Choices
    from obowlab.weights.inspection import inspect

    for line in inspect(file, choices=Choices(**choices)):
        click.echo(line)
    return None


@weights.command("import")
@click.argument("file", type=PATH)
@click.option("--out", type=PATH, metavar="FILE", help="Encoder file to write. [default: FILE with the ending .safetensors]")
@click.option("--force", is_flag=True, help="Replace --out if it is there.")
@_choices
@dry_run_option
def import_file(file: Path, out: Path | None, force: bool, choices: dict[str, Any], dry_run: bool) -> None:
    """Turn a weights file of others into an encoder file: OBoW's authors', MoCo, SwAV, DINO, torchvision, timm and more.

    Every key must fit; what has no place here is listed. Teacher, heads and vocabulary of the authors' full model are written
    beside the encoder. docs/weights.md has the formats. No code of the file is run.
    """
    target = out or file.with_suffix(".safetensors")
    _refuse_absent(file)
    if target.suffix != ".safetensors":
        raise UserError(f"--out {target} must end in .safetensors.")
    if target.resolve() == file.resolve():
        raise UserError(f"The encoder would replace {file} itself: choose another file with --out.")
    _refuse_present(target, force=force)
    from obowlab.weights.info import peek, refuse_own

    refuse_own(peek(file), path=file)
    if dry_run:
        return would(f"read {file} and write its encoder to {target}")
    from obowlab.weights.encoder_file import Choices, Encoder, import_weights, write_method
    from obowlab.weights.export import export
    from obowlab.weights.inspection import about, notes

    imported = import_weights(file, choices=Choices(**choices))
    backbone, release = imported.info.backbone, imported.found.release
    layout = release.title if release is not None else f"{imported.found.network.scheme} names"
    click.echo(f"{file}: {layout}, {backbone.arch}, {imported.info.weights_hash[:8]}.")
    if imported.unused:
        click.echo(f"Left out: {len(imported.unused)} keys without a place here, as {_some(list(imported.unused))}.")
    for line in (*about(imported.info), *notes(imported)):
        click.echo(f"  {line}")
    written = export(Encoder(model=imported.encoder, info=imported.info, path=file), format="safetensors", path=target)
    click.echo(f"Wrote {written.path}; largest difference of a feature after reading it back: {written.max_difference:.3g}.")
    if imported.method is not None:
        click.echo(f"Wrote {write_method(imported, path=target)}: the whole model, with teacher, heads and vocabulary.")
    click.echo(f"Measure it with: obowlab eval {written.path} --dataset NAME")
    return None


@weights.command("continue")
@click.argument("file", type=PATH)
@click.argument("recipe", metavar="RECIPE")
@click.option("--optimizer", "optimizer_file", type=PATH, metavar="FILE", help="The authors' optimiser file of the same epoch.")
@set_option
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the images' order and views.")
@machine_options("data_root", "runs_root", "machine_file")
@dry_run_option
def continue_file(
    file: Path,
    recipe: str,
    optimizer_file: Path | None,
    overrides: tuple[str, ...],
    seed: int,
    options: MachineOptions,
    dry_run: bool,
) -> None:
    """Make a run of a full model that the authors' code has trained; `obowlab run RECIPE` continues it.

    FILE is their model_net_checkpoint_*.pth.tar: student, teacher, heads, vocabulary and the number of steps. RECIPE must
    describe the same model; what differs is said, with the options that fit. No code of the file is run.
    """
    from obowlab.config import load_recipe
    from obowlab.launch.preflight import data_checks

    loaded, machine = load_recipe(recipe, overrides=overrides), options.machine()
    from obowlab.weights.info import peek, refuse_own

    for each in (file, *([optimizer_file] if optimizer_file is not None else [])):
        _refuse_absent(each)
        refuse_own(peek(each), path=each)
    for check in data_checks([loaded], machine=machine, dry_run=dry_run, say=click.echo):
        check()
    if dry_run:
        return would(f"make a run of {loaded.name}, seed {seed}, in {machine.runs_root} that continues where {file} stopped")
    from obowlab.training.take_over import take_over

    made = take_over(file, loaded=loaded, seed=seed, machine=machine, optimizer_file=optimizer_file)
    epoch = made.step / made.steps_per_epoch
    click.echo(f"Made {made.folder.run_id}: step {made.step} of {made.total_steps}, epoch {epoch:.4g}.")
    if made.num_momenta:
        click.echo(f"  momentum of {made.num_momenta} parameters from {optimizer_file}")
    for note in made.notes:
        click.echo(f"  {note}")
    command = text.arguments("run", recipe, set=overrides, seed=seed or None)
    click.echo(f"Continue it with: obowlab {shlex.join(command)}")
    return None


@weights.command("export")
@click.argument("encoder", metavar="RUN|FILE")
@click.option(
    "--format",
    "asked",
    type=click.Choice(FORMATS),
    help="What to write. [default: by --out, .pth torchvision, .pkl detectron2, .onnx, .safetensors, a folder module]",
)
@click.option("--out", type=PATH, required=True, metavar="PATH", help="File to write, or folder (timm, module).")
@click.option("--force", is_flag=True, help="Replace the files if they are there.")
@machine_options("runs_root", "machine_file")
@dry_run_option
def export_file(encoder: str, asked: str | None, out: Path, force: bool, options: MachineOptions, dry_run: bool) -> None:
    """Write the encoder of a run, a weights file or a model version (models:/NAME/VERSION) for use elsewhere, and check it.

    torchvision, mmpretrain: a state dict with torchvision's names. timm: a folder for timm.create_model("local-dir:PATH",
    pretrained=True). detectron2: a .pkl, and its settings beside it. These four are for networks of the usual width, stem and
    padding. onnx, module (a folder with encoder.py, which needs torch and torchvision only), safetensors (obowlab's own file):
    for any network.

    What was written is read back and the features of a random batch are compared; files whose features differ are not kept.
    """
    from obowlab.weights.formats import choose_format, refuse_format, targets
    from obowlab.weights.source import find_source

    machine = options.machine()
    format_ = choose_format(cast("Format | None", asked), out=out)
    for file in targets(format_, out=out):
        _refuse_present(file, force=force)
    source = find_source(encoder, runs_root=machine.runs_root, tracking_uri=machine.tracking_uri)
    if source.backbone is not None:
        refuse_format(format_, backbone=source.backbone, name=source.name)
    if dry_run:
        would(f"write the encoder of {source.name} to {out} as {format_}")
        if source.backbone is None:
            click.echo(f"  not known before {source.name} is read: whether its network has this format")
        return
    from obowlab.weights.encoder_file import read_source
    from obowlab.weights.export import export
    from obowlab.weights.usage import usage

    subject = read_source(source)
    written = export(subject, format=format_, path=out)
    click.echo(
        f"Wrote {written.path} ({format_}); largest difference of a feature after reading it back: {written.max_difference:.3g}."
    )
    click.echo(usage(format_, info=subject.info, path=out))


def _refuse_absent(file: Path) -> None:
    if not file.is_file():
        raise UserError(f"There is no file '{file}'.")


def _refuse_present(path: Path, *, force: bool) -> None:
    if path.is_dir():
        raise UserError(f"{path} is a folder; choose another --out.")
    if path.exists() and not force:
        raise UserError(f"{path} is there already; choose another --out, or add --force.")
    there = next(place for place in path.absolute().parents if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"Cannot write {path}: {there} is no folder that you may write to; choose another --out.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
