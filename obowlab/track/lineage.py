"""Which run is which stage: a stage is found by its fingerprint, whatever its name."""

from __future__ import annotations

from pathlib import Path

from obowlab.track.folder import RunFolder, list_runs


def find_run(fingerprint: str, *, runs_root: Path) -> RunFolder | None:
    """Return the run with this fingerprint, a finished one before the newest; None when there is none."""
    same = [run for run in list_runs(runs_root) if run.info.fingerprint == fingerprint]
    same.sort(key=lambda run: run.state.status != "finished")
    return RunFolder(same[0].path, same[0].info) if same else None
