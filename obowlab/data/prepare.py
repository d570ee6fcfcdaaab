"""Make prepared data sets: from images that a person has, or by drawing the synthetic set.

Both give a `Content` per split, a stream of records, and `build` writes it: one file format, one way to write it.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import obowlab
from obowlab import text
from obowlab.data import synthetic
from obowlab.data.annotations import Annotate, Annotation
from obowlab.data.beton import MAX_PAGE_SIZE, MIN_PAGE_SIZE, BetonWriter, Record, page_size_for, read_index
from obowlab.data.catalogue import DATASETS, check_spelling, missing
from obowlab.data.decoding import UnreadableImageError, to_jpeg
from obowlab.data.identity import note_written
from obowlab.data.image_lists import write_names
from obowlab.data.manifest import (
    NAMES_SUFFIX,
    OBJECTS_SUFFIX,
    Manifest,
    Skipped,
    beton_path,
    check_name,
    file_sha256,
    publish,
    read_manifest,
    refuse_closed,
    workplace,
    write_manifest,
)
from obowlab.data.objects import write_objects
from obowlab.data.opening import open_source
from obowlab.data.sources import Source, SourceImage, SourceSplit
from obowlab.data.split_names import SPLITS
from obowlab.data.voc import SEVERAL_YEARS
from obowlab.errors import UserError
from obowlab.runs.provenance import num_cores

REPORT_EVERY_S = 0.5
_PROBE_IMAGES = 64
_CHUNK = 16


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


@dataclass(frozen=True)
class Progress:
    """How far one split is; `remaining_s` is for this split."""

    split: str
    done: int
    total: int
    remaining_s: float


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


@dataclass(frozen=True)
class Content:
    """What a split is made of.

    Attributes:
        split: `train` or `val`.
        class_names: of all splits.
        num_images: how many images there are, the unreadable included.
        page_size: of the file, in bytes.
        source: where the images come from.
        source_hash: identifies them without reading them.
        val_fraction: see `Source`.
        targets: see `SourceSplit`.
        names: of the images, the unreadable included; none of drawn ones.
        annotations: see `SourceSplit`.
        records: begins to yield the images in order, each as a record or with the reason why it is skipped.
    """

    split: str
    class_names: tuple[str, ...]
    num_images: int
    page_size: int
    source: str
    source_hash: str
    records: Callable[[], Iterator[Record | Skipped]]
    val_fraction: float | None = None
    targets: tuple[str, ...] = ()
    names: Sequence[str] = ()
    annotations: Sequence[Annotate] = ()


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
    return _plan(name, found, data_root=data_root, workers=workers or num_cores())


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
        found, contents = None, [_drawn(split) for split in SPLITS]
    else:
        found = source_of(name, source, labelled=labelled, val_fraction=val_fraction, data_root=data_root, force=force)
        contents = [_content(split, found, workers=workers) for split in found.splits]

    def done_before() -> PrepareReport | None:
        present = _present(name, data_root=data_root)
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
            plan = _plan(name, found, data_root=data_root, workers=workers)
            if plan.num_bytes * 1.02 + (64 << 20) > plan.free_bytes:
                raise UserError(
                    f"{name} needs about {text.size(plan.num_bytes)} and {data_root} has {text.size(plan.free_bytes)} left: "
                    "make room or choose another --data-root."
                )
            if announce is not None:
                announce(plan)
        manifests = [build(content, dataset=name, folder=working, progress=progress) for content in contents]
        publish(working, data_root, name)
        note_written(manifests, data_root=data_root)
    notes = [*_notes(name, found), *_losses(found, manifests)] if found is not None else []
    return PrepareReport(tuple(manifests), already_prepared=False, elapsed_s=time.monotonic() - start, notes=tuple(notes))


def build(content: Content, *, dataset: str, folder: Path, progress: Callable[[Progress], None] | None = None) -> Manifest:
    """Write one split, FOLDER/SPLIT.beton and FOLDER/SPLIT.json, and return its manifest.

    The finished file is read once more: the manifest describes what the disk holds.

    Raises:
        UserError: none of its images can be read, or the disk refuses.
    """
    path = folder / f"{content.split}.beton"
    skipped: list[Skipped] = []
    targets: list[str] = []
    names: list[str] = []
    annotations: list[Annotation] = []
    start = last = time.monotonic()
    try:
        with BetonWriter(path, capacity=content.num_images, page_size=content.page_size) as writer:
            for done, record in enumerate(content.records(), start=1):
                if isinstance(record, Skipped):
                    skipped.append(record)
                else:
                    writer.append(record)
                    targets += content.targets[done - 1 : done]
                    names += content.names[done - 1 : done]
                    for annotate in content.annotations[done - 1 : done]:
                        annotations.append(annotate((record.height, record.width)))
                now = time.monotonic()
                if progress is not None and (now - last >= REPORT_EVERY_S or done == content.num_images):
                    last = now
                    left_s = (now - start) / done * (content.num_images - done)
                    progress(Progress(content.split, done=done, total=content.num_images, remaining_s=left_s))
    except OSError as error:
        raise UserError(
            f"Cannot write '{dataset}' into {folder.parent} ({error.strerror}): make room or choose another --data-root."
        ) from error
    if not writer.num_images:
        first = f"{skipped[0].name}: {skipped[0].reason}"
        raise UserError(f"No image of {content.source}, {content.split}, can be read; the first: {first}.")
    manifest = Manifest(
        dataset=dataset,
        split=content.split,
        num_images=len(read_index(path).labels),
        class_names=content.class_names,
        content_hash=writer.content_hash,
        file_bytes=path.stat().st_size,
        file_sha256=file_sha256(path),
        source=content.source,
        source_hash=content.source_hash,
        val_fraction=content.val_fraction,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        obowlab_version=obowlab.__version__,
        skipped=tuple(skipped),
        targets=tuple(targets),
    )
    if names:
        write_names(path.with_suffix(NAMES_SUFFIX), names)
    if annotations:
        write_objects(path.with_suffix(OBJECTS_SUFFIX), annotations)
    write_manifest(path.with_suffix(".json"), manifest)
    return manifest


def synthetic_is_drawn(data_root: Path) -> bool:
    """Return whether this version of the synthetic data set is prepared."""
    present = [read_manifest(data_root, synthetic.NAME, split) for split in SPLITS]
    return [each and each.source_hash for each in present] == [_drawn(split).source_hash for split in SPLITS]


# -------------------------------------------------------------------------------------------------------------- contents


def _drawn(split: str) -> Content:
    """Return the content of a split of the synthetic data set."""
    return Content(
        split=split,
        class_names=synthetic.CLASS_NAMES,
        num_images=synthetic.num_images(split),
        page_size=MIN_PAGE_SIZE,
        source="drawn by obowlab",
        source_hash=f"synthetic version {synthetic.SYNTHETIC_VERSION} {split}",
        records=lambda: synthetic.records(split),
    )


def _content(split: SourceSplit, source: Source, *, workers: int) -> Content:
    """Return the content of a split of a source."""
    page_size = page_size_for(max(image.size * (1 if _is_jpeg(image) else 2) for image in split.images))
    return Content(
        split=split.name,
        class_names=split.class_names,
        num_images=len(split.images),
        page_size=page_size,
        source=str(source.path),
        source_hash=split.listing_hash,
        val_fraction=source.val_fraction,
        targets=split.targets,
        names=[image.name for image in split.images],
        annotations=split.annotations,
        records=lambda: _decoded(split.images, page_size=page_size, workers=workers),
    )


def _decoded(images: Sequence[SourceImage], *, page_size: int, workers: int) -> Iterator[Record | Skipped]:
    """Yield images in order, decoded by a pool of threads that is a few chunks ahead."""
    if workers == 1:  # a thread of its own would only take turns with this one
        yield from (_decode(image, page_size=page_size) for image in images)
        return
    waiting: deque[Future[list[Record | Skipped]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for first in range(0, len(images), _CHUNK):
                chunk = images[first : first + _CHUNK]
                waiting.append(pool.submit(lambda chunk: [_decode(image, page_size=page_size) for image in chunk], chunk))
                if len(waiting) > 4 * workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _decode(image: SourceImage, *, page_size: int) -> Record | Skipped:
    try:
        decoded = to_jpeg(image.read())
    except UnreadableImageError as error:
        return Skipped(name=image.name, reason=str(error))
    except OSError as error:
        return Skipped(name=image.name, reason=f"cannot be read: {error.strerror or error}")
    if len(decoded.jpeg) > page_size:
        return Skipped(name=image.name, reason=f"takes {len(decoded.jpeg)} bytes as JPEG, more than a page of {page_size}")
    return Record(label=image.label, jpeg=decoded.jpeg, height=decoded.height, width=decoded.width)


def _is_jpeg(image: SourceImage) -> bool:
    return image.name.lower().endswith((".jpg", ".jpeg"))


# --------------------------------------------------------------------------------------------------------------- sources


def _present(name: str, *, data_root: Path) -> list[Manifest]:
    return [each for split in SPLITS if (each := read_manifest(data_root, name, split)) is not None]


def _usual_fraction(name: str, *, data_root: Path, force: bool) -> float | None:
    """Return the share of val where none is given: that of the preparation before, or none; None for what is usual."""
    try:
        present = _present(name, data_root=data_root)
    except UserError:  # a damaged manifest, which --force replaces, and which is said elsewhere
        present = []
    if present and present[0].val_fraction is not None:
        return present[0].val_fraction
    # What earlier versions prepared without val stays so; the val of the catalogue's data sets is published.
    return 0.0 if name in DATASETS or (len(present) == 1 and not force) else None


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


def _plan(name: str, source: Source, *, data_root: Path, workers: int) -> Plan:
    images = [image for split in source.splits for image in split.images]
    probe = images[:: -(-len(images) // _PROBE_IMAGES)]
    start = time.monotonic()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda image: _decode(image, page_size=MAX_PAGE_SIZE), probe))
    per_byte = (time.monotonic() - start) / max(1, sum(image.size for image in probe))
    num_bytes = sum(image.size for image in images)
    existing = next(folder for folder in (data_root, *data_root.absolute().parents) if folder.exists())
    return Plan(
        dataset=name,
        source=str(source.path),
        num_images={split.name: len(split.images) for split in source.splits},
        class_names=source.splits[0].class_names,
        num_bytes=num_bytes,
        free_bytes=shutil.disk_usage(existing).free,
        estimated_s=per_byte * num_bytes,
        num_ignored=source.num_ignored,
        notes=tuple(_notes(name, source)),
    )


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


def _notes(name: str, source: Source) -> list[str]:
    """Say what is left out of a source, and what it lacks."""
    notes = [f"left out, as no image of train/ or val/: {source.num_ignored} files"] if source.num_ignored else []
    if source.num_hidden:
        notes.append(f"left out, as hidden or a thumbnail: {source.num_hidden} files")
    if source.empty_classes:
        some = ", ".join(source.empty_classes[:5]) + (", ..." if len(source.empty_classes) > 5 else "")
        notes.append(f"class folders without an image: {len(source.empty_classes)} ({some})")
    return [*source.notes, *notes, *missing(name, source)]


def _losses(source: Source, manifests: Sequence[Manifest]) -> list[str]:
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
