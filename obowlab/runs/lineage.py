"""Which run is which stage: a stage is found by its fingerprint, whatever its name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from obowlab.config import Loaded
from obowlab.errors import UserError
from obowlab.runs.folder import RunFolder
from obowlab.runs.info import TRAINED
from obowlab.runs.listing import list_runs


def find_run(fingerprint: str, *, runs_root: Path) -> RunFolder | None:
    """Return the run with this fingerprint, a finished one before the newest; None when there is none."""
    same = [run for run in list_runs(runs_root) if run.info.fingerprint == fingerprint]
    same.sort(key=lambda run: run.state.status != "finished")
    return RunFolder(same[0].path, same[0].info) if same else None


def stages_of(loaded: Loaded, *, seed: int, runs_root: Path) -> list[Loaded]:
    """Return the stages of a recipe, first to last, those before the last under the names of the runs that are there already."""
    *earlier, last = loaded.stages()
    named = []
    for stage in earlier:
        found = find_run(stage.recipe.fingerprint(seed=seed), runs_root=runs_root)
        named.append(stage if found is None else replace(stage, name=found.info.name))
    return [*named, last]


def waiting_students(teachers: Iterable[RunFolder], *, runs_root: Path) -> list[tuple[str, str]]:
    """Return the ids of the unfinished runs that read one of these as their teacher, each with the teacher's id."""
    known = {folder.info.fingerprint: folder.run_id for folder in teachers}
    found = []
    for run in list_runs(runs_root):
        if run.info.recipe_values.get("teacher") is None or run.state.status in TRAINED:
            continue
        try:
            teacher = run.info.recipe.teacher
        except UserError:  # of another version
            continue
        if teacher is not None and (key := teacher.fingerprint(seed=run.info.seed)) in known:
            found.append((run.info.run_id, known[key]))
    return found
