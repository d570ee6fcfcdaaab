"""`obowlab embed`: features of a folder of images."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import click

from obowlab.cli.options import PATH, MachineOptions, dry_run_option, machine_options, when_interrupted, would
from obowlab.cli.output import refuse_target
from obowlab.errors import UserError

FORMATS = (".npz", ".parquet")


@click.command()
@click.argument("subject", metavar="RUN|FILE")
@click.argument("folder", metavar="DIR", type=PATH)
@click.option("--out", type=PATH, required=True, metavar="FILE", help="File to write, .npz or .parquet.")
@click.option("--force", is_flag=True, help="Replace --out if it is there.")
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=128, show_default=True, metavar="N", help="Images at a time; as for eval."
)
@machine_options("device", "workers", "runs_root", "machine_file")
@dry_run_option
def embed(subject: str, folder: Path, out: Path, force: bool, batch_size: int, options: MachineOptions, dry_run: bool) -> None:
    """Write the features of a folder of images as a file of numpy or Parquet.

    RUN is a run id, the beginning of one, or a run folder; FILE is a weights file (ours, torchvision's or the authors') or a
    model version in MLflow, models:/NAME/VERSION. DIR is searched to any depth. For every image the file holds its name below
    DIR and its features, in the order of the names. Images that cannot be read are left out and named.
    """
    machine = options.machine()
    _check_target(out, force=force)
    from obowlab.data.image_folder import list_images

    count = len(list_images(folder))
    from obowlab.weights.source import find_source

    source = find_source(subject, runs_root=machine.runs_root, tracking_uri=machine.tracking_uri)
    if dry_run:
        return would(f"write the features of {count} images in {folder} by {source.name} to {out}")
    when_interrupted(f"{out} was not written.")
    from obowlab.launch.gpu_leases import using_gpus

    alone = machine.model_copy(update={"procs": 1, "nodes": 1})
    with using_gpus(alone):
        import torch  # must not see GPUs of others

        from obowlab.training.distributed import join
        from obowlab.weights import embedding
        from obowlab.weights.encoder_file import read_source

        if machine.threads is not None:
            torch.set_num_threads(machine.threads)
        encoder = read_source(source)
        with join(alone) as world:
            features, paths = embedding.embed(
                encoder, folder, batch_size=batch_size, device=world.device, workers=machine.workers
            )
    facts = {"weights_hash": encoder.info.weights_hash, "source": encoder.info.source}
    names = [path.relative_to(folder).as_posix() for path in paths]
    embedding.write_features(out, features=features, names=names, facts=facts)
    click.echo(f"Wrote {out}: {len(features)} images, {features.shape[1]} features each, by {source.name}.")
    return None


def _check_target(out: Path, *, force: bool) -> None:
    """Refuse, before anything is computed, a file that could not be written.

    Raises:
        UserError: says what to change.
    """
    if out.suffix not in FORMATS:
        raise UserError(f"--out {out} must end in {' or '.join(FORMATS)}.")
    refuse_target(out, option="--out")
    if out.exists() and not force:
        raise UserError(f"{out} is there already; choose another --out, or add --force.")
    if out.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"--out {out} needs pyarrow, which comes with mlflow: `pip install mlflow`, or write .npz.")
