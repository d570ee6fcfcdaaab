"""A worker: claims trials of a study until enough are completed, so many at a time, and goes on with those of dead workers.

Any number of workers, on one machine or several, may work on one study as long as they share its storage and its run store.
What to do next is decided by one worker at a time: a dead worker's trial first, else a new point if the budget has room for it.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from obowlab.config import Machine
from obowlab.errors import UserError
from obowlab.launch.compute_command import CommandFactory, compute_command
from obowlab.launch.processes import StopSignals
from obowlab.signals import STOPPING
from obowlab.studies.spec import CategoricalParameter, FloatParameter, Parameter, Tuning, choice_label
from obowlab.studies.storage import STUDIES
from obowlab.studies.trial import Bench, Outcome, TrialWork, describe
from obowlab.studies.trial_locks import Claims

POLL_S = 2.0
RETRY_S = 5.0
LOOK_AGAIN = "things have just changed"
MAX_FAILURES = 3
"""So many failed trials of this worker in a row, and it gives up: something is wrong that another point will not mend."""
DEFINITION = "definition"
"""Attribute of a study: what must stay the same."""


class Stopped(Exception):  # noqa: N818 - not an error: open trials are gone on with later
    """The user wants to stop."""


@dataclass(frozen=True)
class Ended:
    """How a worker ended.

    Attributes:
        signum: the signal that stopped it; 0 for none.
        failures: failed trials in a row at the end; `MAX_FAILURES` made it give up.
    """

    signum: int
    failures: int


def open_study(tuning: Tuning, *, storage: BaseStorage, claims: Claims) -> optuna.Study:
    """Open a study, or make it and put the paper's point first.

    Raises:
        UserError: it was begun with another recipe, space or objective.
    """
    definition = tuning.definition()
    with claims.alone():
        study = optuna.create_study(
            study_name=tuning.name,
            storage=storage,
            direction="maximize" if tuning.maximize else "minimize",
            load_if_exists=True,
        )
        begun_with = study.user_attrs.get(DEFINITION)
        if begun_with is None:
            study.set_user_attr("title", tuning.spec.title)
            study.set_user_attr(DEFINITION, definition)
        else:
            _refuse_another(tuning, begun_with=begun_with, definition=definition)
        study.set_metric_names([tuning.spec.objective])
        paper = tuning.paper_point()
        if paper is not None and not any(trial.user_attrs.get("paper") for trial in study.get_trials(deepcopy=False)):
            study.enqueue_trial(paper, user_attrs={"paper": True})
    study.pruner = _pruner(tuning)
    return study


def find_study(tuning: Tuning, *, storage: BaseStorage) -> optuna.Study | None:
    """Open a study that is there; None when it is not."""
    try:
        study = optuna.load_study(study_name=tuning.name, storage=storage)
    except KeyError:
        return None
    return study


def study_folder(tuning: Tuning, *, machine: Machine) -> Path:
    """Return `RUNS_ROOT/.studies/NAME`."""
    return machine.runs_root / STUDIES / tuning.name


class Worker:
    """Works on a study with several slots, each of which has one trial at a time."""

    def __init__(
        self,
        tuning: Tuning,
        *,
        study: optuna.Study,
        claims: Claims,
        machine: Machine,
        slots: int,
        budget: int,
        say: Callable[[str], None],
        after_trial: Callable[[], object],
        command: CommandFactory = compute_command,
    ) -> None:
        """Prepare to work.

        Args:
            tuning: the study.
            study: in its storage.
            claims: who works on which trial.
            machine: of every run.
            slots: trials at a time.
            budget: completed trials in the storage, whoever completed them.
            say: prints one line.
            after_trial: called after every trial that ended.
            command: makes the command line of the compute process.
        """
        self.tuning = tuning
        self.study = study
        self.claims = claims
        self.budget = budget
        self._machine = machine
        self._slots = slots
        self._say = say
        self._after_trial = after_trial
        self._command = command
        self._stopping = threading.Event()
        self._signum = 0
        self._guard = threading.Lock()
        self._running: list[StopSignals] = []
        self._failures = 0
        self._errors: list[BaseException] = []

    def work(self) -> Ended:
        """Work until the budget is reached, the user stops it or too many trials fail.

        Raises:
            UserError: something that every trial would meet; open trials are gone on with by the next worker.
        """
        threads = [threading.Thread(target=self._slot, name=f"slot {number}") for number in range(self._slots)]
        with self._listening():
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)  # in turns, so that signals are dealt with
        for error in self._errors:
            raise error
        return Ended(signum=self._signum, failures=self._failures)

    # -------------------------------------------------------------------------------------------------- slots

    def _slot(self) -> None:
        bench = Bench(
            tuning=self.tuning,
            study=self.study,
            claims=self.claims,
            machine=self._machine,
            stopping=self._stopping,
            say=self._say,
            watch=self._watch,
            patiently=self._patiently,
            command=self._command,
        )
        waiting = ""
        try:
            while not self._stopping.is_set():
                trial = self._patiently(self._claim)
                if isinstance(trial, str):
                    if not trial:
                        return
                    if trial not in (waiting, LOOK_AGAIN):
                        self._say(trial)
                    waiting = trial
                    self._stopping.wait(POLL_S)
                    continue
                waiting = ""
                try:
                    outcome = TrialWork(bench, trial=trial, recipe=self.tuning.recipe(trial.params)).carry_out()
                    self._settle(trial, outcome)
                finally:
                    self.claims.release(trial.number)
        except Stopped:
            return
        except BaseException as error:  # raised again by `work`, once every run has saved itself
            self._errors.append(error)
            self._stop(signal.SIGTERM)

    def _claim(self) -> optuna.Trial | str:
        """Decide what to do next, alone among all workers.

        Returns:
            A trial to carry out, which this worker holds; or why there is none yet; or nothing when the budget is reached.
        """
        with self.claims.alone():
            trials = self.study.get_trials(deepcopy=False)
            completed = sum(trial.state == TrialState.COMPLETE for trial in trials)
            if completed >= self.budget:
                return ""
            running = [trial for trial in trials if trial.state == TrialState.RUNNING]
            for trial in running:
                if self.claims.take(trial.number):
                    with self._released_unless_well(trial.number):
                        now = self.study.get_trials(deepcopy=False)[trial.number]
                        if now.state == TrialState.RUNNING:
                            return self._adopt(trial.number, trial._trial_id)
                    self.claims.release(trial.number)  # its worker has just finished it and let it go
                    return LOOK_AGAIN
            if completed + len(running) >= self.budget:
                return f"waiting for trial {', '.join(str(trial.number) for trial in running)} of other workers or jobs"
            # The sampler's seed follows the number of the trial, so that workers and restarts never draw the same points.
            self.study.sampler = _sampler(self.tuning, number=len(trials))
            chosen = self.study.ask(distributions(self.tuning))
            assert self.claims.take(chosen.number), "nobody else can know of this trial"
        with self._released_unless_well(chosen.number):
            kind = "the paper's point, " if chosen.user_attrs.get("paper") else ""
            self._say(f"trial {chosen.number}: {kind}{describe(chosen.params)}")
            return chosen

    @contextmanager
    def _released_unless_well(self, number: int) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.claims.release(number)  # it is open, and the next claim finds it
            raise

    def _adopt(self, number: int, trial_id: int) -> optuna.Trial:
        """Take over a trial whose worker is gone: the same trial, and with its recipe the same runs and their checkpoints."""
        self.study.sampler = _sampler(self.tuning, number=number)
        trial = optuna.trial.Trial(self.study, trial_id)
        for key, distribution in distributions(self.tuning).items():  # all there, unless it was killed while choosing
            trial._suggest(key, distribution)
        times = [*trial.user_attrs.get("resumed", []), round(time.time(), 3)]
        trial.set_user_attr("resumed", times)
        worker = trial.user_attrs.get("worker", {})
        left_by = f" left by process {worker['pid']} on {worker['host']}" if worker else ""
        self._say(f"trial {number}: going on with {describe(trial.params)},{left_by or ' whose worker is gone'}")
        return trial

    def _settle(self, trial: optuna.Trial, outcome: Outcome) -> None:
        if outcome.ending == "stopped":
            return
        if outcome.message:
            self._patiently(trial.set_user_attr, "message", outcome.message)
        state = {"completed": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}[outcome.ending]
        self._patiently(self.study.tell, trial.number, outcome.value, state=state, skip_if_finished=True)
        value = f" {self.tuning.spec.objective} {outcome.value:.2f}" if outcome.value is not None else ""
        why = f" ({outcome.message})" if outcome.message else ""
        self._say(f"trial {trial.number}: {outcome.ending}{value}{why}")
        self._patiently(self._after_trial)
        with self._guard:
            self._failures = self._failures + 1 if outcome.ending == "failed" else 0
            if self._failures >= MAX_FAILURES:
                self._stop(signal.SIGTERM)

    # ----------------------------------------------------------------------------------------------- stopping

    def _watch(self, signals: StopSignals) -> bool:
        with self._guard:
            if self._stopping.is_set():
                return False
            self._running.append(signals)
            return True

    @contextmanager
    def _listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # Python allows handlers in the main thread only
            yield
            return

        def receive(number: int, frame: FrameType | None) -> None:
            self._signum = self._signum or number
            self._stop(number)

        before = {number: signal.signal(number, receive) for number in STOPPING}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int) -> None:
        """Let no trial begin any more and stop all runs; a second call kills those that have not stopped by then."""
        self._stopping.set()
        for signals in list(self._running):
            signals.send(number)

    def _patiently(self, function: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
        """Call a function of the storage; while the storage is away, say so and try again.

        Raises:
            Stopped: the user stopped the waiting; the trial stays open.
        """
        told = False
        while True:
            try:
                return function(*args, **keywords)
            except StorageInternalError as error:
                reason = " ".join(str(error.__cause__ or error).split())[:120]
                if not told:
                    self._say(f"the study's storage does not answer ({reason}); runs go on, and it is asked again")
                told = True
            if self._stopping.wait(RETRY_S):
                raise Stopped


def distributions(tuning: Tuning) -> dict[str, BaseDistribution]:
    """Return the search space as Optuna has it."""
    return {key: _distribution(parameter) for key, parameter in tuning.spec.parameters.items()}


def _distribution(parameter: Parameter) -> BaseDistribution:
    if isinstance(parameter, CategoricalParameter):
        return CategoricalDistribution([choice_label(choice) for choice in parameter.choices])
    if isinstance(parameter, FloatParameter):
        return FloatDistribution(parameter.low, parameter.high, log=parameter.log)
    return IntDistribution(parameter.low, parameter.high, log=parameter.log)


def _sampler(tuning: Tuning, *, number: int) -> optuna.samplers.BaseSampler:
    settings = tuning.spec.sampler
    return optuna.samplers.TPESampler(
        seed=(settings.seed * 1_000_003 + number) % 2**32,
        n_startup_trials=settings.startup_trials,
        multivariate=settings.multivariate,
        constant_liar=settings.constant_liar,
    )


def _pruner(tuning: Tuning) -> optuna.pruners.BasePruner:
    settings = tuning.spec.pruner
    if settings.kind == "none":
        return optuna.pruners.NopPruner()
    every = tuning.every_epochs(tuning.base.recipe.training.epochs)
    return optuna.pruners.MedianPruner(
        n_startup_trials=settings.startup_trials,
        n_warmup_steps=settings.warmup_points * every + 1,  # steps are epochs; the points up to here are not acted on
        interval_steps=1,
        n_min_trials=settings.min_trials,
    )


def _refuse_another(tuning: Tuning, *, begun_with: Mapping[str, Any], definition: Mapping[str, Any]) -> None:
    for key in {**begun_with, **definition}:
        if begun_with.get(key) != definition.get(key):
            before, now = (values.get(key, "its default") for values in (begun_with, definition))
            raise UserError(
                f"Study '{tuning.name}' was begun with {key} = {before}, now it is {now}: their trials cannot be compared. "
                "Restore it, or give the new study a --name."
            )
