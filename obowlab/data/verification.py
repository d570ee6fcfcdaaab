"""Check prepared data sets: file and content hashes, images that decode, and a comparison with the source."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from obowlab.data import synthetic
from obowlab.data.beton import BetonIndex, ContentHash, fix_for, read_index
from obowlab.data.decoding import UnreadableImageError, to_jpeg
from obowlab.data.manifest import Manifest, beton_path, check_name, file_sha256, read_manifest
from obowlab.data.opening import is_there, open_source
from obowlab.data.sources import UNLABELLED, Source
from obowlab.data.split_names import SPLITS
from obowlab.errors import UserError

SAME_PIXELS = 4.0
"""Mean absolute difference, of 255, up to which an image encoded anew by another JPEG library counts as the same."""


@dataclass(frozen=True)
class Problem:
    """What is wrong with a split, and the command that fixes it."""

    split: str
    what: str
    fix: str


@dataclass(frozen=True)
class VerifyReport:
    """What was checked and what is wrong; nothing is wrong if `problems` is empty."""

    dataset: str
    manifests: tuple[Manifest, ...]
    num_decoded: int
    num_compared: int
    """Images compared with the source; 0 if it is no longer there."""
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether everything checked is as it was prepared."""
        return not self.problems


def verify(
    name: str,
    *,
    data_root: Path,
    source: str | Path | None = None,
    sample: int | None = 256,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> VerifyReport:
    """Compare every prepared split with its manifest, and a sample of its images with the source.

    Args:
        name: of the data set.
        data_root: folder of all data sets.
        source: what to compare with, as `prepare` takes it; the one noted in the manifest, if it is still there, when absent.
        sample: images of each split that are decoded and compared; None for all.
        seed: draws the sample.
        progress: called with what is done next.

    Raises:
        UserError: it was never prepared, or the given source cannot be listed.
    """
    check_name(name)
    report = progress or (lambda text: None)
    problems: list[Problem] = []
    manifests: list[Manifest] = []
    for split in SPLITS:
        try:
            manifest = read_manifest(data_root, name, split)
        except UserError as error:
            problems.append(Problem(split, str(error), fix_for(name)))
            continue
        if manifest is not None:
            manifests.append(manifest)
        elif beton_path(data_root, name, split).exists():
            problems.append(Problem(split, f"{beton_path(data_root, name, split)} has no manifest beside it", fix_for(name)))
    if not manifests and not problems:
        raise UserError(f"'{name}' is not prepared in {data_root}: there is nothing to verify.")
    given = _opened(source, manifests[0]) if source is not None and manifests else None
    num_decoded = num_compared = 0
    for manifest in manifests:
        path = beton_path(data_root, name, manifest.split)
        report(f"{path}: hashing {manifest.file_bytes / 1e6:.0f} MB")
        index, found = _check_file(path, manifest)
        if index is not None:
            count = len(index.labels)
            chosen = np.random.default_rng(seed).permutation(count)[: count if sample is None else sample]
            report(f"{path}: decoding {len(chosen)} of {count} images")
            images = _Images(path, index, np.sort(chosen).tolist())
            found += _check_decoding(images)
            num_decoded += len(chosen)
            original = given or _noted_source(manifest)
            if original is not None:
                report(f"{path}: comparing them with {original.path}")
                found += _compare(images, manifest, original)
                num_compared += len(chosen)
        problems += [Problem(manifest.split, what, fix_for(name)) for what in found]
    return VerifyReport(name, tuple(manifests), num_decoded, num_compared, tuple(problems))


def _check_file(path: Path, manifest: Manifest) -> tuple[BetonIndex | None, list[str]]:
    """Return the file's index, if it has one that can be trusted, and what differs from the manifest."""
    try:
        num_bytes, sha256 = path.stat().st_size, file_sha256(path)
        index = read_index(path)
    except (OSError, UserError) as error:
        return None, [f"{path} cannot be read: {error}"]
    problems = []
    if num_bytes != manifest.file_bytes:
        problems.append(f"{path} has {num_bytes} bytes, {manifest.file_bytes} were written")
    elif sha256 != manifest.file_sha256:
        problems.append(f"{path} has changed since it was written (its SHA-256 differs)")
    if len(index.labels) != manifest.num_images:
        problems.append(f"{path} holds {len(index.labels)} images, {manifest.num_images} were written")
    if index.labels.max() >= len(manifest.class_names):
        problems.append(f"{path} has label {index.labels.max()}, the manifest names {len(manifest.class_names)} classes")
    content = ContentHash()
    images = np.memmap(path, np.uint8, mode="r")
    for label, start, size in zip(index.labels.tolist(), index.pointers.tolist(), index.sizes.tolist(), strict=True):
        content.add(label, images[start : start + size].data)
    if content.hexdigest() != manifest.content_hash:
        problems.append(f"{path} holds other images than were written (its content hash differs)")
    return index, problems


@dataclass(frozen=True)
class _Images:
    """The chosen images of a file, read one by one."""

    path: Path
    index: BetonIndex
    chosen: list[int]

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        with self.path.open("rb") as file:
            for number in self.chosen:
                file.seek(int(self.index.pointers[number]))
                yield number, file.read(int(self.index.sizes[number]))


def _check_decoding(images: _Images) -> list[str]:
    problems = []
    for number, jpeg in images:
        try:
            image = to_jpeg(jpeg)
        except UnreadableImageError as error:
            problems.append(f"image {number} cannot be decoded ({error})")
            continue
        if image.jpeg != jpeg:
            problems.append(f"image {number} is no RGB or grayscale JPEG")
        if (image.height, image.width) != (images.index.heights[number], images.index.widths[number]):
            problems.append(f"image {number} is {image.height}x{image.width}, its record says otherwise")
    return problems


def _noted_source(manifest: Manifest) -> Source | None:
    """Return the source the split was made from if it can still be listed."""
    if manifest.dataset == synthetic.NAME or not is_there(manifest.source):
        return None
    try:
        return _opened(manifest.source, manifest)
    except UserError:  # it was replaced by something else; only a source given by the user must exist
        return None


def _opened(source: str | Path, manifest: Manifest) -> Source:
    """Return a source with labels and validation images as a split was prepared."""
    usual = manifest.val_fraction if manifest.val_fraction is not None else 0.0
    return open_source(source, labelled=manifest.class_names != (UNLABELLED,), usual_fraction=usual)


def _compare(images: _Images, manifest: Manifest, source: Source) -> list[str]:
    split = source.split(manifest.split)
    if split is None or (split.listing_hash, split.class_names) != (manifest.source_hash, manifest.class_names):
        return [f"{source.path} has other files in {manifest.split}/ than were prepared"]
    skipped = {image.name for image in manifest.skipped}
    originals = [image for image in split.images if image.name not in skipped]
    if len(originals) != manifest.num_images:
        return [f"{source.path} minus the skipped gives {len(originals)} images, {manifest.num_images} were prepared"]
    problems = []
    for number, jpeg in images:
        try:
            expected = to_jpeg(originals[number].read()).jpeg
            same = jpeg == expected or _pixel_difference(jpeg, expected) <= SAME_PIXELS
        except (OSError, UnreadableImageError) as error:
            problems.append(f"image {number} cannot be compared with {originals[number].name} ({error})")
            continue
        if not same:
            problems.append(f"image {number} differs from {originals[number].name} of the source")
    return problems


def _pixel_difference(first: bytes, second: bytes) -> float:
    """Return the mean absolute difference of two JPEG images, infinite if their sizes differ."""
    one, two = (np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.int16) for data in (first, second))
    return float(np.abs(one - two).mean()) if one.shape == two.shape else float("inf")
