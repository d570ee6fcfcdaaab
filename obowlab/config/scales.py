"""The scales at which a table or a study is worked: which recipes its base word stands for."""

from __future__ import annotations

from pathlib import Path

from obowlab.config import nearest, recipe_files
from obowlab.errors import UserError

SCALES: dict[str, str] = {"paper": "imagenet20-", "tiny": "tiny-", "demo": "demo-"}
"""Scale -> what its recipes' names begin with."""


def recipe_for(base: str, scale: str, *, folder: Path) -> str:
    """Return what the base word of a table or a study stands for at a scale.

    `vanilla` at `tiny` is `tiny-vanilla`. A recipe of one's own lies beside the table or study, the same at every scale:
    `mine.toml`, or `mine` where that is no shipped recipe's word.

    Args:
        base: the word.
        scale: one of `SCALES`.
        folder: of the table or the study.

    Returns:
        The name of a shipped recipe, or a path.

    Raises:
        UserError: there is no such scale.
    """
    if scale not in SCALES:
        raise UserError(f"There is no scale '{scale}'.{nearest(scale, list(SCALES))}")
    shipped = f"{SCALES[scale]}{base}"
    own = folder / (base if base.endswith(".toml") else f"{base}.toml")
    return str(own) if base.endswith(".toml") or (shipped not in recipe_files() and own.is_file()) else shipped
