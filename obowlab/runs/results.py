"""Results of evaluations as files hold them: grouped for display, and the observations behind each measurement.

Two runs are compared on identical episodes or images, which needs every observation and not just their mean. They are small
enough to be stored with the measurement: correct answers per episode, or per image.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Measured:
    """One metric on one data set with one protocol, of the student and of the random initialisation.

    Attributes:
        metric: as in `runs.metrics`.
        dataset: on which it was measured.
        protocol: name, version and the first digits of its hash.
        student: the measurement as the results file has it (`value`, `interval`, `low`, `high`, ...); None when there is none.
        random: the same of the untrained weights.
        count: episodes or images the interval was taken over.
    """

    metric: str
    dataset: str
    protocol: str
    student: Mapping[str, Any] | None
    random: Mapping[str, Any] | None
    count: int


def tabulate(results: Iterable[Mapping[str, Any]]) -> list[Measured]:
    """Return one entry per metric, data set and protocol; of several measurements the newest counts.

    Args:
        results: of one run or encoder, the oldest first.
    """
    found: dict[tuple[str, str, str], dict[str, Mapping[str, Any]]] = {}
    for result in results:
        dataset = str(result.get("details", {}).get("dataset", ""))
        protocol = f"{result['protocol']} v{result['version']} {str(result['protocol_hash'])[:8]}"
        for measurement in result["measurements"]:
            found.setdefault((measurement["name"], dataset, protocol), {})[result["subject"]] = measurement
    return [
        Measured(*key, entry.get("student"), entry.get("random"), int(next(iter(entry.values()))["count"]))
        for key, entry in found.items()
    ]


def pack(correct: Sequence[int], *, of: int) -> dict[str, Any]:
    """Return observations as JSON values: a list of counts, or for single questions (`of` = 1) bits in hexadecimal digits.

    Args:
        correct: correct answers of every observation, each from 0 to `of`.
        of: questions in one observation.
    """
    counts = np.asarray(correct, dtype=np.int64)
    assert counts.ndim == 1
    assert ((counts >= 0) & (counts <= of)).all()
    packed = np.packbits(counts.astype(np.uint8)).tobytes().hex() if of == 1 else counts.tolist()
    return {"of": of, "count": len(counts), "correct": packed}


def unpack(samples: Mapping[str, Any]) -> npt.NDArray[np.float64]:
    """Return the observations in percent, [count]; the inverse of `pack`."""
    of, count, packed = int(samples["of"]), int(samples["count"]), samples["correct"]
    if of == 1:
        bits = np.frombuffer(bytes.fromhex(packed), dtype=np.uint8)
        correct = np.unpackbits(bits, count=count)
    else:
        correct = np.asarray(packed, dtype=np.uint8 if of < 256 else np.int64)
    assert len(correct) == count
    return 100.0 * correct.astype(np.float64) / of
