"""A worker: runs trials of a study until enough are completed, several at a time, and resumes those of dead workers.

Any number of workers, on one machine or several, may work on one study as long as they share its storage and its run store.
What to do next is decided by one worker at a time: a dead worker's trial first, else a new point if the budget has room for it.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from obowlab.config import Machine
from obowlab.errors import UserError
from obowlab.files.opening import user_name
from obowlab.files.sharing import is_others
from obowlab.launch.compute_command import CommandFactory, compute_command
from obowlab.launch.processes import STOPPING_RUNS, StopSignals
from obowlab.runs.info import TRAINED, read_state
from obowlab.studies.schema import STUDIES
from obowlab.studies.spec import CategoricalParameter, FloatParameter, Parameter, Tuning, choice_label
from obowlab.studies.trial import GIVEN, PAPER, RECIPE, WHOSE, Outcome, TrialContext, TrialRunner, describe
from obowlab.studies.trial_locks import TrialLocks

POLL_S = 2.0
RETRY_S = 5.0
SIGNAL_POLL_S = 0.2
MAX_FAILURES = 3
"""After so many failed trials in a row a worker gives up: something is wrong that another point will not fix."""
DEFINITION = "definition"
"""Attribute of a study: what must stay the same."""
BUDGET = "budget"
"""Attribute of a study: completed trials wanted, as the last `--trials` said."""


class Stopped(Exception):  # noqa: N818 - not an error: open trials are resumed later
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


def open_study(tuning: Tuning, *, storage: BaseStorage, locks: TrialLocks) -> optuna.Study:
    """Open a study, or make it and put the paper's point first.

    Raises:
        UserError: somebody else made it, or it was created with another recipe, space or objective.
    """
    with locks.alone():
        study = optuna.create_study(
            study_name=tuning.name,
            storage=storage,
            direction="maximize" if tuning.maximize else "minimize",
            load_if_exists=True,
        )
        check_own(study, tuning=tuning)
        if DEFINITION not in study.user_attrs:
            study.set_user_attr("title", tuning.spec.title)
            study.set_user_attr(DEFINITION, tuning.definition())
        study.set_metric_names([tuning.spec.objective])
        _put_known_points_first(study, tuning=tuning)
    study.pruner = _pruner(tuning)
    return study


def _put_known_points_first(study: optuna.Study, *, tuning: Tuning) -> None:
    """Enqueue the paper's point; in a study of which no trial has begun, after it the recipe's own and the file's.

    What a killed command has enqueued already is not enqueued again.
    """
    trials = study.get_trials(deepcopy=False)
    paper, own = tuning.paper_point(), tuning.recipe_point()
    given = [point for point in tuning.given_points() if point not in (paper, own)]
    there = {name: sum(bool(trial.user_attrs.get(name)) for trial in trials) for name in WHOSE}
    if paper is not None and not there[PAPER]:
        study.enqueue_trial(paper, user_attrs={PAPER: True, **({RECIPE: True} if paper == own else {})})
    if any(trial.state != TrialState.WAITING for trial in trials):
        return
    if own is not None and own != paper and not there[RECIPE]:
        study.enqueue_trial(own, user_attrs={RECIPE: True})
    for point in given[there[GIVEN] :]:
        study.enqueue_trial(point, user_attrs={GIVEN: True})


def budget_of(study: optuna.Study | None, *, tuning: Tuning, asked: int | None) -> int:
    """Return how many completed trials are wanted: as asked for, else as the last time, else as the file says."""
    return asked or (study.user_attrs.get(BUDGET) if study is not None else None) or tuning.spec.trials


def check_own(study: optuna.Study, *, tuning: Tuning) -> None:
    """Refuse a study of this name that another program made, or obowlab for something else; writes nothing.

    One that holds nothing yet is taken: a command that was killed between its first two writes leaves such.

    Raises:
        UserError: says what it is, and what to do.
    """
    created_with = study.user_attrs.get(DEFINITION)
    if isinstance(created_with, Mapping):
        return _refuse_another(tuning, created_with=created_with, definition=tuning.definition())
    ours = StudyDirection.MAXIMIZE if tuning.maximize else StudyDirection.MINIMIZE
    trials = study.get_trials(deepcopy=False)
    if study.directions == [ours] and not trials and set(study.user_attrs) <= {"title"}:
        return None
    names = ", ".join(sorted({name for trial in trials for name in trial.params}))
    kind = " and ".join(f"{direction.name.lower()}s" for direction in study.directions)
    raise UserError(
        f"Study '{study.study_name}' in this storage was not made by obowlab (it {kind}, with {len(trials)} trials"
        f"{f' over {names}' if names else ''}) and is left as it is: give yours another --name or another --storage."
    )


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
        locks: TrialLocks,
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
            locks: who works on which trial.
            machine: of every run.
            slots: trials at a time.
            budget: completed trials in the storage, of all workers.
            say: prints one line.
            after_trial: called after every trial that ended.
            command: makes the command line of the compute process.
        """
        self.tuning = tuning
        self.study = study
        self.locks = locks
        self.budget = budget
        self._machine = machine
        self._slots = slots
        self._say = say
        self._after_trial = after_trial
        self._command = command
        self._stopping = threading.Event()
        self._left: set[int] = set()
        self._guard = threading.Lock()
        self._running: list[StopSignals] = []
        self._failures = 0

    def work(self) -> Ended:
        """Work until the budget is reached, the user stops it or too many trials fail.

        Raises:
            UserError: something that every trial would meet; the next worker resumes the open trials.
        """
        signals, handled = StopSignals(notice=STOPPING_RUNS), 0
        with signals.listening(), ThreadPoolExecutor(self._slots) as pool:
            slots = [pool.submit(self._slot) for _ in range(self._slots)]
            while wait(slots, timeout=SIGNAL_POLL_S).not_done:
                for number in signals.received[handled:]:
                    self._stop(number)
                    handled += 1
        for slot in slots:
            slot.result()
        return Ended(signum=next(iter(signals.received), 0), failures=self._failures)

    # -------------------------------------------------------------------------------------------------- slots

    def _slot(self) -> None:
        """Run one trial after the other."""
        context = TrialContext(
            tuning=self.tuning,
            study=self.study,
            locks=self.locks,
            machine=self._machine,
            stopping=self._stopping,
            say=self._say,
            watch=self._watch,
            retry=self._retry,
            command=self._command,
        )
        waited_for: list[int] = []
        try:
            while not self._stopping.is_set():
                trial, others = self._retry(self._claim)
                if trial is not None:
                    try:
                        outcome = TrialRunner(context, trial=trial, recipe=self.tuning.recipe(trial.params)).run()
                        self._settle(trial, outcome)
                    finally:
                        self.locks.release(trial.number)
                elif not others:
                    return
                else:
                    if others != waited_for:
                        numbers = ", ".join(str(number) for number in others)
                        self._say(f"waiting for trial {numbers} of other workers or jobs")
                    self._stopping.wait(POLL_S)
                waited_for = others
        except Stopped:
            return
        except BaseException:  # raised again by `work`, once every run has saved a checkpoint
            self._stop(signal.SIGTERM)
            raise

    def _claim(self) -> tuple[optuna.Trial | None, list[int]]:
        """Decide what to do next, alone among all workers.

        Returns:
            A trial to run, whose lock this worker then holds. Without one, the trials of others to wait for: if they all
            complete, the budget is reached. Neither when it is reached.
        """
        with self.locks.alone():
            while True:
                trials = self.study.get_trials(deepcopy=False)
                completed = sum(trial.state == TrialState.COMPLETE for trial in trials)
                if completed >= self.budget:
                    return None, []
                running = [trial for trial in trials if trial.state == TrialState.RUNNING and not self._is_anothers(trial)]
                left = next((trial for trial in running if self.locks.take(trial.number)), None)
                if left is None:
                    break
                with self._released_on_error(left.number):
                    if self.study.get_trials(deepcopy=False)[left.number].state == TrialState.RUNNING:
                        return self._adopt(left.number, left._trial_id), []
                self.locks.release(left.number)  # its worker recorded its end between the two looks
            if completed + len(running) >= self.budget:
                return None, [trial.number for trial in running]
            # The sampler's seed follows the number of the trial, so that workers and restarts never draw the same points.
            self.study.sampler = _sampler(self.tuning, number=len(trials))
            chosen = self.study.ask(distributions(self.tuning))
            taken = self.locks.take(chosen.number)
            assert taken, "no other worker can know of this trial"
        with self._released_on_error(chosen.number):
            known = next((whose for name, whose in WHOSE.items() if chosen.user_attrs.get(name)), None)
            kind = f"the {known}'s point, " if known is not None else ""
            self._say(f"trial {chosen.number}: {kind}{describe(chosen.params)}")
        return chosen, []

    def _is_anothers(self, trial: FrozenTrial) -> bool:
        """Return whether a trial that nobody works on has an unfinished run of another user, who alone can continue it."""
        if trial.number in self._left:
            return True
        if self.locks.is_held(trial.number):
            return False
        for path in (self._machine.runs_root / name for name in trial.user_attrs.get("run_folders", {}).values()):
            try:
                if not is_others(path) or read_state(path).status in TRAINED:
                    continue
            except FileNotFoundError:
                continue
            except UserError:  # not for us to read
                pass
            self._left.add(trial.number)
            owner = user_name(path.lstat().st_uid)
            self._say(f"trial {trial.number}: left by {owner}, who continues it with the same command; another takes its place")
            return True
        return False

    @contextmanager
    def _released_on_error(self, number: int) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.locks.release(number)  # it is open, and the next claim finds it
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
        self._say(f"trial {number}: resuming {describe(trial.params)},{left_by or ' whose worker is gone'}")
        return trial

    def _settle(self, trial: optuna.Trial, outcome: Outcome) -> None:
        if outcome.ending == "stopped":
            return
        if outcome.message:
            self._retry(trial.set_user_attr, "message", outcome.message)
        state = {"completed": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}[outcome.ending]
        self._retry(self.study.tell, trial.number, outcome.value, state=state, skip_if_finished=True)
        value = f" {self.tuning.spec.objective} {outcome.value:.2f}" if outcome.value is not None else ""
        why = f" ({outcome.message})" if outcome.message else ""
        self._say(f"trial {trial.number}: {outcome.ending}{value}{why}")
        self._retry(self._after_trial)
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

    def _stop(self, number: int) -> None:
        """Let no trial begin any more and stop all runs; a second call kills those that have not stopped by then."""
        self._stopping.set()
        for signals in list(self._running):
            signals.send(number)

    def _retry(self, function: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
        """Call a function of the storage; while the storage does not answer, say so and try again.

        Raises:
            Stopped: the user stopped the waiting; the trial stays open.
        """
        announced = False
        while True:
            try:
                return function(*args, **keywords)
            except StorageInternalError as error:
                reason = " ".join(str(error.__cause__ or error).split())[:120]
                if not announced:
                    self._say(f"the study's storage does not answer ({reason}); runs continue, and it is tried again")
                announced = True
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


def _refuse_another(tuning: Tuning, *, created_with: Mapping[str, Any], definition: Mapping[str, Any]) -> None:
    for key in {**created_with, **definition}:
        if created_with.get(key) != definition.get(key):
            before, now = (values.get(key, "its default") for values in (created_with, definition))
            raise UserError(
                f"Study '{tuning.name}' was created with {key} = {before}, now it is {now}: their trials cannot be compared. "
                "Restore it, or give the new study a --name."
            )
