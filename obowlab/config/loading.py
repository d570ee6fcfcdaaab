"""Recipes as files: TOML with `extends`, sparse overrides, and where every value comes from.

An unknown key is an error that names the nearest known one, and every value remembers the file that set it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from obowlab.config.base import Section
from obowlab.config.methods import DEFAULT_METHOD, METHOD_SECTIONS
from obowlab.config.recipe import Recipe
from obowlab.config.validation import check_keys, flat_pairs, known_keys, nearest, nest, read_toml, set_by, validate
from obowlab.errors import UserError

TEACHER = "teacher."
"""What the keys of the stage before begin with."""


@cache
def project_root() -> Path:
    """Return the folder that holds `experiments/`, `ablations/` and `dashboards/`.

    It is the checkout, or the copy inside an installed wheel.
    """
    package = Path(__file__).resolve().parents[1]
    bundled = package / "_project"
    return bundled if bundled.is_dir() else package.parent


def recipe_files() -> dict[str, Path]:
    """Return every shipped recipe by name."""
    return {path.stem: path for path in sorted((project_root() / "experiments").glob("*.toml"))}


def find_file(name: str, *, shipped: Mapping[str, Path], kind: str, also: Sequence[str] = ()) -> Path:
    """Return the file that a name or a path of a .toml file stands for.

    Args:
        name: of a shipped file, or a path.
        shipped: the shipped files by name.
        kind: what they are: recipe, table, study.
        also: names that mean something else and may be proposed too.

    Raises:
        UserError: there is none; proposes the nearest name.
    """
    if name in shipped:
        return shipped[name]
    path = Path(name)
    if path.suffix != ".toml":
        raise UserError(f"There is no {kind} '{name}'.{nearest(name, [*shipped, *also])}")
    if not path.is_file():
        raise UserError(f"There is no {kind} file '{name}'.")
    return path


@dataclass(frozen=True)
class Loaded:
    """A recipe with its name and, for every dotted key, the file or option that set it."""

    name: str
    recipe: Recipe
    sources: Mapping[str, str]

    def stages(self) -> list[Loaded]:
        """Return every stage of the recipe, first to last; the last is the recipe itself, the others are its teachers.

        They are called `NAME-stage1`, `NAME-stage2`, ... and `NAME`; a stage without a title bears the recipe's.
        """
        recipes = [self.recipe]
        while recipes[0].teacher is not None:
            recipes.insert(0, recipes[0].teacher)
        earlier = []
        for number, recipe in enumerate(recipes[:-1], start=1):
            prefix = "teacher." * (len(recipes) - number)
            title = recipe.title or f"{self.recipe.title} (stage {number} of {len(recipes)})"
            named = {key: set_by(f"{prefix}{key}", sources=self.sources)[1] for key in flatten(recipe) if key != "title"}
            earlier.append(
                Loaded(
                    name=f"{self.name}-stage{number}",
                    recipe=recipe.model_copy(update={"title": title}),
                    sources={key: source for key, source in named.items() if source != "default"},
                )
            )
        return [*earlier, self]


def load_recipe(name: str, *, changes: Mapping[str, Any] | None = None, overrides: Sequence[str] = ()) -> Loaded:
    """Read a recipe by name or a TOML file by path, and lay changes and then overrides over it.

    Args:
        name: of a recipe, as `find_recipe` takes it.
        changes: dotted keys to values, as a row of a table has them.
        overrides: texts `key=value`, as `--set` takes them.

    Raises:
        UserError: unknown recipe or key, a value out of range, a file that is not TOML, an `extends` that goes in circles.
    """
    path = find_recipe(name)
    values, sources = _read_chain(path, ())
    parsed = {text: parse_override(text) for text in overrides}
    for layer_values, layer_sources in (
        (dict(changes or {}), dict.fromkeys(changes or {}, "changes")),
        (dict(parsed.values()), {key: f"--set {text}" for text, (key, _) in parsed.items()}),
    ):
        values = layer(values, layer_values)
        sources = {key: layer_sources.get(key, sources.get(key, "")) for key in values}
    return Loaded(name=path.stem, recipe=recipe_from_values(values, sources=sources), sources=sources)


def recipe(name: str | Path, *, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Recipe:
    """Return a recipe with everything that changes a result: of a shipped name or a TOML file, with changes.

    Args:
        name: of a shipped recipe (`obowlab config list`) or of one in the current folder, or a path ending in `.toml`.
        overrides: dotted keys to values, `{"method.kappa": 8}`, or texts as `--set` takes them, `["method.kappa=8"]`.

    Raises:
        UserError: as `load_recipe`.
    """
    if isinstance(overrides, Mapping):
        return load_recipe(str(name), changes=overrides).recipe
    return load_recipe(str(name), overrides=[overrides] if isinstance(overrides, str) else overrides).recipe


def layer(values: Mapping[str, Any], changes: Mapping[str, Any], *, method: str = DEFAULT_METHOD) -> dict[str, Any]:
    """Return flat settings with changes laid over them.

    Where the changes name another method, its settings and the stages before it make room: every `method.*` and
    `teacher.*` key of `values` is dropped. The same goes for the `teacher` of a teacher.

    Args:
        values: dotted keys to values.
        changes: dotted keys to values.
        method: the method where `values` do not name one.
    """
    before = values.get("method.name", method)
    after = changes.get("method.name", before)
    own, teacher = split_teacher(values)
    own_changes, teacher_changes = split_teacher(changes)
    if after != before:
        own = {key: value for key, value in own.items() if not key.startswith("method.")}
        teacher = {}
    merged = layer(teacher, teacher_changes, method=after) if teacher or teacher_changes else {}
    return {**own, **own_changes, **{f"{TEACHER}{key}": value for key, value in merged.items()}}


def split_teacher(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a recipe's own settings, and those of its teacher without their prefix."""
    own = {key: value for key, value in values.items() if not key.startswith(TEACHER)}
    return own, {key.removeprefix(TEACHER): value for key, value in values.items() if key.startswith(TEACHER)}


