"""What each part of a run takes on this machine: `python -m obowlab.training.bottleneck`, one after the other.

`obowlab.launch.bounds` starts it, writes what to measure to its standard input, and reads parts and facts from its output, a JSON
line each. Loader, rendering, step and evaluation are first timed alone; then `loop.train` itself trains for a while, in a run
folder that is thrown away. Of a table of costs only step and training are asked for, and their memory.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from obowlab.config import Loaded, Machine, Recipe, load_recipe
from obowlab.data.datasets import Split, open_split, prepare
from obowlab.data.manifest import read_manifest
from obowlab.data.synthetic import NAME as SYNTHETIC
from obowlab.errors import UserError
from obowlab.launch.bounds import (
    ENCODERS,
    LOADER,
    RENDERING,
    STEP,
    TOGETHER,
    Facts,
    Part,
    Speed,
)
from obowlab.launch.system import computes_bfloat16
from obowlab.runs.folder import RunFolder
from obowlab.runs.provenance import num_cores
from obowlab.training.context import RunContext
from obowlab.training.distributed import World, join
from obowlab.training.evaluation_speed import Sizes, evaluation
from obowlab.training.feed import open_loader
from obowlab.training.flops import count_flops, matmul_tflops, peak_tflops
from obowlab.training.loop import train
from obowlab.training.memory import forget_peak, peak_mib, present_mib
from obowlab.training.reporter import Reporter
from obowlab.training.signals import Interrupted, StopRequest
from obowlab.training.timing import WARM_UP, rate, timed
from obowlab.training.work import Work
from obowlab.views.loaders import PixelBatch, TrainLoader, num_workers
from obowlab.views.photometric import render

SHARES = {LOADER: 0.15, RENDERING: 0.1, STEP: 0.25, TOGETHER: 0.3, "evaluation": 0.2}
"""Of the time there is."""

SMALL_BATCH = 16
"""Images with which a step is tried first on a CPU; a multiple of what methods split a batch into."""

STEPS_IN_TIME = 12
"""Steps that must fit into the time of all parts for the recipe's whole batch to be measured on a CPU."""

DRAWN, DRAWN_SIZE, DRAWN_IMAGES = "drawn", (500, 375), 64
"""What is read where the data set is not prepared: as many different images, of ImageNet's usual size."""


@dataclass(frozen=True)
class Opened:
    """A run in the scratch folder, ready to be timed.

    Attributes:
        asked: the recipe as it was asked for.
        run: of the same recipe with a batch that fits, on images that are there.
        split: what it trains on.
        batch: images of a step.
        work: a step of that batch alone, which has been done.
        images: what the loader reads, in words.
        resident_mib: memory on the device before anything was built.
    """

    asked: Recipe
    run: RunContext
    split: Split
    batch: int
    work: Work
    images: str
    resident_mib: float


@contextlib.contextmanager
def opened(
    name: str, *, overrides: list[str], machine: Machine, seconds: float, scratch: Path, say: Callable[[str], None]
) -> Iterator[Opened]:
    """Open a recipe's run in a folder that is thrown away; where its data set is not prepared, on drawn images.

    Args:
        name: of the recipe, or its file.
        overrides: texts `key=value`.
        machine: where and with what.
        seconds: that the parts may take together, by which a CPU's batch is chosen.
        scratch: an empty folder, for what is drawn and trained.
        say: called with a line of progress at a time.

    Raises:
        UserError: the recipe cannot be trained on its data set, or is too large for the GPU.
    """
    asked = load_recipe(name, overrides=overrides).recipe
    with join(machine) as world:
        if world.device.type == "cuda":
            torch.backends.cudnn.benchmark = not machine.deterministic
        resident_mib = present_mib(world.device)
        say("Timing a step to choose the batch.")
        batch, work = choose_batch(asked, machine=machine, device=world.device, seconds=seconds)
        overrides = [*overrides, f"training.batch_size={batch}", "evaluation.every_epochs=0"]
        images = f"'{asked.data.dataset}'"
        if asked.data.dataset != SYNTHETIC and read_manifest(machine.data_root, asked.data.dataset, "train") is None:
            say("Drawing images.")
            images = (
                f"drawn images of {DRAWN_SIZE[0]}x{DRAWN_SIZE[1]}: '{asked.data.dataset}' is not prepared in {machine.data_root}"
            )
            machine = machine.model_copy(update={"data_root": scratch / "data"})
            draw_images(scratch / "images", count=max(batch, min(8 * batch, 2048)))
            prepare(DRAWN, source=scratch / "images", data_root=machine.data_root)
            overrides += [f"data.dataset={DRAWN}", "data.images_per_class=all"]
        machine = machine.model_copy(update={"runs_root": scratch / "runs"})
        loaded = load_recipe(name, overrides=overrides)
        split = open_split(loaded.recipe.data.dataset, "train", data_root=machine.data_root, runs_root=machine.runs_root)
        yield Opened(asked, make_run(loaded, machine=machine, world=world), split, batch, work, images, resident_mib)


