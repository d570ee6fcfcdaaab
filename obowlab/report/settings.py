"""What a run's page says of its recipe: every setting, the shipped recipe that it is compared with, and what differs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from obowlab import text
from obowlab.config import Recipe, canonical_hash, flatten, load_recipe, recipe_files
from obowlab.config.validation import flat_pairs
from obowlab.report.labels import in_short
from obowlab.report.model import Setting

NOT_TRAINED_WITH = re.compile(r"(teacher\.)*(title$|evaluation\.)")
"""Settings that do not make another training."""


def closest(name: str, *, values: Mapping[str, Any], sources: Mapping[str, str]) -> str:
    """Return the shipped recipe that a run is compared with; its own name where there is none.

    It is the one of its name; for a user's own recipe, of those that it extends the one with the fewest differences.

    Args:
        name: of its recipe.
        values: of the run, by dotted key.
        sources: dotted key to the file or option that set it.
    """
    shipped = recipe_files()
    if name in shipped:
        return name
    extended = {source.removesuffix(".toml") for source in sources.values() if source.endswith(".toml")} & shipped.keys()

    def num_differences(other: str) -> int:
        theirs, _ = _shipped(other)
        return sum(value != theirs.get(key) for key, value in values.items() if not NOT_TRAINED_WITH.match(key))

    return min(sorted(extended), key=num_differences, default=name)


def compare(values: Mapping[str, Any], *, name: str, sources: Mapping[str, str]) -> tuple[tuple[Setting, ...], str]:
    """Return a run's settings beside the recipe that it is compared with, and which that is in words.

    Args:
        values: of the run, by dotted key.
        name: of that recipe, see `closest`.
        sources: dotted key to the file or option that set it.
    """
    shipped, base = _shipped(name)
    settings = []
    for key, value in values.items():
        own = text.override(value)
        other = text.override(shipped[key]) if key in shipped else None
        settings.append(Setting(key, own, sources.get(key, "default"), other if other != own else None))
    return tuple(settings), base


@dataclass(frozen=True)
class Described:
    """What the pages of all runs of one recipe say of it; see `Run`."""

    settings: tuple[Setting, ...]
    base: str
    changes: Mapping[str, str]
    short: str
    base_recipe: str
    family: str


@cache
def describe(name: str, *, recipe: str, sources: str) -> Described:
    """Return what a run's page says of its recipe; once for all seeds, as a store has far fewer recipes than runs.

    Args:
        name: of the recipe.
        recipe: its resolved values, as JSON.
        sources: dotted key to the file or option that set it, as JSON.
    """
    values, set_by, flat = json.loads(recipe), json.loads(sources), settings_of(recipe)
    nearest = closest(name, values=flat, sources=set_by)
    settings, base = compare(flat, name=nearest, sources=set_by)
    changed = [s for s in settings if s.shipped is not None and not NOT_TRAINED_WITH.match(s.key)]
    changes = {setting.key: brief(setting.value) for setting in changed}
    title = str(values.get("title", ""))
    short = in_short(changes)
    if title and name not in recipe_files() and title != _shipped(nearest)[0].get("title"):
        by_hand = {key: value for key, value in changes.items() if not set_by.get(key, "").endswith(".toml")}
        short = ", ".join(part for part in (title, in_short(by_hand) if nearest != name else "") if part)
    return Described(
        settings=settings,
        base=base,
        changes=changes,
        short=short,
        base_recipe=_same_training(nearest),
        family=_trained_with(flat),
    )


def _trained_with(values: Mapping[str, Any]) -> str:
    """Return a hash of the settings that make a training, by dotted key."""
    return canonical_hash({key: value for key, value in values.items() if not NOT_TRAINED_WITH.match(key)})


@cache
def _same_training(name: str) -> str:
    """Return one name for all shipped recipes that are the same training; a name that is not shipped as it is."""
    if name not in recipe_files():
        return name
    own = _trained_with(_shipped(name)[0])
    return min((each for each in recipe_files() if _trained_with(_shipped(each)[0]) == own), key=lambda each: (len(each), each))


def settings_of(recipe: str) -> dict[str, Any]:
    """Return the settings of a recipe in JSON by dotted key; one of another version just as it was written."""
    try:
        return flatten(Recipe.model_validate_json(recipe))
    except ValueError:
        return dict(flat_pairs(json.loads(recipe)))


def brief(value: str) -> str:
    """Return a setting for a label: numbers to four digits, anything else as it is."""
    try:
        return f"{float(value):.4g}"
    except ValueError:
        return value


@cache
def _shipped(name: str) -> tuple[Mapping[str, Any], str]:
    """Return the values of the shipped recipe of this name, or the defaults, and which of them it was."""
    if name in recipe_files():
        return flatten(load_recipe(name).recipe), f"the recipe {name} of this version"
    return flatten(Recipe()), "the defaults of this version, which has no such recipe"