def recipe_from_values(values: Mapping[str, Any], *, sources: Mapping[str, str]) -> Recipe:
    """Validate flat dotted keys into a Recipe; each complaint names the key and who set it.

    `teacher.*` keys are changes to the recipe itself, without its title, that make the recipe of the stage before.
    """
    return _resolve(values, sources=sources, prefix="")


def _resolve(values: Mapping[str, Any], *, sources: Mapping[str, str], prefix: str) -> Recipe:
    own, changes = split_teacher(values)
    name = own.get("method.name", DEFAULT_METHOD)
    if not isinstance(name, str) or name not in METHOD_SECTIONS:
        key, source = set_by(f"{prefix}method.name", sources=sources)
        raise UserError(f"'{key}' ({source}): there is no method {name!r:.60}.{nearest(str(name), list(METHOD_SECTIONS))}")
    known = [key for key in known_keys(Recipe) if key not in ("method", "teacher")]
    known += [f"method.{key}" for key in METHOD_SECTIONS[name].model_fields]
    check_keys(own, known=known, sources=sources, prefix=prefix)
    document = nest(own)
    if changes:
        inherited = {key: value for key, value in own.items() if key != "title"}
        teacher = _resolve(layer(inherited, changes), sources=sources, prefix=f"{prefix}{TEACHER}")
        document["teacher"] = teacher.model_dump(mode="json")
    return validate(Recipe, document, sources=sources, prefix=prefix)


def flatten(section: Section) -> dict[str, Any]:
    """Return every setting under its dotted key, as JSON values; of a recipe's teacher those in which it differs.

    `recipe_from_values` makes the same recipe of them.
    """
    if not isinstance(section, Recipe):
        return dict(flat_pairs(section.model_dump(mode="json")))
    values = dict(flat_pairs(section.model_dump(mode="json", exclude={"teacher"})))
    if section.teacher is None:
        return values
    teacher = flatten(section.teacher)
    inherited = layer({**values, "title": ""}, {"method.name": section.teacher.method.name})
    return {
        **values,
        **{
            f"{TEACHER}{key}": value
            for key, value in teacher.items()
            if key not in inherited or inherited[key] != value or (key == "method.name" and value != values[key])
        },
    }


def find_recipe(name: str) -> Path:
    """Return the file of a recipe: a shipped one, else NAME.toml in the current folder, else a path ending in `.toml`.

    Raises:
        UserError: there is none; proposes the nearest name.
    """
    own = Path(f"{name}.toml")
    if own.name == f"{name}.toml" and own.is_file() and name not in recipe_files():
        return own
    return _recipe_path(name)


def _recipe_path(name: str) -> Path:
    path = project_root() / "experiments" / f"{name}.toml"
    if Path(name).name == name and path.is_file():  # most often so, and a table asks two hundred times
        return path
    return find_file(name, shipped=recipe_files(), kind="recipe", also=[path.stem for path in Path().glob("*.toml")])


def _read_chain(path: Path, below: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    """Read a recipe file on top of the ones it extends; return flat values and the file of each."""
    if path.resolve() in below:
        raise UserError(f"{path} extends itself through {' -> '.join(p.name for p in (*below, path))}.")
    document = read_toml(path)
    parent = document.pop("extends", None)
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if parent is not None:
        if not isinstance(parent, str):
            raise UserError(f"'extends' in {path} must be the name of one recipe.")
        sibling = path.parent / f"{parent}.toml"
        values, sources = _read_chain(sibling if sibling.is_file() else _recipe_path(parent), (*below, path.resolve()))
        values = {key: value for key, value in values.items() if key != "title" and not key.endswith(".title")}
    own = dict(flat_pairs(document))
    values = layer(values, own)
    return values, {key: path.name if key in own else sources[key] for key in values}


def parse_override(text: str) -> tuple[str, Any]:
    """Split `key=value` into the key and its TOML value; a bare word is a string."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(f"--set needs key=value, not '{text}'.")
    value = value.strip()
    if "\n" in value:
        raise UserError(f"--set {key} needs a value on one line.")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        if value[:1] in tuple("[{\"'"):
            raise UserError(f"--set {text} is not a TOML value: .1 is written 0.1, and words in lists need quotes.") from None
    try:
        return key, float(value)  # .05 is a number to everybody but TOML
    except ValueError:
        return key, value  # a bare word is a string