def measure(
    name: str, *, overrides: list[str], machine: Machine, seconds: float, scratch: Path, say: Callable[[str], None]
) -> Iterator[Part | Facts]:
    """Yield every part of a recipe's run as soon as it is measured, and the facts at the end.

    Args:
        name: as for `opened`, and the others.
        overrides: texts.
        machine: where and with what.
        seconds: about so long; a slow step is done twice nevertheless.
        scratch: an empty folder.
        say: called with a line of progress at a time.

    Raises:
        UserError: as `opened`.
    """
    with opened(name, overrides=overrides, machine=machine, seconds=seconds, scratch=scratch, say=say) as it:
        asked, run, batch, device = it.asked, it.run, it.batch, it.run.world.device
        say("Loader.")
        loader = open_loader(run, split=it.split)
        workers = num_workers(machine)
        taken, stream = seconds * SHARES[LOADER], batches(loader)
        alone = rate(stream, batch_size=batch, seconds=taken, wait=it.work.wait)
        yield _of_batch(LOADER, alone, batch=batch, note=f"{loader.backend}, {workers} worker(s), {it.images}")

        say("Rendering.")
        with contextlib.closing(batches(loader)) as one:
            pixels = next(one)
        rendered = timed(
            lambda: render(pixels, pixels.numbers.on(device)[0], device=device),
            seconds=seconds * SHARES[RENDERING],
            wait=it.work.wait,
        )
        yield _of_batch(RENDERING, batch / rendered, batch=batch, note="colours, blur and flips of a batch that is cut")

        say("Step.")
        step_s = 0.0
        for part, one_s in steps(it.work, seconds=seconds * SHARES[STEP]):
            step_s = one_s if part.name == STEP else step_s
            yield part
        flops = count_flops(it.work.step)
        it.work.forget()

        say("All parts together.")
        whole = together(run, seconds=seconds * SHARES[TOGETHER], batch=batch)
        yield whole

        say("Evaluation.")
        sizes = Sizes(asked, split=it.split, data_root=run.machine.data_root)
        evaluated: list[tuple[Part, float]] = []
        for found in evaluation(run, split=it.split, sizes=sizes, seconds=seconds * SHARES["evaluation"]):
            evaluated.append(found)
            yield found[0]
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        precision = asked.training.precision
        peak = peak_tflops(card, precision) if card else matmul_tflops()
        images_seen = asked.training.epochs * (sizes.num_train // asked.training.batch_size) * asked.training.batch_size
        yield Facts(
            device=device.type,
            card=card,
            gpus=torch.cuda.device_count() if card else 0,
            cores=num_cores(),
            threads=torch.get_num_threads(),
            workers=workers,
            loader=loader.backend,
            precision=precision,
            bfloat16=computes_bfloat16(),
            batch_size=asked.training.batch_size,
            measured_batch=batch,
            images=it.images,
            source_px=max(asked.views.original_resize, asked.views.patch_source_size if asked.views.num_patches else 0),
            tflops=flops / step_s / 1e12,
            peak_tflops=peak,
            train_s=None if whole.images_per_s is None else images_seen / whole.images_per_s,
            evaluation_s=sum(each_s for _, each_s in evaluated) * (2 if asked.evaluation.random_baseline else 1),
        )


def measure_speed(
    name: str, *, overrides: list[str], machine: Machine, seconds: float, scratch: Path, say: Callable[[str], None]
) -> Speed:
    """Return how fast a recipe trains and what memory that takes: half of the time a step alone, half the training itself.

    Args:
        name: as for `opened`, and the others.
        overrides: texts.
        machine: where and with what.
        seconds: about so long; a slow step is done twice nevertheless.
        scratch: an empty folder.
        say: called with a line of progress at a time.

    Raises:
        UserError: as `opened`; an epoch has too few steps to be timed.
    """
    with opened(name, overrides=overrides, machine=machine, seconds=seconds, scratch=scratch, say=say) as it:
        device = it.run.world.device
        step_s = timed(it.work.step, seconds=seconds / 2, wait=it.work.wait)
        flops = count_flops(it.work.step)
        it.work.forget()
        forget_peak(device)
        whole = together(it.run, seconds=seconds / 2, batch=it.batch)
        if whole.images_per_s is None:
            raise UserError(f"The training of {name} could not be timed: {whole.note}.")
        return Speed(
            loop_images_per_s=whole.images_per_s,
            step_images_per_s=it.batch / step_s,
            gflops_per_image=flops / it.batch / 1e9,
            memory_mib=max(0.0, peak_mib(device) - it.resident_mib),
            measured_batch=it.batch,
            device=device.type,
            card=torch.cuda.get_device_name(device) if device.type == "cuda" else "",
            threads=torch.get_num_threads(),
            images=it.images,
        )


def _of_batch(name: str, images_per_s: float, *, batch: int, note: str = "") -> Part:
    return Part(name, images_per_s, 1e3 * batch / images_per_s, note)


def batches(loader: TrainLoader) -> Generator[PixelBatch, None, None]:
    """Yield the batches of one epoch after the other, without end."""
    for epoch in itertools.count():
        yield from loader.batches(epoch=epoch)


# --------------------------------------------------------------------------------------------------------------- training


def choose_batch(recipe: Recipe, *, machine: Machine, device: torch.device, seconds: float) -> tuple[int, Work]:
    """Return how many images to measure a step with, and that step, which has been done once.

    That is the recipe's batch where it fits: on a GPU into its memory, on a CPU into the time.

    Raises:
        UserError: not even a small batch fits into the GPU's memory.
    """

    def tried(batch: int) -> tuple[float, Work]:
        work = Work(recipe, batch_size=batch, device=device, channels_last=machine.channels_last, compiled=machine.compile)
        work.step()
        return work.seconds(work.step)[0], work

    whole = recipe.training.batch_size
    if device.type == "cpu":
        small = min(SMALL_BATCH, whole)
        step_s, work = tried(small)
        if small < whole and STEPS_IN_TIME * step_s * whole / small <= seconds:
            return whole, tried(whole)[1]
        return small, work
    batch = whole
    while True:
        try:
            return batch, tried(batch)[1]
        except torch.OutOfMemoryError:
            if batch // 2 < min(SMALL_BATCH, whole):
                raise UserError(f"Not even {batch} images of this recipe fit into the GPU's memory: use smaller views.") from None
        batch //= 2
        torch.cuda.empty_cache()


def steps(work: Work, *, seconds: float) -> Iterator[tuple[Part, float]]:
    """Yield the parts of a step alone, with their seconds."""
    batch, whole = work.batch_size, work.recipe.training.batch_size
    note = "fixed batch" if batch == whole else f"fixed batch of {batch} images, not {whole}"
    if not work.has_encoder_work:
        step_s = timed(work.step, seconds=seconds, wait=work.wait)
        yield _of_batch(STEP, batch / step_s, batch=batch, note=note), step_s
        return
    began, rounds = time.perf_counter(), work.rounds(1)
    while time.perf_counter() - began < seconds:
        rounds.append((work.seconds(work.encoders), work.seconds(work.step)))
    encoder_s, step_s = (statistics.median(each[0] for each in column) for column in zip(*rounds, strict=True))
    ratio = statistics.median(step[0] / encoder[0] for encoder, step in rounds)
    yield _of_batch(STEP, batch / step_s, batch=batch, note=f"{note}; {ratio:.2f} times its encoder work"), step_s
    note = "of this step: student forward and backward, teacher forward"
    yield _of_batch(ENCODERS, batch / encoder_s, batch=batch, note=note), encoder_s


class StopWatch(StopRequest):
    """Asks a run to stop after a while, and notes when each step asked whether it should.

    Attributes:
        times: in seconds, one for every step that counts: the first ones do not.
    """

    def __init__(self, *, seconds: float) -> None:
        """Stop `seconds` after the warm-up, which takes half as long at most, but not before two steps were timed."""
        super().__init__()
        self._seconds, self._early = seconds, list[float]()
        self.times: list[float] = []

    def asked_after_step(self) -> bool:
        """Note the time; return whether it is time to stop."""
        now = time.perf_counter()
        warm = len(self._early) >= WARM_UP or (self._early and now - self._early[0] > self._seconds / 2)
        (self.times if warm else self._early).append(now)
        is_over = len(self.times) >= 3 and now - self.times[0] > self._seconds
        return is_over or super().asked_after_step()


def make_run(loaded: Loaded, *, machine: Machine, world: World) -> RunContext:
    """Make a run in the machine's run store."""
    folder = RunFolder.create(loaded, seed=0, runs_root=machine.runs_root)
    return RunContext(folder, machine=machine, world=world, reporter=Reporter(None), stop=StopRequest())


def together(run: RunContext, *, seconds: float, batch: int) -> Part:
    """Train as `obowlab run` does for so many seconds, and return at which speed."""
    if run.recipe.teacher is not None:
        return Part(TOGETHER, None, None, "not measured: the stage before this one is not trained here")
    stop = StopWatch(seconds=seconds)
    with contextlib.suppress(Interrupted):
        train(RunContext(run.folder, machine=run.machine, world=run.world, reporter=run.reporter, stop=stop))
    times = stop.times
    if len(times) < 2:
        return Part(TOGETHER, None, None, "not measured: the training has too few steps")
    return _of_batch(
        TOGETHER,
        batch * (len(times) - 1) / (times[-1] - times[0]),
        batch=batch,
        note=f"training as `obowlab run` does it, {len(times) - 1} steps",
    )


def draw_images(folder: Path, *, count: int) -> None:
    """Draw an ImageFolder: a few different JPEGs, which have as many names as images are needed, in train/ of two classes."""
    rng = np.random.default_rng(0)
    width, height = DRAWN_SIZE
    for number in range(count):
        path = folder / "train" / f"class{number % 2}" / f"{number:05}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number >= DRAWN_IMAGES:
            first = number % DRAWN_IMAGES
            os.link(folder / "train" / f"class{first % 2}" / f"{first:05}.JPEG", path)
            continue
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(DRAWN_SIZE, Image.Resampling.BICUBIC)
        grain = rng.integers(-8, 9, (height, width, 3))
        Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)).save(path, quality=90)


def main() -> int:
    """Measure what standard input asks for; return the exit code."""
    request = json.load(sys.stdin)

    def write(**line: Any) -> None:
        print(json.dumps(line), flush=True)

    machine = Machine.model_validate_json(json.dumps(request["machine"]))
    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    how: dict[str, Any] = {
        "overrides": request["overrides"],
        "machine": machine,
        "seconds": request["seconds"],
        "scratch": Path(request["scratch"]),
        "say": lambda words: write(say=words),
    }
    try:
        if request.get("speed_alone"):
            write(speed=asdict(measure_speed(request["name"], **how)))
            return 0
        for found in measure(request["name"], **how):
            write(**{"part" if isinstance(found, Part) else "facts": asdict(found)})
    except UserError as error:
        write(error=str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
