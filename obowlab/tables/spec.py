"""The files in `ablations/`: a table is a base recipe, rows that change a little of it, columns and the paper's numbers.

A row's recipe at a scale is the base recipe of that scale (`config.scales`) with the row's changes. Rows of any tables whose
recipes have the same fingerprint are one training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field

from obowlab.config import (
    Loaded,
    Recipe,
    Section,
    find_file,
    flatten,
    load_recipe,
    nearest,
    parse_override,
    parse_section,
    project_root,
    read_toml,
)
from obowlab.config.scales import SCALES, recipe_for
from obowlab.config.unused import unused_settings
from obowlab.errors import UserError
from obowlab.runs.metrics import lookup
from obowlab.text import override

COSTS, TRANSFER = "costs", "transfer"
"""`kind` of a file whose rows are timed (`tables.costs`), and of one whose rows are encoders (`tables.transfer`)."""

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class AtScale(Section):
    """What a row has at one scale in addition to its settings at every scale."""

    set: dict[str, Any] = Field({}, description="recipe key -> value")
    footnotes: tuple[str, ...] = ()


class TableRow(Section):
    """A row of a table file."""

    key: str = Field(pattern=NAME, description="short name for --rows and MLflow, unique in the table")
    label: str
    group: str = ""
    base: str | None = Field(None, description="another base than the table's")
    set: dict[str, Any] = Field({}, description="recipe key -> value")
    paper: dict[str, float] = Field({}, description="metric -> the paper's value, percent")
    footnotes: tuple[str, ...] = ()
    at: dict[str, AtScale] = Field({}, description="scale -> what is added there")


class TableFile(Section):
    """A table file."""

    title: str
    base: str = Field(description="base recipe without the scale's prefix (vanilla, full, ...), or a recipe beside this file")
    primary: str = Field(description="the metric that decides a row's verdict")
    columns: dict[str, str] = Field(description="metric -> heading")
    footnotes: tuple[str, ...] = ()
    row: tuple[TableRow, ...] = Field(min_length=1)


@dataclass(frozen=True)
class PlannedRow:
    """A row at one scale.

    Attributes:
        row: from the file.
        loaded: its recipe.
        base_recipe: name of the recipe that it changes.
        overrides: what it changes.
        is_base: whether it is the row the others are compared with: the base recipe itself.
        footnotes: its own and those of the scale.
    """

    row: TableRow
    loaded: Loaded
    base_recipe: str
    overrides: dict[str, Any]
    is_base: bool
    footnotes: tuple[str, ...]


@dataclass(frozen=True)
class PlannedTable:
    """A table at one scale.

    Attributes:
        name: of its file, without the ending.
        path: of its file; None for the copy that a run store keeps.
        scale: one of `SCALES`.
        file: what it says.
        rows: in its order.
        changes: what every row changes beside its own settings (`--set`), recipe key -> value.
    """

    name: str
    path: Path | None
    scale: str
    file: TableFile
    rows: tuple[PlannedRow, ...] = field(repr=False)
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> PlannedRow:
        """The row that the others are compared with."""
        return next(row for row in self.rows if row.is_base)

    @property
    def changed(self) -> tuple[str, ...]:
        """What every row changes, as texts `key=value`."""
        return override_texts(self.changes)


def shipped_files() -> dict[str, Path]:
    """Return the file of every shipped table by name, whatever its kind."""
    return {path.stem: path for path in sorted((project_root() / "ablations").glob("*.toml"))}


def table_files() -> dict[str, Path]:
    """Return the file of every shipped table whose rows are trained, by name."""
    return {name: path for name, path in shipped_files().items() if "kind" not in read_toml(path)}


def load_tables(names: Sequence[str], *, scale: str, overrides: Sequence[str] = ()) -> list[PlannedTable]:
    """Read the tables that a command names, see `resolve_names` and `load_table`.

    Raises:
        UserError: as `load_table`; two tables, or one and a shipped one, have the same name.
    """
    changes = dict(map(parse_override, overrides))
    tables = [load_table(name, scale=scale, changes=changes) for name in resolve_names(names)]
    shipped = table_files()
    for place, table in enumerate(tables):
        assert table.path is not None
        others = [other.path for other in tables[:place] if other.name == table.name]
        if table.name in shipped and table.path.read_bytes() != shipped[table.name].read_bytes():
            others.append(shipped[table.name])
        if others:
            raise UserError(
                f"{table.path}: there is another table '{table.name}' ({others[0]}): rename the file, as runs, MLflow and the "
                "report know a table by the name of its file."
            )
    return tables


def load_table(name: str | Path, *, scale: str, changes: Mapping[str, Any] | None = None) -> PlannedTable:
    """Read a shipped table by name, or a TOML file by path, and resolve its rows' recipes at a scale.

    Args:
        name: of the table, or its file.
        scale: one of `SCALES`.
        changes: what every row changes beside its own settings, the base row too; recipe key -> value.

    Raises:
        UserError: no such table, scale, base recipe, metric or recipe key; two rows of one name; no base row, or several;
            a row sets what all rows shall change.
    """
    path = name if isinstance(name, Path) else _find(name)
    file = _read(path)
    common = dict(changes or {})
    texts = override_texts(common)
    base = cache(
        lambda: load_recipe(recipe_for(file.base, scale, folder=path.parent), overrides=texts).recipe.fingerprint(seed=0)
    )
    try:
        if common:
            _refuse_set_twice(file, scale=scale, changes=common)
            base()  # a mistake in what all rows change is not that of a row
        rows = tuple(_plan(row, file=file, folder=path.parent, scale=scale, base=base, changes=common) for row in file.row)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    bases = [row.row.key for row in rows if row.is_base]
    if len(bases) != 1:
        found = f"rows {' and '.join(bases)} are" if bases else "no row is"
        raise UserError(
            f"{path}: {found} the base recipe '{file.base}' without changes; just one must be. What all rows share belongs "
            "into a recipe that 'base' names."
        )
    return PlannedTable(name=path.stem, path=path, scale=scale, file=file, rows=rows, changes=common)


def resolve_names(names: Sequence[str]) -> list[str]:
    """Return the tables that are meant: `all` stands for every shipped one that is trained, and none is named twice.

    Raises:
        UserError: there is no such table.
    """
    wanted = [shipped for name in names for shipped in (table_files() if name == "all" else [name])]
    for name in wanted:
        _find(name)
    return list(dict.fromkeys(wanted))


def one_kind(names: Sequence[str]) -> str | None:
    """Return the `kind` of the tables that a command names; None for those that are trained, for which `all` stands.

    Raises:
        UserError: there is no such table, or they are of several kinds.
    """
    kinds = {name: _kind(name) for name in names if name != "all"}
    if "all" in names:
        kinds = {"all": None, **kinds}
    first, *others = kinds
    for other in others:
        if kinds[other] != kinds[first]:
            raise UserError(f"{other} is another kind of table than {first}: one after the other.")
    return kinds[first]


def override_texts(changes: Mapping[str, Any]) -> tuple[str, ...]:
    """Return changes of a recipe as texts `key=value`, as `--set` takes them."""
    return tuple(f"{key}={override(value)}" for key, value in changes.items())


def is_result(metric: str) -> bool:
    """Return whether an evaluation measures this."""
    try:
        return lookup(metric).group == "eval"
    except KeyError:
        return False


def also_differs(row: PlannedRow, *, base: PlannedRow, paper_row: PlannedRow, paper_base: PlannedRow) -> str:
    """Return in words what separates a row from its base row at this scale and not at the paper's; empty for nothing.

    A small scale trains rows with expensive steps for fewer epochs, which a reader of the difference must know.
    """
    at_paper = _differences(paper_row.loaded.recipe, paper_base.loaded.recipe)
    here = _differences(row.loaded.recipe, base.loaded.recipe)
    more = {key: values for key, values in here.items() if key not in at_paper}
    if not more:
        return ""
    listed = ", ".join(f"{key} {ours} (base row {theirs})" for key, (ours, theirs) in more.items())
    return f"At this scale the row differs from the base row in {listed} as well."


# -------------------------------------------------------------------------------------------------------------- helpers


def _kind(name: str) -> str | None:
    kind = read_toml(_find(name)).get("kind")
    return None if kind is None else str(kind)


def _find(name: str) -> Path:
    return find_file(name, shipped=shipped_files(), kind="table", also=["all"])


def _read(path: Path) -> TableFile:
    document = read_toml(path)
    if "extends" in document:
        raise UserError(f"{path}: this is a recipe, not a table: recipes belong into experiments/.")
    for key in document.keys() & TableRow.model_fields.keys() - TableFile.model_fields.keys():
        raise UserError(f"{path}: '{key}' belongs to a row; what all rows share belongs into a recipe that 'base' names.")
    file = parse_section(TableFile, document, place=str(path))
    keys = [row.key for row in file.row]
    if len(set(keys)) != len(keys):
        raise UserError(f"{path}: two rows have the key '{next(key for key in keys if keys.count(key) > 1)}'.")
    for metric in (*file.columns, file.primary, *(metric for row in file.row for metric in row.paper)):
        if not is_result(metric):
            hint = nearest(metric, ["fewshot_1shot", "fewshot_5shot", "linear_top1", "knn_top1"])
            raise UserError(f"{path}: '{metric}' is not a metric of an evaluation.{hint}")
    if file.primary not in file.columns:
        raise UserError(f"{path}: the primary metric '{file.primary}' is not among the columns.")
    for row in file.row:
        for scale in row.at:
            if scale not in SCALES:
                raise UserError(f"{path}: row '{row.key}' names the scale '{scale}'.{nearest(scale, list(SCALES))}")
    return file


def _refuse_set_twice(file: TableFile, *, scale: str, changes: Mapping[str, Any]) -> None:
    """Refuse to change for all rows what a row sets itself.

    Raises:
        UserError: names the first such row.
    """
    for row in file.row:
        for key in changes.keys() & {**row.set, **row.at.get(scale, AtScale()).set}.keys():
            raise UserError(f"row '{row.key}' sets '{key}' itself, so --set {key} cannot hold for all rows: leave it out.")


def _plan(
    row: TableRow, *, file: TableFile, folder: Path, scale: str, base: Callable[[], str], changes: Mapping[str, Any]
) -> PlannedRow:
    """Resolve a row; `base` gives the fingerprint of the table's base recipe, called once the row itself is valid."""
    name = recipe_for(row.base or file.base, scale, folder=folder)
    here = row.at.get(scale, AtScale())
    overrides = {**row.set, **here.set}
    try:
        loaded = load_recipe(name, changes={**overrides, **changes})
    except UserError as error:
        raise UserError(f"row '{row.key}': {error}") from None
    return PlannedRow(
        row=row,
        loaded=loaded,
        base_recipe=name,
        overrides=overrides,
        is_base=loaded.recipe.fingerprint(seed=0) == base(),
        footnotes=(*row.footnotes, *here.footnotes),
    )


def _differences(recipe: Recipe, other: Recipe) -> dict[str, tuple[Any, Any]]:
    """Return what two recipes train differently, by key; of settings that one of them does not use, the choice alone tells."""
    ours, theirs = flatten(recipe), flatten(other)
    used = ours.keys() & theirs.keys() - {"title"} - unused_settings(recipe).keys() - unused_settings(other).keys()
    return {
        key: (ours[key], theirs[key])
        for key in ours
        if key in used and ours[key] != theirs[key] and not key.startswith(("evaluation.", "teacher"))
    }
