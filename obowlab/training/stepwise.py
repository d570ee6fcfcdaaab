"""A training that other code drives: the steps of `obowlab run`, without a run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from obowlab.config import Loaded, Machine, Recipe, load_machine
from obowlab.errors import UserError
from obowlab.methods import Batch, Method, StepOutput
from obowlab.runs.folder import RunFolder
from obowlab.training.context import RunContext
from obowlab.training.distributed import World, device_of
from obowlab.training.loop import Trainer
from obowlab.training.render_ahead import rendered
from obowlab.training.reporter import Reporter
from obowlab.training.signals import StopRequest
from obowlab.training.stages import find_teacher, prepare


def trainer(
    recipe: Recipe,
    *,
    seed: int = 0,
    method: type[Method[Any]] | None = None,
    data_root: str | Path | None = None,
    runs_root: str | Path | None = None,
    device: str | None = None,
    workers: int | None = None,
) -> Steps:
    """Return a training at its first step, in this process, for code that takes the steps itself.

    The steps are those of `obowlab run` with the same recipe and seed, to the bit. But nothing is written: there is no run, no
    checkpoint and no metric file, and nothing is measured. No GPU is leased either. What is not given is as on the command line:
    from the environment, the machine file, or the defaults.

    Args:
        recipe: as `obowlab.recipe` returns it.
        seed: of initial weights, order, views and whatever else is drawn.
        method: another class for the recipe's method, with the same settings: a subclass of it, for instance.
        data_root: where prepared data sets are.
        runs_root: the run store; a recipe of several stages has its teacher there.
        device: `cpu`, `cuda` (the first GPU that torch sees) or `auto`.
        workers: loader workers.

    Raises:
        UserError: the images are not prepared, the recipe does not fit them, or the teacher's run is not there.
    """
    given = {
        "data_root": None if data_root is None else Path(data_root),
        "runs_root": None if runs_root is None else Path(runs_root),
        "device": device,
        "workers": workers,
    }
    machine = load_machine(overrides=given).model_copy(update={"procs": 1, "nodes": 1, "launcher": "local"})
    with tempfile.TemporaryDirectory(prefix="obowlab-") as scratch:  # a Trainer has a folder, and writes to it when it saves
        return Steps(_start(recipe, seed=seed, kind=method, machine=machine, scratch=Path(scratch)))


class Steps:
    """A training, step by step; made by `trainer`.

    Attributes:
        recipe: what is trained.
        method: the torch module with everything that is learnt; `method.encoder` is the student.
        optimizer: moves it. After a step the parameters still have its gradients.
        total_steps: of the whole training, for schedules.
    """

    def __init__(self, trainer: Trainer) -> None:
        """Drive a trainer that has started."""
        self._trainer = trainer
        self.recipe: Recipe = trainer.run.recipe
        self.method = trainer.method
        self.optimizer = trainer.optimizer
        self.total_steps = trainer.total_steps

    @property
    def num_done(self) -> int:
        """Steps taken; the number of the next one."""
        return self._trainer.step

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch."""
        return self._trainer.loader.steps_per_epoch

    @property
    def device(self) -> torch.device:
        """Where batches and weights are."""
        return self._trainer.run.world.device

    def batches(self) -> Iterator[Batch]:
        """Yield the batches from the next step on to the end of the training; take one step with each.

        All metrics are computed for every batch (`wants_metrics`), which a run does for logged steps only.

        Raises:
            UserError: a record of the data set cannot be read.
        """
        first, start = divmod(self.num_done, self.steps_per_epoch)
        for epoch in range(first, self.recipe.training.epochs):
            loaded = self._trainer.load(epoch, start if epoch == first else 0)
            with closing(rendered(loaded, self._trainer.render, device=self.device)) as stream:  # type: ignore[type-var]
                for _, batch in stream:
                    yield batch

    def step(self, batch: Batch, *, loss: Callable[[StepOutput], Tensor] | None = None) -> StepOutput:
        """Do one update: schedule, forward, backward, optimiser.

        Args:
            batch: the next of `batches`, or another one on the device.
            loss: what to minimise, 0-dim, given the method's output; by default the method's own loss, `output.loss`.

        Returns:
            The loss that was minimised, without gradient, and the method's metrics, 0-dim tensors on the device.

        Raises:
            UserError: the loss is not finite; nothing was updated.
        """
        output = self._trainer.forward(batch)
        minimised = output.loss if loss is None else loss(output)
        self._trainer.backward(minimised)
        if not torch.isfinite(minimised):
            raise UserError(
                f"The loss is not finite at step {self.num_done}. "
                "Lower optimizer.learning_rate, or set training.precision to float32."
            )
        self._trainer.update()
        return StepOutput(loss=minimised.detach(), metrics=output.metrics)


def _start(recipe: Recipe, *, seed: int, kind: type[Method[Any]] | None, machine: Machine, scratch: Path) -> Trainer:
    """Return a trainer before its first step, with a folder that it does not need any more."""
    folder = RunFolder.create(Loaded("steps", recipe, {}), seed=seed, runs_root=scratch)
    world = World(rank=0, world_size=1, device=device_of(machine, local_rank=0))
    run = RunContext(folder, machine=machine, world=world, reporter=Reporter(None), stop=StopRequest())
    trainer = Trainer(run, kind=kind)
    trainer.log_every = 1
    prepare(run, method=trainer.method, teacher=find_teacher(run, runs_root=machine.runs_root), split=trainer.split)
    trainer.start()
    return trainer
