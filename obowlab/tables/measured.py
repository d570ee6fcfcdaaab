"""What tables of costs and of transfer share: how their files are read, and where what was measured for them is kept.

That is `RUNS_ROOT/.tables/NAME-SCALE.KIND`, or among the records of `ablate --records`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from obowlab.config import Loaded, Section, load_recipe, nearest, parse_section, read_toml
from obowlab.config.scales import SCALES
from obowlab.errors import UserError
from obowlab.files.locks import locked
from obowlab.files.opening import read_file
from obowlab.files.replacing import write_atomic
from obowlab.files.sharing import shared_folder
from obowlab.tables.kept import KEPT
from obowlab.tables.spec import shipped_files

File = TypeVar("File", bound=Section)
Content = TypeVar("Content", bound=BaseModel)


def read_table(name: str, *, scale: str, shape: type[File]) -> tuple[Path, File]:
    """Return the path of a shipped table, or of one's own, and what it says.

    Raises:
        UserError: no such scale, file or key.
    """
    if scale not in SCALES:
        raise UserError(f"There is no scale '{scale}'.{nearest(scale, list(SCALES))}")
    path = shipped_files().get(name, Path(name))
    return path, parse_section(shape, read_toml(path), place=str(path))


def check_scales(place: str, scales: Iterable[str]) -> None:
    """Raise a UserError where a part of a table file names a scale that is none."""
    for scale in scales:
        if scale not in SCALES:
            raise UserError(f"{place} names the scale '{scale}'.{nearest(scale, list(SCALES))}")


def recipe_place(recipe: str, *, folder: Path) -> str:
    """Return a recipe that a table file names as `load_recipe` takes it: a file is beside the table."""
    return str(folder / recipe) if recipe.endswith(".toml") else recipe


def load_row(recipe: str, *, key: str, changes: Mapping[str, Any]) -> Loaded:
    """Return the recipe of a row; errors name the row."""
    try:
        return load_recipe(recipe, changes=changes)
    except UserError as error:
        raise UserError(f"row '{key}': {error}") from None


def select_keys(asked: Sequence[str], *, keys: Sequence[str], table: str, where: str = "") -> list[str]:
    """Return the keys of a table that `--rows` asks for, in its order; all where it is not given.

    Raises:
        UserError: there is no such row; `where` follows its name.
    """
    wanted = [key for text in asked for key in text.split(",") if key]
    for key in wanted:
        if key not in keys:
            raise UserError(f"{table} has no row '{key}'{where} (--rows).{nearest(key, keys)}")
    return [key for key in keys if not wanted or key in wanted]


def find_kept(shape: type[Content], file_name: str, *, folder: Path) -> Content | None:
    """Return what was measured for a table as a run store keeps it, or as it is among records; None where nothing was.

    Raises:
        UserError: as `read_kept`.
    """
    return read_kept(shape, folder / KEPT / file_name) or read_kept(shape, folder / file_name)


def read_kept(shape: type[Content], path: Path) -> Content | None:
    """Return what was measured; None where nothing was.

    Raises:
        UserError: the file cannot be read, is damaged, or is of another version.
    """
    try:
        return shape.model_validate_json(read_file(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from None
    except ValueError:
        raise UserError(
            f"{path} is damaged, or of another version of obowlab: move it away, and what it holds is measured again."
        ) from None


def change_kept(shape: type[Content], path: Path, change: Callable[[Content | None], Content]) -> Content:
    """Change what a run store keeps of a table, one process at a time, and return it as it is then.

    Args:
        shape: of the content.
        path: in the store.
        change: is called with what is there, None where nothing is, and returns what shall be there.

    Raises:
        UserError: as `read_kept`; the disk refuses.
    """
    try:
        shared_folder(path.parent)
        with locked(path.parent / ".lock"):
            content = change(read_kept(shape, path))
            write_atomic(path, _json(content), shared=True)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror}.") from None
    return content


def write_kept(content: BaseModel, path: Path) -> None:
    """Write what was measured among records; the same gives the same bytes.

    Raises:
        UserError: the disk refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, _json(content))
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror}.") from None


def _json(content: BaseModel) -> str:
    return content.model_dump_json(indent=1) + "\n"
