"""Execute a plan: train what is missing, some runs at a time, each an `obowlab run` in a process of its own.

The run store alone says what is done: killed at any moment and started again, the same command continues, and two of them at once
are kept apart by the lock of each run.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from obowlab.config import Machine
from obowlab.files.opening import read_file
from obowlab.files.sharing import shared_file, shared_folder
from obowlab.launch.processes import STOPPING_RUNS, StopSignals, start
from obowlab.runs.folder import RunFolder
from obowlab.runs.listing import RunSummary, has_run
from obowlab.runs.locks import is_locked
from obowlab.runs.records import store_runs
from obowlab.tables.plan import Job, Plan, labels_of

POLL_S = 1.0
REPORT_EVERY_S = 60.0
LOGS = ".logs"


@dataclass(frozen=True)
class Outcome:
    """How a job ended: `stopped` when a signal asked to stop before it was finished."""

    job: Job
    status: Literal["finished", "failed", "stopped"]
    message: str = ""


@dataclass
class _Child:
    process: subprocess.Popen[bytes]
    signals_sent: int = 0


@dataclass
class Execution:
    """The execution of a plan.

    Attributes:
        plan: what is needed.
        machine: where and with what; on CUDA every job takes a free GPU.
        slots: jobs at a time.
        say: prints one line.
        machine_file: where the machine's other settings are, for the jobs; None for the usual place.
        again: fingerprints of finished jobs that are to be measured, see `plan.unmeasured`; those begun are taken out.
        finished: called with every job that ends well.
        labelled: runs that got new labels, in the order of labelling.
        signals: that asked to stop.
    """

    plan: Plan
    machine: Machine
    slots: int
    say: Callable[[str], None]
    machine_file: Path | None = None
    again: set[str] = field(default_factory=set)
    finished: Callable[[Job], object] = lambda job: None
    labelled: list[RunFolder] = field(default_factory=list)
    signals: StopSignals = field(default_factory=lambda: StopSignals(notice=STOPPING_RUNS))
    _children: dict[str, _Child] = field(default_factory=dict)
    _announced: set[str] = field(default_factory=set)
    _with_labels: set[str] = field(default_factory=set)

    def run(self) -> list[Outcome]:
        """Train what is missing and return how every job ended, in the plan's order.

        A failed job stops no others, except those that need it. A job that another process trains is waited for without taking
        a slot, and taken over if that process dies. The first stopping signal makes all children save and stop, the second kills
        them.
        """
        ended: dict[str, Outcome] = {}
        running: dict[Future[Outcome | None], Job] = {}
        reported_at = time.monotonic()
        with self.signals.listening(), ThreadPoolExecutor(self.slots) as pool:
            try:
                while len(ended) < len(self.plan.jobs) and (running or not self.signals.received):
                    some_wait = len(ended) + len(running) < len(self.plan.jobs)
                    if some_wait and len(running) < self.slots and not self.signals.received:
                        for job, run in self._ready(ended, running.values()):
                            running[pool.submit(self._train, job, run)] = job
                    if not running and len(ended) < len(self.plan.jobs):  # the rest is trained by other processes
                        time.sleep(POLL_S)
                    done, _ = wait(running, timeout=POLL_S, return_when=FIRST_COMPLETED)
                    for future in done:
                        job = running.pop(future)
                        outcome = future.result()
                        if outcome is not None:
                            ended[job.fingerprint] = outcome
                            self._say_ended(outcome, num_ended=len(ended))
                    self._pass_signals_on()
                    if time.monotonic() - reported_at >= REPORT_EVERY_S:
                        reported_at = time.monotonic()
                        self._report(len(ended), running.values())
            finally:
                for child in self._children.values():
                    child.process.terminate()
        return [ended.get(job.fingerprint, Outcome(job, "stopped")) for job in self.plan.jobs]

    def _ready(self, ended: dict[str, Outcome], running: Iterable[Job]) -> Iterator[tuple[Job, RunSummary | None]]:
        """Yield the jobs to start now, with their present runs; record those that are finished, or whose stage failed."""
        started = {job.fingerprint for job in running}
        free = self.slots - len(started)
        runs = store_runs(self.machine.runs_root, fingerprints=self.plan.fingerprints)
        for job in self.plan.jobs:
            if job.fingerprint in ended or job.fingerprint in started:
                continue
            run = runs.get(job.fingerprint)
            stage = ended.get(job.needs) if job.needs is not None else None
            if run is not None:
                self._label(job, run.path)
            if run is not None and run.state.status == "finished" and job.fingerprint not in self.again:
                ended[job.fingerprint] = Outcome(job, "finished")
            elif stage is not None and stage.status != "finished":
                ended[job.fingerprint] = Outcome(job, "failed", "the stage before it failed")
            elif run is not None and is_locked(run.path):
                if stage is not None or job.needs is None:
                    self._say_once(f"{run.info.run_id} is being trained by another process; waiting for it.")
            elif free and (stage is not None or job.needs is None):
                free -= 1
                self.again.discard(job.fingerprint)
                yield job, run

    # ------------------------------------------------------------------------------------------------- one job, in a thread

    def _train(self, job: Job, run: RunSummary | None) -> Outcome | None:
        """Train a job in a process of its own; None if it has to be looked at again."""
        run_id = run.info.run_id if run is not None else job.run_id
        path = run.path if run is not None else self.machine.runs_root / run_id
        log = shared_file(shared_folder(self.machine.runs_root / LOGS) / f"{run_id}.log")  # of another user, perhaps
        environment = dict(os.environ)
        if self.machine_file is not None:
            environment["OBOWLAB_MACHINE"] = str(self.machine_file.absolute())
        command = [sys.executable, "-m", "obowlab.cli", *job.command, *self.machine.local_args(), "--no-progress"]
        process = start(command, environment=environment, output=log)
        self._children[job.fingerprint] = _Child(process)
        is_finished = run is not None and run.state.status == "finished"
        verb = "Measuring" if is_finished else "Continuing" if run is not None and run.state.step else "Training"
        self.say(f"{verb} {run_id} for {', '.join(job.places)}.")
        while process.returncode is None:
            try:
                process.wait(POLL_S)
            except subprocess.TimeoutExpired:
                self._label(job, path)
        del self._children[job.fingerprint]
        self._label(job, path)
        run = store_runs(self.machine.runs_root, fingerprints={job.fingerprint}).get(job.fingerprint)
        if run is not None and run.state.status == "finished":
            return Outcome(job, "finished")
        if self.signals.received or (run is not None and is_locked(run.path)):  # another command locked it first
            return None
        message = (run.state.message if run is not None else "") or _last_line(log)
        return Outcome(job, "failed", message or f"ended with exit code {process.returncode}")

    def _label(self, job: Job, path: Path) -> None:
        """Write into a run, once its folder is there, which rows it serves; its mirror makes tags of that in MLflow."""
        if job.fingerprint not in self._with_labels and has_run(path):
            self._with_labels.add(job.fingerprint)
            folder = RunFolder.open(path)
            if folder.add_labels(labels_of(job, plan=self.plan)):
                self.labelled.append(folder)

    # --------------------------------------------------------------------------------------------------- messages and signals

    def _say_once(self, line: str) -> None:
        if line not in self._announced:
            self._announced.add(line)
            self.say(line)

    def _say_ended(self, outcome: Outcome, *, num_ended: int) -> None:
        if outcome.status == "finished":
            self.say(f"{outcome.job.run_id} is finished ({num_ended} of {len(self.plan.jobs)}).")
            self.finished(outcome.job)
        else:
            self.say(f"{outcome.job.run_id} failed: {outcome.message}")

    def _report(self, num_ended: int, running: Iterable[Job]) -> None:
        runs = store_runs(self.machine.runs_root, fingerprints={job.fingerprint for job in running})
        parts = [
            f"{run.info.run_id} {100 * run.state.step // run.state.total_steps} %"
            for run in runs.values()
            if run.state.total_steps
        ]
        self.say(f"{num_ended} of {len(self.plan.jobs)} done; training {', '.join(parts) or 'nothing yet'}.")

    def _pass_signals_on(self) -> None:
        """Send every child one SIGTERM per signal received: it saves at the first and is killed at the second.

        Only the main loop does this, and so a child that starts while a signal arrives gets each of them just once.
        """
        for child in list(self._children.values()):
            while child.signals_sent < len(self.signals.received):
                child.signals_sent += 1
                child.process.send_signal(signal.SIGTERM)


def _last_line(log: Path) -> str:
    lines = read_file(log).decode(errors="replace").splitlines()
    return lines[-1].removeprefix("Error: ")[:300] if lines else ""
