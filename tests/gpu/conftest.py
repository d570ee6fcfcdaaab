"""The order of the GPU's tests; each one's outcome goes to $OBOWLAB_TEST_OUTCOMES, a JSON line, as soon as it is known."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import OUTCOMES_VARIABLE

HERE = Path(__file__).resolve().parent
FIRST = ("test_steps", "test_views", "test_targets", "test_sync", "test_memory")
"""The modules that are played first: the others start processes, and may take the time that is left."""


@pytest.hookimpl(trylast=True)  # after the order of tests/conftest.py
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = [place for place, item in enumerate(items) if item.path.parent == HERE]
    ordered = sorted((items[place] for place in places), key=_order)
    for place, item in zip(places, ordered, strict=True):
        items[place] = item


def _order(item: pytest.Item) -> int:
    return FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST)


def _write(line: dict[str, Any]) -> None:
    if path := os.environ.get(OUTCOMES_VARIABLE):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def pytest_runtest_logstart(nodeid: str) -> None:
    _write({"test": nodeid, "outcome": "stopped"})  # until it has ended


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.when == "call" or report.outcome != "passed":
        words = ""
        if report.skipped and isinstance(report.longrepr, tuple):
            words = str(report.longrepr[2]).removeprefix("Skipped: ")
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            words = str(crash.message if crash else report.longrepr).strip()
        _write(
            {
                "test": item.nodeid,
                "outcome": report.outcome,
                "seconds": round(report.duration, 2),
                "words": words,
                "numbers": dict(report.user_properties),
            }
        )
    return report
