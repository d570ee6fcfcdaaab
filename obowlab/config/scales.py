"""The scales at which a table or a study is worked: which recipes its base word stands for."""

from __future__ import annotations

from obowlab.config import nearest
from obowlab.errors import UserError

SCALES: dict[str, str] = {"paper": "imagenet20-", "tiny": "tiny-", "demo": "demo-"}
"""Scale -> what its recipes' names begin with."""


def recipe_for(base: str, scale: str) -> str:
    """Return the recipe of a base word at a scale: `vanilla` at `tiny` is `tiny-vanilla`.

    Raises:
        UserError: there is no such scale.
    """
    if scale not in SCALES:
        raise UserError(f"There is no scale '{scale}'.{nearest(scale, list(SCALES))}")
    return f"{SCALES[scale]}{base}"
