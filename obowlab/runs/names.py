"""The names of runs: `NAME-sSEED-` and 8 digits of the fingerprint, and what a shorter name stands for."""

from __future__ import annotations

import re
from collections.abc import Collection

from obowlab.config import Loaded, recipe_files
from obowlab.errors import UserError


def run_id_of(loaded: Loaded, *, seed: int) -> str:
    """Return the id of the run that this recipe and seed make: `NAME-sSEED-` and 8 digits of the fingerprint.

    Raises:
        UserError: the recipe's name holds characters that do not belong in a folder or model name.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", loaded.name):
        raise UserError(
            f"Rename the recipe file '{loaded.name}.toml': runs are named after it and may have letters, digits and '._-' only."
        )
    return f"{loaded.name}-s{seed}-{loaded.recipe.fingerprint(seed=seed)[:8]}"


def split_run_id(run_id: str) -> tuple[str, str, str]:
    """Return the recipe, `sSEED` and the digits of an id, the reverse of `run_id_of`; a folder of another name is all recipe."""
    found = re.fullmatch(r"(.+)-(s\d+)-([0-9a-f]{8})", run_id)
    return (found[1], found[2], found[3]) if found is not None else (run_id, "", "")


def meaning_of(ref: str, *, known: Collection[str]) -> tuple[str, list[str]]:
    """Return what a name stands for among the ids of runs, in words, and the ids that it fits; see `RunFolder.find`."""
    parts = {run_id: split_run_id(run_id) for run_id in known}
    meanings = {
        "the name": [run_id for run_id in known if run_id == ref],
        "the recipe": [run_id for run_id, (recipe, _, _) in parts.items() if recipe == ref],
        "recipe and seed": [run_id for run_id, (recipe, seed, _) in parts.items() if f"{recipe}-{seed}" == ref],
        "the end": [run_id for run_id, (_, _, digits) in parts.items() if digits and digits == ref],
        "a prefix": [run_id for run_id in known if ref and run_id.startswith(ref) and ref not in recipe_files()],
    }
    return next((item for item in meanings.items() if item[1]), ("", []))
