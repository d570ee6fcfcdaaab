"""Time and memory of trainings, from a few of their own steps: `python -m obowlab.training.benchmark REQUEST`.

`obowlab.launch.cost` starts it with as many processes as a training has on a node. What it times is the training itself
(`Trainer`): loading, colours, every collective, metrics and the checkpoint, in a run folder that is thrown away.

REQUEST is a file with {"machine": ..., "recipes": {key: recipe}}. For every recipe one line, with its key and the numbers or an
`error`, is appended to `ANSWERS` beside it.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from statistics import median

import torch
from torch import nn

from obowlab.config import Loaded, Machine, Recipe
from obowlab.errors import UserError
from obowlab.methods import Batch
from obowlab.methods.projection import GlobalBatchNorm1d
from obowlab.precision import autocast
from obowlab.runs.folder import RunFolder
from obowlab.training.__main__ import end_at_once, stop_with_parent
from obowlab.training.checkpoint import CURRENT
from obowlab.training.context import RunContext
from obowlab.training.distributed import OtherRankFailed, World, join
from obowlab.training.loop import Trainer
from obowlab.training.memory import forget_peak, peak_mib
from obowlab.training.render_ahead import rendered
from obowlab.training.reporter import Reporter
from obowlab.training.signals import StopRequest
from obowlab.training.sync_batchnorm import SyncBatchNorm
from obowlab.views.loaders import PixelBatch, num_workers

ANSWERS = "answers.jsonl"

FEW = (8, 16)
"""Images a process where a step of its whole share would take too long; multiples of what methods split a batch into."""

LONG_S = 10.0
"""A step that takes longer than about this is not timed."""

WARM_UP = 2
"""Steps that are not counted after the first: libraries look for their fastest kernels."""

TIMED_S = 3.0
MAX_WINDOWS = 12
SHARE = 20
"""Steps are timed for about so long, in at most so many windows of each kind and one for so many steps of the training; their
median counts."""


def measure(recipe: Recipe, *, machine: Machine, world: World, scratch: Path) -> dict[str, float]:
    """Return what training a recipe takes, the numbers of `obowlab.launch.cost.Measured`; every rank calls it.

    Steps are of the run's own share of the batch. Only where those take too long, as with large images on a CPU, they are of
    `FEW` images, and every number is taken from the line through the two: neither the prediction head nor the optimiser has
    more to do when a batch is larger.

    Args:
        recipe: what to measure; its images are prepared.
        machine: the training's; its processes on one node are these.
        world: these.
        scratch: an empty folder for the run.

    Raises:
        UserError: the recipe cannot be trained.
    """
    share = recipe.training.batch_size // machine.procs
    trainer = _trainer(recipe, images=share, machine=machine, world=world, scratch=scratch)
    most = max(1, recipe.training.epochs * trainer.loader.steps_per_epoch // SHARE)
    if world.device.type == "cuda" or share <= FEW[1] or _guess_s(trainer, images=share) <= LONG_S:
        return _measure(trainer, most=most)
    few, more = (_measure(_trainer(recipe, images=n, machine=machine, world=world, scratch=scratch), most=most) for n in FEW)
    return {name: through(few[name], more[name], images=share) for name in few}


def through(few: float, more: float, *, images: int) -> float:
    """Return the value for so many images on the line through those for `FEW`; never less than for the larger of them."""
    slope = max(0.0, more - few) / (FEW[1] - FEW[0])
    return more + slope * (images - FEW[1])


def _trainer(recipe: Recipe, *, images: int, machine: Machine, world: World, scratch: Path) -> Trainer:
    """Return a training with so many images a process, that ends in a million epochs and learns nothing."""
    training = recipe.training.model_copy(update={"batch_size": images * world.world_size, "epochs": 10**6})
    optimizer = recipe.optimizer.model_copy(update={"learning_rate": 1e-12, "end_learning_rate": 0.0})
    recipe = recipe.model_copy(update={"training": training, "optimizer": optimizer})
    loaded = Loaded("benchmark", recipe, {})
    folder = RunFolder.create(loaded, seed=0, runs_root=scratch / f"{images}-{world.rank}")
    run = RunContext(folder, machine=machine, world=world, reporter=Reporter(None), stop=StopRequest())
    return world.together(lambda: Trainer(run))


def _guess_s(trainer: Trainer, *, images: int) -> float:
    """Return roughly the seconds of a step: ten times what the encoder takes for the original views."""
    run, encoder = trainer.run, trainer.method.encoder.eval()
    size = run.recipe.views.original_size
    few = torch.randn(2, 3, size, size, device=run.world.device)
    with torch.no_grad(), autocast(run.recipe.training.precision, device=run.world.device):
        encoder(few)
        began = time.perf_counter()
        encoder(few)
    forward_s = torch.tensor([time.perf_counter() - began])
    return float(run.world.all_reduce_mean(forward_s)) / len(few) * images * 10.0


def _measure(trainer: Trainer, *, most: int) -> dict[str, float]:
    """Return the numbers of one share of the batch, from at most so many windows."""
    run, method = trainer.run, trainer.method
    device = run.world.device
    forget_peak(device)
    run.world.on_main(lambda: trainer.open_metric_log(None))
    trainer.start()
    stream = rendered(trainer.timer.waiting_for(_endless(trainer)), trainer.render, device=device)
    window = 5 if device.type == "cuda" else 1  # on a GPU a single step could not be told from the wait for it
    first_s = _step_s(trainer, stream, steps=1, logged=True)
    warm_s = _step_s(trainer, stream, steps=WARM_UP, logged=True)
    agreed_s = run.world.all_reduce_mean(torch.tensor([warm_s], device=device)).item()
    plain, logged = [], []
    for _ in range(min(MAX_WINDOWS, most, max(1, int(TIMED_S / (2 * window * agreed_s))))):
        plain.append(_step_s(trainer, stream, steps=window, logged=False))
        logged.append(_step_s(trainer, stream, steps=window, logged=True))
    began = time.perf_counter()
    trainer.save(wait=False)  # as one in the middle of training
    save_s = time.perf_counter() - began
    trainer.save()
    step_s = median(plain)
    learnt = [parameter for parameter in method.parameters() if parameter.requires_grad]
    return {
        "step_s": step_s,
        "metrics_s": max(0.0, median(logged) - step_s),
        "load_s": _load_s(trainer),
        "start_s": max(0.0, first_s - step_s),
        "save_s": save_s,
        "memory_mib": peak_mib(device),
        "checkpoint_mib": (run.folder.path / CURRENT).stat().st_size / 2**20 if run.world.is_main else 0.0,
        "encoder_mib": _mib(method.encoder.state_dict().values()),
        "gradient_mib": _mib(learnt),
        "collectives": _num_collectives(trainer),
    }


def _endless(trainer: Trainer) -> Iterator[PixelBatch]:
    for epoch in itertools.count():
        yield from trainer.run.world.each(trainer.load(epoch, 0))


def _step_s(trainer: Trainer, stream: Iterator[tuple[PixelBatch, Batch]], *, steps: int, logged: bool) -> float:
    """Return the mean seconds of the next steps of the loop, all of them logged or none."""
    trainer.log_every = 1 if logged else sys.maxsize
    _wait_for(trainer.run.world.device)
    began = time.perf_counter()
    for _ in range(steps):
        pixels, batch = next(stream)
        trainer.train_step(batch, item=pixels)
        if batch.wants_metrics:
            trainer.log_step()
    _wait_for(trainer.run.world.device)
    return (time.perf_counter() - began) / steps


def _load_s(trainer: Trainer) -> float:
    """Return the seconds that the loader takes for a batch by itself: beside a few fast steps it would not fall behind yet."""
    batches = trainer.run.world.each(trainer.load(0, 0))
    workers = num_workers(trainer.run.machine)
    with closing(batches):  # type: ignore[type-var]
        next(batches)
        began = time.perf_counter()
        loaded = sum(1 for _ in itertools.islice(batches, 8 + 2 * workers))
        return (time.perf_counter() - began) / max(1, loaded)


def _num_collectives(trainer: Trainer) -> float:
    """Return the collectives in a step that nothing else waits beside: the batch norms' of every pass, and the votes."""
    kinds_of_norm = nn.BatchNorm2d | GlobalBatchNorm1d | SyncBatchNorm
    layers = [each for each in trainer.method.modules() if isinstance(each, kinds_of_norm)]
    views = trainer.run.recipe.views
    kinds = bool(views.num_crops) + bool(views.num_patches) + bool(views.num_small_crops)
    return 1.0 + sum(2 * kinds if each.weight is None or each.weight.requires_grad else 1 for each in layers)


def _mib(tensors: Iterable[torch.Tensor]) -> float:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _answer(request: Path, answer: Mapping[str, object]) -> None:
    with (request.parent / ANSWERS).open("a") as answers:
        answers.write(json.dumps(answer) + "\n")


def main(argv: list[str]) -> int:
    """Measure the recipes of a request."""
    stop_with_parent()
    path = Path(argv[0])
    request = json.loads(path.read_bytes())
    machine = Machine.model_validate_json(json.dumps(request["machine"]))
    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    try:
        with join(machine) as world:
            for key, values in request["recipes"].items():
                recipe = Recipe.model_validate_json(json.dumps(values))
                try:
                    answer = {"key": key, **measure(recipe, machine=machine, world=world, scratch=path.parent / key)}
                except (UserError, OtherRankFailed) as error:
                    answer = {"key": key, "error": str(error)}
                if world.is_main:
                    _answer(path, answer)
    except Exception as error:
        _answer(path, {"key": "", "error": f"{type(error).__name__}: {error}"})  # torchrun's own last line says nothing
        if os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        end_at_once(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
