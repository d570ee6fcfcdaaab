"""What the images of a prepared split show, kept beside it: `SPLIT.objects.npz`.

The objects of all images stand one after the other; `*_ends` say where those of an image, of an object or of a polygon end.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt

from obowlab.data.annotations import Annotation, Outline
from obowlab.data.beton import fix_for
from obowlab.data.manifest import OBJECTS_SUFFIX
from obowlab.data.prepared import Prepared
from obowlab.errors import UserError

Ints = npt.NDArray[np.int64]

_KINDS = {
    "ends": (np.dtype(np.int64), 1),
    "boxes": (np.dtype(np.float64), 2),
    "labels": (np.dtype(np.int64), 1),
    "difficult": (np.dtype(np.bool_), 1),
}
_OF_OUTLINES = {
    "areas": (np.dtype(np.float64), 1),
    "crowd": (np.dtype(np.bool_), 1),
    "polygon_ends": (np.dtype(np.int64), 1),
    "point_ends": (np.dtype(np.int64), 1),
    "points": (np.dtype(np.float64), 1),
    "count_ends": (np.dtype(np.int64), 1),
    "counts": (np.dtype(np.int64), 1),
}


def write_objects(path: Path, annotations: Sequence[Annotation]) -> None:
    """Write what the images of a split show, in order."""
    arrays: dict[str, npt.NDArray[np.generic]] = {
        "ends": _ends([len(each.labels) for each in annotations]),
        "boxes": np.concatenate([each.boxes for each in annotations]).reshape(-1, 4),
        "labels": np.concatenate([each.labels for each in annotations]),
        "difficult": np.concatenate([each.difficult for each in annotations]),
    }
    outlines = [outline for each in annotations for outline in each.outlines]
    if outlines:
        polygons = [polygon for outline in outlines for polygon in outline.polygons]
        counts = [np.zeros(0, dtype=np.int64) if outline.counts is None else outline.counts for outline in outlines]
        arrays |= {
            "areas": np.array([outline.area for outline in outlines], dtype=np.float64),
            "crowd": np.array([outline.is_crowd for outline in outlines], dtype=np.bool_),
            "polygon_ends": _ends([len(outline.polygons) for outline in outlines]),
            "point_ends": _ends([len(polygon) for polygon in polygons]),
            "points": np.concatenate([*polygons, np.zeros(0)]),
            "count_ends": _ends([len(each) for each in counts]),
            "counts": np.concatenate([*counts, np.zeros(0, dtype=np.int64)]),
        }
    content = io.BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]
    path.write_bytes(content.getbuffer())


class Annotations(Sequence[Annotation]):
    """What the images of a split show; each is put together when it is asked for.

    Attributes:
        has_outlines: whether objects have outlines.
    """

    def __init__(self, arrays: dict[str, npt.NDArray[np.generic]], *, heights: Sequence[int], widths: Sequence[int]) -> None:
        self._arrays, self._sizes = arrays, list(zip(heights, widths, strict=True))
        self.has_outlines = "areas" in arrays

    def __len__(self) -> int:
        return len(self._sizes)

    @overload
    def __getitem__(self, place: int) -> Annotation: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Annotation, ...]: ...
    def __getitem__(self, place: int | slice) -> Annotation | tuple[Annotation, ...]:
        if isinstance(place, slice):
            return tuple(self[each] for each in range(*place.indices(len(self))))
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        place %= len(self)
        own = self._of("ends", place)
        outlines = tuple(self._outline(each) for each in range(own.start, own.stop)) if self.has_outlines else ()
        return Annotation(
            size=self._sizes[place],
            boxes=self._arrays["boxes"][own].astype(np.float64),
            labels=self._arrays["labels"][own].astype(np.int64),
            difficult=self._arrays["difficult"][own].astype(np.bool_),
            outlines=outlines,
        )

    def _outline(self, place: int) -> Outline:
        polygons = self._of("polygon_ends", place)
        points = [self._of("point_ends", each) for each in range(polygons.start, polygons.stop)]
        counts = self._arrays["counts"][self._of("count_ends", place)].astype(np.int64)
        return Outline(
            polygons=tuple(self._arrays["points"][each].astype(np.float64) for each in points),
            counts=counts if self._arrays["crowd"][place] else None,
            area=float(self._arrays["areas"][place]),
        )

    def _of(self, ends: str, place: int) -> slice:
        values = self._arrays[ends]
        return slice(int(values[place - 1]) if place else 0, int(values[place]))


def read_objects(split: Prepared) -> Annotations:
    """Return what the images of a split show, in order.

    Raises:
        UserError: it was prepared without objects, or they are damaged.
    """
    path = split.path.with_suffix(OBJECTS_SUFFIX)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(
            f"'{split.dataset}' has no boxes: a detector is trained on a folder of PASCAL VOC with its Annotations or of COCO, "
            f"such as `obowlab data draw voc DIR` and `draw coco` make. {fix_for(split.dataset).capitalize()}."
        ) from None
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        raise UserError(f"{path} is damaged: {fix_for(split.dataset)}.") from None
    if not _fits(arrays):
        raise UserError(f"{path} is damaged: {fix_for(split.dataset)}.")
    labels = arrays["labels"]
    if len(arrays["ends"]) != split.num_images or (len(labels) and not 0 <= labels.min() <= labels.max() < split.num_classes):
        raise UserError(f"{path} does not belong to the {split.num_images} images of {split.path}: {fix_for(split.dataset)}.")
    return Annotations(arrays, heights=split.heights.tolist(), widths=split.widths.tolist())


def _ends(lengths: Sequence[int]) -> Ints:
    ends: Ints = np.cumsum(np.array(lengths, dtype=np.int64))
    return ends


def _fits(arrays: dict[str, npt.NDArray[np.generic]]) -> bool:
    """Return whether arrays are those that `write_objects` writes: their kinds and lengths."""
    kinds = _KINDS | (_OF_OUTLINES if "areas" in arrays else {})
    if arrays.keys() != kinds.keys() or any(
        arrays[name].dtype != dtype or arrays[name].ndim != axes for name, (dtype, axes) in kinds.items()
    ):
        return False
    number = len(arrays["labels"])
    rows = ["boxes", "difficult", *(["areas", "crowd", "polygon_ends", "count_ends"] if "areas" in arrays else [])]
    pairs = [("ends", number)]
    if "areas" in arrays:
        pairs += [("polygon_ends", len(arrays["point_ends"])), ("point_ends", len(arrays["points"]))]
        pairs += [("count_ends", len(arrays["counts"]))]
    return (
        all(len(arrays[name]) == number for name in rows)
        and arrays["boxes"].shape[1] == 4
        and all(_are_ends(arrays[name].astype(np.int64), total=total) for name, total in pairs)
    )


def _are_ends(ends: Ints, *, total: int) -> bool:
    steps = np.diff(ends, prepend=0)
    return bool((steps >= 0).all()) and int(ends[-1] if len(ends) else 0) == total
