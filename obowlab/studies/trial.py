"""Run one trial: train and measure what its runs, one per seed, still lack, and return the objective's value.

A recipe with several stages has a run for each; those before the last are trained first, once for all trials that share them.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState

from obowlab.config import Loaded, Machine
from obowlab.errors import UserError
from obowlab.launch.compute_command import CommandFactory
from obowlab.launch.local import launch
from obowlab.launch.processes import StopSignals
from obowlab.runs.folder import RunFolder
from obowlab.runs.lineage import find_run, stages_of
from obowlab.runs.locks import RunTakenError
from obowlab.runs.results import is_alike
from obowlab.studies.spec import Tuning
from obowlab.studies.trial_locks import TrialLocks

PAPER, RECIPE, GIVEN = "paper", "recipe", "given"
"""Attributes of trials whose points were known before the study began."""
WHOSE = {PAPER: PAPER, RECIPE: RECIPE, GIVEN: "file"}

POLL_S = 1.0
WAIT_S = 3.0
"""Between two looks at a run or trial that another process works on."""
MAX_RESTARTS = 3
"""Of a run that was stopped by a signal from outside; a killed one is restarted by the launcher itself."""

Ending = Literal["completed", "pruned", "failed", "stopped"]


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Attributes:
        ending: `stopped` leaves the trial open: the next worker continues it.
        value: mean of the objective over the seeds; None unless completed.
        message: why; empty when there is nothing to explain.
    """

    ending: Ending
    value: float | None = None
    message: str = ""


@dataclass(frozen=True)
class TrialContext:
    """What the trials of one worker share.

    Attributes:
        tuning: the study.
        study: in its storage.
        locks: who works on which trial.
        machine: of every run.
        stopping: set when the user wants to stop.
        say: prints one line.
        watch: registers what can stop the run that is being trained; false when it is too late to begin.
        retry: calls a function with the given arguments, repeatedly while the storage does not answer.
        command: makes the command line of the compute process.
    """

    tuning: Tuning
    study: optuna.Study
    locks: TrialLocks
    machine: Machine
    stopping: threading.Event
    say: Callable[[str], None]
    watch: Callable[[StopSignals], bool]
    retry: Callable[..., Any]
    command: CommandFactory


