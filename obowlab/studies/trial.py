"""One trial in the hands of a worker: its runs, one per seed, from wherever they stand to the objective's value.

A recipe with several stages has a run for each; those before the last are trained first, once for all trials that share them.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Mapping
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
from obowlab.studies.spec import Tuning
from obowlab.studies.trial_locks import Claims

POLL_S = 1.0
WAIT_S = 3.0
"""Between looks at a run or trial that another process works on."""
MAX_RESTARTS = 3
"""Of a run that somebody else asked to stop; the launcher itself goes on with one that was killed."""

Ending = Literal["completed", "pruned", "failed", "stopped"]


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Attributes:
        ending: `stopped` leaves the trial open: the next worker goes on with it.
        value: mean of the objective over the seeds; None unless completed.
        message: what to tell about it.
    """

    ending: Ending
    value: float | None = None
    message: str = ""


@dataclass(frozen=True)
class Bench:
    """What the trials of one worker share.

    Attributes:
        tuning: the study.
        study: in its storage.
        claims: who works on which trial.
        machine: of every run.
        stopping: set when the user wants to stop.
        say: prints one line.
        watch: registers what can stop the run that is being trained; false when it is too late to begin.
        patiently: calls a function with the given arguments, again and again while the storage is away.
        command: makes the command line of the compute process.
    """

    tuning: Tuning
    study: optuna.Study
    claims: Claims
    machine: Machine
    stopping: threading.Event
    say: Callable[[str], None]
    watch: Callable[[StopSignals], bool]
    patiently: Callable[..., Any]
    command: CommandFactory


