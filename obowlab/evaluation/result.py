"""What an evaluation returns: measurements with their 95 % intervals, and everything needed to know what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from obowlab.runs.results import pack

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


@dataclass(frozen=True)
class Measurement:
    """One number with its uncertainty.

    Attributes:
        name: what was measured, for example `fewshot_5shot`.
        value: percent.
        interval: half of the 95 % interval's length, in percent.
        low: lower end of the interval, in percent.
        high: upper end; a proportion's interval reaches further towards 50 % than away from it.
        count: number of independent observations behind it (episodes or images).
        samples: the observations themselves, as `obowlab.runs.results` packs them, so that runs can be compared in pairs.
    """

    name: str
    value: float
    interval: float
    low: float
    high: float
    count: int
    samples: dict[str, Any]


@dataclass(frozen=True)
class Result:
    """The outcome of one protocol on one set of weights.

    Attributes:
        protocol: key of `EVALUATORS`.
        version: raised whenever the same weights and settings would give another number.
        protocol_hash: SHA-256 over protocol, version, settings, views, classes and images: equal hashes may be compared.
        subject: whose weights were measured, `student` or `random`.
        weights_hash: SHA-256 of the weights.
        data_hash: SHA-256 of the images that were used, with their labels.
        measurements: the numbers.
        details: the settings in words and numbers, JSON values only.
        elapsed_s: seconds spent on the protocol itself, features not counted.
    """

    protocol: str
    version: int
    protocol_hash: str
    subject: str
    weights_hash: str
    data_hash: str
    measurements: tuple[Measurement, ...]
    details: dict[str, Any]
    elapsed_s: float

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {**asdict(self), "measurements": [asdict(measurement) for measurement in self.measurements]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Result:
        """Rebuild a result from what `to_json` returned."""
        measurements = tuple(
            Measurement(**{"low": each["value"] - each["interval"], "high": each["value"] + each["interval"], **each})
            for each in values["measurements"]  # results of earlier versions have no ends
        )
        return cls(**{**values, "measurements": measurements})


def mean_with_interval(name: str, correct: Sequence[int], *, of: int) -> Measurement:
    """Return the mean accuracy of independent episodes with the normal interval 1.96 · s / √n.

    Args:
        name: of the measurement.
        correct: right answers of every episode; at least two episodes.
        of: questions of each episode.
    """
    assert len(correct) >= 2, "an interval needs two episodes"
    accuracies = [100 * right / of for right in correct]
    value, half = fmean(accuracies), Z_95 * stdev(accuracies) / math.sqrt(len(accuracies))
    return Measurement(
        name=name,
        value=value,
        interval=half,
        low=value - half,
        high=value + half,
        count=len(accuracies),
        samples=pack(correct, of=of),
    )


def proportion_with_interval(name: str, correct: Sequence[int]) -> Measurement:
    """Return an accuracy in percent with Wilson's interval, which keeps its coverage near 0 and 100 %.

    Args:
        name: of the measurement.
        correct: 1 for every image that was classified correctly, else 0; at least one image.
    """
    from scipy.stats import binomtest  # half a second, which an evaluation without classifiers need not wait for

    count = len(correct)
    ends = binomtest(sum(correct), count).proportion_ci(0.95, method="wilson")
    return Measurement(
        name=name,
        value=100 * (sum(correct) / count),
        interval=50 * float(ends.high - ends.low),
        low=100 * float(ends.low),
        high=100 * float(ends.high),
        count=count,
        samples=pack(correct, of=1),
    )
