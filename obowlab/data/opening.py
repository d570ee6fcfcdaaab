"""Open what `--source` names, whatever it is, and set validation images apart where a source has none."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from obowlab.data.coco import find_coco, read_coco
from obowlab.data.image_folder import is_hidden, read_source, unread_photos
from obowlab.data.list_files import LIST_SUFFIXES, read_list
from obowlab.data.places import find_places, read_places
from obowlab.data.sources import ARCHIVE_SUFFIXES, LAYOUT, NoImageError, Source, SourceImage, SourceSplit
from obowlab.data.tables import files_of_folder, files_of_saved, read_tables
from obowlab.data.torchvision_sets import PREFIX, read_torchvision
from obowlab.data.voc import find_voc, read_both_years, read_voc
from obowlab.data.webdataset import is_webdataset, read_webdataset
from obowlab.errors import UserError

VAL_FRACTION = 0.1
"""Share of every class that becomes val where a source has none and nothing else is said."""


def open_source(
    spec: str | Path,
    *,
    labelled: bool = True,
    val_fraction: float | None = None,
    usual_fraction: float | None = None,
    several_years: bool = False,
) -> Source:
    """List the images of a source; no image is read, except of tables.

    Args:
        spec: a folder or .tar of class folders or of images, a list (.csv, .tsv, .txt), Parquet files, a folder that Hugging
            Face's `datasets` has saved, the tars of a WebDataset, a folder of PASCAL VOC or of Places205, or
            `torchvision:NAME:ROOT`.
        labelled: whether to use the labels that there are.
        val_fraction: share of every class that becomes val where the source has no val, in [0, 1).
        usual_fraction: the same where `val_fraction` is None; None for a tenth of images with labels, nothing of others.
        several_years: of a folder of PASCAL VOC, whether to train on 2007 and 2012 together.

    Raises:
        UserError: there is nothing, or nothing that is understood, or a source with val is to be split.
    """
    source = _read(spec, labelled=labelled, several_years=several_years)
    if source.split("val") is not None:
        if val_fraction is not None:
            raise UserError(f"--source {source.path} has validation images of its own: leave --val-fraction out.")
        return _described(source)
    if val_fraction is None:
        val_fraction = usual_fraction
    if val_fraction is None:
        val_fraction = VAL_FRACTION if len(source.splits[0].class_names) > 1 else 0.0
    return _described(with_val(source, fraction=val_fraction))


def is_there(spec: str) -> bool:
    """Return whether what a manifest notes as its source still exists."""
    place = spec.removeprefix(PREFIX).partition(":")[2] if spec.startswith(PREFIX) else spec
    return Path(place).exists()


def with_val(source: Source, *, fraction: float) -> Source:
    """Return a source whose train images of every class are shared out to train and val.

    Which images are taken depends on their names alone: it is the same on every machine, and an image that is added later moves
    hardly any other. A class of two images or more keeps at least one in each split.
    """
    (train,) = source.splits
    names_of: dict[int, list[str]] = {}
    for image in train.images:
        names_of.setdefault(image.label, []).append(image.name)
    chosen: set[str] = set()
    for names in names_of.values():
        count = min(max(1, int(fraction * len(names) + 0.5)), len(names) - 1) if fraction else 0
        chosen.update(sorted(names, key=_place)[: max(0, count)])
    kept = _of(train, "train", [image for image in train.images if image.name not in chosen])
    val = _of(train, "val", [image for image in train.images if image.name in chosen])
    return replace(source, splits=(kept, val) if chosen else (train,), val_fraction=fraction)


def _of(split: SourceSplit, name: str, images: Sequence[SourceImage]) -> SourceSplit:
    return SourceSplit(name, split.class_names, tuple(images))


def _place(name: str) -> bytes:
    """Return the place of an image in the order from which val is taken: a counter-based one, with the name as counter."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()


def _described(source: Source) -> Source:
    """Add what a person should know about labels and splits."""
    notes = []
    if not source.is_labelled:
        notes.append("images without labels: for training, visual words and embeddings; protocols that need labels are left out")
    if source.val_fraction and source.split("val") is not None:
        of = "every class" if source.is_labelled else "the images"
        notes.append(f"no val in the source: {100 * source.val_fraction:g} % of {of} become val, chosen by name (--val-fraction)")
    elif source.val_fraction and source.is_labelled:
        notes.append("no val: no class has two images")
    return replace(source, notes=(*notes, *source.notes))


def _read(spec: str | Path, *, labelled: bool, several_years: bool) -> Source:
    """Read a source by what it is."""
    if str(spec).startswith(PREFIX):
        return read_torchvision(str(spec), labelled=labelled)
    path = Path(spec).expanduser().absolute()
    name = path.name.lower()
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or ((path / "state.json").is_file() and (path / "dataset_info.json").is_file()):
            return read_tables(path, files_of_saved(path), labelled=labelled)
        if labelled and several_years:
            return read_both_years(path)
        if labelled and (voc := find_voc(path)) is not None:
            return read_voc(voc)
        if labelled and (annotations := find_coco(path)) is not None:
            return read_coco(path, annotations=annotations)
        if labelled and (lists := find_places(path)) is not None:
            return read_places(path, lists=lists)
        return _read_folder(path, labelled=labelled)
    if not path.is_file():
        raise UserError(f"--source {path} is neither a folder nor a .tar file, a list or a table: there is nothing of that name.")
    if name.endswith(LIST_SUFFIXES):
        return read_list(path, labelled=labelled)
    if name.endswith((".parquet", ".arrow")):
        return read_tables(path, [(None, path)], labelled=labelled)
    if name.endswith(ARCHIVE_SUFFIXES) and not name.endswith(".tar"):
        raise UserError(f"--source {path} is a compressed archive: unpack it and give the folder, or make a plain .tar of it.")
    if is_webdataset(path):
        return read_webdataset(path, [path], labelled=labelled)
    return read_source(path, labelled=labelled)


def _read_folder(path: Path, *, labelled: bool) -> Source:
    """Read a folder of images or, where it holds none, one of tables or of a WebDataset's tars."""
    try:
        return read_source(path, labelled=labelled)
    except NoImageError as error:
        none = error
        files = [file for file in sorted(path.rglob("*")) if not is_hidden(str(file.relative_to(path)))]
    tables = [file for file in files if file.suffix.lower() in (".parquet", ".arrow")]
    if tables:
        return read_tables(path, files_of_folder(path, tables), labelled=labelled)
    shards = [file for file in files if file.suffix.lower() == ".tar"]
    if shards and is_webdataset(shards[0]):
        return read_webdataset(path, shards, labelled=labelled)
    if unread_photos(file.name for file in files):
        raise none
    others = shards + [file for file in files if file.suffix.lower() in (".csv", ".tsv")]
    hint = f" Or give one file, as in `--source {shlex.quote(str(others[0]))}`." if others else ""
    raise UserError(f"--source {path} holds no image; expected {LAYOUT}, a folder of images, Parquet files or tars.{hint}")
