"""What a data set would be prepared from, how long it would take, and what a person should look at; nothing is written."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from obowlab.data import synthetic
from obowlab.data.beton import MAX_PAGE_SIZE
from obowlab.data.catalogue import DATASETS, check_spelling, missing
from obowlab.data.manifest import Manifest, check_name, read_manifest
from obowlab.data.opening import open_source
from obowlab.data.sources import Source
from obowlab.data.split_names import SPLITS
from obowlab.data.voc import SEVERAL_YEARS
from obowlab.data.writing import decode
from obowlab.errors import UserError
from obowlab.files.room import free_bytes
from obowlab.runs.provenance import num_cores

_PROBE_IMAGES = 64


@dataclass(frozen=True)
class Plan:
    """What preparing will do, known before it starts.

    Attributes:
        dataset: its name.
        source: folder or archive.
        num_images: of each split.
        class_names: of all splits.
        num_bytes: of all image files, about what the prepared files will take.
        free_bytes: where they are written.
        estimated_s: seconds that decoding takes.
        num_ignored: other files of the source, which are left out.
        notes: what a person should look at before it starts, a sentence each.
    """

    dataset: str
    source: str
    num_images: dict[str, int]
    class_names: tuple[str, ...]
    num_bytes: int
    free_bytes: int
    estimated_s: float
    num_ignored: int
    notes: tuple[str, ...]


def plan_prepare(
    name: str,
    *,
    source: str | Path,
    data_root: Path,
    labelled: bool = True,
    val_fraction: float | None = None,
    force: bool = False,
    workers: int | None = None,
) -> Plan:
    """List the source and decode a few of its images to estimate time and size; nothing is written.

    Raises:
        UserError: as `prepare`.
    """
    found = source_of(name, source, labelled=labelled, val_fraction=val_fraction, data_root=data_root, force=force)
    return plan_of(name, found, data_root=data_root, workers=workers or num_cores())


def source_of(
    name: str,
    source: str | Path | None,
    *,
    data_root: Path,
    labelled: bool = True,
    val_fraction: float | None = None,
    force: bool = False,
) -> Source:
    """Return the images that a data set would be prepared from.

    Raises:
        UserError: as `prepare`.
    """
    if check_name(name) == synthetic.NAME:
        raise UserError(f"'{name}' is drawn on first use and has no --source.")
    check_spelling(name)
    if source is None:
        raise UserError(f"Give --source DIR, the folder, .tar, list or table that holds the images of '{name}'.")
    usual = _usual_fraction(name, data_root=data_root, force=force)
    several_years = name in SEVERAL_YEARS
    return open_source(source, labelled=labelled, val_fraction=val_fraction, usual_fraction=usual, several_years=several_years)


def plan_of(name: str, source: Source, *, data_root: Path, workers: int) -> Plan:
    """Decode a few images of a source to estimate what preparing it takes."""
    images = [image for split in source.splits for image in split.images]
    probe = images[:: -(-len(images) // _PROBE_IMAGES)]
    start = time.monotonic()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda image: decode(image, page_size=MAX_PAGE_SIZE), probe))
    per_byte = (time.monotonic() - start) / max(1, sum(image.size for image in probe))
    num_bytes = sum(image.size for image in images)
    return Plan(
        dataset=name,
        source=str(source.path),
        num_images={split.name: len(split.images) for split in source.splits},
        class_names=source.splits[0].class_names,
        num_bytes=num_bytes,
        free_bytes=free_bytes(data_root),
        estimated_s=per_byte * num_bytes,
        num_ignored=source.num_ignored,
        notes=tuple(notes_of(name, source)),
    )


def manifests_of(name: str, *, data_root: Path) -> list[Manifest]:
    """Return what is prepared under a name, split by split.

    Raises:
        UserError: a manifest is damaged.
    """
    return [each for split in SPLITS if (each := read_manifest(data_root, name, split)) is not None]


def _usual_fraction(name: str, *, data_root: Path, force: bool) -> float | None:
    """Return the share of val where none is given: that of the preparation before, or none; None for what is usual."""
    try:
        present = manifests_of(name, data_root=data_root)
    except UserError:  # a damaged manifest, which --force replaces, and which is said elsewhere
        present = []
    if present and present[0].val_fraction is not None:
        return present[0].val_fraction
    # What earlier versions prepared without val stays so; the val of the catalogue's data sets is published.
    return 0.0 if name in DATASETS or (len(present) == 1 and not force) else None


def notes_of(name: str, source: Source) -> list[str]:
    """Say what is left out of a source, and what it lacks."""
    notes = [f"left out, as no image of train/ or val/: {source.num_ignored} files"] if source.num_ignored else []
    if source.num_hidden:
        notes.append(f"left out, as hidden or a thumbnail: {source.num_hidden} files")
    if source.empty_classes:
        some = ", ".join(source.empty_classes[:5]) + (", ..." if len(source.empty_classes) > 5 else "")
        notes.append(f"class folders without an image: {len(source.empty_classes)} ({some})")
    return [*source.notes, *notes, *missing(name, source)]


def losses(source: Source, manifests: Sequence[Manifest]) -> list[str]:
    """Say which classes lost more than half of their images or have none in a split."""
    notes: list[str] = []
    for split, manifest in zip(source.splits, manifests, strict=True):
        skipped = {image.name for image in manifest.skipped}
        lost = Counter(split.class_names[image.label] for image in split.images if image.name in skipped)
        given = Counter(split.class_names[image.label] for image in split.images)
        notes += [
            f"{split.name}/{name}: {lost[name]} of {given[name]} images cannot be read"
            for name in split.class_names
            if lost[name] * 2 > given[name]
        ]
        notes += [f"{split.name} has no image of class {name}" for name in split.class_names if not given[name]]
    return notes
