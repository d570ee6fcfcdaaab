"""`obowlab config`: which recipes there are, what they say and how they differ."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from obowlab import text
from obowlab.cli import Family
from obowlab.cli.options import dry_run_option, json_flag, set_option, would
from obowlab.cli.output import print_json, print_table

if TYPE_CHECKING:
    from obowlab.config import Loaded


@click.group(cls=Family)
def config() -> None:
    """List, show and compare recipes."""


@config.command("list")
@json_flag
@dry_run_option
def list_recipes(as_json: bool, dry_run: bool) -> None:
    """List the recipes with what they are and what they cost."""
    from obowlab.config import load_recipe, recipe_files

    files = recipe_files()
    if dry_run:
        return would(f"list {len(files)} recipes")
    rows = [(name, load_recipe(name).recipe.title, cost_line(path)) for name, path in files.items()]
    if as_json:
        return print_json([{"name": name, "title": title, "cost": cost} for name, title, cost in rows])
    return print_table(("recipe", "what it is", "cost"), rows)


@config.command("show")
@click.argument("name")
@set_option
@json_flag
@dry_run_option
def show(name: str, overrides: tuple[str, ...], as_json: bool, dry_run: bool) -> None:
    """Print every setting of a recipe with the file or option that set it."""
    from obowlab.config import flatten, load_recipe

    loaded = load_recipe(name, overrides=overrides)
    if dry_run:
        return would(f"print every setting of recipe '{loaded.name}'")
    if as_json:
        return print_json(loaded.recipe.model_dump(mode="json"))
    rows = [(key, text.toml(value), _source(loaded, key)) for key, value in flatten(loaded.recipe).items()]
    return print_table(("setting", "value", "set by"), rows, names=("setting",))


@config.command("diff")
@click.argument("first")
@click.argument("second", required=False)
@set_option
@dry_run_option
def diff(first: str, second: str | None, overrides: tuple[str, ...], dry_run: bool) -> None:
    """Print the settings in which two recipes differ.

    The --set options apply to SECOND. Without SECOND they are compared with FIRST as it stands in its file.
    """
    from obowlab.config import flatten, load_recipe
    from obowlab.errors import UserError

    if second is None and not overrides:
        raise UserError("`obowlab config diff` needs a second recipe, or --set key=value to compare with.")
    left = load_recipe(first)
    right = load_recipe(second or first, overrides=overrides)
    names = (left.name, f"{right.name} with --set" if overrides else right.name)
    if dry_run:
        return would(f"compare recipe '{names[0]}' with '{names[1]}'")
    ours, theirs = flatten(left.recipe), flatten(right.recipe)
    rows = []
    for key in dict.fromkeys([*ours, *theirs]):  # methods may have different settings
        if key not in ours or key not in theirs or ours[key] != theirs[key]:
            cells = [text.toml(values[key]) if key in values else "–" for values in (ours, theirs)]
            rows.append((key, *cells, _source(right if key in theirs else left, key)))
    if not rows:
        click.echo(f"'{names[0]}' and '{names[1]}' do not differ.")
        return None
    return print_table(("setting", *names, "set by"), rows, names=("setting",), hide=("set by",))


def cost_line(path: Path) -> str:
    """Return the cost from a recipe file's opening comment, `# Cost: ...`; empty when it has none."""
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        if not line.startswith("#"):
            break
        if line.startswith("# Cost: "):
            return line.removeprefix("# Cost: ").strip()
    return ""


def _source(loaded: Loaded, key: str) -> str:
    return loaded.sources.get(key, "default")
