"""What a training will cost: its time, memory and disk, estimated before it begins.

The estimates come, the best first, from a finished run of the same recipe with as many processes on the same kind of device; from
a micro-benchmark, a few steps of the training itself (`obowlab.training.benchmark`), kept in RUNS_ROOT/.costs.json; or from a
finished run with another number of processes. The quote and the actual cost are kept in the run's `cost.json`.
"""

from __future__ import annotations

import json
import logging
import math
import socket
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from pydantic import BaseModel

from obowlab import text
from obowlab.config import Detector, Machine, Recipe
from obowlab.data.datasets import num_training_images
from obowlab.errors import UserError
from obowlab.files.opening import read_file
from obowlab.files.records import read_lines
from obowlab.files.replacing import write_atomic
from obowlab.files.room import free_bytes
from obowlab.launch.compute_command import compute_command, environment_of, threads_of
from obowlab.launch.gpu_leases import leased
from obowlab.launch.system import computes_bfloat16, computes_on_cpu
from obowlab.runs.folder import COST_FILE, RunFolder
from obowlab.runs.info import DAMAGED
from obowlab.runs.listing import RunSummary
from obowlab.runs.records import store_runs

COSTS = ".costs.json"
MIB = 2**20
SMALL_FILES_MIB = 3.0
"""Metrics, results and logs of a run."""

BENCHMARK_TIMEOUT_S = 600.0

NO_BFLOAT16 = (
    "This processor has no bfloat16 instructions: --set training.precision=float32 is likely faster here, and makes another run."
)

