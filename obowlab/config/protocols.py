"""The protocols of `obowlab eval` that are trainings of their own: each is a recipe of that name."""

from __future__ import annotations

from obowlab.config.loading import recipe_files
from obowlab.errors import UserError

TRAININGS = ("linear-imagenet", "places205", "semi-1", "semi-10")
"""The protocols, and the recipes that they are; with a preset it is the recipe PROTOCOL-PRESET."""


def recipe_of(protocol: str, *, preset: str | None) -> str:
    """Return the name of the recipe that a protocol is.

    Raises:
        UserError: there is no such preset.
    """
    known = [name.removeprefix(f"{protocol}-") for name in recipe_files() if name.startswith(f"{protocol}-")]
    if preset is None:
        return protocol
    if preset not in known:
        raise UserError(f"--protocol {protocol} has no preset '{preset}'. Known: {', '.join(known) or 'none'}.")
    return f"{protocol}-{preset}"
