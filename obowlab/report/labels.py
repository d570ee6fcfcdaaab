"""Names and tables as a chart of plotly takes them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

LABEL_LENGTH = 44
"""Longer names end in an ellipsis in the legend; hovering shows them whole."""

RUNS_SHOWN = 3
"""Hovering a mean of more runs names so many of them."""


CHANGES_SHOWN = 4
"""A label names so many changed settings and counts the others."""


def in_short(changes: Mapping[str, str]) -> str:
    """Return changed settings for a label, `kappa=9, epochs=30 and 3 more`: by the last part of each key where that is clear."""
    last = [key.rpartition(".")[2] for key in changes]
    names = [end if last.count(end) == 1 else key for key, end in zip(changes, last, strict=True)]
    shown = [f"{name}={value}" for name, value in zip(names, changes.values(), strict=True)]
    more = len(shown) - CHANGES_SHOWN
    return ", ".join(shown[:CHANGES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def plain(name: str) -> str:
    """Return a name in a form that plotly shows to the letter: it knows tags, entities and %{variables}."""
    return escape(name, quote=False).replace("%{", "%&#123;")


def shortened(name: str, length: int) -> str:
    """Return a name, with an ellipsis at its end if it is longer than so many characters."""
    return name if len(name) <= length else f"{name[: length - 1]}…"


def run_names(runs: Sequence[str]) -> str:
    """Return the names of some runs for hovering, a few of many."""
    more = f"<br>and {len(runs) - RUNS_SHOWN} more" if len(runs) > RUNS_SHOWN else ""
    return "<br>".join(plain(run) for run in runs[:RUNS_SHOWN]) + more


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table as CSV."""
    target = io.StringIO(newline="")
    writer = csv.writer(target, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return target.getvalue()
