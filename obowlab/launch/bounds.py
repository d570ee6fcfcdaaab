"""What bounds a run on this machine: the parts that `obowlab.training.bottleneck` measures, and what follows from them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from obowlab import text
from obowlab.config import Machine
from obowlab.errors import UserError
from obowlab.launch.compute_command import threads_of
from obowlab.launch.gpu_leases import leased
from obowlab.launch.processes import kill_family, tied_to_this_process

LOADER, RENDERING, STEP, ENCODERS, TOGETHER = "loader", "rendering", "step", "encoder work", "together"
FEATURES, FEW_SHOT, LINEAR, KNN = "features", "few-shot", "linear probe", "k-NN"
IN_TURNS = 0.9
"""The parts work in turns, not side by side, when a step with all of them takes this share of their sum."""


@dataclass(frozen=True)
class Part:
    """What one part of a run does in a second.

    Attributes:
        name: one of the names above.
        images_per_s: of this process; for few-shot, episodes. None where it was not measured.
        ms_per_step: milliseconds that it adds to a step of the measured batch; None for parts of the evaluation.
        note: how it was measured, or why it was not.
    """

    name: str
    images_per_s: float | None
    ms_per_step: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Facts:
    """On what the parts were measured.

    Attributes:
        device: cpu or cuda.
        card: of the GPU; empty on a CPU.
        gpus: that the machine has.
        cores: that the process may use.
        threads: of the process.
        workers: of the loader.
        loader: its backend.
        precision: of the recipe.
        bfloat16: whether the processor has instructions for it.
        batch_size: of the recipe, all processes together.
        measured_batch: images of a step as it was measured.
        images: what the loader read.
        source_px: side to which images of the data set could be shrunk, in pixels.
        tflops: of a step alone, in operations that torch counts.
        peak_tflops: of the device: a GPU's in this precision by its data sheet, None where that is not known; on a CPU what a
            product of float32 matrices reached.
        train_s: of the whole training at the speed of `together`; None where that was not measured.
        evaluation_s: of the recipe's protocols once.
    """

    device: str
    card: str
    gpus: int
    cores: int
    threads: int
    workers: int
    loader: str
    precision: str
    bfloat16: bool
    batch_size: int
    measured_batch: int
    images: str
    source_px: int
    tflops: float
    peak_tflops: float | None
    train_s: float | None
    evaluation_s: float

    @property
    def utilisation(self) -> float | None:
        """Share of the peak that a step alone reaches, in percent (on a GPU: MFU); None where the peak is not known."""
        return None if self.peak_tflops is None else 100 * self.tflops / self.peak_tflops


@dataclass(frozen=True)
class Speed:
    """How fast a recipe trains in one process, and what that takes.

    Attributes:
        loop_images_per_s: training as `obowlab run` does it.
        step_images_per_s: steps on a fixed batch in memory.
        gflops_per_image: operations of a step that torch counts, a multiplication and an addition as two, in 10^9.
        memory_mib: peak of the training on its device; on a CPU of the process, less what it had before the network was built.
        measured_batch: images of a step.
        device: cpu or cuda.
        card: of the GPU; empty on a CPU.
        threads: of the process.
        images: what the loader read.
    """

    loop_images_per_s: float
    step_images_per_s: float
    gflops_per_image: float
    memory_mib: float
    measured_batch: int
    device: str
    card: str
    threads: int
    images: str


@dataclass
class Measured:
    """Everything that was measured; facts, or the speed alone, come last."""

    parts: list[Part] = field(default_factory=list)
    facts: Facts | None = None
    speed: Speed | None = None


# ---------------------------------------------------------------------------------------------------------- what follows


def bound(parts: Sequence[Part], *, train_s: float | None, evaluation_s: float) -> str:
    """Return which part bounds a run: `loader`, `rendering`, `step` or `evaluation`.

    The loader works beside rendering and step, and bounds the run when it takes longer than both together; else the longer of
    them does. Where all share one core they work in turns, and the longest counts.
    """
    if train_s is not None and evaluation_s > train_s:
        return "evaluation"
    ms = {part.name: part.ms_per_step for part in parts if part.ms_per_step is not None}
    loader, rendering, step = (ms[name] for name in (LOADER, RENDERING, STEP))
    in_turns = TOGETHER in ms and ms[TOGETHER] >= IN_TURNS * (loader + rendering + step)
    if loader >= (max(rendering, step) if in_turns else rendering + step):
        return LOADER
    return RENDERING if rendering > step else STEP


def verdict(parts: Sequence[Part], *, facts: Facts) -> tuple[str, str]:
    """Return which part bounds a run here, and a sentence that says so and what to change."""
    name = bound(parts, train_s=facts.train_s, evaluation_s=facts.evaluation_s)
    if name == "evaluation":
        assert facts.train_s is not None
        share = f"{text.duration(facts.evaluation_s)} beside {text.duration(facts.train_s)} of training"
    else:
        ms = {part.name: part.ms_per_step for part in parts}
        whole = "" if ms.get(TOGETHER) is None else f" where a step of all parts takes {ms[TOGETHER]:.1f} ms"
        share = f"{ms[name]:.1f} ms a step{whole}"
    return name, f"{name.capitalize()} bounds a run here ({share}): {advice(name, facts=facts)}."


def advice(name: str, *, facts: Facts) -> str:
    """Return what would make a part faster on this machine."""
    if name == "evaluation":
        return "measure with fewer protocols or epochs (evaluation.protocols, evaluation.linear.epochs), which changes no weights"
    if name == LOADER:
        if facts.workers < facts.cores:
            return f"try --workers {facts.cores}"
        if facts.loader != "ffcv":
            return "install obowlab[ffcv] for the compiled loader"
        return f"shrink the images to about {facts.source_px} px before `obowlab data prepare`, which makes another data set"
    if facts.device == "cpu":
        if name == STEP and facts.precision == "bfloat16" and not facts.bfloat16:
            return "try --set training.precision=float32, which makes another run: this processor has no bfloat16 instructions"
        procs = _shares(facts.batch_size, most=facts.cores)
        return f"try --procs {procs}, or a GPU" if procs > 1 else "train on a GPU, or on a machine with more cores"
    changes = []
    if name == STEP and facts.precision in ("float32", "tf32"):
        changes.append("--set training.precision=bfloat16, which makes another run,")
    gpus = _shares(facts.batch_size, most=facts.gpus)
    changes.append(f"--gpus {gpus}" if gpus > 1 else "a machine with more GPUs and --gpus N")
    return f"try {' or '.join(changes)}"


def _shares(batch_size: int, *, most: int) -> int:
    """Return into how many equal shares a batch can be split, at most so many."""
    return max(count for count in range(1, max(1, most) + 1) if batch_size % count == 0)


# ---------------------------------------------------------------------------------------------------------- the process


def measure(
    name: str,
    *,
    overrides: Sequence[str],
    machine: Machine,
    seconds: float,
    say: Callable[[str], None],
    speed_alone: bool = False,
) -> Measured:
    """Measure the parts of a recipe's run in a process of its own, which has its threads and GPU as a run has.

    Args:
        name: of the recipe, or its file.
        overrides: texts `key=value`.
        machine: where and with what.
        seconds: about so long.
        say: called with a line of progress at a time.
        speed_alone: measure no parts, only how fast it trains.

    Raises:
        UserError: the recipe cannot be trained here.
    """
    machine = machine.model_copy(update={"threads": threads_of(machine), "procs": 1, "nodes": 1})
    request = {
        "name": name,
        "overrides": list(overrides),
        "machine": machine.model_dump(mode="json"),
        "seconds": seconds,
        "speed_alone": speed_alone,
    }
    measured = Measured()
    with tempfile.TemporaryDirectory(prefix="obowlab-bench-") as scratch, leased(machine) as gpus:
        environment = {**os.environ, "OMP_NUM_THREADS": str(machine.threads), **gpus}
        child = subprocess.Popen(
            [sys.executable, "-m", "obowlab.training.bottleneck"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C reaches this process alone, which ends the other
            preexec_fn=tied_to_this_process(),
        )
        try:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(json.dumps({**request, "scratch": scratch}).encode())
            child.stdin.close()
            for line in child.stdout:
                _take(json.loads(line), measured=measured, say=say)
            code = child.wait()
        except BaseException:
            kill_family(child)
            child.wait()
            raise
    if code or (measured.facts is None and measured.speed is None):
        raise UserError(
            f"The process that measured ended with exit code {code}, and what it printed is above; if memory ran out, lower "
            "training.batch_size."
        )
    return measured


def _take(line: Mapping[str, Any], *, measured: Measured, say: Callable[[str], None]) -> None:
    """Take in a line of the process that measures.

    Raises:
        UserError: it could not go on; the line says why.
    """
    match line:
        case {"say": words}:
            say(words)
        case {"part": part}:
            measured.parts.append(Part(**part))
        case {"facts": facts}:
            measured.facts = Facts(**facts)
        case {"speed": speed}:
            measured.speed = Speed(**speed)
        case {"error": message}:
            raise UserError(message)
