"""Flat dotted keys in, one sentence about the first thing that is wrong out."""

from __future__ import annotations

import copy
import difflib
import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from obowlab.config.base import CONFLICT, Section, SectionT
from obowlab.errors import UserError

DEFAULT = "default"
"""The source of a setting that no file and no option set."""


def nearest(word: str, known: Sequence[str]) -> str:
    """Return ` Did you mean 'x'?` for the closest known word; else a list of all if it is short, or nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if not close:  # 'kapa' should find 'method.kappa'
        tails = {name.rsplit(".", 1)[-1]: name for name in known}
        close = [tails[tail] for tail in difflib.get_close_matches(word.rsplit(".", 1)[-1], list(tails), n=1, cutoff=0.5)]
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Known: {', '.join(known)}." if 0 < len(known) <= 20 else ""


def read_toml(path: Path) -> dict[str, Any]:
    """Return a TOML file's content.

    Raises:
        UserError: there is no such file, or it is not TOML.
    """
    try:
        return copy.deepcopy(_parsed(path.read_text(encoding="utf-8-sig")))
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, a number of thousands of digits, a thousand brackets
        raise UserError(f"{path} is not valid TOML: {error}.") from None


@cache
def _parsed(text: str) -> dict[str, Any]:
    return tomllib.loads(text)  # once: the rows of all tables extend the same few recipes


def flat_pairs(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of nested tables under its dotted key."""
    for key, value in document.items():
        if isinstance(value, Mapping):
            yield from flat_pairs(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested tables of dotted keys."""
    document: dict[str, Any] = {}
    for key, value in values.items():
        *groups, leaf = key.split(".")
        place = document
        for group in groups:
            place = place.setdefault(group, {})
        place[leaf] = value
    return document


def known_keys(model: type[Section], prefix: str = "") -> Iterator[str]:
    """Yield the dotted key of every setting; a field that may hold one of several sections yields itself."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from known_keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def check_keys(values: Iterable[str], *, known: Sequence[str], sources: Mapping[str, str], prefix: str = "") -> None:
    """Refuse the first key that is not known and name the nearest that is.

    Args:
        values: keys.
        known: keys that there are.
        sources: who set what, under the full keys.
        prefix: stands before every key in `sources` and in the complaint.

    Raises:
        UserError: an unknown key.
    """
    for key in values:
        if key not in known:
            name, source = set_by(f"{prefix}{key}", sources=sources)
            hint = nearest(name, [f"{prefix}{one}" for one in known]) or " `obowlab config show full` lists every key."
            raise UserError(f"Unknown key '{name}' ({source}).{hint}")


def set_by(key: str, *, sources: Mapping[str, str]) -> tuple[str, str]:
    """Return the key that set a value, and the file or option it stands in; a stage inherits from the one after it."""
    name = key
    while name not in sources and name.startswith("teacher."):
        name = name.removeprefix("teacher.")
    return (name, sources[name]) if name in sources else (key, DEFAULT)


def validate(model: type[SectionT], document: Mapping[str, Any], *, sources: Mapping[str, str], prefix: str = "") -> SectionT:
    """Make a model of nested settings.

    Args:
        model: the model.
        document: nested settings, JSON values.
        sources: who set what, under the full keys.
        prefix: stands before every key in `sources` and in the complaint.

    Raises:
        UserError: the first complaint, with the key and who set it.
    """
    # JSON mode: strict about types, yet a TOML array may fill a tuple.
    try:
        return model.model_validate_json(json.dumps(document, default=str))
    except ValidationError as error:
        first = error.errors()[0]
        parts = [str(part) for part in first["loc"] if not isinstance(part, int)]
        if len(parts) > 1 and parts[0] == "method":
            del parts[1]  # pydantic names the member of the union
        if first["type"] == CONFLICT:
            group = prefix + "".join(f"{part}." for part in parts)
            setters = [set_by(f"{group}{key}", sources=sources) for key in first["ctx"]["keys"]]
            key, source = min(setters, key=lambda setter: (not setter[1].startswith("--"), setter[1] == DEFAULT))
            complaint = f"'{key}' ({source}): {first['msg']}."
        else:
            key, source = set_by(prefix + ".".join(parts), sources=sources)
            if source == DEFAULT and len(parts) > 2:  # a key in an entry of a list: the list has a source
                source = set_by(prefix + ".".join(parts[:-1]), sources=sources)[1]
            if first["type"] == "extra_forbidden":
                known = [f"{key.rpartition('.')[0]}.{name}" for name in _section_at(model, first["loc"][:-1]).model_fields]
                raise UserError(f"Unknown key '{key}' ({source}).{nearest(key, known)}") from None
            complaint = f"'{key}' ({source}): {first['msg']}, not {first['input']!r:.60}."
        raise UserError(complaint) from None


def parse_section(model: type[SectionT], values: Mapping[str, Any], *, place: str) -> SectionT:
    """Make a section of a file that is not a recipe.

    Args:
        model: of the section.
        values: as TOML gives them.
        place: what the message calls the section: the file, or `[sampler] of FILE`.

    Raises:
        UserError: the first complaint, with the key; an unknown key before all others, as it often stands for a missing one.
    """
    try:
        return model.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    name = ".".join(str(part + 1) if isinstance(part, int) else part for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = list(_section_at(model, first["loc"][:-1]).model_fields)
        raise UserError(f"Unknown key '{name}' in {place}.{nearest(str(first['loc'][-1]), known)}")
    if first["type"] == "missing":
        raise UserError(f"{place} lacks '{name}'.")
    given = "" if isinstance(first["input"], Mapping) else f", not {first['input']!r:.60}"
    where = f"'{name}' in {place}" if name else place
    raise UserError(f"{where}: {first['msg'].removeprefix('Value error, ')}{given}.")


def _section_at(model: type[Section], loc: Sequence[int | str]) -> type[Section]:
    """Return the section that a path of field names, list positions and table keys leads to."""
    for part in loc:
        field = model.model_fields.get(str(part))
        if field is not None:
            model = next((each for each in _types_in(field.annotation) if issubclass(each, Section)), model)
    return model


def _types_in(annotation: Any) -> Iterator[type]:
    if isinstance(annotation, type):
        yield annotation
    for argument in get_args(annotation):
        yield from _types_in(argument)
