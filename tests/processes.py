"""What tests of processes share: waiting for what another process does, and launching without MLflow."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from obowlab.tracking.mirror import SyncReport


class NoMirror:
    """Stands in for the mirror, which test_mirror.py tests: mlflow takes seconds to import."""

    def __init__(self, folder: Any, *, tracking_uri: str | None) -> None:
        self.folder = folder

    def sync(self, *, timeout_s: float) -> SyncReport:
        return SyncReport(sent=0, pending=0)

    def sync_when_due(self, *, timeout_s: float) -> SyncReport:
        return self.sync(timeout_s=timeout_s)


def wait_until(condition: Callable[[], object], *, timeout_s: float = 60.0) -> None:
    """Return as soon as the condition holds.

    Raises:
        AssertionError: it did not hold in time.
    """
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"it did not happen within {timeout_s:.0f} s"
        time.sleep(0.02)
