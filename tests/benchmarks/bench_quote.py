"""Hold what a training is said to cost against what it takes: quote / truth, on this machine's CPU.

Every case is quoted as `obowlab run` would, then trained for a few steps without evaluation, then quoted again: whatever else the
machine does disturbs both. Printed are seconds of training.

    PYTHONPATH=. python tests/benchmarks/bench_quote.py --source tinyimagenet100.tar
    PYTHONPATH=. python tests/benchmarks/bench_quote.py --data-root data --recipes demo --batch-sizes 64 --procs 1
    PYTHONPATH=. python tests/benchmarks/bench_quote.py --data-root data --recipes voc-detection-demo --batch-sizes 8
    PYTHONPATH=. python tests/benchmarks/bench_quote.py --svm --procs 1 2

The time of the SVMs is said when their first class is done, so that is what is held against the truth with --svm.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean

import numpy as np

from obowlab.config import Detector, Loaded, Machine, Voc07Svm, load_recipe
from obowlab.data.datasets import open_split
from obowlab.data.manifest import read_manifest
from obowlab.evaluation.svm import fit_classes, normalised
from obowlab.launch.cost import Cost, CostBook
from obowlab.runs.folder import RunFolder
from obowlab.runs.names import run_id_of

PHOTOS = "tinyimagenet100"


def obowlab(*words: str) -> None:
    """Run a command; what it prints is shown only if it fails."""
    done = subprocess.run([sys.executable, "-m", "obowlab.cli", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"obowlab {' '.join(words)}:\n{done.stdout}{done.stderr}")


def short(name: str, *, batch_size: int, steps: int, data_root: Path) -> tuple[Loaded, tuple[str, ...]]:
    """Return a recipe cut down to about so many steps of a batch size, and the changes that make it."""
    recipe = load_recipe(name).recipe
    manifest = read_manifest(data_root, recipe.data.dataset, "train")
    assert manifest is not None
    changes: tuple[str, ...] = (f"training.batch_size={batch_size}", "training.epochs=1", "evaluation.protocols=[]")
    if isinstance(recipe.method, Detector):
        changes += (f"method.steps_per_epoch={steps}", "method.precise_batches=0", "optimizer.decay_after=[]")
    else:
        changes += (f"data.images_per_class={-(-steps * batch_size // len(manifest.class_names))}",)
    return load_recipe(name, overrides=changes), changes


def quote(loaded: Loaded, *, machine: Machine) -> Cost:
    """Return the cost by a new micro-benchmark."""
    with tempfile.TemporaryDirectory() as empty:
        book = CostBook(machine.model_copy(update={"runs_root": Path(empty)}), runs=[])
        if problem := book.measure([loaded.recipe]):
            raise SystemExit(f"{loaded.name} could not be timed: {problem}")
        return book.cost(loaded.recipe)


def truth(name: str, changes: tuple[str, ...], *, loaded: Loaded, machine: Machine) -> tuple[float, float]:
    """Train, and return the seconds of training and the peak memory in MiB."""
    places = ("--data-root", str(machine.data_root), "--runs-root", str(machine.runs_root), "--device", "cpu")
    words = [word for change in changes for word in ("--set", change)]
    obowlab("run", name, *words, *places, "--procs", str(machine.procs), "--no-quote", "--no-progress", "--fresh")
    folder = RunFolder.open(machine.runs_root / run_id_of(loaded, seed=0))
    return folder.trained_s() or 0.0, folder.state.memory_mib or 0.0


def svm_times(processes: int) -> tuple[float, float]:
    """Fit 20 classes to features as many and as wide as a tenth of VOC 2007's; return the seconds foretold, and those it took."""
    random = np.random.default_rng(0)
    targets = np.where(random.random((501, 20)) < 0.07, 1, 0).astype(np.int8)
    features = normalised(np.maximum(random.normal(size=(501, 512)) + 0.3 * targets @ random.normal(size=(20, 512)), 0.0))
    began, foretold = time.monotonic(), list[float]()

    def note(line: str) -> None:
        left = re.search(r"about (.+) left", line)
        if not foretold and left is not None:
            foretold.append(time.monotonic() - began + seconds_of(left[1]))

    with tempfile.TemporaryDirectory() as kept:
        fit_classes(
            features,
            targets=targets,
            test_features=features,
            class_names=[f"class {column}" for column in range(20)],
            config=Voc07Svm(),
            processes=processes,
            kept=Path(kept),
            report=note,
        )
    return foretold[0], time.monotonic() - began


def seconds_of(words: str) -> float:
    """Return what `text.duration` wrote, as seconds."""
    units = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+) (s|min|h|d)\b", words))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help=f"photos of {PHOTOS}, as for `obowlab data prepare`")
    parser.add_argument("--data-root", type=Path, help="where they are prepared already")
    parser.add_argument("--recipes", nargs="+", default=["demo", "tiny-vanilla", "tiny-full"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--procs", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--svm", action="store_true", help="the SVMs of voc07-svm alone")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if args.svm:
        for procs in args.procs:
            foretold, took = svm_times(procs)
            print(
                f"voc07-svm, {procs} process(es): {foretold:.0f} s foretold, {took:.0f} s taken, {foretold / took:.2f}",
                flush=True,
            )
        return
    with tempfile.TemporaryDirectory() as scratch:
        data_root = (args.data_root or Path(scratch) / "data").absolute()
        if args.source is not None:
            obowlab("data", "prepare", PHOTOS, "--source", str(args.source), "--data-root", str(data_root))
        open_split("synthetic", "train", data_root=data_root)  # draws the images at their first use
        print("recipe         batch  procs   quote s       truth s    quote / truth    memory MiB, quote / truth", flush=True)
        for name in args.recipes:
            for batch_size in args.batch_sizes:
                for procs in args.procs:
                    loaded, changes = short(name, batch_size=batch_size, steps=args.steps, data_root=data_root)
                    machine = Machine(data_root=data_root, runs_root=Path(scratch) / f"runs{procs}", device="cpu", procs=procs)
                    before = quote(loaded, machine=machine)
                    true_s, true_mib = truth(name, changes, loaded=loaded, machine=machine)
                    after = quote(loaded, machine=machine)
                    seconds = [each.seconds or 0.0 for each in (before, after)]
                    print(
                        f"{name:14s} {batch_size:5d}  {procs:5d}   {seconds[0]:.1f} {seconds[1]:.1f}   {true_s:8.1f}    "
                        f"{mean(seconds) / true_s:13.2f}    {before.memory_mib:.0f} / {true_mib:.0f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
