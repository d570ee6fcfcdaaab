"""Two runs side by side: the settings in which they differ, their results, where their curves end, where they come from."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from obowlab import text
from obowlab.config import flatten
from obowlab.runs.folder import RunFolder
from obowlab.runs.metrics import METRIC_FILES, unit_of
from obowlab.runs.records import FACTS
from obowlab.runs.results import ENDS, unpack
from obowlab.tables.statistics import Matrix, estimate

Measurement = Mapping[str, Any]
CURVES = [name for name in METRIC_FILES if name != "system"]
"""The metric files whose last line is shown."""

PAIRED = "Both answered the same episodes or images: the interval of the difference is the paired one."
APART = (
    "Differences marked * are of other episodes or images, or of results without single observations: their interval takes both "
    "as independent."
)


@dataclass(frozen=True)
class Compared:
    """One metric of two runs.

    Attributes:
        metric: its name.
        subject: `student` or `random`.
        dataset: on which it was measured.
        protocol: its hash; results of other protocols are other entries, as they are not comparable.
        first: the measurement of the first run; None when it has none.
        second: of the second.
        difference: second minus first; None when one is missing.
        interval: half-width of its 95 % interval.
        paired: whether both answered the same episodes or images.
    """

    metric: str
    subject: str
    dataset: str
    protocol: str
    first: dict[str, float] | None
    second: dict[str, float] | None
    difference: float | None = None
    interval: float | None = None
    paired: bool = False


@dataclass(frozen=True)
class RunComparison:
    """What `obowlab runs compare` shows.

    Attributes:
        runs: both ids.
        settings: key and its two values as text, a dash where a method has no such setting.
        results: every metric that either has.
        metrics: metric and its last value in each; None where it was not logged. With the step first.
        facts: name and its two values as text.
    """

    runs: tuple[str, str]
    settings: list[tuple[str, str, str]]
    results: list[Compared]
    metrics: list[tuple[str, float | None, float | None]]
    facts: list[tuple[str, str, str]]

    @property
    def notes(self) -> list[str]:
        """What the differences are."""
        known = {result.paired for result in self.results if result.difference is not None}
        return [note for note, paired in ((PAIRED, True), (APART, False)) if paired in known]

    def result_rows(self) -> list[tuple[str, ...]]:
        """Return the results as texts."""
        return [
            (
                result.metric,
                result.subject,
                result.dataset,
                text.measurement(result.first),
                text.measurement(result.second),
                text.estimate(result.difference, result.interval, signed=True)
                + ("*" if result.difference is not None and not result.paired else ""),
            )
            for result in self.results
        ]

    def metric_rows(self) -> list[tuple[str, ...]]:
        """Return the last metrics as texts."""
        return [
            (name, *(text.ABSENT if value is None else f"{value:.6g}" for value in values), unit_of(name))
            for name, *values in self.metrics
        ]

    def fact_rows(self) -> list[tuple[str, ...]]:
        """Return where the runs come from, hashes by their first digits."""
        return [(name, *(_first_digits(value) for value in values)) for name, *values in self.facts]

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values; numbers that are not finite as their names."""

        def plain(value: float | None) -> float | str | None:
            return value if value is None or math.isfinite(value) else repr(value)

        return {
            "runs": list(self.runs),
            "settings": {key: values for key, *values in self.settings},
            "results": [asdict(result) for result in self.results],
            "last_metrics": {name: [plain(value) for value in values] for name, *values in self.metrics},
            "facts": {name: values for name, *values in self.facts},
        }


def compare_runs(first: RunFolder, second: RunFolder) -> RunComparison:
    """Compare two runs.

    Raises:
        UserError: a file of one of them is damaged, or its recipe cannot be read.
    """
    return RunComparison(
        runs=(first.run_id, second.run_id),
        settings=[pair for pair in _pairs(_settings(first), _settings(second)) if pair[1] != pair[2]],
        results=_results(first.results(), second.results()),
        metrics=_last_metrics(first, second),
        facts=_pairs(_facts(first), _facts(second)),
    )


def _first_digits(value: str) -> str:
    return value[:12] if re.fullmatch(r"[0-9a-f]{40,}", value) else value


def _pairs(first: Mapping[str, str], second: Mapping[str, str]) -> list[tuple[str, str, str]]:
    return [(key, first.get(key, text.ABSENT), second.get(key, text.ABSENT)) for key in dict.fromkeys([*first, *second])]


def _settings(run: RunFolder) -> dict[str, str]:
    return {key: text.toml(value) for key, value in flatten(run.info.recipe).items()}


def _facts(run: RunFolder) -> dict[str, str]:
    facts, state = run.facts(), run.current_state()
    known = {key: str(facts[key]) for key in FACTS if facts.get(key) not in (None, "")}
    versions = {f"version of {name}": str(version) for name, version in sorted(facts.get("versions", {}).items())}
    return {
        "recipe": run.info.name,
        "seed": str(run.info.seed),
        "status": state.status,
        "created": text.timestamp(run.info.created_at),
        "obowlab": run.info.version,
        "trained in": text.duration(run.trained_s()),
        **known,
        **versions,
    }


def _last_metrics(first: RunFolder, second: RunFolder) -> list[tuple[str, float | None, float | None]]:
    lines: list[tuple[str, float | None, float | None]] = []
    for name in CURVES:
        points = [run.metrics(name) for run in (first, second)]
        last = [{"step": float(p[-1].step), **p[-1].values} if p else {} for p in points]
        for key in dict.fromkeys([*last[0], *last[1]]):
            shown = key if name == "metrics" else f"{name} {key}"
            lines.append((shown, last[0].get(key), last[1].get(key)))
    return lines


def _results(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> list[Compared]:
    """Pair the newest results of every metric, subject, data set and protocol."""
    ours, theirs = _by_question(first), _by_question(second)
    compared = []
    for key in dict.fromkeys([*ours, *theirs]):
        a, b = ours.get(key), theirs.get(key)
        difference, interval, paired = _difference(a, b) if a is not None and b is not None else (None, None, False)
        compared.append(Compared(*key, _shown(a), _shown(b), difference, interval, paired))
    return compared


def _shown(measurement: Measurement | None) -> dict[str, float] | None:
    if measurement is None:
        return None
    return {key: float(measurement[key]) for key in ENDS if key in measurement}


def _by_question(results: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str, str], Measurement]:
    return {
        (
            measurement["name"],
            str(result["subject"]),
            str(result.get("details", {}).get("dataset", "")),
            str(result["protocol_hash"]),
        ): {**measurement, "data_hash": result.get("data_hash")}
        for result in results
        for measurement in result["measurements"]
    }


def _difference(first: Measurement, second: Measurement) -> tuple[float, float, bool]:
    """Return second minus first, the half-width of its 95 % interval, and whether it is paired."""
    observations = [unpack(one["samples"]) if one.get("samples") else None for one in (first, second)]
    a, b = observations
    if a is not None and b is not None and len(a) == len(b) >= 2 and first["data_hash"] == second["data_hash"]:
        rows: Matrix = (b - a)[None, :]
        paired = estimate(rows)
        return paired.value, paired.interval, True
    return second["value"] - first["value"], math.hypot(float(first["interval"]), float(second["interval"])), False
