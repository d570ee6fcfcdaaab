"""Few-shot results during training: studies prune trials by them, and every run has them as a curve.

Measuring has no effect on training: it uses no random generator and restores the encoder's train and eval modes.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from obowlab.errors import UserError, memory_sentence
from obowlab.evaluation import evaluate
from obowlab.methods import Method
from obowlab.training.context import RunContext

ONLINE = "online"
"""Name of the metric file, and of the group in MLflow."""

FEATURES = ".online."
"""How the folder of a run begins in which features lie for as long as they are measured."""


def is_due(run: RunContext, *, epoch: int) -> bool:
    """Return whether the few-shot protocol is run after so many whole epochs.

    Never after the last one: the same weights are measured once training is over.
    """
    every = run.recipe.evaluation.every_epochs
    return every > 0 and 0 < epoch < run.recipe.training.epochs and epoch % every == 0


def measure(run: RunContext, *, method: Method[Any], step: int, epoch: int) -> float:
    """Measure the student, append the result to `online.jsonl` and return the seconds it took; on rank 0 alone.

    A step that is in the file already is not measured again: a resumed run has the same weights there. Nor is one of images that
    cannot carry the protocol. A signal ends the measurement at once, so write a checkpoint of this step first. Where it
    fails otherwise, the point is missing and a line says why: training does not need it.

    Args:
        run: its recipe has the number of shots and episodes.
        method: in training.
        step: optimiser updates done.
        epoch: whole epochs done.

    Raises:
        Interrupted: a signal came.
    """
    started = time.monotonic()
    with run.folder.metric_log(ONLINE) as log:
        if step > log.last_step and "fewshot" not in run.left_out:
            try:
                values = few_shot(run, method=method)
            except Exception as error:
                reason = memory_sentence(error) or (str(error) if isinstance(error, UserError | OSError) else None)
                if reason is None:
                    raise
                run.reporter.say(f"Warning: epoch {epoch} is not measured, and training continues. {reason}")
            else:
                log.append(step, {"epoch": epoch, **values})
                run.reporter.say(f"Epoch {epoch}: " + ", ".join(f"{name} {value:.2f} %" for name, value in values.items()))
    return time.monotonic() - started


def last_step(run: RunContext) -> int:
    """Return the step of the last result in `online.jsonl`; -1 when there is none."""
    return max((point.step for point in run.folder.metrics(ONLINE)), default=-1)


def few_shot(run: RunContext, *, method: Method[Any]) -> dict[str, float]:
    """Return the student's accuracy in percent by metric name."""
    for left in run.folder.path.glob(f"{FEATURES}*"):  # of a process that was killed, gigabytes perhaps
        shutil.rmtree(left, ignore_errors=True)
    # The next step changes these weights, so their features are not cached with those of finished encoders.
    with (
        run.stop.acting_at_once(),
        tempfile.TemporaryDirectory(prefix=FEATURES, dir=run.folder.path) as cache,
    ):
        results = evaluate(
            method.encoder,
            recipe=run.recipe,
            machine=run.machine,
            subject="student",
            cache_dir=Path(cache),
            protocols=("fewshot",),
            device=run.world.device,
            report=run.reporter.log,
        )
    return {measurement.name: measurement.value for result in results for measurement in result.measurements}
