"""Look at images before a recipe is written for them: their number, size and classes. No torch."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from obowlab.config.fitted import ImagesFound
from obowlab.data.datasets import Split, open_split
from obowlab.data.manifest import read_manifest
from obowlab.data.sources import UNLABELLED, Source
from obowlab.errors import UserError

_SAMPLE = 200
"""Images of a source that are looked at for their size."""


def survey_prepared(name: str, *, data_root: Path) -> ImagesFound:
    """Return what a prepared data set holds.

    Raises:
        UserError: it is not prepared, or damaged.
    """
    train = open_split(name, "train", data_root=data_root)
    val = open_split(name, "val", data_root=data_root) if read_manifest(data_root, name, "val") is not None else None
    return ImagesFound(
        dataset=name,
        train_per_class=_per_class(train),
        val_per_class=_per_class(val) if val is not None else (),
        is_labelled=train.class_names != (UNLABELLED,),
        short_sides=tuple(np.minimum(train.heights, train.widths).tolist()),
    )


def survey_source(source: Source, *, dataset: str) -> ImagesFound:
    """Return what a source holds; some of its images are opened for their size.

    Raises:
        UserError: none of these can be opened.
    """
    splits = {split.name: split for split in source.splits}
    train, val = splits["train"], splits.get("val")
    count = len(train.class_names)
    sides = []
    for image in train.images[:: -(-len(train.images) // _SAMPLE)]:
        try:
            with Image.open(io.BytesIO(image.read())) as opened:
                sides.append(min(opened.size))
        except Exception:  # Pillow raises nearly anything; preparing lists what cannot be read
            continue
    if not sides:
        raise UserError(f"--source {source.path}: none of the images looked at can be read, such as {train.images[0].name}.")
    return ImagesFound(
        dataset=dataset,
        train_per_class=tuple(np.bincount([image.label for image in train.images], minlength=count).tolist()),
        val_per_class=tuple(np.bincount([image.label for image in val.images], minlength=count).tolist()) if val else (),
        is_labelled=source.is_labelled,
        short_sides=tuple(sides),
    )


def _per_class(split: Split) -> tuple[int, ...]:
    return tuple(np.bincount(split.labels, minlength=split.num_classes).tolist())
