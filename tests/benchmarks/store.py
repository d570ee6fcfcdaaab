"""Fill a run store with runs as finished trainings leave them: `python tests/benchmarks/store.py DIR [--runs 200]`.

Everything is written by the project's own writers and sent to the store's MLflow by its own mirror; only the training is drawn
from random numbers, the same for the same run. The runs are those of Tables 1 and 3 on photos with ten seeds and on drawn images
with eight, and two seeds of every other table on photos: `obowlab table table3 --scale tiny` has something to say about them.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from obowlab.config import Machine, canonical_hash
from obowlab.evaluation.result import Measurement, Result, mean_with_interval, proportion_with_interval
from obowlab.launch.cost import num_steps
from obowlab.launch.local import sample_interval_s
from obowlab.report.read import cache_curves
from obowlab.runs import provenance
from obowlab.runs.folder import RunFolder
from obowlab.tables.plan import Job, make_plan
from obowlab.tables.spec import load_table, table_files
from obowlab.tracking.mirror import Mirror

CONTENT = ((("table1", "table3"), "tiny", 10), (("table1", "table3"), "demo", 8), (tuple(table_files()), "tiny", 2))
"""Tables, their scale and how many seeds of them; a run that several of them need is there once."""

RUNS = 200
STEP_TIME_S = 0.14
PER_LEVEL = {
    "distance": 40.0,
    "kappa": 5.0,
    "msd": 40.0,
    "perplexity_batch": 300.0,
    "perplexity_image": 80.0,
    "prediction_entropy": 6.0,
    "target_entropy": 4.0,
    "word_age": 30.0,
    "words_used": 60.0,
}
"""What OBoW logs of a level, and about how much of it."""

SHARED = {"grad_norm": 2.0, "learning_rate": 0.05, "images_per_s": 400.0, "step_time_s": STEP_TIME_S, "data_wait_s": 0.01}
OF_METHOD = {
    "obow": {"loss_kl": 1.5, "teacher_momentum": 0.99},
    "bownet": {f"{name}_conv5": PER_LEVEL[name] for name in ("distance", "perplexity_batch", "perplexity_image", "words_used")},
    "rotnet": {"rotation_accuracy": 70.0},
    "moco": {"contrast_accuracy": 60.0, "queue_age": 40.0, "teacher_momentum": 0.999},
    "simsiam": {"projection_std": 0.02},
    "simclr": {"contrast_accuracy": 60.0},
    "byol": {"projection_std": 0.06, "teacher_momentum": 0.99},
    "swav": {"loss_kl": 3.0, "code_entropy": 2.0, "prototypes_used": 30.0},
    "supervised": {"class_accuracy": 70.0},
}
"""Method -> what it logs beside its losses, and about how much of it."""

MODEL_SCRIPT = """
import sys, torch
from pathlib import Path
from obowlab.tracking.model import save_encoder_model
from obowlab.weights.standalone import build
torch.manual_seed(0)
save_encoder_model(build("resnet18", stem="small", width=4).eval(), path=Path(sys.argv[1]), example=torch.zeros(2, 3, 32, 32))
"""


def planned(count: int) -> Iterator[Job]:
    """Yield the first so many different runs of `CONTENT`."""
    seen: set[str] = set()
    for names, scale, seeds in CONTENT:
        plan = make_plan([load_table(name, scale=scale) for name in names], seeds=range(seeds), rows={})
        for job in plan.jobs:
            if job.fingerprint not in seen and len(seen) < count:
                seen.add(job.fingerprint)
                yield job


def add_run(job: Job, *, machine: Machine, model: Path, points: int) -> RunFolder:
    """Make the folder of one finished run.

    Args:
        job: which run.
        machine: where its store is.
        model: an MLflow model folder, every run's encoder.
        points: at most so many points per training metric.
    """
    folder = RunFolder.create(job.loaded, seed=job.seed, runs_root=machine.runs_root)
    rng = np.random.default_rng(int(job.fingerprint[:12], 16))
    recipe = job.loaded.recipe
    total = num_steps(recipe, data_root=machine.data_root)
    assert total is not None
    folder.write_machine(machine)
    facts = {"dataset": recipe.data.dataset, "data_hash": canonical_hash(recipe.data.dataset), "loader": "torch", "device": "cpu"}
    code = provenance.code()
    folder.append_attempt(
        {**provenance.environment(), "commit": code.commit, "branch": code.branch, "dirty": False, **facts, "procs": 1, "step": 0}
    )
    log_metrics(folder, rng=rng, total=total, points=points)
    for result in results(job, rng=rng):
        folder.add_result(result.to_json())
    folder.write_artifact("log.txt", "".join(f"Step {step} of {total}.\n" for step in range(0, total, max(1, total // 20))))
    for name in ("checkpoint.pt", "checkpoint.previous.pt", "encoder.safetensors"):
        folder.write_artifact(name, rng.bytes(1024))  # nothing but training reads them
    shutil.copytree(model, folder.path / "model")
    tables = dict(place.split("/", maxsplit=1) for place in job.places)
    folder.add_labels({**{f"obowlab.{table}": row for table, row in tables.items()}, "obowlab.scale": scale_of(job)})
    folder.set_state(status="running", attempt=1, step=total, total_steps=total, trained_s=round(total * STEP_TIME_S, 1))
    folder.set_state(status="finished")
    cache_curves(folder)
    return folder


def log_metrics(folder: RunFolder, *, rng: np.random.Generator, total: int, points: int) -> None:
    """Append the training, online and system metrics of a run."""
    recipe, began = folder.info.recipe, folder.info.created_at
    every = max(1, math.ceil(total / points))
    steps = np.arange(every, total + 1, every)
    sizes = {**OF_METHOD[recipe.method.name], **SHARED, "loss": 5.0}
    sizes |= {f"loss_{kind}": 4.0 for kind in ("crops", "patches") if getattr(recipe.views, f"num_{kind}")}
    if recipe.method.name == "obow":
        sizes |= {f"{name}_{level}": size for level in recipe.method.levels for name, size in PER_LEVEL.items()}
    part = steps / total
    drawn = {}
    for name, size in sizes.items():
        start, end = size * rng.uniform(0.5, 1.5, size=2)
        drawn[name] = end + (start - end) * np.exp(-6 * part) + 0.03 * size * rng.standard_normal(len(steps))
    columns = {name: np.abs(values).astype(np.float32).tolist() for name, values in drawn.items()}
    columns["epoch"] = (recipe.training.epochs * part).tolist()
    with folder.metric_log() as log:
        for i, step in enumerate(steps.tolist()):
            log.append(step, {name: values[i] for name, values in columns.items()}, time_s=began + step * STEP_TIME_S)
    every_epochs = recipe.evaluation.every_epochs or 3
    with folder.metric_log("online") as log:
        for epoch in range(every_epochs, recipe.training.epochs, every_epochs):
            step = total * epoch // recipe.training.epochs
            values = {"epoch": epoch, "fewshot_5shot": 6 + epoch / 4 + rng.normal()}
            log.append(step, values, time_s=began + step * STEP_TIME_S)
    names = ("disk_free", "cpu", "memory_used", "memory_percent", "run_processes", "run_memory")
    with folder.metric_log("system") as log:
        second = 5.0
        while second < total * STEP_TIME_S:
            values = dict(zip(names, rng.uniform(10, 100, size=len(names)).tolist(), strict=True))
            log.append(int(second), values, time_s=began + second)
            second += sample_interval_s(second)


def results(job: Job, *, rng: np.random.Generator) -> Iterator[Result]:
    """Yield the results of a run; runs of one row lie around one value, and all runs of a scale answer the same questions."""
    recipe = job.loaded.recipe
    row = np.random.default_rng(int(recipe.fingerprint(seed=0)[:12], 16)).normal(scale=1.5)
    images = 5000 if recipe.data.dataset != "synthetic" else 1200
    hard = np.random.default_rng(images).normal(scale=4.0, size=200)
    for subject in ("student", "random") if recipe.evaluation.random_baseline else ("student",):
        level = 12 + row + rng.normal(scale=0.6) if subject == "student" else 5.0

        def few_shot(shots: int, level: float = level) -> Measurement:
            chance = np.clip(level + (2.0 if shots == 5 else 0.0) + hard, 1, 99) / 100
            return mean_with_interval(f"fewshot_{shots}shot", rng.binomial(50, chance).tolist(), of=50)

        def top1(name: str, level: float = level) -> Measurement:
            return proportion_with_interval(f"{name}_top1", rng.binomial(1, (level + 3) / 100, size=images).tolist())

        for protocol in recipe.evaluation.protocols:
            shots = recipe.evaluation.fewshot.shots
            measured = tuple(few_shot(each) for each in shots) if protocol == "fewshot" else (top1(protocol),)
            yield Result(
                protocol=protocol,
                version=1,
                protocol_hash=canonical_hash([protocol, recipe.data.dataset]),
                subject=subject,
                weights_hash=canonical_hash([job.fingerprint, subject]),
                data_hash=canonical_hash([recipe.data.dataset, "val"]),
                measurements=measured,
                details={
                    **recipe.evaluation.model_dump(mode="json")[protocol],
                    "dataset": recipe.data.dataset,
                    "images": "validation",
                },
                elapsed_s=1.0,
            )


def scale_of(job: Job) -> str:
    """Return the scale that a job's recipe belongs to."""
    return job.loaded.name.partition("-")[0]