class TrialWork:
    """Carries out one trial that this worker has claimed."""

    def __init__(self, bench: Bench, *, trial: optuna.Trial, recipe: Loaded) -> None:
        """Prepare the runs of a point and write down which they are, before anything is trained.

        Args:
            bench: what the worker's trials share.
            trial: running, with all its parameters.
            recipe: of its point.
        """
        self.bench = bench
        self.trial = trial
        self.recipe = recipe
        root = bench.machine.runs_root
        seeds = bench.tuning.spec.seeds
        self.earlier = {seed: stages_of(recipe, seed=seed, runs_root=root)[:-1] for seed in seeds}
        self.folders = {seed: _folder_of(recipe, seed=seed, machine=bench.machine) for seed in seeds}
        self.run_ids = {str(seed): folder.run_id for seed, folder in self.folders.items()}
        name, number = bench.tuning.name, str(trial.number)
        self._remember(
            {
                "runs": self.run_ids,
                "run_folders": {str(seed): str(folder.path.relative_to(root)) for seed, folder in self.folders.items()},
                "fingerprints": {str(seed): folder.info.fingerprint for seed, folder in self.folders.items()},
                "worker": {"pid": os.getpid(), "host": socket.gethostname()},
            }
        )
        for folder in self.folders.values():
            folder.add_labels({"obowlab.study": name, "obowlab.trial": number, f"obowlab.study.{name}": number})

    @property
    def is_paper(self) -> bool:
        """Whether this is the paper's own point, which is never pruned."""
        return bool(self.trial.user_attrs.get("paper"))

    def carry_out(self) -> Outcome:
        """Train and measure what is missing and return how the trial ended.

        Raises:
            UserError: something that every trial would meet; the trial stays open.
        """
        twin = self._await_twin()
        if self.bench.stopping.is_set():
            return Outcome("stopped")
        if twin is not None and twin.state == TrialState.PRUNED:
            self._remember({"repeat_of": twin.number})
            self._copy_points(twin)
            return Outcome("pruned", message=f"the point of trial {twin.number}, which was pruned")
        finished_before = all(folder.state.status == "finished" for folder in self.folders.values())
        values = {}
        for position, (seed, folder) in enumerate(self.folders.items()):
            ended = None
            for stage in self.earlier[seed] if folder.state.status != "finished" else ():
                ended = ended or self._complete(_folder_of(stage, seed=seed, machine=self.bench.machine), stage, seed=seed)
            ended = ended or self._complete(folder, self.recipe, seed=seed, reports=position == 0)
            self._remember({"mlflow_runs": {str(seed): folder.mlflow_run_id() for seed, folder in self.folders.items()}})
            if ended is not None:
                return ended
            values[seed] = objective_of(folder, tuning=self.bench.tuning)
        self._remember({"values": {str(seed): result["value"] for seed, result in values.items()}})
        mean = sum(result["value"] for result in values.values()) / len(values)
        if finished_before and not self.trial.user_attrs.get("resumed"):
            self._remember({"repeat_of": twin.number if twin is not None else "finished runs"})
            return Outcome("completed", value=mean, message="these runs were finished already")
        return Outcome("completed", value=mean)

    # ------------------------------------------------------------------------------------------------ one run

    def _complete(self, folder: RunFolder, recipe: Loaded, *, seed: int, reports: bool = False) -> Outcome | None:
        """Bring one run to its end; None when it is there, else how the trial ends instead."""
        bench = self.bench
        reports = reports and bench.tuning.online_metric is not None
        if reports and folder.state.status != "finished" and self._is_condemned():
            return Outcome("pruned", message="its last worker did not come to say so")
        for attempt in range(MAX_RESTARTS + 1):
            signals = StopSignals()
            if not bench.watch(signals):
                return Outcome("stopped")
            reader = _OnlineReader(self, folder=folder, signals=signals) if reports else None
            code = self._launch(folder, recipe, seed=seed, signals=signals, reader=reader)
            state = folder.current_state()
            if state.status == "finished":
                return None
            if bench.stopping.is_set() or code is None:
                return Outcome("stopped")
            if reader is not None and reader.pruned is not None:
                return Outcome("pruned", message=reader.pruned)
            if state.status != "interrupted" or attempt == MAX_RESTARTS:
                return Outcome("failed", message=f"run {folder.run_id}: {state.message}")
            bench.say(
                f"trial {self.trial.number}: run {folder.run_id} was stopped from outside ({state.message}); going on with it"
            )
        raise AssertionError("the last attempt returns")

    def _launch(
        self, folder: RunFolder, recipe: Loaded, *, seed: int, signals: StopSignals, reader: _OnlineReader | None
    ) -> int | None:
        """Launch a run, waiting for whoever trains it already; None when the user stopped the waiting."""
        bench, told = self.bench, False
        loaded = replace(recipe, name=folder.info.name)
        while True:
            try:
                if reader is not None:
                    reader.start()
                return launch(
                    loaded,
                    seed=seed,
                    machine=bench.machine,
                    fresh=False,
                    progress=False,
                    command=bench.command,
                    signals=signals,
                    quiet=True,
                )
            except RunTakenError as error:
                if not told:
                    bench.say(f"trial {self.trial.number}: {error}")
                told = True
            finally:
                if reader is not None:
                    reader.finish()
            if bench.stopping.wait(WAIT_S):
                return None

    def _is_condemned(self) -> bool:
        """Return whether the results that an earlier worker reported are bad enough already."""
        return not self.is_paper and bool(self.reported()) and bool(self.bench.patiently(self.trial.should_prune))

    # ------------------------------------------------------------------------------------------------- twins

    def _await_twin(self) -> FrozenTrial | None:
        """Return the earliest other trial of the same point, once nobody works on it any more."""
        bench, told = self.bench, False
        while True:
            twin = self._twin()
            if twin is None or twin.state != TrialState.RUNNING or not bench.claims.is_held(twin.number):
                return twin
            if not told:
                bench.say(f"trial {self.trial.number}: the point of trial {twin.number}, which is being trained; waiting for it")
            told = True
            if bench.stopping.wait(WAIT_S):
                return None

    def _twin(self) -> FrozenTrial | None:
        states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        trials = self.bench.patiently(self.bench.study.get_trials, deepcopy=False, states=states)
        same = [t for t in trials if t.number < self.trial.number and t.user_attrs.get("runs") == self.run_ids]
        return min(same, key=lambda t: t.number, default=None)

    def _copy_points(self, twin: FrozenTrial) -> None:
        for epoch, value in twin.intermediate_values.items():
            if epoch not in self.reported():
                self.bench.patiently(self.trial.report, value, step=epoch)

    # ------------------------------------------------------------------------------------------------ storage

    def reported(self) -> dict[int, float]:
        """Return what the storage has of this trial's results during training, epoch to percent."""
        number = self.trial.number
        trials = self.bench.patiently(self.bench.study.get_trials, deepcopy=False)
        return dict(trials[number].intermediate_values)

    def _remember(self, facts: Mapping[str, Any]) -> None:
        before = self.trial.user_attrs
        for key, value in facts.items():
            if before.get(key) != value:
                self.bench.patiently(self.trial.set_user_attr, key, value)


