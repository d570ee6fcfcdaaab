"""The boxes of a prepared split, kept beside it: `SPLIT.boxes.gz`, what every image shows and where."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from obowlab.data.beton import fix_for
from obowlab.data.manifest import BOXES_SUFFIX
from obowlab.data.prepared import Prepared
from obowlab.data.voc_boxes import Annotation
from obowlab.errors import UserError


def write_boxes(path: Path, annotations: Sequence[Annotation]) -> None:
    """Write what the images of a split show, in order."""
    content = [
        [
            [*box, int(label), int(difficult)]
            for box, label, difficult in zip(a.boxes.tolist(), a.labels, a.difficult, strict=True)
        ]
        for a in annotations
    ]
    path.write_bytes(gzip.compress(json.dumps(content).encode("ascii"), mtime=0))


def read_boxes(split: Prepared) -> tuple[Annotation, ...]:
    """Return what the images of a split show, in order.

    Raises:
        UserError: it was prepared without boxes, or they are damaged.
    """
    path = split.path.with_suffix(BOXES_SUFFIX)
    try:
        content = json.loads(gzip.decompress(path.read_bytes()))
        tables = [np.array(objects, dtype=np.float64).reshape(-1, 6) for objects in content]
    except FileNotFoundError:
        raise UserError(
            f"'{split.dataset}' has no boxes: a detector is trained on a folder of PASCAL VOC with its Annotations, "
            f"such as `obowlab data draw voc DIR` draws. {fix_for(split.dataset).capitalize()}."
        ) from None
    except (OSError, EOFError, ValueError, TypeError):
        raise UserError(f"{path} is damaged: {fix_for(split.dataset)}.") from None
    if len(tables) != split.num_images or any(len(t) and t[:, 4].max() >= split.num_classes for t in tables):
        raise UserError(f"{path} does not belong to the {split.num_images} images of {split.path}: {fix_for(split.dataset)}.")
    sizes = zip(split.heights.tolist(), split.widths.tolist(), strict=True)
    return tuple(
        Annotation(size=size, boxes=table[:, :4], labels=table[:, 4].astype(np.int64), difficult=table[:, 5] > 0)
        for table, size in zip(tables, sizes, strict=True)
    )
