"""`obowlab weights`: encoders in and out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from obowlab.cli import Family
from obowlab.cli.options import PATH, MachineOptions, dry_run_option, machine_options, would
from obowlab.errors import UserError

if TYPE_CHECKING:
    from obowlab.weights.formats import Format

FORMATS = ("torchvision", "timm", "safetensors", "module")


@click.group(cls=Family)
def weights() -> None:
    """Import and export encoder weights."""


@weights.command("import")
@click.argument("file", type=PATH)
@click.option("--out", type=PATH, metavar="FILE", help="Encoder file to write. [default: FILE with the ending .safetensors]")
@click.option("--force", is_flag=True, help="Replace --out if it is there.")
@dry_run_option
def import_file(file: Path, out: Path | None, force: bool, dry_run: bool) -> None:
    """Turn a released checkpoint of the authors, or a torchvision file, into an encoder file.

    Both of the authors' files are read: the full model and the feature extractor. Every key must fit; what has no place here is
    listed. Teacher, heads and vocabulary of a full model are written beside the encoder.
    """
    target = out or file.with_suffix(".safetensors")
    if not file.is_file():
        raise UserError(f"There is no file '{file}'.")
    if target.suffix != ".safetensors":
        raise UserError(f"--out {target} must end in .safetensors.")
    _refuse_present(target, force=force)
    from obowlab.weights.info import peek, refuse_own

    refuse_own(peek(file), path=file)
    if dry_run:
        return would(f"read {file} and write its encoder to {target}")
    from obowlab.weights.encoder_file import Encoder, import_authors, write_method
    from obowlab.weights.export import export

    imported = import_authors(file)
    backbone = imported.info.backbone
    click.echo(f"{file}: {imported.kind}, {backbone.arch}, {imported.info.weights_hash[:8]}.")
    if imported.unused:
        click.echo(f"Left out: {len(imported.unused)} keys without a place here, as {_some(list(imported.unused))}.")
    written = export(Encoder(model=imported.encoder, info=imported.info, path=file), format="safetensors", path=target)
    click.echo(f"Wrote {written.path}; largest difference of a feature after reading it back: {written.max_difference:.3g}.")
    if imported.method is not None:
        click.echo(f"Wrote {write_method(imported, path=target)}: the whole model, with teacher, heads and vocabulary.")
    click.echo(f"Measure it with: obowlab eval {written.path} --dataset NAME")
    return None


@weights.command("export")
@click.argument("encoder", metavar="RUN|FILE")
@click.option(
    "--format",
    "asked",
    type=click.Choice(FORMATS),
    help="What to write. [default: by --out, .pth torchvision, .safetensors safetensors, a folder module]",
)
@click.option("--out", type=PATH, required=True, metavar="PATH", help="File to write, or folder (timm, module).")
@click.option("--force", is_flag=True, help="Replace the files if they are there.")
@machine_options("runs_root", "machine_file")
@dry_run_option
def export_file(encoder: str, asked: str | None, out: Path, force: bool, options: MachineOptions, dry_run: bool) -> None:
    """Write the encoder of a run, a weights file or a model version (models:/NAME/VERSION) for use elsewhere, and check it.

    torchvision: a state dict with its names. timm: a folder for timm.create_model("local-dir:PATH", pretrained=True). Both are
    for networks of the usual width and stem. module: a folder with encoder.py, which needs torch and torchvision only, for any
    network. safetensors: obowlab's own file.

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

    written = export(read_source(source), format=format_, path=out)
    click.echo(
        f"Wrote {written.path} ({format_}); largest difference of a feature after reading it back: {written.max_difference:.3g}."
    )


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
