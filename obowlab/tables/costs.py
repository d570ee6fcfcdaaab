"""Tables of what training costs (Table 8): every row is timed on this machine, in turns, and trained by nobody.

A file in `ablations/` with `kind = "costs"` names a recipe per row and scale. All rows are timed with the base row's batch, in a
process of their own, round after round, so that a machine that slows down slows all of them. What was measured is kept in
`RUNS_ROOT/.tables/NAME-SCALE.costs` after every row: the same command continues there.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from obowlab.config import Loaded, Machine, Section, canonical_hash, nearest, parse_override
from obowlab.errors import UserError
from obowlab.launch.bounds import Speed, measure
from obowlab.runs import provenance
from obowlab.tables.kept import KEPT, identity
from obowlab.tables.measured import change_kept, check_scales, load_row, read_kept, read_table, recipe_place, select_keys
from obowlab.tables.spec import NAME, override_texts

ROUNDS = 3
"""How often every row is timed."""

SECONDS = 12.0
"""About what timing a row takes each time, beside the start of its process."""


class Ratios(Section):
    """A row of the paper, relative to its base row."""

    epochs: int = Field(description="of training")
    epoch_time: float = Field(description="time per epoch")
    training_time: float = Field(description="time of all epochs")
    memory: float = Field(description="per GPU")


class CostRow(Section):
    """A row of the file."""

    key: str = Field(pattern=NAME, description="short name for --rows, unique in the table")
    label: str
    recipes: dict[str, str] = Field(description="scale -> name of the recipe, or its file beside this one")
    set: dict[str, dict[str, Any]] = Field({}, description="scale -> recipe key -> value")
    paper: Ratios | None = None
    footnotes: tuple[str, ...] = ()


class CostFile(Section):
    """A table file of costs."""

    kind: Literal["costs"]
    title: str
    base: str = Field(description="key of the row that is the unit")
    footnotes: tuple[str, ...] = ()
    row: tuple[CostRow, ...] = Field(min_length=1)


@dataclass(frozen=True)
class CostTable:
    """A table of costs at one scale.

    Attributes:
        name: of its file, without the ending.
        scale: one of `SCALES`.
        file: what it says.
        recipes: name or file of every row's recipe at this scale, by key.
        loaded: recipe of every row that has one at this scale, by key; all with the base row's batch.
        overrides: what is changed of each, as texts.
        changes: what all rows change (`--set`), as texts.
    """

    name: str
    scale: str
    file: CostFile
    recipes: dict[str, str]
    loaded: dict[str, Loaded] = field(repr=False)
    overrides: dict[str, tuple[str, ...]] = field(repr=False)
    changes: tuple[str, ...] = ()

    @property
    def rows(self) -> list[CostRow]:
        """The rows that have a recipe at this scale."""
        return [row for row in self.file.row if row.key in self.loaded]

    @property
    def file_name(self) -> str:
        """The name under which what was measured is kept."""
        return f"{identity(self.name, scale=self.scale, changes=self.changes)}.costs"


class Timed(BaseModel):
    """A row, timed once."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    round: int
    row: str
    speed: Speed


