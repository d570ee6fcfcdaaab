"""Prepared data sets: which are known, what a split holds, and how to open one. No ffcv, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from obowlab.config import Data
from obowlab.data import synthetic
from obowlab.data.beton import damaged, fix_for, read_index
from obowlab.data.catalogue import DATASETS, DatasetInfo
from obowlab.data.identity import FileIdentity, identify, is_written_file
from obowlab.data.image_lists import listed, num_listed
from obowlab.data.manifest import Manifest, Skipped, beton_path, check_name, read_manifest
from obowlab.data.planning import Plan, plan_prepare
from obowlab.data.prepare import PrepareReport, prepare, synthetic_is_drawn
from obowlab.data.sources import ABSENT, DIFFICULT, PRESENT
from obowlab.data.split_names import SPLITS
from obowlab.data.verification import Problem, VerifyReport, verify
from obowlab.data.writing import Progress
from obowlab.errors import AbsentError, UserError

__all__ = [
    "DATASETS",
    "DatasetInfo",
    "Listing",
    "Manifest",
    "Plan",
    "PrepareReport",
    "Problem",
    "Progress",
    "Skipped",
    "Split",
    "VerifyReport",
    "list_datasets",
    "num_training_images",
    "open_split",
    "plan_prepare",
    "prepare",
    "subset",
    "trained_on",
    "verify",
]


@dataclass(frozen=True, eq=False)
class Split:
    """One prepared split of N images in their fixed order: position = image index.

    The file is mapped into memory on first use, in every process that uses it, so a Split is cheap to copy and to send.
    """

    dataset: str
    name: str
    path: Path
    class_names: tuple[str, ...]
    labels: NDArray[np.int64]
    heights: NDArray[np.int32]
    widths: NDArray[np.int32]
    content_hash: str
    """SHA-256 (hex) over the label and the JPEG bytes of every image in order."""
    pointers: NDArray[np.int64] = field(repr=False)
    sizes: NDArray[np.int64] = field(repr=False)
    targets: NDArray[np.int8] | None = field(repr=False)
    """Of images that may show several classes, [N, classes]: 1 shown, 0 not shown, -1 shown by difficult objects alone."""
    identity: FileIdentity = field(repr=False)
    """Which file it was when it was opened; see `check_unchanged`."""

    @property
    def num_images(self) -> int:
        """N."""
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Classes of the data set, whether or not this split has images of each."""
        return len(self.class_names)

    def jpeg(self, index: int) -> memoryview:
        """Return the JPEG bytes of one image, not copied."""
        if not 0 <= index < self.num_images:
            raise IndexError(f"image {index} of {self.num_images}")
        start = int(self.pointers[index])
        return self._bytes[start : start + int(self.sizes[index])].data

    def check_unchanged(self) -> None:
        """Make sure that the file is still the one that was opened; asks its size and time only.

        Raises:
            UserError: it was changed or replaced meanwhile.
        """
        try:
            same = identify(self.path) == self.identity
        except OSError:
            same = False
        if not same:
            raise UserError(
                f"{self.path} was changed or replaced while it was in use: put the prepared file back (`obowlab data verify "
                f"{self.dataset}` checks it) and run the command again; nothing was kept since the last checkpoint."
            )

    @cached_property
    def _bytes(self) -> np.memmap[Any, np.dtype[np.uint8]]:
        return np.memmap(self.path, np.uint8, mode="r")

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_bytes"}


def open_split(dataset: str, split: str, *, data_root: Path, runs_root: Path | None = None) -> Split:
    """Open a prepared split; `synthetic` is drawn first if it is not there.

    Args:
        dataset: its name.
        split: `train` or `val`.
        data_root: folder of all data sets.
        runs_root: the run store, which remembers the hash of a file whose folder cannot be written.

    Raises:
        UserError: it was not prepared, or its files are damaged or do not belong together.
    """
    check_name(dataset)
    if split not in SPLITS:
        raise UserError(f"There is no split '{split}'; there are {', '.join(SPLITS)}.")
    if dataset == synthetic.NAME and not synthetic_is_drawn(data_root):
        prepare(synthetic.NAME, source=None, data_root=data_root)
    return _open(dataset, split, data_root, runs_root=runs_root)


def num_training_images(data: Data, *, data_root: Path) -> int | None:
    """Return how many images are trained on, by the prepared data set or else its published size; None when neither is known."""
    dataset, images_per_class = data.dataset, data.images_per_class
    if data.image_list:
        return num_listed(data.image_list, dataset=dataset, data_root=data_root)
    manifest, info = read_manifest(data_root, dataset, "train"), DATASETS.get(dataset)
    if manifest is not None:
        num_images, num_classes = manifest.num_images, len(manifest.class_names)
    elif info is not None:
        num_images, num_classes = info.num_images["train"], info.num_classes
    else:
        return None
    return num_images if images_per_class is None else min(num_images, images_per_class * num_classes)


