"""Make prepared data sets: from images that a person has, or by drawing the synthetic set.

Both give a `Content` per split, a stream of records, and `build` writes it: one file format, one way to write it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from obowlab import text
from obowlab.data import synthetic
from obowlab.data.identity import note_written
from obowlab.data.manifest import (
    Manifest,
    Skipped,
    beton_path,
    publish,
    read_manifest,
    refuse_closed,
    workplace,
)
from obowlab.data.planning import Plan, losses, manifests_of, notes_of, plan_of, source_of
from obowlab.data.sources import Source
from obowlab.data.split_names import SPLITS
from obowlab.data.writing import Content, Progress, build, content_of, drawn
from obowlab.errors import UserError
from obowlab.runs.provenance import num_cores


@dataclass(frozen=True)
class PrepareReport:
    """What was prepared, split by split, and what a person should look at."""

    manifests: tuple[Manifest, ...]
    already_prepared: bool
    elapsed_s: float
    notes: tuple[str, ...]

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Every unreadable image with its reason; names start with the split."""
        return tuple(
            Skipped(name=f"{manifest.split}/{image.name}", reason=image.reason)
            for manifest in self.manifests
            for image in manifest.skipped
        )


def prepare(
    name: str,
    *,
    source: str | Path | None,
    data_root: Path,
    labelled: bool = True,
    val_fraction: float | None = None,
    force: bool = False,
    workers: int | None = None,
    announce: Callable[[Plan], None] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> PrepareReport:
    """Write DATA_ROOT/NAME from images that a person has; every image is decoded once to find the unreadable.

    Nothing is visible until everything is written; an interrupted call starts over when it is repeated.

    Args:
        name: of the data set, `[a-z0-9][a-z0-9_-]*`; `synthetic` is drawn, and waits for another process that draws it.
        source: what `open_source` takes; None for `synthetic`.
        data_root: folder of all data sets.
        labelled: whether to use the labels that there are.
        val_fraction: share of every class that becomes val where the source has none, in [0, 1). When absent it is the one
            that the data set was prepared with before, or a tenth; nothing for a data set of the catalogue, which has its own
            val, and for images without labels.
        force: replace what was prepared from another source.
        workers: decoding threads; as many as this process has cores if absent.
        announce: called with size and estimated time before the work starts.
        progress: called twice a second and at the end of each split.

    Returns:
        What was prepared; with `already_prepared` if the same source was prepared before and `force` is not set.

    Raises:
        UserError: a bad name or source, no readable image, no space, or another source was prepared under this name.
    """
    start = time.monotonic()
    workers = workers or num_cores()
    if name == synthetic.NAME:
        if source is not None:
            raise UserError(f"'{name}' is drawn, not read: leave --source out, or choose another name for your images.")
        found, contents = None, [drawn(split) for split in SPLITS]
    else:
        found = source_of(name, source, labelled=labelled, val_fraction=val_fraction, data_root=data_root, force=force)
        contents = [content_of(split, found, workers=workers) for split in found.splits]

    def done_before() -> PrepareReport | None:
        present = manifests_of(name, data_root=data_root)
        if found is not None:
            _refuse_another(name, found, present=present)
        if not _is_complete(contents, present=present, data_root=data_root):
            return None
        return PrepareReport(tuple(present), already_prepared=True, elapsed_s=time.monotonic() - start, notes=())

    if not force and (report := done_before()):  # without the lock: two people who ask at once are both answered
        return report
    with workplace(data_root, name, wait=found is None) as working:
        if not force and (report := done_before()):
            return report
        refuse_closed(data_root, name)
        if found is not None:
            plan = plan_of(name, found, data_root=data_root, workers=workers)
            if plan.num_bytes * 1.02 + 64e6 > plan.free_bytes:
                raise UserError(
                    f"{name} needs about {text.size(plan.num_bytes)} and 64 MB to spare, and {data_root} has "
                    f"{text.size(plan.free_bytes)} left: make room or choose another --data-root."
                )
            if announce is not None:
                announce(plan)
        manifests = [build(content, dataset=name, folder=working, progress=progress) for content in contents]
        publish(working, data_root, name)
        note_written(manifests, data_root=data_root)
    notes = [*notes_of(name, found), *losses(found, manifests)] if found is not None else []
    return PrepareReport(tuple(manifests), already_prepared=False, elapsed_s=time.monotonic() - start, notes=tuple(notes))


def synthetic_is_drawn(data_root: Path) -> bool:
    """Return whether this version of the synthetic data set is prepared."""
    present = [read_manifest(data_root, synthetic.NAME, split) for split in SPLITS]
    return [each and each.source_hash for each in present] == [drawn(split).source_hash for split in SPLITS]


def _refuse_another(name: str, source: Source, *, present: Sequence[Manifest]) -> None:
    for manifest in present:
        split = source.split(manifest.split)
        if split is None or (split.listing_hash, split.class_names) != (manifest.source_hash, manifest.class_names):
            raise UserError(
                f"'{name}' was prepared from {manifest.source}, whose files, labels or validation images differ from those of "
                f"{source.path} now: choose another name, or add --force to replace it."
            )


def _is_complete(contents: Sequence[Content], *, present: Sequence[Manifest], data_root: Path) -> bool:
    """Return whether these contents are prepared, in files of the right size."""
    if [each.source_hash for each in contents] != [manifest.source_hash for manifest in present]:
        return False
    files = [(beton_path(data_root, manifest.dataset, manifest.split), manifest.file_bytes) for manifest in present]
    return all(path.is_file() and path.stat().st_size == num_bytes for path, num_bytes in files)