NODE_MIB_PER_S = 10_000.0
NODE_LATENCY_S = 50e-6
"""Assumed of the network between nodes: bandwidth for gradients, and what one small exchange takes."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cost:
    """What one training costs.

    Attributes:
        steps: optimiser updates; None when the data set is not known here.
        seconds: of training, without evaluation; None when nothing was measured.
        source: where the numbers come from: `run`, `benchmark` or `unknown`.
        memory_mib: peak of one process, on its GPU or else of the process itself; None when not measured.
        disk_mib: of the run folder in the end; None when not measured.
    """

    steps: int | None
    seconds: float | None
    source: Literal["run", "benchmark", "unknown"]
    memory_mib: float | None = None
    disk_mib: float | None = None

    def sentence(self, machine: Machine) -> str:
        """Return the cost as a sentence, for the processes of a machine and what they compute on."""
        if self.seconds is None:
            return "Cost: unknown; the command times a few steps first, on the machine that trains."
        procs = machine.procs
        on_cpu = machine.device == "cpu" or (machine.launcher == "local" and computes_on_cpu(machine))  # a cluster has its own
        parts = [
            f"{text.duration(self.seconds)} of training, {procs * self.seconds / 3600:.2g} {'CPU' if on_cpu else 'GPU'}-hours"
        ]
        if self.memory_mib is not None:
            parts.append(f"{_size(self.memory_mib)} of {'' if on_cpu else 'GPU '}memory for each of {procs} process(es)")
        if self.disk_mib is not None:
            parts.append(f"{_size(self.disk_mib)} on disk")
        return f"Cost, from {'a finished run' if self.source == 'run' else 'a micro-benchmark'}: {', '.join(parts)}."


def refuse_without_room(cost: Cost, *, run: str, runs_root: Path) -> None:
    """Refuse a training whose files would not fit.

    Raises:
        UserError: says what it needs and what is left.
    """
    if cost.disk_mib is None:
        return
    free_mib = free_bytes(runs_root) / MIB
    if cost.disk_mib > free_mib:
        raise UserError(
            f"{run} needs about {_size(cost.disk_mib)} on disk, and {runs_root} has {_size(free_mib)} left: make room or choose "
            "another --runs-root."
        )


class Measured(BaseModel):
    """What the micro-benchmark measures of a recipe, with the processes that one node has.

    Attributes:
        step_s: seconds of a step of the whole batch: loading, colours, forward, backward, collectives of this node, update.
        metrics_s: that a step takes longer when it is logged.
        load_s: seconds in which the loader makes a batch; it works beside the steps, and may be the slower one.
        start_s: that the first step takes longer: compilers, and libraries that make their plans.
        save_s: of writing a checkpoint.
        memory_mib: peak of one process.
        checkpoint_mib: of one checkpoint.
        encoder_mib: of the encoder alone.
        gradient_mib: what the processes average in every step.
        collectives: other exchanges in a step, of a few kilobytes each: batch-norm statistics and votes.
    """

    step_s: float
    metrics_s: float
    load_s: float
    start_s: float
    save_s: float
    memory_mib: float
    checkpoint_mib: float
    encoder_mib: float
    gradient_mib: float
    collectives: float

    def seconds(self, steps: int, *, machine: Machine) -> float:
        """Return the seconds of a training (docs/training.md, "What a training costs")."""
        log_every = max(1, math.ceil(steps / machine.log_points))
        step_s = max(self.step_s, self.load_s) + self._between_nodes_s(machine.nodes) + self.metrics_s / log_every
        saving = self.save_s / machine.checkpoint_every_s  # seconds of writing for every second of training
        return (self.start_s + steps * step_s) * (1.0 + saving)

    def _between_nodes_s(self, nodes: int) -> float:
        """Return what a step takes longer because the nodes exchange gradients and statistics; assumed, not measured."""
        if nodes == 1:
            return 0.0
        return 2 * self.gradient_mib * (nodes - 1) / nodes / NODE_MIB_PER_S + self.collectives * NODE_LATENCY_S


class CostBook:
    """The costs of recipes on this machine."""

    def __init__(self, machine: Machine, *, runs: Iterable[RunSummary]) -> None:
        """Read the measurements.

        Args:
            machine: its run store keeps the measurements.
            runs: the finished ones among them are measurements too.
        """
        self._machine = machine
        self._path = machine.runs_root / COSTS
        self._finished: dict[str, list[_Finished]] = {}
        for run in runs:
            if run.state.status == "finished":
                with suppress(*DAMAGED):  # it is no measurement; whoever lists the runs says so
                    self._note(RunFolder(run.path, run.info))
        self._measured = _read(self._path)

    def cost(self, recipe: Recipe) -> Cost:
        """Return what a training of this recipe costs, as far as it is known."""
        steps = num_steps(recipe, data_root=self._machine.data_root)
        if runs := self._alike(recipe):
            return _cost_of(runs, steps=steps, procs=self._machine.procs)
        measured = self._measured.get(self._place(recipe))
        if measured is not None and steps is not None:
            return Cost(
                steps,
                measured.seconds(steps, machine=self._machine),
                "benchmark",
                memory_mib=round(measured.memory_mib, 1),
                disk_mib=round(2 * measured.checkpoint_mib + 2 * measured.encoder_mib + SMALL_FILES_MIB, 1),
            )
        if others := self._finished.get(recipe.fingerprint(seed=0)):
            return _cost_of(others, steps=steps, procs=self._machine.procs)
        return Cost(steps, None, "unknown")

    def measure(self, recipes: Sequence[Recipe]) -> str:
        """Time a few steps of the recipes that were never trained or timed like this, whose images must be prepared.

        Returns:
            Why not all of them could be timed, in a few words; empty on success. No run fails for want of a quote.
        """
        unknown = [each for each in recipes if not self._alike(each) and self._place(each) not in self._measured]
        missing = {recipe.fingerprint(seed=0): recipe for recipe in unknown}
        if not missing:
            return ""
        machine = self._machine.model_copy(update={"threads": threads_of(self._machine)})
        request = {
            "machine": machine.model_dump(mode="json", exclude={"tracking_uri"}),
            "recipes": {key: recipe.model_dump(mode="json") for key, recipe in missing.items()},
        }
        here = machine.model_copy(update={"procs": machine.procs // machine.nodes, "nodes": 1})
        with tempfile.TemporaryDirectory(prefix="obowlab-cost-") as folder, leased(here) as gpus:
            path = Path(folder) / "request.json"
            path.write_text(json.dumps(request))
            try:
                done = subprocess.run(
                    compute_command(path, here, module="obowlab.training.benchmark"),
                    env={**environment_of(here, token="", progress=False), **gpus},
                    capture_output=True,
                    text=True,
                    timeout=BENCHMARK_TIMEOUT_S,
                    check=False,
                )
                problem = "" if done.returncode == 0 else (done.stderr.splitlines() or [f"exit code {done.returncode}"])[-1]
            except subprocess.TimeoutExpired:
                problem = f"it took more than {text.duration(BENCHMARK_TIMEOUT_S)}"
            for answer in read_lines(path.with_name("answers.jsonl")):
                key = answer.pop("key")
                if "error" in answer:
                    problem = str(answer["error"])
                else:
                    self._measured[self._place(missing[key])] = Measured.model_validate(answer)
        values = {place: measured.model_dump() for place, measured in self._measured.items()}
        with suppress(OSError):  # measured again next time
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self._path, json.dumps(values, indent=1, sort_keys=True), shared=True)
        return problem

    def _note(self, folder: RunFolder) -> None:
        try:
            key = folder.info.recipe.fingerprint(seed=0)
        except UserError:
            return  # made by another version, whose recipes differ from this one's
        trained_s, facts = folder.trained_s(), folder.facts()
        if trained_s is not None and self._machine.device in ("auto", facts.get("device")):
            truth = folder.cost().get("truth", {})
            run = _Finished(int(facts.get("procs", 1)), trained_s, folder.state.memory_mib, truth.get("disk_mib"))
            self._finished.setdefault(key, []).append(run)

    def _alike(self, recipe: Recipe) -> list[_Finished]:
        """Return the finished runs of a recipe with as many processes."""
        runs = self._finished.get(recipe.fingerprint(seed=0), [])
        return [run for run in runs if run.procs == self._machine.procs]

    def _place(self, recipe: Recipe) -> str:
        """Return the key of a measurement: the recipe, and all of the machine that changes its time."""
        machine = self._machine
        spread = f"{machine.procs} on {machine.nodes}"
        kind = [machine.loader, machine.workers, machine.channels_last, machine.compile, machine.deterministic]
        words = [socket.gethostname(), machine.device, spread, threads_of(machine), *kind, recipe.fingerprint(seed=0)]
        return " ".join(map(str, words))


@dataclass(frozen=True)
class _Finished:
    """What a finished run took."""

    procs: int
    seconds: float
    memory_mib: float | None
    disk_mib: float | None


def _cost_of(runs: Sequence[_Finished], *, steps: int | None, procs: int) -> Cost:
    """Return the cost of finished runs of one recipe, their time shared out over another number of processes."""
    return Cost(
        steps,
        median(run.seconds * run.procs / procs for run in runs),
        "run",
        memory_mib=max((run.memory_mib for run in runs if run.memory_mib is not None), default=None),
        disk_mib=max((run.disk_mib for run in runs if run.disk_mib is not None), default=None),
    )


# ------------------------------------------------------------------------------------------------ quote and actual cost


def quoted(recipe: Recipe, *, machine: Machine, measure: bool) -> Cost:
    """Return what a training will cost.

    Args:
        recipe: of the training.
        machine: where and with what.
        measure: time a few steps if nothing is known yet, and log the quote; else only return what is known.
    """
    book = CostBook(machine, runs=store_runs(machine.runs_root).values())
    if measure and (problem := book.measure([recipe])):
        logger.warning("No cost can be quoted (%s).", problem)
    cost = book.cost(recipe)
    if measure and cost.seconds is not None:
        logger.info(cost.sentence(machine))
        if computes_on_cpu(machine) and recipe.training.precision == "bfloat16" and not computes_bfloat16():
            logger.info(NO_BFLOAT16)
    return cost


def write_quote(folder: RunFolder, *, cost: Cost, procs: int) -> None:
    """Write what a run is expected to cost into its folder, unless that was done when it began."""
    if not (folder.path / COST_FILE).exists():
        _write(folder, {"quote": {**_numbers(cost, procs=procs), "source": cost.source}})


def write_actual_cost(folder: RunFolder) -> None:
    """Write what a finished run did cost beside its quote."""
    files = [path.stat().st_size for path in folder.path.rglob("*") if path.is_file()]
    procs = int(folder.facts().get("procs", 1))
    truth = Cost(None, folder.trained_s(), "run", folder.state.memory_mib, round(sum(files) / MIB, 1))
    _write(folder, {**folder.cost(), "truth": _numbers(truth, procs=procs)})


def _numbers(cost: Cost, *, procs: int) -> dict[str, Any]:
    hours = None if cost.seconds is None else round(procs * cost.seconds / 3600, 5)
    seconds = None if cost.seconds is None else round(cost.seconds, 1)
    numbers = {"hours": hours, "seconds": seconds, "memory_mib": cost.memory_mib, "disk_mib": cost.disk_mib}
    return {key: value for key, value in numbers.items() if value is not None}


def _write(folder: RunFolder, values: Mapping[str, Any]) -> None:
    folder.write_artifact(COST_FILE, json.dumps(values, indent=1))


def _size(mib: float) -> str:
    return f"{mib / 1024:.1f} GiB" if mib >= 1024 else f"{mib:.0f} MiB"


def num_steps(recipe: Recipe, *, data_root: Path) -> int | None:
    """Return the optimiser updates of a recipe from the prepared data set, or from its published size; else None."""
    data, training = recipe.data, recipe.training
    if isinstance(recipe.method, Detector):
        return training.epochs * recipe.method.steps_per_epoch
    num_images = num_training_images(data, data_root=data_root)
    return None if num_images is None else training.epochs * (num_images // training.batch_size)


def _read(path: Path) -> dict[str, Measured]:
    try:
        return {str(place): Measured.model_validate(values) for place, values in json.loads(read_file(path)).items()}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}  # measured again when it is needed
