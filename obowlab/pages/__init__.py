"""HTML pages: the templates of all of them, and those pages that evaluation writes too and that therefore import no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from obowlab.config import project_root

if TYPE_CHECKING:
    from jinja2 import Environment


def templates() -> Path:
    """Return the folder of the templates, and of the scripts and styles beside them."""
    return project_root() / "dashboards"


def environment(folder: Path, *, trim_blocks: bool = True) -> Environment:
    """Return what renders the templates of a folder: it escapes every value, and a name that it does not know is an error.

    Args:
        folder: of the templates.
        trim_blocks: whether a statement takes the end of its line with it.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # late: commands that write no page start sooner

    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=trim_blocks,
        lstrip_blocks=True,
        auto_reload=False,
    )