def make_model(path: Path) -> None:
    """Save a small real encoder as an MLflow model, in a process of its own: torch stays out of this one."""
    subprocess.run([sys.executable, "-c", MODEL_SCRIPT, str(path)], check=True)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to make the store; new or empty")
    parser.add_argument("--runs", type=int, default=RUNS, help=f"how many (default: {RUNS}, all there are)")
    parser.add_argument("--points", type=int, default=2000, help="at most so many points per training metric (default: 2000)")
    parser.add_argument("--no-mlflow", action="store_true", help="leave MLflow out")
    options = parser.parse_args(words)
    if options.folder.exists() and any(options.folder.iterdir()):
        parser.error(f"{options.folder} is not empty")
    options.folder.mkdir(parents=True, exist_ok=True)
    machine = Machine(runs_root=options.folder.absolute(), data_root=options.folder.absolute() / ".no-data")
    model = machine.runs_root / ".model"
    make_model(model)
    began = time.monotonic()
    for number, job in enumerate(planned(options.runs), start=1):
        folder = add_run(job, machine=machine, model=model, points=options.points)
        problem = None if options.no_mlflow else Mirror(folder).sync(timeout_s=600).error
        if problem:
            print(f"MLflow refused {folder.run_id}: {problem}", file=sys.stderr)
            return 1
        if number % 20 == 0 or number == options.runs:
            print(f"{number} runs in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    shutil.rmtree(model)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
