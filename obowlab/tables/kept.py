"""The tables that a run store remembers: `RUNS_ROOT/.tables/NAME-SCALE.json`, a copy of a table with its rows' recipes resolved.

Shipped tables are at hand wherever obowlab is. A user's own table, and one whose rows are changed by `--set`, is remembered when
it is trained or shown, so that `report` finds it wherever its file, or the store, has moved to.
"""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from obowlab.config import canonical_hash
from obowlab.config.scales import SCALES
from obowlab.errors import UserError
from obowlab.files.opening import read_file
from obowlab.files.replacing import write_atomic
from obowlab.files.sharing import shared_folder
from obowlab.tables.build import also_differing
from obowlab.tables.spec import PlannedTable, is_result, table_files

KEPT = ".tables"
"""Folder of the run store."""

_CONTENT = TypeAdapter(PlannedTable)


def identity(name: str, *, scale: str, changes: tuple[str, ...]) -> str:
    """Return a name for a table at a scale, as it may stand in a file name; different tables have different ones.

    Args:
        name: of the table.
        scale: one of `SCALES`.
        changes: what all rows change, as texts.
    """
    plain = re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip(".") or "unnamed"
    if plain == name and not changes:
        return f"{name}-{scale}"
    return f"{plain}-{scale}-{canonical_hash([name, sorted(changes)])[:8]}"


def keep_table(planned: PlannedTable, *, runs_root: Path) -> str | None:
    """Let a run store remember a table; a shipped one without changes needs no copy.

    A table of the same name, scale and changes is replaced: names are what runs and MLflow know tables by.

    Returns:
        One sentence when the store cannot be written to; None when all is well.
    """
    if planned.path is None or (planned.name in table_files() and not planned.changes):
        return None
    rows = tuple(
        replace(row, base_recipe=Path(row.base_recipe).name, footnotes=(*row.footnotes, *also))
        for row, also in zip(planned.rows, also_differing(planned), strict=True)
    )
    content = _CONTENT.dump_json(replace(planned, path=None, rows=rows), indent=1)
    path = runs_root / KEPT / f"{identity(planned.name, scale=planned.scale, changes=planned.changed)}.json"
    try:
        if path.is_file() and read_file(path) == content:
            return None
        shared_folder(path.parent)
        write_atomic(path, content, shared=True)
    except OSError as error:
        return f"`obowlab report` will not show {planned.name} as it is now: cannot write {path} ({error.strerror})."
    return None


def closed_tables(runs_root: Path) -> str | None:
    """Return a sentence when the folder of a run store that tables are kept in is closed to this user; None when all is well."""
    folder = runs_root / KEPT
    if not folder.exists() or os.access(folder, os.R_OK | os.X_OK):
        return None
    return (
        f"{folder} cannot be read, so tables of one's own, and what was measured for tables, are missing: "
        f"chmod -R g+rwX {shlex.quote(str(folder))}, by its owner."
    )


def kept_tables(runs_root: Path) -> tuple[list[PlannedTable], list[str]]:
    """Return the tables that a run store remembers, by name, and a sentence on each that cannot be read."""
    tables, problems = [], []
    for path in sorted((runs_root / KEPT).glob("*.json")):
        try:
            tables.append(_read(path))
        except (OSError, UserError):
            problems.append(f"{KEPT}/{path.name} cannot be read: `obowlab table FILE` writes it again from the table's file.")
    return tables, problems


def _read(path: Path) -> PlannedTable:
    try:
        planned = _CONTENT.validate_json(read_file(path))
    except ValidationError:
        raise UserError(f"{path} is damaged, or of another version.") from None
    file = planned.file
    known = planned.scale in SCALES and file.primary in file.columns and all(map(is_result, file.columns))
    if not known or sum(row.is_base for row in planned.rows) != 1:
        raise UserError(f"{path} is of another version.")
    return replace(planned, path=None)