class TrialRunner:
    """Runs one trial whose lock this worker holds."""

    def __init__(self, context: TrialContext, *, trial: optuna.Trial, recipe: Loaded) -> None:
        """Prepare the runs of a point and record in the storage which they are, before anything is trained.

        Args:
            context: what the worker's trials share.
            trial: running, with all its parameters.
            recipe: of its point.
        """
        self._context = context
        self._trial = trial
        self._recipe = recipe
        self._pruned: str | None = None
        self._reported: dict[int, float] = {}
        root = context.machine.runs_root
        seeds = context.tuning.spec.seeds
        self._earlier = {seed: stages_of(recipe, seed=seed, runs_root=root)[:-1] for seed in seeds}
        self._folders = {seed: _folder_of(recipe, seed=seed, machine=context.machine) for seed in seeds}
        self._run_ids = {str(seed): folder.run_id for seed, folder in self._folders.items()}
        name, number = context.tuning.name, str(trial.number)
        self._record(
            {
                "runs": self._run_ids,
                "run_folders": {str(seed): str(folder.path.relative_to(root)) for seed, folder in self._folders.items()},
                "fingerprints": {str(seed): folder.info.fingerprint for seed, folder in self._folders.items()},
                "worker": {"pid": os.getpid(), "host": socket.gethostname()},
            }
        )
        for folder in self._folders.values():
            folder.add_labels({"obowlab.study": name, "obowlab.trial": number, f"obowlab.study.{name}": number})

    def run(self) -> Outcome:
        """Train and measure what is missing and return how the trial ended.

        Raises:
            UserError: something that every trial would meet; the trial stays open.
        """
        duplicate = self._await_duplicate()
        if self._context.stopping.is_set():
            return Outcome("stopped")
        if duplicate is not None and duplicate.state == TrialState.PRUNED:
            self._record({"repeat_of": duplicate.number})
            self._copy_points(duplicate)
            return Outcome("pruned", message=f"the point of trial {duplicate.number}, which was pruned")
        finished_before = all(folder.state.status == "finished" for folder in self._folders.values())
        values = {}
        for position, (seed, folder) in enumerate(self._folders.items()):
            ended = None
            for stage in self._earlier[seed] if folder.state.status != "finished" else ():
                ended = ended or self._complete(_folder_of(stage, seed=seed, machine=self._context.machine), stage, seed=seed)
            reports = position == 0 and self._context.tuning.online_metric is not None
            ended = ended or self._complete(folder, self._recipe, seed=seed, reports=reports)
            self._record({"mlflow_runs": {str(seed): folder.mlflow_run_id() for seed, folder in self._folders.items()}})
            if ended is not None:
                return ended
            values[seed] = objective_of(folder, tuning=self._context.tuning)
        self._record({"values": {str(seed): result["value"] for seed, result in values.items()}})
        mean = sum(result["value"] for result in values.values()) / len(values)
        if finished_before and not self._trial.user_attrs.get("resumed"):
            self._record({"repeat_of": duplicate.number if duplicate is not None else "finished runs"})
            return Outcome("completed", value=mean, message="these runs were finished already")
        return Outcome("completed", value=mean)

    # ------------------------------------------------------------------------------------------------ one run

    def _complete(self, folder: RunFolder, recipe: Loaded, *, seed: int, reports: bool = False) -> Outcome | None:
        """Train one run to its end; None when it is finished, else how the trial ends instead."""
        context = self._context
        if reports:
            self._reported = self._stored_points()
            if folder.state.status != "finished" and self._reported and self._should_prune():
                return Outcome("pruned", message="the previous worker died before recording it")
        for attempt in range(MAX_RESTARTS + 1):
            signals = StopSignals()
            if not context.watch(signals):
                return Outcome("stopped")
            code = self._train(folder, recipe, seed=seed, signals=signals, reports=reports)
            state = folder.current_state()
            if state.status == "finished":
                return None
            if context.stopping.is_set() or code is None:
                return Outcome("stopped")
            if self._pruned is not None:
                return Outcome("pruned", message=self._pruned)
            if state.status != "interrupted" or attempt == MAX_RESTARTS:
                return Outcome("failed", message=f"run {folder.run_id}: {state.message}")
            self._say(f"run {folder.run_id} was stopped from outside ({state.message}); resuming it")
        raise AssertionError("the last attempt returns")

    def _train(self, folder: RunFolder, recipe: Loaded, *, seed: int, signals: StopSignals, reports: bool) -> int | None:
        """Launch a run, waiting for another process that trains it already; None when the user stopped the waiting."""
        context, announced = self._context, False
        while True:
            with ThreadPoolExecutor(1) as pool:
                training = pool.submit(
                    launch,
                    replace(recipe, name=folder.info.name),
                    seed=seed,
                    machine=context.machine,
                    fresh=False,
                    progress=False,
                    command=context.command,
                    signals=signals,
                    quiet=True,
                )
                while not wait([training], timeout=POLL_S).done:
                    if reports:
                        self._report_points(folder, signals=signals)
            if reports:
                self._report_points(folder)
            try:
                return training.result()
            except RunTakenError as error:
                if not announced:
                    self._say(str(error))
                announced = True
            if context.stopping.wait(WAIT_S):
                return None

    def _report_points(self, folder: RunFolder, *, signals: StopSignals | None = None) -> None:
        """Report the results during training that are new to the storage; stop the run when the pruner says so.

        Args:
            folder: of the run.
            signals: stop the run; None when it has ended.
        """
        metric, study, number = self._context.tuning.online_metric, self._context.tuning.name, self._trial.number
        assert metric is not None
        for point in folder.metrics("online"):
            epoch = round(point.values["epoch"])
            if epoch in self._reported or metric not in point.values:
                continue
            value = point.values[metric]
            self._context.retry(self._trial.report, value, step=epoch)
            self._reported[epoch] = value
            self._say(f"epoch {epoch} of {self._recipe.recipe.training.epochs}, {metric} {value:.2f}")
            if signals is not None and self._pruned is None and self._should_prune():
                self._pruned = f"{metric} {value:.2f} after epoch {epoch}"
                folder.add_labels({"obowlab.pruned": f"{study}, trial {number}: {self._pruned}"})
                reason = f"pruned by trial {number} of study {study}: {self._pruned}, worse than the median"
                signals.send(signal.SIGTERM, reason=reason)

    def _should_prune(self) -> bool:
        """Return whether the results so far are bad enough; the paper's point, the recipe's and the file's are never pruned."""
        known = WHOSE.keys() & self._trial.user_attrs.keys()
        return not known and bool(self._context.retry(self._trial.should_prune))

    # --------------------------------------------------------------------------------------------- duplicates

    def _await_duplicate(self) -> FrozenTrial | None:
        """Return the earliest other trial of the same point, once no worker holds it any more."""
        announced = False
        while True:
            duplicate = self._duplicate()
            if duplicate is None or duplicate.state != TrialState.RUNNING or not self._context.locks.is_held(duplicate.number):
                return duplicate
            if not announced:
                self._say(f"the point of trial {duplicate.number}, which is being trained; waiting for it")
            announced = True
            if self._context.stopping.wait(WAIT_S):
                return None

    def _duplicate(self) -> FrozenTrial | None:
        states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        trials = self._context.retry(self._context.study.get_trials, deepcopy=False, states=states)
        same = [t for t in trials if t.number < self._trial.number and t.user_attrs.get("runs") == self._run_ids]
        return min(same, key=lambda t: t.number, default=None)

    def _copy_points(self, duplicate: FrozenTrial) -> None:
        stored = self._stored_points()
        for epoch, value in duplicate.intermediate_values.items():
            if epoch not in stored:
                self._context.retry(self._trial.report, value, step=epoch)

    # ------------------------------------------------------------------------------------------------ storage

    def _stored_points(self) -> dict[int, float]:
        """Return what the storage has of this trial's results during training, epoch to percent."""
        trials = self._context.retry(self._context.study.get_trials, deepcopy=False)
        return dict(trials[self._trial.number].intermediate_values)

    def _record(self, facts: Mapping[str, Any]) -> None:
        before = self._trial.user_attrs
        for key, value in facts.items():
            if before.get(key) != value:
                self._context.retry(self._trial.set_user_attr, key, value)

    def _say(self, line: str) -> None:
        self._context.say(f"trial {self._trial.number}: {line}")


