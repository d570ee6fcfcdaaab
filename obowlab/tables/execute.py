"""Tables to trainings: what is done, running and missing, and the missing ones carried out, some at a time.

The run store alone says what is done: a job is a recipe and a seed, and it is done when the store has a finished run with its
fingerprint. So an ablation has no state of its own: killed at any moment and typed again, it looks at the store and goes on, and
two of them at once meet in the lock of each run. Every job is an `obowlab run` of its own, in its own process.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from obowlab import text
from obowlab.config import Loaded, Machine, command_options
from obowlab.launch.processes import tied_to_this_process
from obowlab.runs.folder import RunFolder, RunSummary, run_id_of
from obowlab.runs.locks import is_locked
from obowlab.runs.records import store_runs
from obowlab.tables.spec import PlannedRow, PlannedTable

POLL_S = 1.0
REPORT_EVERY_S = 60.0
LOGS = ".logs"
_STOPPING = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Job:
    """One training of the plan.

    Attributes:
        loaded: its recipe.
        seed: its seed.
        fingerprint: of both.
        run_id: what the run is called.
        command: words after `obowlab` that train it.
        needs: fingerprint of the stage that must be finished before; None for none.
        places: the rows it serves, as `table1/queue_local`; stages of a row serve it too.
        is_stage: whether it serves rows only as an earlier stage.
    """

    loaded: Loaded
    seed: int
    fingerprint: str
    run_id: str
    command: tuple[str, ...]
    needs: str | None
    places: tuple[str, ...]
    is_stage: bool


@dataclass(frozen=True)
class Plan:
    """Every training that tables need, once each, in the order of carrying out: seed by seed, stages first."""

    tables: tuple[PlannedTable, ...]
    seeds: tuple[int, ...]
    jobs: tuple[Job, ...]

    @property
    def num_rows(self) -> int:
        """Rows of all tables."""
        return sum(len(table.rows) for table in self.tables)


def make_plan(tables: Sequence[PlannedTable], *, seeds: Sequence[int], rows: Mapping[str, Sequence[str]]) -> Plan:
    """Return what tables need.

    Args:
        tables: at one scale.
        seeds: every row has a run of each.
        rows: table -> keys of the rows wanted; the base row always comes along, as the others are compared with it.
    """
    jobs: dict[str, Job] = {}
    for seed in seeds:
        for table in tables:
            for row in sorted(table.rows, key=lambda row: not row.is_base):  # what the others are compared with, first
                if not wanted(row, table=table, rows=rows):
                    continue
                place = f"{table.name}/{row.row.key}"
                needs = None
                stages = row.loaded.stages()
                for number, stage in enumerate(stages, start=1):
                    fingerprint = stage.recipe.fingerprint(seed=seed)
                    last = number == len(stages)
                    before = jobs.get(fingerprint)
                    jobs[fingerprint] = Job(
                        loaded=stage,
                        seed=seed,
                        fingerprint=fingerprint,
                        run_id=before.run_id if before else run_id_of(stage, seed=seed),
                        command=before.command if before else _command(row, seed=seed, stage=None if last else number),
                        needs=needs,
                        places=(*(before.places if before else ()), *(() if before and place in before.places else (place,))),
                        is_stage=not last and (before is None or before.is_stage),
                    )
                    needs = fingerprint
    return Plan(tables=tuple(tables), seeds=tuple(seeds), jobs=tuple(jobs.values()))


def wanted(row: PlannedRow, *, table: PlannedTable, rows: Mapping[str, Sequence[str]]) -> bool:
    """Tell whether a row was asked for, or is the base row of one that was."""
    return row.is_base or not rows or row.row.key in rows.get(table.name, ())


def _command(row: PlannedRow, *, seed: int, stage: int | None) -> tuple[str, ...]:
    changes = [word for key, value in row.overrides.items() for word in ("--set", f"{key}={text.override(value)}")]
    only = () if stage is None else ("--stage", str(stage))
    return ("run", row.base_recipe, *changes, "--seed", str(seed), *only)


# ----------------------------------------------------------------------------------------------------------- carrying out


@dataclass(frozen=True)
class Outcome:
    """How a job ended: `finished`, `failed`, or `stopped` when the ablation was asked to stop."""

    job: Job
    status: str
    message: str = ""


@dataclass
class _Child:
    process: subprocess.Popen[bytes]
    log: IO[bytes]


@dataclass
class Ablation:
    """The carrying out of a plan.

    Attributes:
        plan: what is needed.
        machine: where and with what.
        slots: jobs at a time.
        gpus: whether every job takes a free GPU.
        say: prints one line.
        machine_file: where the machine's other settings are, for the jobs; None for the usual place.
        labelled: runs that learnt by this ablation which rows they serve, in the order of finding.
    """

    plan: Plan
    machine: Machine
    slots: int
    gpus: bool
    say: Callable[[str], None]
    machine_file: Path | None = None
    labelled: list[RunFolder] = field(default_factory=list)
    _seen: set[str] = field(default_factory=set)
    _children: dict[str, _Child] = field(default_factory=dict)
    _asked: int = 0

    def carry_out(self) -> list[Outcome]:
        """Train whatever is missing and return how every job ended, in the plan's order.

        A failed job does not stop the others, but those that need it. A job that another process trains is waited for, and
        taken over when that process dies.
        """
        ended: dict[str, Outcome] = {}
        announced: set[str] = set()
        last_report = time.monotonic()
        with self._listening():
            while len(ended) < len(self.plan.jobs):
                runs = store_runs(self.machine.runs_root, fingerprints={job.fingerprint for job in self.plan.jobs})
                self._label(runs)
                self._reap(ended)
                if self._asked:
                    if not self._children:
                        break
                else:
                    self._advance(ended, runs, announced)
                if len(ended) < len(self.plan.jobs):
                    if time.monotonic() - last_report >= REPORT_EVERY_S:
                        last_report = time.monotonic()
                        self._report(ended, runs)
                    time.sleep(POLL_S)
            self._label(store_runs(self.machine.runs_root, fingerprints={job.fingerprint for job in self.plan.jobs}))
        return [ended.get(job.fingerprint, Outcome(job, "stopped")) for job in self.plan.jobs]

    @property
    def asked_to_stop(self) -> int:
        """The number of the signal that asked to stop; 0 for none."""
        return self._asked

    # ------------------------------------------------------------------------------------------------- one round

    def _advance(self, ended: dict[str, Outcome], runs: Mapping[str, RunSummary], announced: set[str]) -> None:
        """File what is done, and start jobs while there are free slots."""
        for job in self.plan.jobs:
            key = job.fingerprint
            if key in ended or key in self._children:
                continue
            run = runs.get(key)
            if run is not None and run.state.status == "finished":
                ended[key] = Outcome(job, "finished")
                continue
            if job.needs is not None and job.needs not in ended:
                continue
            if job.needs is not None and ended[job.needs].status != "finished":
                ended[key] = Outcome(job, "failed", "the stage before it failed")
                continue
            if run is not None and is_locked(run.path):
                if key not in announced:
                    announced.add(key)
                    self.say(f"{run.info.run_id} is being trained by another process; waiting for it.")
                continue
            if len(self._children) < self.slots:
                self._start(job, run)

    def _start(self, job: Job, run: RunSummary | None) -> None:
        logs = self.machine.runs_root / LOGS
        logs.mkdir(parents=True, exist_ok=True)
        run_id = run.info.run_id if run is not None else job.run_id
        log = (logs / f"{run_id}.log").open("ab")
        environment = dict(os.environ)
        if self.machine_file is not None:
            environment["OBOWLAB_MACHINE"] = str(self.machine_file.absolute())
        process = subprocess.Popen(
            [sys.executable, "-m", "obowlab.cli", *job.command, *job_options(self.machine, gpus=self.gpus)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the ablation alone, which passes it on once
            preexec_fn=tied_to_this_process(),
        )
        self._children[job.fingerprint] = _Child(process, log)
        verb = "Continuing" if run is not None and run.state.step else "Training"
        self.say(f"{verb} {run_id} for {', '.join(job.places)}.")

    def _label(self, runs: Mapping[str, RunSummary]) -> None:
        """Write into every run, once it is there, which rows it serves; its own mirror makes tags of it in MLflow."""
        for job in self.plan.jobs:
            run = runs.get(job.fingerprint)
            if run is None or job.fingerprint in self._seen:
                continue
            self._seen.add(job.fingerprint)
            folder = RunFolder(run.path, run.info)
            if folder.add_labels(labels_of(job, plan=self.plan)):
                self.labelled.append(folder)

    def _reap(self, ended: dict[str, Outcome]) -> None:
        """File the jobs whose process has ended."""
        for job in self.plan.jobs:
            child = self._children.get(job.fingerprint)
            if child is None or child.process.poll() is None:
                continue
            child.log.close()
            del self._children[job.fingerprint]
            if self._asked:
                continue
            run = store_runs(self.machine.runs_root, fingerprints={job.fingerprint}).get(job.fingerprint)
            if run is not None and run.state.status == "finished":
                ended[job.fingerprint] = Outcome(job, "finished")
                self.say(f"{job.run_id} is finished ({len(ended)} of {len(self.plan.jobs)}).")
            elif run is None or not is_locked(run.path):  # another ablation may have been quicker to lock it
                message = (run.state.message if run is not None else "") or self._last_words(job)
                ended[job.fingerprint] = Outcome(job, "failed", message or f"ended with exit code {child.process.returncode}")
                self.say(f"{job.run_id} failed: {ended[job.fingerprint].message}")

    def _last_words(self, job: Job) -> str:
        lines = (self.machine.runs_root / LOGS / f"{job.run_id}.log").read_text(encoding="utf-8", errors="replace").splitlines()
        return lines[-1].removeprefix("Error: ")[:300] if lines else ""

    def _report(self, ended: Mapping[str, Outcome], runs: Mapping[str, RunSummary]) -> None:
        parts = []
        for job in self.plan.jobs:
            run = runs.get(job.fingerprint)
            if job.fingerprint in self._children and run is not None and run.state.total_steps:
                parts.append(f"{run.info.run_id} {100 * run.state.step // run.state.total_steps} %")
        self.say(f"{len(ended)} of {len(self.plan.jobs)} done; training {', '.join(parts) or 'nothing yet'}.")

    # -------------------------------------------------------------------------------------------------- signals

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Pass the first stopping signal on to all jobs, and again at every further one; kill nothing that is saving."""

        def pass_on(number: int, frame: FrameType | None) -> None:
            self._asked = number
            for child in self._children.values():
                if child.process.poll() is None:
                    child.process.send_signal(signal.SIGTERM)

        before = {number: signal.signal(number, pass_on) for number in _STOPPING}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def labels_of(job: Job, *, plan: Plan) -> dict[str, str]:
    """Return what a run is told of the rows it serves."""
    places = [place.split("/", maxsplit=1) for place in job.places]
    rows = {f"obowlab.{table}": f"{row} (stage)" if job.is_stage else row for table, row in places}
    return {**rows, "obowlab.scale": plan.tables[0].scale}


def job_options(machine: Machine, *, gpus: bool) -> list[str]:
    """Return what is added to a job's command: where, with what, and here."""
    device = "cuda" if gpus else machine.device
    return [*command_options(machine), "--device", device, "--launcher", "local", "--no-progress"]


def shown_command(job: Job) -> str:
    """Return what a user could type to train a job alone."""
    return shlex.join(["obowlab", *job.command])
