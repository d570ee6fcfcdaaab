"""`obowlab weights`: encoders in and out."""

from __future__ import annotations

from pathlib import Path

import click

from obowlab.cli import Family
from obowlab.cli.options import PATH, MachineOptions, dry_run_option, machine_options, would
from obowlab.errors import UserError

FORMATS = ("torchvision", "safetensors")


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
    if dry_run:
        return would(f"read {file} and write its encoder to {target}")
    from obowlab.weights.encoder_file import Encoder, export, import_authors, write_method

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
@click.argument("run", metavar="RUN|FILE")
@click.option("--format", "format_", type=click.Choice(FORMATS), default="torchvision", show_default=True, help="What to write.")
@click.option("--out", type=PATH, required=True, metavar="FILE", help="File to write.")
@click.option("--force", is_flag=True, help="Replace --out if it is there.")
@machine_options("runs_root", "machine_file")
@dry_run_option
def export_file(run: str, format_: str, out: Path, force: bool, options: MachineOptions, dry_run: bool) -> None:
    """Write the encoder of a run (or of a weights file) for use elsewhere, and check it.

    The file is read back and the features of a random batch are compared; a file whose features differ is not kept.
    """
    machine = options.machine()
    _refuse_present(out, force=force)
    if not Path(run).is_file():
        from obowlab.runs.folder import RunFolder

        run = str(RunFolder.find(run, runs_root=machine.runs_root).path)
    if dry_run:
        return would(f"write the encoder of {run} to {out} as {format_}")
    from obowlab.weights.encoder_file import export, load_encoder

    encoder = load_encoder(run, runs_root=machine.runs_root)
    written = export(encoder, format="torchvision" if format_ == "torchvision" else "safetensors", path=out)
    click.echo(
        f"Wrote {written.path} ({format_}); largest difference of a feature after reading it back: {written.max_difference:.3g}."
    )
    return None


def _refuse_present(path: Path, *, force: bool) -> None:
    if path.exists() and not force:
        raise UserError(f"{path} is there already; choose another --out, or add --force.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
