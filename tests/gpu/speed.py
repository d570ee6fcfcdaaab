"""What `make gpu-check` measures, in parts: `python -m tests.gpu.speed PART ROWS_FILE`, one process each.

A part is a generator of rows. The process appends each to its file as soon as it is measured, so that a part that is stopped
leaves what it had. `--try-on-cpu` runs the same code on the CPU with sizes at which its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from obowlab.config import FewShot, Linear, Views, load_recipe
from obowlab.data.datasets import open_split
from obowlab.data.prepare import prepare
from obowlab.evaluation.fewshot import authors_episodes, episode_answers
from obowlab.evaluation.linear import linear_probe
from obowlab.precision import computing_in
from obowlab.runs.folder import RunFolder
from obowlab.training.flops import count_flops, peak_tflops
from obowlab.training.timing import rate
from obowlab.training.work import Work
from obowlab.views.draws import draw
from obowlab.views.loaders import PixelBatch, train_loader
from obowlab.views.packed import pack
from obowlab.views.photometric import render as render_views
from tests.benchmarks import bench_detector as detectors
from tests.benchmarks import run as benchmarks

ROOT = Path(__file__).resolve().parents[2]
PRECISIONS = ("bfloat16", "tf32", "float32")
TINY = (
    *("backbone.arch=resnet18", "backbone.width=8", "method.num_words=64", "method.border=0"),
    *("views.original_size=96", "views.original_resize=104", "views.crop_size=48"),
    *("views.patch_size=24", "views.patch_source_size=64", "views.patch_jitter=8"),
)
SHORT_DEMO = (
    *("data.images_per_class=4", "training.epochs=1", "evaluation.protocols=['fewshot']", "evaluation.fewshot.num_episodes=4"),
    "evaluation.random_baseline=false",
)


@dataclass(frozen=True)
class Row:
    """One number, and what it should be at least or at most.

    Attributes:
        name: what was measured.
        value: None where it could not be.
        unit: of value and target.
        least: the target from below, or None.
        most: the target from above, or None.
        note: why there is no value, or what else to know.
    """

    name: str
    value: float | None
    unit: str = ""
    least: float | None = None
    most: float | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        """`ok`, `missed`, `not measured`, or nothing for a number without a target."""
        if self.value is None:
            return "not measured"
        if self.least is None and self.most is None:
            return ""
        low, high = (-float("inf") if self.least is None else self.least), (float("inf") if self.most is None else self.most)
        return "ok" if low <= self.value <= high else "missed"


@dataclass(frozen=True)
class Options:
    """Where to measure, at what size, and where files go."""

    device: torch.device
    tiny: bool
    out: Path

    @property
    def batch_size(self) -> int:
        """Images of one GPU."""
        return 4 if self.tiny else 64

    @property
    def overrides(self) -> tuple[str, ...]:
        """Changes of the recipes."""
        return TINY if self.tiny else ()

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


# ------------------------------------------------------------------------------------------------------------------- step


def step(options: Options) -> Iterator[Row]:
    """Yield times of a step of `full` and of `imagenet20-full` beside their own encoder work."""
    torch.backends.cudnn.benchmark = options.device.type == "cuda"
    for precision in PRECISIONS:
        yield from _step(options, recipe="full", precision=precision)
    yield from _step(options, recipe="imagenet20-full", precision="bfloat16")


def _step(options: Options, *, recipe: str, precision: str) -> Iterator[Row]:
    name, is_target = f"{recipe}, {precision}", recipe == "full"
    loaded = load_recipe(recipe, overrides=(*options.overrides, f"training.precision={precision}"))
    work = Work(loaded.recipe, batch_size=options.batch_size, device=options.device)
    rounds = work.rounds(1 if options.tiny else 10)
    encoder_s, step_s = (statistics.median(each[0] for each in column) for column in zip(*rounds, strict=True))
    yield Row(f"{name}: encoder work", 1e3 * encoder_s, "ms")
    yield Row(f"{name}: step", 1e3 * step_s, "ms")
    ratio = statistics.median(step[0] / encoder[0] for encoder, step in rounds)
    yield Row(f"{name}: step / encoder work", ratio, most=1.15 if is_target else None)

    count = 1 if options.tiny else 20
    one_s = _pipelined_s(work, count=count)
    least = 1000.0 if is_target and precision == "bfloat16" else None
    yield Row(f"{name}: images/s", options.batch_size / one_s, "images/s", least=least)

    flops = count_flops(work.step)
    peak = peak_tflops(torch.cuda.get_device_name(options.device) if options.device.type == "cuda" else "CPU", precision)
    mfu = None if peak is None else 100 * flops / one_s / (peak * 1e12)
    yield Row(f"{name}: MFU", mfu, "%", note="" if peak else "the card's peak is not known")
    if is_target and precision == "bfloat16":
        idle, trace = trace_steps(work, options=options, name=f"trace-{recipe}-{precision}")
        yield Row(f"{name}: GPU idle", idle, "%", most=3.0, note=trace.name)


def compiled(options: Options) -> Iterator[Row]:
    """Yield how fast `full` is in bfloat16 where PyTorch has compiled student and teacher, and how long that takes."""
    torch.backends.cudnn.benchmark = options.device.type == "cuda"
    loaded = load_recipe("full", overrides=(*options.overrides, "training.precision=bfloat16"))
    work = Work(loaded.recipe, batch_size=options.batch_size, device=options.device, compiled=True)
    first_s, _ = work.seconds(work.step)
    yield Row("full, bfloat16, compiled: first step", first_s, "s")
    count = 1 if options.tiny else 20
    one_s = statistics.median(work.seconds(work.step)[0] for _ in range(count))
    yield Row("full, bfloat16, compiled: step", 1e3 * one_s, "ms")
    yield Row("full, bfloat16, compiled: images/s", options.batch_size / _pipelined_s(work, count=count), "images/s")


def _pipelined_s(work: Work, *, count: int) -> float:
    """Return the seconds of a step of so many without a wait in between."""
    work.wait()
    started = time.perf_counter()
    for _ in range(count):
        work.step()
    work.wait()
    return (time.perf_counter() - started) / count


def trace_steps(work: Work, *, options: Options, name: str) -> tuple[float | None, Path]:
    """Profile a few steps twice and return for which share of them, in percent, the GPU had nothing to do, and the trace.

    The share is taken with the GPU's activities alone, which disturbs least. The trace that is returned has the CPU's as well.
    """
    count = 1 if options.tiny else 5
    on_gpu = [ProfilerActivity.CUDA] if options.device.type == "cuda" else [ProfilerActivity.CPU]
    idle = None
    for activities, suffix in ((on_gpu, "-gpu"), (list({*on_gpu, ProfilerActivity.CPU}), "")):
        path = options.out / f"{name}{suffix}.json"
        work.step()
        options.wait()
        with profile(activities=activities) as found:
            for _ in range(count):
                work.step()
            options.wait()
        found.export_chrome_trace(str(path))
        if suffix:
            idle = idle_share(json.loads(path.read_text())["traceEvents"])
        with gzip.open(f"{path}.gz", "wb", compresslevel=5) as packed:
            packed.write(path.read_bytes())
        path.unlink()
    return idle, Path(f"{path}.gz")


def idle_share(events: Iterable[dict[str, Any]]) -> float | None:
    """Return in percent how long no kernel and no copy ran, from the start of the first to the end of the last; None without any.

    Args:
        events: of a Chrome trace; times are in microseconds.
    """
    busy = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") and "dur" in event]
    if not busy:
        return None
    spans = sorted((float(event["ts"]), float(event["ts"]) + float(event["dur"])) for event in busy)
    first, end = spans[0]
    idle = 0.0
    for start, stop in spans:
        idle += max(0.0, start - end)
        end = max(end, stop)
    return 100.0 * idle / (end - first) if end > first else 0.0


def detector(options: Options) -> Iterator[Row]:
    """Yield the times of a detector's losses and gradients on two images, beside torchvision's on the same trunk."""
    torch.backends.cudnn.benchmark = options.device.type == "cuda"
    arch, size, regions = ("resnet18", (96, 128), 16) if options.tiny else ("resnet50", (800, 1088), 512)
    kinds = {"C4": "Faster R-CNN C4", "FPN": "Mask R-CNN FPN"}
    with computing_in("tf32", device=options.device):
        measured = detectors.pairs(
            arch=arch, count=2, size=size, regions=regions, rounds=1 if options.tiny else 10, device=options.device
        )
        for name, rounds in measured:
            note = f"{arch}, 2 images of {size[0]} x {size[1]}, tf32"
            yield Row(
                f"{kinds[name]}: losses and gradients", 1e3 * statistics.median(ours for ours, _ in rounds), "ms", note=note
            )
            ratio = statistics.median(ours / theirs for ours, theirs in rounds)
            yield Row(f"{kinds[name]}: time / torchvision's", ratio, note=note)


# ----------------------------------------------------------------------------------------------------------------- images


def pixels(count: int, views: Views, *, pin: bool) -> PixelBatch:
    """Return cut views of random pixels."""

    def images(*shape: int, side: int) -> torch.Tensor:
        made = torch.randint(256, (*shape, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(side))
        return made.pin_memory() if pin else made

    indices = np.arange(count)
    numbers = pack((draw(views, seed=0, epoch=0, indices=indices, piece_pixels=None), torch.zeros(count, dtype=torch.int64)))
    return PixelBatch(
        epoch=0,
        step=0,
        indices=indices,
        numbers=numbers.pin_memory() if pin else numbers,
        original=images(count, side=views.original_size),
        crops=images(count, views.num_crops, side=views.cut_size),
        patch_source=images(count, side=views.patch_source_size),
    )


def render(options: Options) -> Iterator[Row]:
    """Yield how fast the device colours cut views of `full` that are in pinned memory."""
    views = load_recipe("full", overrides=options.overrides).recipe.views
    batch = pixels(options.batch_size, views, pin=options.device.type == "cuda")
    count = 1 if options.tiny else 30
    for number in (1, count):  # the first is not counted
        started = time.perf_counter()
        for _ in range(number):
            render_views(batch, batch.numbers.on(options.device)[0], device=options.device)
        options.wait()
        one_s = (time.perf_counter() - started) / number
    yield Row("render alone: images/s", options.batch_size / one_s, "images/s")
    yield Row("render alone: a batch", 1e3 * one_s, "ms")


def photos(scratch: Path) -> tuple[Path, str]:
    """Return a folder CLASS/*.JPEG and what it is: $PHOTOS, those of the kit, those of the tests, or drawn ones."""
    kit = ROOT / ".gpu-kit" / "photos50.tar"
    if not os.environ.get("PHOTOS") and kit.is_file():
        os.environ["PHOTOS"] = str(kit)
    if (found := benchmarks.photos(scratch)) is not None:
        return found, "photographs"
    folder = scratch / "drawn" / "class"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(64):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((500, 375), Image.Resampling.BICUBIC)
        grain = rng.integers(-8, 9, (375, 500, 3))
        image = Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8))
        image.save(folder / f"{number:03}.JPEG", quality=90)
    return folder.parent, "drawn images of 500x375"


def loader(options: Options) -> Iterator[Row]:
    """Yield how many images a second the loader gives with all cores, alone and with the device colouring them."""
    views = load_recipe("full", overrides=options.overrides).recipe.views
    cores = len(os.sched_getaffinity(0))
    seconds = 0.2 if options.tiny else 10.0
    torch.set_num_threads(1)  # the loader has the cores
    with tempfile.TemporaryDirectory() as scratch:
        folder, kind = photos(Path(scratch))
        prepare("bench", source=folder, data_root=Path(scratch) / "data")
        split = open_split("bench", "train", data_root=Path(scratch) / "data")
        order = np.tile(np.arange(split.num_images), max(1, (2_000 if options.tiny else 300_000) // split.num_images))
        backend, workers = ("torch", 0) if options.tiny else ("auto", cores)
        made = train_loader(
            split,
            subset=order,
            views=views,
            batch_size=options.batch_size,
            seed=0,
            backend=backend,
            workers=workers,
            pin=options.device.type == "cuda",
        )
        note = f"{made.backend}, {workers} of {cores} cores, {kind}"

        def coloured() -> Iterator[object]:
            for batch in made.batches(epoch=1):
                yield render_views(batch, batch.numbers.on(options.device)[0], device=options.device)

        alone = rate(made.batches(epoch=0), batch_size=options.batch_size, seconds=seconds, wait=options.wait)
        yield Row("loader alone: images/s", alone, "images/s", note=note)
        both = rate(coloured(), batch_size=options.batch_size, seconds=seconds, wait=options.wait)
        yield Row("loader + render: images/s", both, "images/s", least=1200.0, note=note)


# ------------------------------------------------------------------------------------------------------------- evaluation


def evaluation(options: Options) -> Iterator[Row]:
    """Yield the seconds of 200 episodes and of the linear probe on random features of ImageNet's validation images."""
    num_classes, per_class, width = (60, 8, 16) if options.tiny else (1000, 50, 2048)
    generator = torch.Generator(options.device).manual_seed(0)
    shape = (num_classes * per_class, width)
    features = torch.randn(shape, device=options.device, generator=generator).relu_().mul_(0.1)
    labels = torch.arange(num_classes, device=options.device).repeat_interleave(per_class)
    images_of = {label: list(range(per_class * label, per_class * (label + 1))) for label in range(num_classes)}
    config = FewShot(num_episodes=4 if options.tiny else 200)
    for _ in range(2):  # the first is not counted
        started = time.perf_counter()
        episodes = authors_episodes(images_of, classes=range(0, num_classes), config=config, num_shots=5)
        episode_answers(features, episodes=episodes)
        options.wait()
        fewshot_s = time.perf_counter() - started
    yield Row("200 few-shot episodes, 50 ways, 5 shots", fewshot_s, "s", most=1.0)
    linear = Linear(epochs=2) if options.tiny else Linear()
    started = time.perf_counter()
    linear_probe(
        (features, features.flip(1)),
        labels=labels,
        test_features=features,
        test_labels=labels,
        num_classes=num_classes,
        config=linear,
        seed=0,
    )
    options.wait()
    taken = time.perf_counter() - started
    yield Row(f"linear probe, {linear.epochs} epochs on {shape[0]} x {shape[1]}", taken, "s", most=60.0)


def demo(options: Options) -> Iterator[Row]:
    """Yield the seconds of `obowlab run demo`, drawing its images and evaluating it included, and those of its training."""
    with tempfile.TemporaryDirectory() as scratch:
        runs, data = Path(scratch) / "runs", Path(scratch) / "data"
        words = ["run", "demo", "--device", options.device.type, "--no-progress", "--no-quote"]
        words += ["--runs-root", str(runs), "--data-root", str(data)]
        words += [word for setting in (SHORT_DEMO if options.tiny else ()) for word in ("--set", setting)]
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "obowlab.cli", *words], cwd=ROOT, check=True)
        yield Row("obowlab run demo, from nothing", time.perf_counter() - started, "s")
        (folder,) = (RunFolder.open(path.parent) for path in runs.glob("demo*/metrics.jsonl"))
        yield Row("obowlab run demo: training alone", folder.trained_s(), "s")
        speeds = [point.values["images_per_s"] for point in folder.metrics() if "images_per_s" in point.values]
        yield Row("obowlab run demo: images/s", statistics.median(speeds) if speeds else None, "images/s")
        for result in folder.results():
            if result["subject"] == "student":
                for measured in result["measurements"]:
                    yield Row(f"obowlab run demo: {measured['name']}", measured["value"], "%")


PARTS: dict[str, Callable[[Options], Iterator[Row]]] = {
    "step": step,
    "detector": detector,
    "evaluation": evaluation,
    "render": render,
    "loader": loader,
    "demo": demo,
    "compiled": compiled,
}


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("rows", type=Path, help="file to which the rows are appended, one JSON line each")
    parser.add_argument("--try-on-cpu", action="store_true")
    given = parser.parse_args(words)
    options = Options(torch.device("cpu" if given.try_on_cpu else "cuda"), tiny=given.try_on_cpu, out=given.rows.parent)
    with given.rows.open("a", encoding="utf-8") as file:
        for row in PARTS[given.part](options):
            print(f"{row.name}: {row.value} {row.unit}", flush=True)
            file.write(json.dumps(asdict(row)) + "\n")
            file.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
