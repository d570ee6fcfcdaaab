"""Make prepared data sets: from an ImageFolder or a .tar of one, or by drawing the synthetic set."""

from __future__ import annotations

import io
import os
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from PIL import Image, UnidentifiedImageError

import obowlab
from obowlab.data import synthetic
from obowlab.data.beton import MAX_SIDE, MIN_PAGE_SIZE, BetonWriter, Record, page_size_for, read_index
from obowlab.data.identity import note_written
from obowlab.data.manifest import (
    Manifest,
    Skipped,
    beton_path,
    check_name,
    file_sha256,
    publish,
    read_manifest,
    workplace,
    write_manifest,
)
from obowlab.data.sources import SPLITS, Source, SourceImage, SourceSplit, read_source
from obowlab.errors import UserError

JPEG_QUALITY = 95
"""Of images that are not RGB JPEG files already."""

_PROBE_IMAGES = 64
_CHUNK = 16


@dataclass(frozen=True)
class Plan:
    """What preparing will do, known before it starts."""

    dataset: str
    source: str
    num_images: dict[str, int]
    """Images of each split."""
    num_classes: int
    num_bytes: int
    """Bytes of all image files: about what the prepared files will take."""
    free_bytes: int
    estimated_s: float
    num_ignored: int
    """Files beside the images that are left out."""


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
class DecodedImage:
    """An image that was decoded once completely: the JPEG bytes to keep and its size in pixels."""

    jpeg: bytes
    height: int
    width: int


class UnreadableImageError(Exception):
    """An image file cannot become a record; the text says why."""