class _OnlineReader:
    """Reads the results of a run as it writes them, reports them to the trial and stops the run when the pruner says so."""

    def __init__(self, work: TrialWork, *, folder: RunFolder, signals: StopSignals) -> None:
        self.pruned: str | None = None
        self._work = work
        self._folder = folder
        self._signals = signals
        self._reported = work.reported()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self) -> None:
        """Begin to read in the background."""
        self._ended.clear()
        self._thread = threading.Thread(target=self._watch, name="online reader", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Read what is left and stop reading; what went wrong meanwhile is raised here."""
        self._ended.set()
        assert self._thread is not None
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _watch(self) -> None:
        try:
            while not self._ended.wait(POLL_S):
                self._read(may_prune=True)
            self._read(may_prune=False)
        except BaseException as error:  # handed over to the trial's own thread
            self._error = error

    def _read(self, *, may_prune: bool) -> None:
        bench, trial = self._work.bench, self._work.trial
        metric = bench.tuning.online_metric
        assert metric is not None
        for point in self._folder.metrics("online"):
            epoch = round(point.values["epoch"])
            if epoch in self._reported or metric not in point.values:
                continue
            value = point.values[metric]
            bench.patiently(trial.report, value, step=epoch)
            self._reported[epoch] = value
            epochs = self._work.recipe.recipe.training.epochs
            bench.say(f"trial {trial.number}: epoch {epoch} of {epochs}, {metric} {value:.2f}")
            if may_prune and self.pruned is None and not self._work.is_paper and bench.patiently(trial.should_prune):
                self.pruned = f"{metric} {value:.2f} after epoch {epoch}"
                reason = f"pruned by trial {trial.number} of study {bench.tuning.name}: {self.pruned}, worse than the median"
                self._folder.add_labels({"obowlab.pruned": f"{bench.tuning.name}, trial {trial.number}: {self.pruned}"})
                self._signals.send(signal.SIGTERM, reason=reason)


# ---------------------------------------------------------------------------------------------------------------- results


def objective_of(folder: RunFolder, *, tuning: Tuning) -> dict[str, Any]:
    """Return the student's measurement of the objective on a finished run, measured as the study's recipe says.

    Returns:
        The measurement as it is filed (`value`, `interval`, `samples`, ...) with the result's `protocol_hash`.

    Raises:
        UserError: the run was not measured so; names the command that does it.
    """
    evaluation = tuning.base.recipe.evaluation
    settings = getattr(evaluation, tuning.protocol).model_dump(mode="json")
    for result in reversed(folder.results()):
        details = result.get("details", {})
        own = details.get("dataset") == tuning.base.recipe.data.dataset
        alike = all(details.get(key) == value for key, value in settings.items())
        if result["subject"] == "student" and result["protocol"] == tuning.protocol and own and alike:
            for measurement in result["measurements"]:
                if measurement["name"] == tuning.spec.objective:
                    return {**measurement, "protocol_hash": result["protocol_hash"]}
    raise UserError(
        f"Run {folder.run_id} is finished but has no {tuning.spec.objective} measured as the study says; "
        f"`obowlab eval {folder.run_id} --protocol {tuning.protocol}` measures it, then type the command again."
    )


def _folder_of(recipe: Loaded, *, seed: int, machine: Machine) -> RunFolder:
    """Open the run of this recipe and seed, under whatever name it was begun, or create it."""
    found = find_run(recipe.recipe.fingerprint(seed=seed), runs_root=machine.runs_root)
    return found or RunFolder.create(recipe, seed=seed, runs_root=machine.runs_root)


def describe(params: Mapping[str, Any]) -> str:
    """Return a point in words: `kappa 5, delta_base 0.1`."""
    words = []
    for key, value in params.items():
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        words.append(f"{key.rsplit('.', 1)[-1]} {shown}")
    return ", ".join(words)
