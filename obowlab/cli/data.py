"""`obowlab data`: prepare, draw, verify and list data sets."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from obowlab import text
from obowlab.cli import Family
from obowlab.cli.options import PATH, MachineOptions, dry_run_option, json_flag, machine_options, when_interrupted, would
from obowlab.cli.output import print_json, print_table, show_progress

if TYPE_CHECKING:
    from obowlab.data.datasets import Plan, PrepareReport, Progress

MAX_SHOWN = 20
"""Unreadable images listed one by one; all of them are in the manifest."""


@click.group(cls=Family)
def data() -> None:
    """Prepare, draw, verify and list data sets."""


@data.command("prepare")
@click.argument("name")
@click.option(
    "--source",
    metavar="SOURCE",
    help="Folder or .tar of class folders or images, list (.csv), Parquet files, WebDataset, or torchvision:NAME:ROOT.",
)
@click.option(
    "--val-fraction",
    type=click.FloatRange(min=0, max=1, max_open=True),
    metavar="F",
    help="Share of every class that becomes val where the source has none. [default: 0.1 with labels, else 0]",
)
@click.option("--no-labels", is_flag=True, help="Take all images without labels, whatever the folders or labels are.")
@click.option("--force", is_flag=True, help="Replace what was prepared under this name from another source.")
@click.option("--workers", type=click.IntRange(min=1), metavar="N", help="Decoding threads. [default: one per core]")
@machine_options("data_root", "machine_file")
@dry_run_option
def prepare(
    name: str,
    source: str | None,
    val_fraction: float | None,
    no_labels: bool,
    force: bool,
    workers: int | None,
    options: MachineOptions,
    dry_run: bool,
) -> None:
    """Write a data set's images into .beton files, once and for all recipes.

    SOURCE is a folder or a plain .tar of train/CLASS/*.JPEG and val/CLASS/*.JPEG, of CLASS/*.JPEG or of images without labels; a
    list with a path and a label a line (.csv, .tsv, .txt); Parquet files or a folder saved by Hugging Face's datasets; the tars
    of a WebDataset; or a data set of torchvision on this disk, torchvision:NAME:ROOT.

    Every image is decoded once; those that cannot be read are skipped and listed. Nothing is visible before everything is
    written, so an interrupted call is simply typed again.
    """
    from obowlab.data.datasets import plan_prepare
    from obowlab.data.datasets import prepare as prepare_dataset
    from obowlab.errors import UserError

    root = options.machine().data_root
    if dry_run:
        if source is None:
            if name != "synthetic":
                raise UserError(f"Give --source DIR, the folder, .tar, list or table that holds the images of '{name}'.")
            return would(f"draw the synthetic data set into {root / name}")
        plan = plan_prepare(
            name,
            source=source,
            data_root=root,
            labelled=not no_labels,
            val_fraction=val_fraction,
            force=force,
            workers=workers,
        )
        would(f"write {root / name}: {_plan_line(plan)}")
        for note in plan.notes:
            click.echo(f"  note: {note}")
        return None
    when_interrupted(f"'{name}' is as it was before; the same command begins again.")
    report = prepare_dataset(
        name,
        source=source,
        data_root=root,
        labelled=not no_labels,
        val_fraction=val_fraction,
        force=force,
        workers=workers,
        announce=lambda plan: click.echo(f"Preparing {plan.dataset} from {plan.source}: {_plan_line(plan)}."),
        progress=_show_progress if sys.stderr.isatty() else None,
    )
    return _print_report(name, root / name, report)


@data.command("draw")
@click.argument("layout", type=click.Choice(["voc", "coco", "places"]), metavar="LAYOUT")
@click.argument("folder", type=PATH)
@dry_run_option
def draw(layout: str, folder: Path, dry_run: bool) -> None:
    """Draw images in the layout of a public data set, for trying a protocol without a download.

    LAYOUT voc writes FOLDER/VOC2007: 1000 small images of one to four parts of the synthetic set, with lists and boxes. LAYOUT
    coco writes FOLDER/coco: 1000 such images with boxes and outlines. LAYOUT places writes FOLDER/places205: 1080 images of 24
    classes, with the lists of train and val.
    """
    from obowlab.data import drawn_coco, drawn_places, drawn_voc

    name, count, draw_images = {
        "voc": ("VOC2007", sum(drawn_voc.NUM_IMAGES.values()), drawn_voc.draw_voc),
        "coco": ("coco", sum(drawn_coco.NUM_IMAGES.values()), drawn_coco.draw_coco),
        "places": ("places205", drawn_places.NUM_IMAGES, drawn_places.draw_places),
    }[layout]
    place = folder / name
    if dry_run:
        return would(f"draw {count} images into {place}")
    when_interrupted("Nothing was written: type the same command again.")
    place = draw_images(folder)
    click.echo(f"Drawn: {place}. To use it: obowlab data prepare drawn-{layout} --source {place}")
    return None


@data.command("verify")
@click.argument("name")
@click.option("--source", metavar="SOURCE", help="Compare images with this source. [default: the one it was prepared from]")
@click.option(
    "--sample", type=click.IntRange(min=1), default=256, show_default=True, metavar="N", help="Images compared with the source."
)
@machine_options("data_root", "machine_file")
@dry_run_option
def verify(name: str, source: str | None, sample: int, options: MachineOptions, dry_run: bool) -> int:
    """Read a prepared data set again: hashes of everything, and a sample against its source."""
    from obowlab.data.datasets import verify as verify_dataset

    root = options.machine().data_root
    if dry_run:
        would(f"hash {root / name}, decode {sample} images of each split and compare them with their source")
        return 0
    when_interrupted("nothing was changed.")
    report = verify_dataset(name, data_root=root, source=source, sample=sample, progress=show_progress)
    show_progress("")
    for problem in report.problems:
        click.echo(f"{problem.split}: {problem.what}\n  {problem.fix}")
    images = ", ".join(f"{manifest.num_images} {manifest.split}" for manifest in report.manifests)
    compared = f"{report.num_compared} compared with the source" if report.num_compared else "the source is no longer there"
    verdict = "as it was prepared" if report.ok else f"{len(report.problems)} problem(s)"
    click.echo(f"{name}: {verdict}; {images} images, {report.num_decoded} decoded, {compared}.")
    return int(not report.ok)


@data.command("list")
@machine_options("data_root", "machine_file")
@json_flag
@dry_run_option
def list_all(as_json: bool, options: MachineOptions, dry_run: bool) -> None:
    """List the data sets the recipes know and those that are prepared."""
    from obowlab.data.datasets import list_datasets

    root = options.machine().data_root
    if dry_run:
        return would(f"list the data sets under {root}")
    listings = list_datasets(root)
    if as_json:
        rows = [
            {
                "name": listing.name,
                "prepared": bool(listing.manifests) and listing.problem is None,
                "problem": listing.problem,
                "splits": {
                    manifest.split: manifest.model_dump(mode="json", exclude={"class_names", "skipped"})
                    for manifest in listing.manifests
                },
            }
            for listing in listings
        ]
        return print_json(rows)
    lines = []
    for listing in listings:
        images = ", ".join(f"{manifest.num_images} {manifest.split}" for manifest in listing.manifests)
        total = text.size(sum(manifest.file_bytes for manifest in listing.manifests)) if listing.manifests else ""
        hashes = " ".join(manifest.content_hash[:8] for manifest in listing.manifests)
        if listing.problem is not None:
            state = listing.problem
        elif listing.manifests:
            state = "prepared"
        else:
            state = listing.info.obtain if listing.info is not None else "not prepared"
        lines.append((listing.name, images, total, hashes, state))
    columns = ("data set", "images", "size", "content", "state")
    title = f"Data sets in {root}:"
    return print_table(columns, lines, title=title, right=("size",), names=("data set",), hide=("content", "size"))


def _plan_line(plan: Plan) -> str:
    images = ", ".join(f"{count} {split}" for split, count in plan.num_images.items())
    ignored = f", {plan.num_ignored} other files left out" if plan.num_ignored else ""
    return (
        f"{images} images {_classes(plan.class_names)}{ignored}, about {text.size(plan.num_bytes)} "
        f"({text.size(plan.free_bytes)} free) and {text.duration(plan.estimated_s)}"
    )


def _classes(names: Sequence[str]) -> str:
    from obowlab.data.sources import UNLABELLED

    return "without labels" if tuple(names) == (UNLABELLED,) else f"of {len(names)} class{'es' if len(names) > 1 else ''}"


def _show_progress(progress: Progress) -> None:
    left = f"{text.duration(progress.remaining_s)} left · " if progress.done < progress.total else ""
    show_progress(f"{left}{progress.split}: {progress.done} of {progress.total} images")
    if progress.done == progress.total:
        click.echo(err=True)


def _print_report(name: str, folder: Path, report: PrepareReport) -> None:
    if report.already_prepared:
        click.echo(f"{name} is already prepared in {folder}.")
    else:
        click.echo(f"Prepared {name} in {folder} within {text.duration(report.elapsed_s)}.")
    for manifest in report.manifests:
        click.echo(
            f"  {manifest.split}: {manifest.num_images} images {_classes(manifest.class_names)}, "
            f"{text.size(manifest.file_bytes)}, content {manifest.content_hash}"
        )
    for note in report.notes:
        click.echo(f"  note: {note}")
    if report.skipped:
        click.echo(f"  {len(report.skipped)} images cannot be read and were left out:")
        for image in report.skipped[:MAX_SHOWN]:
            click.echo(f"    {image.name}: {image.reason}")
        if len(report.skipped) > MAX_SHOWN:
            click.echo(f"    ... and {len(report.skipped) - MAX_SHOWN} more, all in the .json files of {folder}")