# ---------------------------------------------------------------------------------------------------------------- results


def objective_of(folder: RunFolder, *, tuning: Tuning) -> dict[str, Any]:
    """Return the student's measurement of the objective on a finished run, measured as the study's recipe says.

    Returns:
        The measurement as it is filed (`value`, `interval`, `samples`, ...) with the result's `protocol_hash`.

    Raises:
        UserError: the run was not measured so; names the command that does it.
    """
    for result in reversed(folder.results()):
        asked = result["subject"] == "student" and result["protocol"] == tuning.protocol
        if asked and is_alike(result, recipe=tuning.base.recipe):
            for measurement in result["measurements"]:
                if measurement["name"] == tuning.spec.objective:
                    return {**measurement, "protocol_hash": result["protocol_hash"]}
    raise UserError(
        f"Run {folder.run_id} is finished but has no {tuning.spec.objective} measured as the study says; "
        f"`obowlab eval {folder.run_id} --protocol {tuning.protocol}` measures it, then type the command again."
    )


def _folder_of(recipe: Loaded, *, seed: int, machine: Machine) -> RunFolder:
    """Open the run of this recipe and seed, whatever its name, or create it."""
    found = find_run(recipe.recipe.fingerprint(seed=seed), runs_root=machine.runs_root)
    return found or RunFolder.create(recipe, seed=seed, runs_root=machine.runs_root)


def describe(params: Mapping[str, Any]) -> str:
    """Return a point in words: `kappa 5, delta_base 0.1`."""
    words = []
    for key, value in params.items():
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        words.append(f"{key.rsplit('.', 1)[-1]} {shown}")
    return ", ".join(words)
