"""Which runs of a store a user means: by recipe, status, tag and comparison, and in which order.

A comparison is `NAME OPERATOR VALUE`, as `linear_top1>40` or `method.kappa=8`. NAME is a result of the trained encoder on the
run's own data set, a setting of the recipe, `seed` or `step`. A run without a value never matches.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from obowlab import text
from obowlab.config import flatten, nearest, parse_override
from obowlab.config.validation import flat_pairs
from obowlab.errors import UserError
from obowlab.runs.folder import RunFolder
from obowlab.runs.info import DAMAGED, Status
from obowlab.runs.listing import RunSummary, damage_of, read_runs
from obowlab.runs.metrics import lookup

MEASURED = ("fewshot_1shot", "fewshot_5shot", "linear_top1", "knn_top1")
"""Results that may be named though no run has one yet."""
CREATED = "created"
ORDERED: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


@dataclass(frozen=True)
class Entry:
    """A run with what a list shows of it."""

    summary: RunSummary
    results: list[dict[str, Any]]
    tags: list[str]

    @classmethod
    def of(cls, summary: RunSummary, *, warn: Callable[[str], object]) -> Entry:
        """Read a run; one whose results or labels are damaged is told of, and has none."""
        folder = RunFolder(summary.path, summary.info)
        try:
            return cls(summary=summary, results=folder.results(), tags=folder.tags())
        except DAMAGED as error:
            warn(damage_of(summary.path, error))
            return cls(summary=summary, results=[], tags=[])

    @cached_property
    def measured(self) -> dict[str, dict[str, Any]]:
        """The newest measurement of the trained encoder under each name, on the run's own data set."""
        own = self.summary.info.recipe_values.get("data", {}).get("dataset")
        return {
            measurement["name"]: measurement
            for result in self.results
            if result["subject"] == "student" and result.get("details", {}).get("dataset", own) == own
            for measurement in result["measurements"]
        }

    @cached_property
    def values(self) -> dict[str, Any]:
        """What comparisons may name: results, settings, seed, step and the time of creation."""
        info = self.summary.info
        try:
            settings = flatten(info.recipe)
        except UserError:  # of another version: as far as it is written down
            settings = dict(flat_pairs(info.recipe_values))
        results = {name: float(measurement["value"]) for name, measurement in self.measured.items()}
        return {**settings, "seed": info.seed, "step": self.summary.state.step, CREATED: info.created_at, **results}


@dataclass(frozen=True)
class Comparison:
    """One `--where`: `word` is the value as typed, `value` what a setting of that value is."""

    name: str
    sign: str
    word: str
    value: Any

    @classmethod
    def parse(cls, typed: str) -> Comparison:
        """Read `NAME OPERATOR VALUE`.

        Raises:
            UserError: it is no comparison.
        """
        found = re.fullmatch(r"\s*([\w.-]+?)\s*(>=|<=|!=|==|=|>|<)\s*(\S.*?)\s*", typed)
        if found is None:
            raise UserError(
                f"--where {typed} is no comparison: write a name, one of = != < <= > >= and a value, in quotes, "
                "as in --where 'linear_top1>40'."
            )
        name, sign, word = found[1], found[2], found[3]
        if name in ("recipe", "status", "tag"):
            raise UserError(f"--where {typed}: write --{name} {word}.")
        value = parse_override(f"{name}={word}")[1]
        if sign in ORDERED and not _is_number(value):
            raise UserError(f"--where {typed}: '{word}' is no number; only = and != take words.")
        return cls(name=name, sign="=" if sign == "==" else sign, word=word, value=value)

    def holds(self, values: dict[str, Any]) -> bool:
        """Return whether it is true of a run's values; never of one that is missing or not a number where one is needed."""
        if self.name not in values:
            return False
        actual = values[self.name]
        if self.sign in ORDERED:
            return _is_number(actual) and ORDERED[self.sign](actual, self.value)
        is_equal = text.override(actual) == self.word or (
            actual == self.value and isinstance(actual, bool) == isinstance(self.value, bool)
        )
        return is_equal == (self.sign == "=")


def select(
    runs_root: Path,
    *,
    recipes: Collection[str] = (),
    statuses: Collection[str] = (),
    tags: Collection[str] = (),
    where: Sequence[str] = (),
    sort: str = CREATED,
    warn: Callable[[str], object] = len,
) -> list[Entry]:
    """Return the runs of a store that all of these fit.

    Args:
        runs_root: the store.
        recipes: names, any of which.
        statuses: any of which.
        tags: all of which.
        where: comparisons, all of which.
        sort: name of a value, the best or else the smallest first, with `-` before it the other way round; runs without it
            come last. `created`: the newest first.
        warn: called with a sentence for every run whose results or labels cannot be read; it is listed without them.

    Raises:
        UserError: no run, recipe, setting or metric has such a name; proposes the nearest.
    """
    comparisons = [Comparison.parse(typed) for typed in where]
    _check(statuses, known=get_args(Status), kind="status")
    summaries, problems = read_runs(runs_root)
    for problem in problems:
        warn(problem)
    entries = [Entry.of(summary, warn=warn) for summary in summaries]
    _check(recipes, known={entry.summary.info.name for entry in entries}, kind="run of recipe")
    _check(tags, known={tag for entry in entries for tag in entry.tags}, kind="run with the tag")
    key = sort.removeprefix("-")
    named = [comparison.name for comparison in comparisons] + ([key] if key != CREATED else [])
    if named and entries:
        _check(
            named, known={*MEASURED, *(name for entry in entries for name in entry.values)} - {CREATED}, kind="result or setting"
        )
    found = [
        entry
        for entry in entries
        if (not recipes or entry.summary.info.name in recipes)
        and (not statuses or entry.summary.state.status in statuses)
        and set(tags) <= set(entry.tags)
        and all(comparison.holds(entry.values) for comparison in comparisons)
    ]
    return _sorted(found, key=key, reverse=sort.startswith("-"))


def _sorted(entries: list[Entry], *, key: str, reverse: bool) -> list[Entry]:
    if key == CREATED:  # the newest are first already
        return entries[::-1] if reverse else entries
    having = [entry for entry in entries if _has(entry.values.get(key))]
    lacking = [entry for entry in entries if not _has(entry.values.get(key))]
    words = any(not _is_number(entry.values[key]) for entry in having)
    having.sort(
        key=lambda entry: text.override(entry.values[key]) if words else entry.values[key],
        reverse=_is_better_above(key) != reverse,
    )
    return [*having, *lacking]


def _has(value: Any) -> bool:
    return value is not None and value == value


def _is_better_above(name: str) -> bool:
    try:
        return lookup(name).direction == "max"
    except KeyError:
        return False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _check(names: Iterable[str], *, known: Collection[str], kind: str) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"There is no {kind} '{name}'.{nearest(name, sorted(known))}")
