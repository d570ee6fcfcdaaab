"""What an evaluation returns: measurements with their 95 % intervals, and everything needed to know what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


@dataclass(frozen=True)
class Measurement:
    """One number with its uncertainty.

    Attributes:
        name: what was measured, for example `fewshot_5shot`.
        value: percent.
        interval: half-width of the 95 % interval, in percent.
        count: number of independent observations behind it (episodes or images).
    """

    name: str
    value: float
    interval: float
    count: int


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
        measurements = tuple(Measurement(**measurement) for measurement in values["measurements"])
        return cls(**{**values, "measurements": measurements})


def mean_with_interval(name: str, samples: Sequence[float]) -> Measurement:
    """Return the mean of independent samples with the normal interval 1.96 · s / √n.

    Args:
        name: of the measurement.
        samples: at least two values, for example the accuracy of every episode, in percent.
    """
    assert len(samples) >= 2, "an interval needs two samples"
    return Measurement(
        name=name, value=fmean(samples), interval=Z_95 * stdev(samples) / math.sqrt(len(samples)), count=len(samples)
    )


def proportion_with_interval(name: str, *, num_correct: int, count: int) -> Measurement:
    """Return an accuracy in percent with the half-width of Wilson's interval, which stays honest at 0 and 100 %."""
    assert 0 <= num_correct <= count
    assert count > 0
    p = num_correct / count
    half_width = Z_95 / (1 + Z_95**2 / count) * math.sqrt(p * (1 - p) / count + Z_95**2 / (4 * count**2))
    return Measurement(name=name, value=100 * p, interval=100 * half_width, count=count)
