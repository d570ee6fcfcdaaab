"""Results of evaluations as files hold them: grouped for display, and the observations behind each measurement.

Two runs are compared on identical episodes or images, which needs every observation and not just their mean. They are small
enough to be stored with the measurement: correct answers per episode, or per image.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from obowlab.errors import UserError
from obowlab.runs.metrics import unit_of

if TYPE_CHECKING:
    from pydantic import BaseModel

    from obowlab.config import Recipe

LEARNED = ("classes", "voc-detection", "coco-detection")
"""Protocols that measure a network which the training learns beside the encoder."""

WITHOUT_SETTINGS = ("voc-detection", "coco-detection")
"""Protocols whose settings are those of the training."""

ENDS = ("value", "interval", "low", "high")
"""What is shown of a measurement; results of earlier versions have no ends of the interval."""


@dataclass(frozen=True)
class Measured:
    """One metric on one data set with one protocol, student and random initialisation side by side, in the metric's unit.

    Attributes:
        metric: as in `runs.metrics`.
        unit: of its values.
        dataset: on which it was measured.
        protocol: name, version and the first digits of its hash.
        student: `ENDS` of the measurement, as `text.measurement` takes them; None when not measured.
        random: the same of the untrained weights.
        count: episodes or images the interval was taken over.
    """

    metric: str
    unit: str
    dataset: str
    protocol: str
    student: Mapping[str, float] | None
    random: Mapping[str, float] | None
    count: int


def tabulate(results: Iterable[Mapping[str, Any]], *, dataset: str | None = None) -> tuple[Measured, ...]:
    """Return one entry per metric, data set and protocol; of several measurements the newest counts.

    Args:
        results: of one run or encoder, the oldest first.
        dataset: comes first, the others in the order of their names; all in the order of the results if absent.
    """
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for result in results:
        where = str(result.get("details", {}).get("dataset", ""))
        protocol = f"{result['protocol']} v{result['version']} {str(result['protocol_hash'])[:8]}"
        for measurement in result["measurements"]:
            entry = found.setdefault((measurement["name"], where, protocol), {})
            entry[result["subject"]] = {key: float(measurement[key]) for key in ENDS if key in measurement}
            entry["count"] = int(measurement["count"])
    rows = [
        Measured(metric, unit_of(metric), where, protocol, entry.get("student"), entry.get("random"), entry["count"])
        for (metric, where, protocol), entry in found.items()
    ]
    return tuple(rows if dataset is None else sorted(rows, key=lambda row: (row.dataset != dataset, row.dataset)))


def is_measured(recipe: Recipe, *, subject: str, protocol: str, results: Iterable[Mapping[str, Any]]) -> bool:
    """Return whether a protocol was run with the settings of a recipe, on its own data set."""
    return any(
        (result["subject"], result["protocol"]) == (subject, protocol) and is_alike(result, recipe=recipe) for result in results
    )


def is_alike(result: Mapping[str, Any], *, recipe: Recipe) -> bool:
    """Return whether a result was measured with the settings of a recipe, on its own data set.

    A setting that an earlier version did not file had its default.
    """
    details = result.get("details", {})
    settings: BaseModel | None = getattr(recipe.evaluation, str(result["protocol"]).replace("-", "_"), None)
    if settings is None:  # or a protocol of another version
        return result["protocol"] in WITHOUT_SETTINGS and details.get("dataset") == recipe.data.dataset
    filed = {key: details.get(key, value) for key, value in type(settings)().model_dump(mode="json").items()}
    return details.get("dataset") == recipe.data.dataset and filed == settings.model_dump(mode="json")


def not_measured(recipe: Recipe, *, results: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, str], ...]:
    """Return what a recipe's evaluation asks for and was not measured yet, as pairs of subject and protocol."""
    evaluation = recipe.evaluation
    wanted = product(("student", "random") if evaluation.random_baseline else ("student",), evaluation.protocols)
    return tuple(
        (subject, protocol)
        for subject, protocol in wanted
        if (subject != "random" or protocol not in LEARNED)  # untrained weights come without these networks
        and not is_measured(recipe, subject=subject, protocol=protocol, results=results)
    )


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


def pack_values(values: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Return observations that are no answers, in percent, as JSON values; a thousandth of a percent is kept."""
    return {"count": len(values), "values": np.round(values, 3).tolist()}


def unpack(samples: Mapping[str, Any]) -> npt.NDArray[np.float64]:
    """Return the observations in percent, [count]; the inverse of `pack` and of `pack_values`."""
    if "values" in samples:
        return np.asarray(samples["values"], dtype=np.float64)
    of, count, packed = int(samples["of"]), int(samples["count"]), samples["correct"]
    if of == 1:
        bits = np.frombuffer(bytes.fromhex(packed), dtype=np.uint8)
        correct = np.unpackbits(bits, count=count)
    else:
        correct = np.asarray(packed, dtype=np.uint8 if of < 256 else np.int64)
    if len(correct) != count:
        raise UserError(f"A result holds {len(correct)} observations where it says {count}: measure again with `obowlab eval`.")
    return 100.0 * correct.astype(np.float64) / of
