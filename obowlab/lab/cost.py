"""What a training will cost before it begins: steps times the seconds of one step.

Seconds come, the best first, from a finished run of the same recipe on the same kind of device, or from a micro-benchmark: a few
steps on random images in a process of its own (`obowlab.training.benchmark`), kept in RUNS_ROOT/.costs.json for the next time.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

from obowlab.config import Machine, Recipe
from obowlab.data.datasets import DATASETS
from obowlab.data.store import read_manifest
from obowlab.errors import UserError
from obowlab.track.folder import RunFolder, RunSummary
from obowlab.track.journal import write_atomic

COSTS = ".costs.json"
BENCHMARK_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Cost:
    """What one training takes.

    Attributes:
        steps: optimiser updates; None when the data set is not known here.
        seconds: of training, evaluation not counted; None when nothing was measured.
        source: where the seconds come from: `run`, `benchmark` or `unknown`.
    """

    steps: int | None
    seconds: float | None
    source: Literal["run", "benchmark", "unknown"]


class CostBook:
    """The costs of recipes on this machine."""

    def __init__(self, machine: Machine, *, runs: Iterable[RunSummary]) -> None:
        """Read what was measured.

        Args:
            machine: its run store keeps the measurements.
            runs: the finished ones among them tell their own time.
        """
        self._machine = machine
        self._path = machine.runs_root / COSTS
        self._trained_s: dict[str, list[float]] = {}
        for run in runs:
            if run.state.status == "finished":
                self._note(RunFolder(run.path, run.info))
        self._step_s: dict[str, float] = _read(self._path)

    def cost(self, recipe: Recipe) -> Cost:
        """Return what a training of this recipe takes, as far as it is known."""
        key, steps = recipe.fingerprint(seed=0), num_steps(recipe, data_root=self._machine.data_root)
        if key in self._trained_s:
            return Cost(steps, median(self._trained_s[key]), "run")
        step_s = self._step_s.get(self._place(key))
        if step_s is not None and steps is not None:
            return Cost(steps, steps * step_s, "benchmark")
        return Cost(steps, None, "unknown")

    def measure(self, recipes: Sequence[Recipe]) -> str:
        """Time a few steps of the recipes that were never measured here, in one process.

        Returns:
            Why not all of them could be timed, in a few words; empty when all is well. A cost is nothing to fail for.
        """
        missing = {recipe.fingerprint(seed=0): recipe for recipe in recipes if self.cost(recipe).source == "unknown"}
        if not missing:
            return ""
        request = json.dumps(
            {"device": self._machine.device, "recipes": {key: recipe.model_dump(mode="json") for key, recipe in missing.items()}}
        )
        environment = {**os.environ, "OMP_NUM_THREADS": str(self._machine.threads or os.environ.get("OMP_NUM_THREADS") or 1)}
        try:
            done = subprocess.run(
                [sys.executable, "-m", "obowlab.training.benchmark"],
                input=request,
                env=environment,
                capture_output=True,
                text=True,
                timeout=BENCHMARK_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"it took more than {duration(BENCHMARK_TIMEOUT_S)}"
        for line in done.stdout.splitlines():
            measured = json.loads(line)
            self._step_s[self._place(measured["key"])] = measured["step_s"]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path, json.dumps(self._step_s, indent=1, sort_keys=True))
        return "" if done.returncode == 0 else (done.stderr.splitlines() or [f"exit code {done.returncode}"])[-1]

    def _note(self, folder: RunFolder) -> None:
        try:
            key = folder.info.recipe.fingerprint(seed=0)
        except UserError:
            return  # made by another version: it cannot be what is planned now
        trained_s = folder.trained_s()
        if trained_s is not None and self._machine.device in ("auto", folder.facts().get("device")):
            self._trained_s.setdefault(key, []).append(trained_s)

    def _place(self, key: str) -> str:
        return f"{socket.gethostname()} {self._machine.device} {key}"


def num_steps(recipe: Recipe, *, data_root: Path) -> int | None:
    """Return the optimiser updates of a recipe from the prepared data set, or from what is known of it; else None."""
    data = recipe.data
    manifest = read_manifest(data_root, data.dataset, "train")
    info = DATASETS.get(data.dataset)
    if manifest is not None:
        num_images, num_classes = manifest.num_images, len(manifest.class_names)
    elif info is not None:
        num_images, num_classes = info.num_images["train"], info.num_classes
    else:
        return None
    if data.images_per_class is not None:
        num_images = min(num_images, data.images_per_class * num_classes)
    return recipe.training.epochs * (num_images // recipe.training.batch_size)


def duration(seconds: float) -> str:
    """Return `40 s`, `12 min`, `3.5 h` or `2.1 days`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def _read(path: Path) -> dict[str, float]:
    try:
        return {str(key): float(value) for key, value in json.loads(path.read_bytes()).items()}
    except (FileNotFoundError, ValueError, AttributeError):
        return {}  # measured again when it is needed
