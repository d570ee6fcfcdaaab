"""What grows with the data and with the trials, each beside its obvious alternative, side by side.

`python -m tests.benchmarks.bench_scale [--images 5000] [--trials 1000]`: preparing small JPEG files with one thread against bare
decoding and hashing of them; the first opening of a data file against SHA-256 of it, and a later one; the report of a study
against one evaluation of its importances, and the report after a further trial. Seconds, the best of three.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import optuna
from PIL import Image

from obowlab.data.datasets import open_split, prepare
from obowlab.data.identity import NOTES
from obowlab.studies.storage import quiet
from obowlab.studies.worker import distributions
from tests.studies import STUDY, Search, tuning_of

TWO_MORE = """[parameters."method.delta_base"]
kind = "float"
low = 0.01
high = 1.0

[parameters."method.teacher_momentum"]
kind = "float"
low = 0.9
high = 0.999

[paper]
"method.delta_base" = 0.1
"method.teacher_momentum" = 0.99"""


def compared(title: str, *functions: Callable[[], object], rounds: int = 3) -> None:
    """Time functions in turn, and print the best times and the ratio of each to the last, the obvious alternative."""
    best = [float("inf")] * len(functions)
    for _ in range(rounds):
        for number, function in enumerate(functions):
            began = time.perf_counter()
            function()
            best[number] = min(best[number], time.perf_counter() - began)
    for name, seconds in zip(title.split(" | "), best, strict=True):
        print(f"{name:<58} {seconds:>8.3f} s {seconds / best[-1]:>8.2f}", flush=True)


def small_files(scratch: Path, *, num_images: int) -> None:
    source = scratch / "small"
    noise = np.random.default_rng(0)
    for number in range(num_images):
        path = source / f"train/class_{number % 50:02}/{number:06}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = Image.fromarray(noise.integers(0, 256, (12, 12, 3), np.uint8)).resize((64, 64))
        pixels.save(path, quality=90)
    files = sorted(source.rglob("*.JPEG"))

    def bare() -> None:
        digest = hashlib.sha256()
        for file in files:
            content = file.read_bytes()
            digest.update(content)
            with Image.open(io.BytesIO(content)) as image:
                image.load()

    compared(
        f"prepare {num_images} small JPEG files, one thread | bare decoding and SHA-256",
        lambda: prepare("small", source=source, data_root=scratch / "data", force=True, workers=1),
        bare,
    )


def data_file(scratch: Path) -> None:
    """Open a split whose folder cannot be written."""
    source, root, store = scratch / "one", scratch / "fixed", scratch / "runs"
    for number in range(8):
        path = source / f"train/a/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((4096, 4096), 90).convert("RGB").save(path)
    prepare("large", source=source, data_root=root)
    folder = root / "large"
    for note in (folder / NOTES).iterdir():
        note.unlink()
    (folder / NOTES).rmdir()
    (folder / NOTES).touch()
    path = folder / "train.beton"

    def first() -> None:
        path.touch()
        open_split("large", "train", data_root=root, runs_root=store)

    def bare() -> None:
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")

    compared(
        f"a data file of {path.stat().st_size >> 20} MB, opened again | opened the first time | bare SHA-256",
        lambda: open_split("large", "train", data_root=root, runs_root=store),
        first,
        bare,
    )


def study_report(scratch: Path, *, num_trials: int) -> None:
    search = Search(scratch, tuning=tuning_of(scratch, text=STUDY.replace("[paper]", TWO_MORE)))
    study = search.open()
    spaces, noise, trials = distributions(search.tuning), np.random.default_rng(0), []
    for number in range(num_trials):
        kappa, delta_base, momentum = noise.uniform((1.0, 0.01, 0.9), (64.0, 1.0, 0.999)).tolist()
        params = {"method.kappa": kappa, "method.delta_base": delta_base, "method.teacher_momentum": momentum}
        value = 60 - 10 * abs(np.log(kappa / 8)) + delta_base + noise.normal()
        points = {epoch: value * epoch / 6 for epoch in range(1, 6)}
        attributes = {"paper": number == 0}
        trials.append(
            optuna.trial.create_trial(
                params=params, distributions=spaces, value=value, intermediate_values=points, user_attrs=attributes
            )
        )
    study.add_trials(trials)

    def again() -> None:
        search.report()

    def whole() -> None:
        (search.locks.folder / "study.json").unlink()
        search.report()

    def bare() -> None:
        with quiet():
            optuna.importance.get_param_importances(study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0))

    search.report()
    compared(
        f"report of {num_trials} trials after one more | the whole report | one evaluation of importances",
        again,
        whole,
        bare,
        rounds=1,
    )


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--trials", type=int, default=1000)
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory(prefix="obowlab-bench-") as scratch:
        print(f"{'':<58} {'':>10} {'ratio':>8}")
        small_files(Path(scratch), num_images=options.images)
        data_file(Path(scratch))
        study_report(Path(scratch) / "study", num_trials=options.trials)
    return 0


if __name__ == "__main__":
    sys.exit(main())
