"""The gallery of a run's visual words: one page that needs no server, no network and nothing but the sheets beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from obowlab.config import project_root

TEMPLATE = "words.html"


def render_words(facts: Mapping[str, Any]) -> str:
    """Return `index.html` for the facts of `words.json` (`evaluation.words.show_words`).

    The page carries its numbers along, as a browser gives a page that was opened from a file no other file to read.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(project_root() / "dashboards"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    shown = {name: _level(level) for name, level in facts["levels"].items()}
    return environment.get_template(TEMPLATE).render(facts=facts, levels=shown)


def _level(level: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the page needs of a level: a short row per word, numbers to the digits that are shown."""
    words = [
        (
            word["number"],
            float(f"{word['use']:.4g}"),
            None if word["coherence"] is None else round(word["coherence"], 4),
            float(f"{word['score']:.4g}"),
            word["age"],
            word["places"],
            word["sheet"],
            word["row"],
        )
        for word in level["words"]
    ]
    kept = ("num_words", "used", "delta", "distance", "patch_side", "coherence", "coherence_of_others", "words_per_sheet")
    return {**{key: level[key] for key in (*kept, "sheets")}, "words": words}
