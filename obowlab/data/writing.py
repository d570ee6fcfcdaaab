"""Write a split of a prepared data set: its images as records, and what is known of them beside it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import obowlab
from obowlab.data import synthetic
from obowlab.data.annotations import Annotate, Annotation
from obowlab.data.beton import MIN_PAGE_SIZE, BetonWriter, Record, page_size_for, read_index
from obowlab.data.decoding import UnreadableImageError, to_jpeg
from obowlab.data.image_lists import write_names
from obowlab.data.manifest import NAMES_SUFFIX, OBJECTS_SUFFIX, Manifest, Skipped, file_sha256, write_manifest
from obowlab.data.objects import write_objects
from obowlab.data.sources import Source, SourceImage, SourceSplit
from obowlab.errors import UserError

REPORT_EVERY_S = 0.5
_CHUNK = 16


@dataclass(frozen=True)
class Progress:
    """How far one split is; `remaining_s` is for this split."""

    split: str
    done: int
    total: int
    remaining_s: float


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


def drawn(split: str) -> Content:
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


def content_of(split: SourceSplit, source: Source, *, workers: int) -> Content:
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
        yield from (decode(image, page_size=page_size) for image in images)
        return
    waiting: deque[Future[list[Record | Skipped]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for first in range(0, len(images), _CHUNK):
                chunk = images[first : first + _CHUNK]
                waiting.append(pool.submit(lambda chunk: [decode(image, page_size=page_size) for image in chunk], chunk))
                if len(waiting) > 4 * workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def decode(image: SourceImage, *, page_size: int) -> Record | Skipped:
    """Return an image as a record, or why it is left out."""
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