class Costs(BaseModel):
    """Everything that was measured for a table on one machine.

    Attributes:
        identity: hash of the rows' recipes, the machine and what it was asked to use.
        host: name of the machine.
        processor: its model.
        cores: that the processes may use.
        commit: of the code; None when unknown.
        software: package -> version.
        began: UTC, ISO 8601.
        timed: in the order of time.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    identity: str
    host: str
    processor: str
    cores: int
    commit: str | None
    software: dict[str, str]
    began: str
    timed: tuple[Timed, ...] = ()

    def speed(self, row: str, number: int) -> Speed | None:
        """Return what a row was timed at in a round; None where it was not."""
        return next((each.speed for each in self.timed if (each.row, each.round) == (row, number)), None)


def load_costs(name: str, *, scale: str, overrides: Sequence[str] = ()) -> CostTable:
    """Read a table of costs and resolve its rows' recipes at a scale.

    Args:
        name: of a shipped table, or its file.
        scale: one of `SCALES`.
        overrides: what every row changes, as texts `key=value`.

    Raises:
        UserError: no such scale, recipe or key; two rows of one name; no base row.
    """
    path, file = read_table(name, scale=scale, shape=CostFile)
    keys = [row.key for row in file.row]
    if len(set(keys)) != len(keys):
        raise UserError(f"{path}: two rows have the key '{next(key for key in keys if keys.count(key) > 1)}'.")
    if file.base not in keys:
        raise UserError(f"{path}: no row has the key '{file.base}', which 'base' names.{nearest(file.base, keys)}")
    for row in file.row:
        check_scales(f"{path}: row '{row.key}'", (*row.recipes, *row.set))
    base = next(row for row in file.row if row.key == file.base)
    if scale not in base.recipes:
        raise UserError(f"{path}: the base row '{base.key}' has no recipe at scale {scale}.")
    changes = dict(map(parse_override, overrides))
    common = override_texts(changes)
    try:
        rows = [row for row in file.row if scale in row.recipes]
        recipes = {row.key: recipe_place(row.recipes[scale], folder=path.parent) for row in rows}
        unit = load_row(recipes[base.key], key=base.key, changes={**base.set.get(scale, {}), **changes})
        same = {"training.batch_size": unit.recipe.training.batch_size}
        changed = {row.key: {**row.set.get(scale, {}), **same, **changes} for row in rows}
        loaded = {key: load_row(recipe, key=key, changes=changed[key]) for key, recipe in recipes.items()}
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    texts = {key: override_texts(each) for key, each in changed.items()}
    return CostTable(path.stem, scale, file, recipes, loaded, texts, common)


def measure_costs(
    table: CostTable, *, rows: Sequence[str], machine: Machine, say: Callable[[str], None], seconds: float = SECONDS
) -> Costs:
    """Time what is not timed yet, and return everything; kept after every row.

    Args:
        table: at its scale.
        rows: keys of those that are timed, see `select`.
        machine: where and with what; its run store keeps the results.
        say: called with a line of progress at a time.
        seconds: about so long for a row in a round.

    Raises:
        UserError: a recipe cannot be trained here; the run store cannot be written to.
    """
    path = machine.runs_root / KEPT / table.file_name
    costs = _begin(table, machine=machine, kept=read_kept(Costs, path))
    wanted = [row for row in table.rows if row.key in rows]
    due = [(number, row) for number in range(ROUNDS) for row in wanted if costs.speed(row.key, number) is None]
    for done, (number, row) in enumerate(due):
        say(f"Timing {row.label}, round {number + 1} of {ROUNDS}; {len(due) - done} to go.")
        measured = measure(
            table.recipes[row.key],
            overrides=table.overrides[row.key],
            machine=machine,
            seconds=seconds,
            say=lambda _: None,
            speed_alone=True,
        )
        assert measured.speed is not None
        timed = Timed(round=number, row=row.key, speed=measured.speed)
        costs = change_kept(Costs, path, partial(_with, timed, began=costs))
    return costs


def select(asked: Sequence[str], *, table: CostTable) -> list[str]:
    """Return the keys of the rows that `--rows` asks for, the base row always among them; all rows where it is not given.

    Raises:
        UserError: there is no such row at this scale.
    """
    keys = list(table.loaded)
    wanted = select_keys(asked, keys=keys, table=table.name, where=f" at scale {table.scale}")
    return [key for key in keys if key in wanted or key == table.file.base]


# -------------------------------------------------------------------------------------------------------------- helpers


def _with(timed: Timed, kept: Costs | None, *, began: Costs) -> Costs:
    """Return what is kept with one row more, unless another process has timed it; what began here, if that is another's."""
    costs = kept if kept is not None and kept.identity == began.identity else began
    if costs.speed(timed.row, timed.round) is not None:
        return costs
    return costs.model_copy(update={"timed": (*costs.timed, timed)})


def _begin(table: CostTable, *, machine: Machine, kept: Costs | None) -> Costs:
    """Return what was measured before, if it was here and of the same recipes; else a new beginning."""
    recipes = {key: loaded.recipe.fingerprint(seed=0) for key, loaded in table.loaded.items()}
    asked = machine.model_dump(mode="json", include={"device", "threads", "loader", "workers", "compile", "channels_last"})
    key = canonical_hash([recipes, asked, socket.gethostname(), os.cpu_count()])
    if kept is not None and kept.identity == key:
        return kept
    return Costs(
        identity=key,
        host=socket.gethostname(),
        processor=str(provenance.environment()["cpu_model"]),
        cores=provenance.num_cores(),
        commit=provenance.code().commit,
        software=provenance.versions(),
        began=datetime.now(UTC).isoformat(timespec="seconds"),
    )