def to_rgb_jpeg(data: bytes) -> DecodedImage:
    """Decode an image file and return RGB JPEG bytes: its own if it is one, else encoded anew with quality 95.

    Orientation tags are ignored, as torchvision's ImageFolder and the authors' code do.

    Raises:
        UnreadableImageError: it cannot be decoded, or is too large for the format.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            width, height = image.size
            jpeg = data
            if image.format not in ("JPEG", "MPO") or image.mode != "RGB":
                buffer = io.BytesIO()
                image.convert("RGB").save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
                jpeg = buffer.getvalue()
    except UnidentifiedImageError:  # its own text holds a memory address
        raise UnreadableImageError("not an image in a format Pillow knows") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files; every one is reported
        raise UnreadableImageError(f"{type(error).__name__}: {error}") from error
    if max(width, height) > MAX_SIDE:
        raise UnreadableImageError(f"{width}x{height} pixels: sides of at most {MAX_SIDE} fit")
    return DecodedImage(jpeg=jpeg, height=height, width=width)


def plan_prepare(name: str, *, source: Path, data_root: Path, workers: int | None = None) -> Plan:
    """List the source and decode a few of its images to tell what preparing it will take; nothing is written.

    Raises:
        UserError: as `prepare`.
    """
    _check_preparable(name)
    return _plan(name, read_source(source), data_root, workers or _usable_cores())


def prepare(
    name: str,
    *,
    source: Path | None,
    data_root: Path,
    force: bool = False,
    workers: int | None = None,
    announce: Callable[[Plan], None] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> PrepareReport:
    """Write DATA_ROOT/NAME from an ImageFolder or a plain .tar of one; every image is decoded once to find the unreadable.

    Nothing is visible until everything is written; an interrupted call starts over when it is typed again.

    Args:
        name: of the data set, `[a-z0-9][a-z0-9_-]*`.
        source: folder or .tar with train/CLASS/*.JPEG and val/CLASS/*.JPEG, or CLASS/*.JPEG (train only); None for `synthetic`.
        data_root: folder of all data sets.
        force: replace what was prepared from another source.
        workers: decoding threads; as many as this process has cores if absent.
        announce: is told size and estimated time before the work starts.
        progress: is told now and then how far it is.

    Returns:
        What was prepared; with `already_prepared` if the same source was prepared before and `force` is not set.

    Raises:
        UserError: a bad name or source, no readable image, no space, or another source was prepared under this name.
    """
    start = time.monotonic()
    if name == synthetic.NAME:
        if source is not None:
            raise UserError(f"'{name}' is drawn, not read: leave --source out, or choose another name for your images.")
        return prepare_synthetic(data_root=data_root, force=force, progress=progress)
    _check_preparable(name)
    if source is None:
        raise UserError(f"Give --source DIR, the folder or .tar that holds the images of '{name}'.")
    found = read_source(source)
    with workplace(data_root, name, wait=False) as working:
        finished = _finished(name, found, data_root, force)
        if finished is not None:
            return PrepareReport(finished, already_prepared=True, elapsed_s=time.monotonic() - start, notes=())
        workers = workers or _usable_cores()
        plan = _plan(name, found, data_root, workers)
        if plan.num_bytes * 1.02 + (64 << 20) > plan.free_bytes:
            raise UserError(
                f"{name} needs about {plan.num_bytes / 1e9:.1f} GB and {data_root} has {plan.free_bytes / 1e9:.1f} GB left: "
                "make room or choose another --data-root."
            )
        if announce is not None:
            announce(plan)
        notes = [f"left out, as no image of train/ or val/: {found.num_ignored} files"] if found.num_ignored else []
        manifests = []
        for split in found.splits:
            skipped: list[Skipped] = []
            records = _decoded(split, workers, skipped, progress)
            written = _write(working, name, split.name, records, capacity=len(split.images), page_size=_page_size(split))
            if written is None:
                raise UserError(
                    f"No image of {found.path}, {split.name}, can be read; the first: {skipped[0].name}: {skipped[0].reason}."
                )
            manifest = _manifest(
                name, split.name, split.class_names, working, written, skipped, str(found.path), split.listing_hash
            )
            manifests.append(manifest)
            notes += _class_notes(split, skipped)
        publish(working, data_root, name)
        note_written(manifests, data_root=data_root)
    return PrepareReport(tuple(manifests), already_prepared=False, elapsed_s=time.monotonic() - start, notes=tuple(notes))


def prepare_synthetic(
    *, data_root: Path, force: bool = False, progress: Callable[[Progress], None] | None = None
) -> PrepareReport:
    """Draw the synthetic data set into DATA_ROOT unless this version of it is there; wait for a process that is at it.

    Raises:
        UserError: the data root cannot be written.
    """
    start = time.monotonic()
    with workplace(data_root, synthetic.NAME, wait=True) as working:
        present = synthetic_manifests(data_root)
        if present is not None and not force:
            return PrepareReport(present, already_prepared=True, elapsed_s=time.monotonic() - start, notes=())
        manifests = []
        for split in SPLITS:
            records = _watched(synthetic.records(split), split, synthetic.num_images(split), progress)
            written = _write(
                working, synthetic.NAME, split, records, capacity=synthetic.num_images(split), page_size=MIN_PAGE_SIZE
            )
            assert written is not None
            manifests.append(
                _manifest(
                    synthetic.NAME, split, synthetic.CLASS_NAMES, working, written, [], "drawn by obowlab", _synthetic_hash(split)
                )
            )
        publish(working, data_root, synthetic.NAME)
        note_written(manifests, data_root=data_root)
    return PrepareReport(tuple(manifests), already_prepared=False, elapsed_s=time.monotonic() - start, notes=())


def synthetic_manifests(data_root: Path) -> tuple[Manifest, ...] | None:
    """Return the manifests of the synthetic data set if this version of it is prepared."""
    found = [read_manifest(data_root, synthetic.NAME, split) for split in SPLITS]
    present = tuple(
        manifest for manifest in found if manifest is not None and manifest.source_hash == _synthetic_hash(manifest.split)
    )
    return present if len(present) == len(SPLITS) else None


# -------------------------------------------------------------------------------------------------------------- helpers


def _check_preparable(name: str) -> None:
    if check_name(name) == synthetic.NAME:
        raise UserError(f"'{name}' is drawn on first use and has no --source.")


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _synthetic_hash(split: str) -> str:
    return f"synthetic version {synthetic.SYNTHETIC_VERSION} {split}"


def _plan(name: str, source: Source, data_root: Path, workers: int) -> Plan:
    images = [image for split in source.splits for image in split.images]
    probe = images[:: -(-len(images) // _PROBE_IMAGES)]
    start = time.monotonic()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(_decode_or_reason, probe))
    per_byte = (time.monotonic() - start) / max(1, sum(image.size for image in probe))
    num_bytes = sum(image.size for image in images)
    existing = next(folder for folder in (data_root, *data_root.absolute().parents) if folder.exists())
    return Plan(
        dataset=name,
        source=str(source.path),
        num_images={split.name: len(split.images) for split in source.splits},
        num_classes=len(source.splits[0].class_names),
        num_bytes=num_bytes,
        free_bytes=shutil.disk_usage(existing).free,
        estimated_s=per_byte * num_bytes,
        num_ignored=source.num_ignored,
    )


def _finished(name: str, source: Source, data_root: Path, force: bool) -> tuple[Manifest, ...] | None:
    """Return the manifests if just this source was prepared; complain if another was."""
    if force:
        return None
    present = [manifest for split in SPLITS if (manifest := read_manifest(data_root, name, split)) is not None]
    for manifest in present:
        split = source.split(manifest.split)
        if split is None or (split.listing_hash, split.class_names) != (manifest.source_hash, manifest.class_names):
            raise UserError(
                f"'{name}' was prepared from {manifest.source}, whose files differ from {source.path}: "
                "choose another name, or add --force to replace it."
            )
    complete = len(present) == len(source.splits) and all(
        beton_path(data_root, name, manifest.split).is_file()
        and beton_path(data_root, name, manifest.split).stat().st_size == manifest.file_bytes
        for manifest in present
    )
    return tuple(present) if complete else None


def _page_size(split: SourceSplit) -> int:
    return page_size_for(max(image.size * (1 if _is_jpeg(image) else 2) for image in split.images))


def _is_jpeg(image: SourceImage) -> bool:
    return image.name.lower().endswith((".jpg", ".jpeg"))


def _decode_or_reason(image: SourceImage) -> DecodedImage | str:
    try:
        return to_rgb_jpeg(image.read())
    except UnreadableImageError as error:
        return str(error)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def _decoded(
    split: SourceSplit, workers: int, skipped: list[Skipped], progress: Callable[[Progress], None] | None
) -> Iterator[Record]:
    """Yield the images of a split in order, decoded by a pool of threads a little ahead; note the unreadable in `skipped`."""
    page_size = _page_size(split)
    chunks = (split.images[first : first + _CHUNK] for first in range(0, len(split.images), _CHUNK))
    report = _reporter(split.name, len(split.images), progress)
    done = 0
    with ThreadPoolExecutor(workers) as pool:
        for chunk, results in _in_order(pool, chunks, ahead=4 * workers):
            for image, result in zip(chunk, results, strict=True):
                if isinstance(result, DecodedImage) and len(result.jpeg) > page_size:
                    result = f"takes {len(result.jpeg)} bytes as JPEG, more than a page of {page_size}"
                if isinstance(result, str):
                    skipped.append(Skipped(name=image.name, reason=result))
                else:
                    yield Record(label=image.label, jpeg=result.jpeg, height=result.height, width=result.width)
            done += len(chunk)
            report(done)


def _in_order(
    pool: ThreadPoolExecutor, chunks: Iterable[tuple[SourceImage, ...]], *, ahead: int
) -> Iterator[tuple[tuple[SourceImage, ...], list[DecodedImage | str]]]:
    """Decode chunks in the pool, at most `ahead` of them waiting, and yield them in their order."""
    waiting: deque[tuple[tuple[SourceImage, ...], Future[list[DecodedImage | str]]]] = deque()
    try:
        for chunk in chunks:
            waiting.append((chunk, pool.submit(lambda images: [_decode_or_reason(image) for image in images], chunk)))
            if len(waiting) > ahead:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        for _, future in waiting:
            future.cancel()


def _watched(records: Iterable[Record], split: str, total: int, progress: Callable[[Progress], None] | None) -> Iterator[Record]:
    report = _reporter(split, total, progress)
    for done, record in enumerate(records, start=1):
        yield record
        report(done)


def _reporter(split: str, total: int, progress: Callable[[Progress], None] | None) -> Callable[[int], None]:
    """Return a function that passes on, twice a second at most and at the end, how many images are done."""
    start = last = time.monotonic()

    def report(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if progress is not None and (now - last >= 0.5 or done == total):
            last = now
            progress(Progress(split=split, done=done, total=total, remaining_s=(now - start) / done * (total - done)))

    return report


def _write(working: Path, name: str, split: str, records: Iterable[Record], *, capacity: int, page_size: int) -> str | None:
    """Write the records to WORKING/SPLIT.beton; return their content hash, or None if there were none."""
    try:
        with BetonWriter(working / f"{split}.beton", capacity=capacity, page_size=page_size) as writer:
            for record in records:
                writer.append(record)
    except OSError as error:
        raise UserError(
            f"Cannot write '{name}' into {working.parent} ({error.strerror}): make room or choose another --data-root."
        ) from error
    return writer.content_hash if writer.num_images else None


def _manifest(
    name: str,
    split: str,
    class_names: tuple[str, ...],
    working: Path,
    content_hash: str,
    skipped: list[Skipped],
    source: str,
    source_hash: str,
) -> Manifest:
    """Write WORKING/SPLIT.json, reading the finished file once more: what the disk holds is what the manifest tells."""
    path = working / f"{split}.beton"
    manifest = Manifest(
        dataset=name,
        split=split,
        num_images=len(read_index(path).labels),
        class_names=class_names,
        content_hash=content_hash,
        file_bytes=path.stat().st_size,
        file_sha256=file_sha256(path),
        source=source,
        source_hash=source_hash,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        obowlab_version=obowlab.__version__,
        skipped=tuple(skipped),
    )
    write_manifest(path.with_suffix(".json"), manifest)
    return manifest


def _class_notes(split: SourceSplit, skipped: list[Skipped]) -> list[str]:
    """Tell which classes lost more than half of their images, or have none in this split."""
    lost = Counter(image.name.split("/", 1)[0] for image in skipped)
    given = Counter(split.class_names[image.label] for image in split.images)
    notes = [
        f"{split.name}/{name}: {lost[name]} of {given[name]} images cannot be read"
        for name in split.class_names
        if lost[name] * 2 > given[name]
    ]
    return notes + [f"{split.name} has no image of class {name}" for name in split.class_names if not given[name]]
