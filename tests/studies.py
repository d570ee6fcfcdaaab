"""What the tests of studies share: a search space, a stand-in for the compute process, workers as processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna

from obowlab.config import Machine
from obowlab.launch import local as launching
from obowlab.studies import trial as trials
from obowlab.studies import worker as workers
from obowlab.studies.schema import StudyReport
from obowlab.studies.spec import Tuning, plan_study
from obowlab.studies.storage import open_storage, quiet, storage_url
from obowlab.studies.summary import Reporter
from obowlab.studies.trial_locks import TrialLocks
from obowlab.studies.worker import Ended, Worker, open_study, study_folder
from tests.processes import NoMirror

STUDY = """
title = "a search"
base = "vanilla"
objective = "fewshot_5shot"
trials = 4
seeds = {seeds}

[overrides]
"training.epochs" = 6
"evaluation.protocols" = ["fewshot"]

[parameters."method.kappa"]
kind = "float"
low = 1.0
high = 64.0
log = true

[paper]
"method.kappa" = 5.0

[sampler]
startup_trials = 3

[pruner]
kind = "{pruner}"
points = 5
startup_trials = 1
warmup_points = 1
"""

REAL_STUDY = """
base = "vanilla"
objective = "fewshot_1shot"
trials = {trials}

[overrides]
"data.dataset" = "small"
"views.original_size" = 24
"views.original_resize" = 27
"views.crop_size" = 16
"backbone.width" = 4
"method.num_words" = 16
"training.epochs" = {epochs}
"training.batch_size" = 8
"evaluation.protocols" = ["fewshot"]
"evaluation.random_baseline" = false
"evaluation.fewshot.num_ways" = 3
"evaluation.fewshot.shots" = [1]
"evaluation.fewshot.num_episodes" = 10

[parameters."method.kappa"]
kind = "float"
low = 1.0
high = 20.0

[paper]
"method.kappa" = 5.0

[pruner]
kind = "{pruner}"
"""
"""A study whose trials train in earnest, in seconds each, on the data set `small`."""

COMPUTE = """
import math, os, signal, sys, time
from pathlib import Path
from obowlab.runs import RunFolder

folder, behaviour, delay = RunFolder.open(Path(sys.argv[1])), sys.argv[2], float(sys.argv[3])
stopped = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: stopped.append(number))
recipe = folder.info.recipe
epochs, every = recipe.training.epochs, recipe.evaluation.every_epochs
value = 60 - 10 * abs(math.log(getattr(recipe.method, "kappa", 8) / 8)) + folder.info.seed
with folder.lock(), folder.metric_log() as log, folder.metric_log("online") as online:
    folder.append_attempt({"step": max(log.last_step, 0), "gpu": os.environ.get("CUDA_VISIBLE_DEVICES")})
    for epoch in range(max(log.last_step, 0) + 1, epochs + 1):
        time.sleep(delay)
        if stopped:
            folder.set_state(status="interrupted", message="stopped by a signal")
            sys.exit(128 + stopped[0])
        log.append(epoch, {"loss": 1 / epoch})
        folder.set_state(status="running", step=epoch, total_steps=epochs)
        if every and epoch % every == 0 and epoch < epochs:
            online.append(epoch, {"epoch": epoch, "fewshot_5shot": value * epoch / epochs})
        if behaviour == "killed" and len(folder.attempts()) == 1 and epoch == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if behaviour == "broken":
            folder.set_state(status="failed", message="the loss is not finite")
            sys.exit(2)
    settings = recipe.evaluation.fewshot.model_dump(mode="json")
    right = [round(value / 2) + i % 3 for i in range(10)]
    folder.add_result({
        "protocol": "fewshot", "version": 1, "protocol_hash": "ab" * 32, "subject": "student",
        "weights_hash": folder.info.fingerprint, "data_hash": "ef" * 32, "elapsed_s": 0.1,
        "details": {"dataset": recipe.data.dataset, **settings},
        "measurements": [{"name": "fewshot_5shot", "value": value, "interval": 0.5, "count": 10,
                          "samples": {"of": 50, "count": 10, "correct": right}}],
    })
    folder.set_state(status="finished", step=epochs)
"""

WORK = "import sys; from tests.studies import main; sys.exit(main(sys.argv[1:]))"


def hurry() -> None:
    """Look more often than users need."""
    launching.Mirror = NoMirror  # type: ignore[assignment, misc]
    trials.POLL_S, trials.WAIT_S = 0.03, 0.1
    workers.POLL_S, workers.RETRY_S = 0.1, 0.3


def machine_of(root: Path) -> Machine:
    return Machine(data_root=root / "data", runs_root=root / "runs", device="cpu")


def tuning_of(root: Path, *, text: str = STUDY, pruner: str = "none", seeds: Sequence[int] = (0,), **options: Any) -> Tuning:
    root.mkdir(exist_ok=True, parents=True)
    path = root / "search.toml"
    path.write_text(text.replace("{pruner}", pruner).replace("{seeds}", str(list(seeds))))
    return plan_study(str(path), scale="demo", **options)


def stand_in(root: Path, *, behaviour: str = "quick", delay: float = 0.0) -> Callable[[Path, Machine], list[str]]:
    script = root / "compute.py"
    script.write_text(COMPUTE)
    return lambda path, machine: [sys.executable, str(script), str(path), behaviour, str(delay)]


class Search:
    """A study in a folder of its own, as the command line puts it together."""

    def __init__(self, root: Path, *, tuning: Tuning | None = None, storage: str | None = None) -> None:
        self.root = root
        self.tuning = tuning or tuning_of(root)
        self.machine = machine_of(root)
        self.url = storage_url(storage, runs_root=self.machine.runs_root)
        self.locks = TrialLocks(study_folder(self.tuning, machine=self.machine))
        self.said: list[str] = []

    def open(self) -> optuna.Study:
        with quiet():
            with self.locks.alone():
                storage = open_storage(self.url)
            return open_study(self.tuning, storage=storage, locks=self.locks)

    def work(
        self,
        *,
        budget: int,
        slots: int = 1,
        behaviour: str = "quick",
        delay: float = 0.0,
        say: Callable[[str], None] | None = None,
    ) -> Ended:
        with quiet():
            return Worker(
                self.tuning,
                study=self.open(),
                locks=self.locks,
                machine=self.machine,
                slots=slots,
                budget=budget,
                say=say or self.said.append,
                after_trial=lambda: None,
                command=stand_in(self.root, behaviour=behaviour, delay=delay),
            ).work()

    def report(self, *, budget: int = 4) -> StudyReport:
        study = self.open()
        with quiet():
            return Reporter(
                study, tuning=self.tuning, machine=self.machine, locks=self.locks, budget=budget, storage=self.url
            ).write()


def start_worker(root: Path, *, storage: str, budget: int, delay: float, name: str) -> subprocess.Popen[str]:
    """Start a worker process; it prints a line per event."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    words = [str(root), storage, str(budget), str(delay), name]
    return subprocess.Popen([sys.executable, "-c", WORK, *words], env=environment, stdout=subprocess.PIPE, text=True)


def main(words: Sequence[str]) -> int:
    """Work as a process of its own: ROOT STORAGE BUDGET DELAY NAME."""
    root, storage, budget, delay, name = words
    hurry()
    search = Search(Path(root), tuning=tuning_of(Path(root), study_name=name), storage=storage)
    ended = search.work(budget=int(budget), delay=float(delay), say=lambda text: print(text, flush=True))
    return 128 + ended.signum if ended.signum else 0
