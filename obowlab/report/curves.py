"""Curves of all that was logged, reduced for drawing: a run's metric files in, a hundred points with their extremes out.

The metrics of hundreds of runs are hundreds of megabytes, and nearly all no longer change: `RUNS_ROOT/.drawn/RUN_ID.json` caches
a run's curves for one state of its metric files and one `CURVES_VERSION`. It may be deleted at any time, and is written beside
and renamed: several processes may write one at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydantic_core

from obowlab.files.opening import LARGEST_RECORD, read_file
from obowlab.files.records import read_all
from obowlab.files.replacing import write_atomic
from obowlab.files.sharing import shared_folder
from obowlab.runs.metrics import METRIC_FILES

CURVES_VERSION = 2
"""Raise it when the same metric files give other curves: cached ones are then computed again (tests/golden/curves.json)."""

CACHE = ".drawn"
FILES = tuple(f"{name}.jsonl" for name in METRIC_FILES)

NUM_BINS = 100
"""A curve has at most so many points."""

DIGITS = 5
"""Significant digits of the values of a curve."""

PLACE = "epoch"
"""What is logged beside every point of a training: where the point is, and no curve."""


@dataclass(frozen=True)
class Curve:
    """One metric of one run over its training.

    Where more was logged than is shown, a point is the mean of all values in its part of the training, with the lowest and the
    highest of them: no spike is lost.

    Attributes:
        step: optimiser updates done; of several logged points their mean, rounded.
        epoch: middle of each part, in epochs, in seconds where the file logs the machine; ascending.
        mean: of the values.
        low: the lowest value.
        high: the highest value.
        last: the value logged last.
        omitted: how many logged values were not finite; they are not shown.
    """

    step: tuple[int, ...]
    epoch: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    last: float
    omitted: int = 0


def cached_curves(run: Path, *, epochs: int) -> dict[str, Curve]:
    """Return the curves of a run by metric, from the cache where it is up to date.

    Args:
        run: its folder.
        epochs: of the whole training.
    """
    files = [run / name for name in FILES]
    stamps = [f"{path.lstat().st_size}-{path.lstat().st_mtime_ns}" if path.exists() else "" for path in files]
    stamp = json.dumps([CURVES_VERSION, epochs, stamps])
    path = run.parent / CACHE / f"{run.name}.json"
    curves = _read_cache(path, stamp=stamp)
    if curves is None:
        curves = {name: curve for file in files for name, curve in read_curves(file, epochs=epochs).items()}
        with suppress(OSError):  # a store that may only be read
            shared_folder(path.parent)
            cached = {name: asdict(curve) for name, curve in curves.items()}
            write_atomic(path, pydantic_core.to_json({"stamp": stamp, "curves": cached}), shared=True)
    return curves


def _read_cache(path: Path, *, stamp: str) -> dict[str, Curve] | None:
    """Return what was cached under this stamp; None when there is nothing, or it is damaged: the metric files are the truth."""
    try:
        cached = pydantic_core.from_json(read_file(path, limit=16 * LARGEST_RECORD))
        if cached["stamp"] != stamp:
            return None
        return {name: _curve(**values) for name, values in cached["curves"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _curve(*, last: float, omitted: int, step: list[int], **values: list[float]) -> Curve:
    return Curve(step=tuple(step), last=last, omitted=omitted, **{name: tuple(each) for name, each in values.items()})


def read_curves(path: Path, *, epochs: float) -> dict[str, Curve]:
    """Read the metrics of one metric file; an absent file has none.

    Points are placed by their `epoch`; those of a file that does not log it, by their step, which in `system.jsonl` is a second.

    Args:
        path: one of `FILES`.
        epochs: of the whole training: runs of equal length are cut into the same parts, so that seeds can be averaged.
    """
    points = read_all(path)
    logged: list[Mapping[str, Any]] = [point["metrics"] for point in points]
    names = sorted(name for name in set().union(*logged) if name != PLACE)
    steps = np.array([point["step"] for point in points], dtype=np.float64)
    epoch = [metrics.get(PLACE) for metrics in logged]
    by_epoch = None not in epoch
    places = np.array(epoch, dtype=np.float64) if by_epoch else steps
    end = max([epochs if by_epoch else 1.0, *places[-1:].tolist()])
    curves = {}
    for name in names:
        found = [metrics.get(name) for metrics in logged]
        there = np.array([value is not None for value in found])
        values = np.array(found, dtype=np.float64)[there]  # None becomes NaN, "inf" infinite
        curve = reduce(places[there], values, steps=steps[there], end=end)
        if curve is not None:
            curves[name] = curve
    return curves


def reduce(
    epochs: npt.NDArray[np.float64],
    values: npt.NDArray[np.float64],
    *,
    steps: npt.NDArray[np.float64],
    end: float,
    bins: int = NUM_BINS,
) -> Curve | None:
    """Return the mean and the extremes of the values in each part of [0, end]; None when no value is finite.

    Args:
        epochs: float64 [N], ascending.
        values: float64 [N]; what is not finite is left out and counted.
        steps: float64 [N], ascending; optimiser updates done.
        end: of the training, in epochs; positive.
        bins: parts. No more than so many values are kept as they are.
    """
    finite = np.isfinite(values)
    x, y, steps = epochs[finite], values[finite], steps[finite]
    if not len(x):
        return None
    mean = low = high = y
    last = float(y[-1])
    if len(x) > bins:
        part = np.minimum((x / end * bins).astype(np.int64), bins - 1)
        starts = np.flatnonzero(np.diff(part, prepend=-1))
        counts = np.diff(starts, append=len(x))
        mean = np.add.reduceat(y, starts) / counts
        low, high = np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)
        x, steps = (part[starts] + 0.5) * end / bins, np.add.reduceat(steps, starts) / counts
    return Curve(
        step=tuple(np.rint(steps).astype(np.int64).tolist()),
        epoch=_rounded(x),
        mean=_rounded(mean),
        low=_rounded(low),
        high=_rounded(high),
        last=last,
        omitted=int((~finite).sum()),
    )


def over_seeds(curves: Sequence[Curve]) -> Curve:
    """Return the mean over seeds with the lowest and the highest seed, where every seed has a point.

    Args:
        curves: one per seed, at least one; of the same metric and the same length of training.
    """
    first = curves[0]
    if len(curves) == 1:
        return first
    by_place = [dict(zip(curve.epoch, curve.mean, strict=True)) for curve in curves]
    step_at = dict(zip(first.epoch, first.step, strict=True))
    shared = sorted(set(by_place[0]).intersection(*by_place[1:]))
    values = [[place[epoch] for place in by_place] for epoch in shared]
    return Curve(
        step=tuple(step_at[epoch] for epoch in shared),
        epoch=tuple(shared),
        mean=_rounded(np.mean(values, axis=1) if values else np.empty(0)),
        low=tuple(map(min, values)),
        high=tuple(map(max, values)),
        last=sum(curve.last for curve in curves) / len(curves),
        omitted=sum(curve.omitted for curve in curves),
    )


def with_point(curve: Curve, *, step: int, epoch: float, value: float) -> Curve:
    """Return the curve with one more value at its end."""
    return replace(
        curve,
        step=(*curve.step, step),
        epoch=(*curve.epoch, epoch),
        mean=(*curve.mean, value),
        low=(*curve.low, value),
        high=(*curve.high, value),
        last=value,
    )


def _rounded(values: npt.NDArray[np.float64]) -> tuple[float, ...]:
    """Return the values with `DIGITS` significant digits: pages are a third as large."""
    return tuple(float(f"{value:.{DIGITS}g}") for value in values.tolist())
