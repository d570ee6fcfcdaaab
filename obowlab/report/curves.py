"""Training curves, reduced for drawing: a run's metric files in, a hundred points with their extremes out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from obowlab.files import read_all

NUM_BINS = 100
"""At most so many points of a line are drawn, and twice as many of its band."""

DRAWN = re.compile(
    r"(loss|monitor_accuracy|fewshot_\d+shot|(perplexity_image|perplexity_batch|words_used|word_age|distance)(_conv[45])?)"
)
"""The metrics that a report draws."""


@dataclass(frozen=True)
class Curve:
    """One metric of one run over its training.

    Where more was logged than is drawn, a point is the mean of all values in its part of the training, with the lowest and the
    highest of them: no spike is lost.

    Attributes:
        epoch: middle of each part, in epochs; ascending.
        mean: of the values.
        low: the lowest value.
        high: the highest value.
        last: the value logged last.
        omitted: how many logged values were not finite; they are not drawn.
    """

    epoch: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    last: float
    omitted: int = 0


def read_curves(path: Path, *, epochs: float) -> dict[str, Curve]:
    """Read the drawn metrics of one metric file; an absent file has none.

    Points are placed by their `epoch`; those of a file that does not log it, by their step.

    Args:
        path: `metrics.jsonl` or `online.jsonl`.
        epochs: of the whole training: runs of equal length are cut into the same parts, so that seeds can be averaged.
    """
    points = read_all(path)
    logged: list[Mapping[str, Any]] = [point["metrics"] for point in points]
    names = sorted(name for name in set().union(*logged) if DRAWN.fullmatch(name))
    epoch = [metrics.get("epoch") for metrics in logged]
    by_epoch = None not in epoch
    places = np.array(epoch if by_epoch else [point["step"] for point in points], dtype=np.float64)
    end = max([epochs if by_epoch else 1.0, *places[-1:].tolist()])
    curves = {}
    for name in names:
        found = [metrics.get(name) for metrics in logged]
        there = np.array([value is not None for value in found])
        curve = reduce(places[there], np.array(found, dtype=np.float64)[there], end=end)  # None becomes NaN, "inf" infinite
        if curve is not None:
            curves[name] = curve
    return curves


def reduce(epochs: npt.NDArray[np.float64], values: npt.NDArray[np.float64], *, end: float, bins: int = NUM_BINS) -> Curve | None:
    """Return the mean and the extremes of the values in each part of [0, end]; None when no value is finite.

    Args:
        epochs: float64 [N], ascending.
        values: float64 [N]; what is not finite is left out and counted.
        end: of the training, in epochs; positive.
        bins: parts. No more than so many values are kept as they are.
    """
    finite = np.isfinite(values)
    omitted = int((~finite).sum())
    x, y = epochs[finite], values[finite]
    if not len(x):
        return None
    if len(x) <= bins:
        mean = low = high = y
    else:
        part = np.minimum((x / end * bins).astype(np.int64), bins - 1)
        starts = np.flatnonzero(np.diff(part, prepend=-1))
        counts = np.diff(starts, append=len(x))
        mean = np.add.reduceat(y, starts) / counts
        low, high = np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)
        x = (part[starts] + 0.5) * end / bins
    return Curve(
        epoch=tuple(x.tolist()),
        mean=tuple(mean.tolist()),
        low=tuple(low.tolist()),
        high=tuple(high.tolist()),
        last=float(y[-1]),
        omitted=omitted,
    )


def over_seeds(curves: Sequence[Curve]) -> Curve:
    """Return the mean over seeds with the lowest and the highest seed, where every seed has a point.

    Args:
        curves: one per seed, at least one; of the same metric and the same length of training.
    """
    shared: Sequence[float] = curves[0].epoch
    values: Sequence[Sequence[float]]
    if all(curve.epoch == shared for curve in curves) and len(set(shared)) == len(shared):  # whole runs of one recipe
        values = list(zip(*(curve.mean for curve in curves), strict=True))
    else:
        by_place = [dict(zip(curve.epoch, curve.mean, strict=True)) for curve in curves]
        shared = sorted(set(by_place[0]).intersection(*by_place[1:]))
        values = [[place[epoch] for place in by_place] for epoch in shared]
    return Curve(
        epoch=tuple(shared),
        mean=tuple(sum(seeds) / len(seeds) for seeds in values),
        low=tuple(min(seeds) for seeds in values),
        high=tuple(max(seeds) for seeds in values),
        last=sum(curve.last for curve in curves) / len(curves),
        omitted=sum(curve.omitted for curve in curves),
    )


def with_point(curve: Curve, *, epoch: float, value: float) -> Curve:
    """Return the curve with one more value at its end."""
    return Curve(
        epoch=(*curve.epoch, epoch),
        mean=(*curve.mean, value),
        low=(*curve.low, value),
        high=(*curve.high, value),
        last=value,
        omitted=curve.omitted,
    )