def _open(dataset: str, split: str, data_root: Path, *, runs_root: Path | None = None, hashed: bool = True) -> Split:
    manifest = read_manifest(data_root, dataset, split)
    if manifest is None:
        raise _not_prepared(dataset, split, data_root)
    path = beton_path(data_root, dataset, split)
    try:
        identity = identify(path)
        if path.stat().st_size != manifest.file_bytes:
            raise damaged(path, f"{path.stat().st_size} bytes where {manifest.file_bytes} were written")
        index = read_index(path)
        if hashed and not is_written_file(path, manifest=manifest, runs_root=runs_root):
            raise damaged(path, "its SHA-256 is not that of the file that was written")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): make it readable, or {fix_for(dataset)}.") from None
    if index.stamp != manifest.content_hash or len(index.labels) != manifest.num_images:
        raise damaged(path, "it does not belong to the manifest beside it")
    if index.labels.max() >= len(manifest.class_names):
        raise damaged(path, f"label {index.labels.max()} where the manifest names {len(manifest.class_names)} classes")
    return Split(
        dataset=dataset,
        name=split,
        path=path,
        class_names=manifest.class_names,
        labels=index.labels,
        heights=index.heights,
        widths=index.widths,
        content_hash=manifest.content_hash,
        pointers=index.pointers,
        sizes=index.sizes,
        targets=_targets(path, manifest),
        identity=identity,
    )


def _targets(path: Path, manifest: Manifest) -> NDArray[np.int8] | None:
    if not manifest.targets:
        return None
    values = {ord(PRESENT): 1, ord(ABSENT): 0, ord(DIFFICULT): -1}
    marks = np.frombuffer("".join(manifest.targets).encode("utf-8"), dtype=np.uint8)
    shape = (manifest.num_images, len(manifest.class_names))
    if {len(each) for each in manifest.targets} != {shape[1]} or len(marks) != shape[0] * shape[1] or {*marks} - {*values}:
        raise damaged(path, "the manifest beside it does not mark every class of every image")
    targets = np.zeros(shape, dtype=np.int8)
    for mark, value in values.items():
        targets[marks.reshape(shape) == mark] = value
    return targets


def trained_on(split: Split, data: Data | None) -> NDArray[np.int64]:
    """Return the int64 indices [n] of the images that a recipe trains on, in order; of all images for None.

    Raises:
        UserError: as `listed`.
    """
    if data is not None and data.image_list:
        return listed(split, data.image_list)
    return subset(split, images_per_class=None if data is None else data.images_per_class)


def subset(split: Split, *, images_per_class: int | None) -> NDArray[np.int64]:
    """Return the int64 indices [n] of the first `images_per_class` images of every class (all if None), in order.

    Images are sorted by class and file name, so 260 of ImageNet's are the paper's "20 %" as the authors take it.
    """
    indices = np.arange(split.num_images, dtype=np.int64)
    if images_per_class is None:
        return indices
    assert images_per_class >= 1
    order = np.argsort(split.labels, kind="stable")
    starts = np.searchsorted(split.labels[order], np.arange(split.num_classes))
    rank = np.empty_like(indices)
    rank[order] = indices - starts[split.labels[order]]
    return indices[rank < images_per_class]


@dataclass(frozen=True)
class Listing:
    """A known or prepared data set as `obowlab data list` shows it."""

    name: str
    info: DatasetInfo | None
    manifests: tuple[Manifest, ...]
    """Of the prepared splits; empty if it is not prepared."""
    problem: str | None
    """Why it cannot be used although something is there."""


def list_datasets(data_root: Path) -> tuple[Listing, ...]:
    """Return all known data sets, then all others that are prepared under the data root."""
    folders = [path.name for path in sorted(data_root.iterdir()) if path.is_dir()] if data_root.is_dir() else []
    others = [name for name in folders if name not in DATASETS and not name.startswith(".")]
    listings = []
    for name in (*DATASETS, *others):
        problem = None
        manifests: list[Manifest] = []
        for split in SPLITS:
            try:
                manifest = read_manifest(data_root, name, split)
                if manifest is not None:
                    manifests.append(manifest)
                    _open(name, split, data_root, hashed=False)  # `data verify` hashes; a list answers at once
            except UserError as error:
                problem = problem or str(error)
        if manifests or problem or name in DATASETS:
            listings.append(Listing(name=name, info=DATASETS.get(name), manifests=tuple(manifests), problem=problem))
    return tuple(listings)


def _not_prepared(dataset: str, split: str, data_root: Path) -> UserError:
    other = next((name for name in SPLITS if name != split and read_manifest(data_root, dataset, name) is not None), None)
    if other is not None:
        way = f"`obowlab data prepare {dataset} --source DIR --val-fraction 0.1 --force` sets some apart"
        return UserError(f"'{dataset}' has no {split} images in {data_root}: {way}.")
    return AbsentError(
        f"'{dataset}' is not prepared in {data_root}: `obowlab data prepare {dataset} --source DIR` (or set --data-root)."
    )
