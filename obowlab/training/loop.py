"""The training loop: one function, top to bottom."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

import torch

from obowlab.config import Machine, Recipe
from obowlab.data.datasets import Split, open_split, subset
from obowlab.data.loaders import TrainLoader, train_loader
from obowlab.data.photometric import render
from obowlab.data.views import Stream, uniforms
from obowlab.errors import UserError
from obowlab.methods import METHODS, Method
from obowlab.methods.schedules import learning_rate
from obowlab.track import provenance
from obowlab.track.folder import RunFolder
from obowlab.training import checkpoint as checkpoints
from obowlab.training.distributed import World, parallelise, synchronise_batchnorm
from obowlab.training.progress import Reporter

PROGRESS_VALUES = ("loss", "perplexity_image_conv5")


class Interrupted(Exception):
    """A signal asked the run to stop; everything up to here is on disk."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


@dataclass
class StopRequest:
    """Remembers SIGINT and SIGTERM until the loop comes to a place where it can stop."""

    signum: int = field(default=0)

    at_once: bool = field(default=False)

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Catch the two signals for as long as the context lasts."""

        def remember(signum: int, frame: FrameType | None) -> None:
            self.signum = signum
            if self.at_once:
                raise Interrupted(signum)

        before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def act_at_once(self) -> None:
        """Raise `Interrupted` right where a signal finds the program from now on: nothing is lost outside of training."""
        self.at_once = True
        if self.signum:
            raise Interrupted(self.signum)


def build(recipe: Recipe, *, split: Split, seed: int, total_steps: int, world: World) -> Method:
    """Build the recipe's method with the initial weights of the seed, on the world's device."""
    method = METHODS[recipe.method.name](
        recipe.method,
        backbone=recipe.backbone,
        total_steps=total_steps,
        seed=seed,
        num_classes=split.num_classes if recipe.training.monitor else None,
        comm=world,
    )
    return method.to(world.device)


def open_loader(recipe: Recipe, *, split: Split, seed: int, machine: Machine, world: World) -> TrainLoader:
    """Open the training images of the recipe as this rank's share of every global batch."""
    return train_loader(
        split,
        subset=subset(split, images_per_class=recipe.data.images_per_class),
        views=recipe.views,
        batch_size=recipe.training.batch_size,
        seed=seed,
        rank=world.rank,
        world_size=world.world_size,
        backend=machine.loader,
        workers=default_workers() if machine.workers is None else machine.workers,
    )


def default_workers() -> int:
    """Return the number of loader workers of one process: its share of the cores."""
    return max(1, torch.get_num_threads())


def train(folder: RunFolder, *, recipe: Recipe, seed: int, machine: Machine, world: World, reporter: Reporter, stop: StopRequest) -> Method:
    """Train the run of a folder from its newest checkpoint to its end and return the method.

    Raises:
        Interrupted: SIGINT or SIGTERM came; a checkpoint was written.
        UserError: the loss is not finite, the data changed, or a file cannot be read or written.
    """
    split = open_split(recipe.data.dataset, "train", data_root=machine.data_root)
    loader = open_loader(recipe, split=split, seed=seed, machine=machine, world=world)
    steps_per_epoch = loader.steps_per_epoch
    total_steps = recipe.training.epochs * steps_per_epoch

    method = build(recipe, split=split, seed=seed, total_steps=total_steps, world=world)
    synchronise_batchnorm(method, world=world)
    if machine.channels_last:
        method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if machine.compile:
        method.encoder.compile()
    optimizer = torch.optim.SGD(
        method.param_groups(weight_decay=recipe.optimizer.weight_decay),
        lr=recipe.optimizer.learning_rate,
        momentum=recipe.optimizer.momentum,
    )
    step = resume(folder, method=method, optimizer=optimizer, data_hash=split.content_hash, world=world, reporter=reporter)
    parallel = parallelise(method, world=world).train()

    log_every = max(1, math.ceil(total_steps / machine.log_points))
    metric_log = folder.metric_log() if world.is_main else None
    if world.is_main:
        announce(folder, split=split, loader=loader, machine=machine, world=world, step=step, total_steps=total_steps)
    last_save = last_log = time.monotonic()
    logged_at = step

    def save() -> None:
        if world.is_main:
            if metric_log is not None:
                metric_log.sync()
            state = checkpoints.Checkpoint(
                step=step,
                fingerprint=folder.info.fingerprint,
                data_hash=split.content_hash,
                method=method.state_dict(),
                optimizer=optimizer.state_dict(),
            )
            checkpoints.save(folder.path, checkpoint=state)
        world.wait()

    with reporter.steps(done=step, total=total_steps):
        while step < total_steps:
            epoch, start_step = divmod(step, steps_per_epoch)
            waiting_since = time.monotonic()
            for batch in loader.batches(epoch=epoch, start_step=start_step):
                data_wait_s = time.monotonic() - waiting_since
                views = render(batch, recipe.views, seed=seed, device=world.device)
                draws = uniforms(seed=seed, epoch=epoch, indices=batch.indices, stream=Stream.WORDS, count=method.num_draws)
                rate = learning_rate(step, config=recipe.optimizer, steps_per_epoch=steps_per_epoch, total_steps=total_steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate

                with torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=recipe.training.precision == "bfloat16"):
                    output = parallel(
                        views.original,
                        views.student_views(),
                        step=step,
                        draws=torch.from_numpy(draws).to(world.device),
                        labels=batch.labels.to(world.device),
                    )
                optimizer.zero_grad(set_to_none=True)
                output.loss.backward()
                # The one synchronisation of a step: all ranks update, save and stop together.
                save_due = time.monotonic() - last_save > machine.checkpoint_every_s
                broken, stopping, saving = world.vote(not math.isfinite(output.loss.item()), stop.signum != 0, save_due)
                if broken:
                    raise UserError(_not_finite(step, epoch=epoch, indices=batch.indices.tolist(), folder=folder))
                optimizer.step()
                step += 1

                if step % log_every == 0 or step == total_steps:
                    names = sorted(output.metrics)
                    averages = world.mean(torch.stack([output.metrics[name].float() for name in names])).tolist()
                    values = dict(zip(names, averages, strict=True))
                    values["grad_norm"] = grad_norm(method)
                    now = time.monotonic()
                    step_time_s = (now - last_log) / (step - logged_at)
                    timing = {"images_per_s": recipe.training.batch_size / step_time_s, "step_time_s": step_time_s, "data_wait_s": data_wait_s}
                    last_log, logged_at = now, step
                    if metric_log is not None:
                        metric_log.append(step, {**values, "learning_rate": rate, "epoch": step / steps_per_epoch, **timing})
                        folder.set_state(status="running", step=step, total_steps=total_steps)
                    shown = {name: values[name] for name in PROGRESS_VALUES if name in values}
                    reporter.step(done=step, total=total_steps, images_per_s=timing["images_per_s"], values={**shown, "step_time_s": step_time_s})

                if saving or stopping:
                    save()
                    last_save = time.monotonic()
                if stopping:
                    raise Interrupted(stop.signum or signal.SIGTERM)
                waiting_since = time.monotonic()
    save()
    return method


def announce(folder: RunFolder, *, split: Split, loader: TrainLoader, machine: Machine, world: World, step: int, total_steps: int) -> None:
    """File the facts of this start of the run: code, software, machine, data."""
    code = provenance.code()
    if code.diff:
        folder.write_artifact("dirty.diff", code.diff)
    facts = {
        "commit": code.commit,
        "branch": code.branch,
        "dirty": code.dirty,
        "dataset": split.dataset,
        "data_hash": split.content_hash,
        "loader": loader.backend,
        "device": world.device.type,
        "procs": world.world_size,
        "threads": torch.get_num_threads(),
        "channels_last": machine.channels_last,
        "compile": machine.compile,
        "step": step,
    }
    attempt = folder.append_attempt({**provenance.environment(), **facts})
    folder.set_state(status="running", attempt=attempt, step=step, total_steps=total_steps, message="")


def grad_norm(method: Method) -> float:
    """Return the Euclidean norm of all gradients of the last backward pass."""
    gradients = [parameter.grad for parameter in method.parameters() if parameter.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def resume(folder: RunFolder, *, method: Method, optimizer: torch.optim.Optimizer, data_hash: str, world: World, reporter: Reporter) -> int:
    """Load the newest valid checkpoint of the folder, if there is one, and return the step to go on from."""
    found, complaints = checkpoints.newest(folder.path, fingerprint=folder.info.fingerprint, map_location=world.device)
    for complaint in complaints:
        reporter.say(f"Warning: {complaint} Going on from the one before.")
    if found is None:
        return 0
    if found.data_hash != data_hash:
        raise UserError(
            f"The training images are not those {folder.run_id} began with (content hash {data_hash[:12]}, was {found.data_hash[:12]}): "
            "restore the data set, or start over with --fresh."
        )
    step = checkpoints.restore(found, method=method, optimizer=optimizer)
    reporter.say(f"Going on from step {step}.")
    return step


def _not_finite(step: int, *, epoch: int, indices: list[int], folder: RunFolder) -> str:
    shown = ", ".join(map(str, indices[:8])) + (", …" if len(indices) > 8 else "")
    good = folder.path / checkpoints.CURRENT
    rest = f"the last good checkpoint is {good}" if good.exists() else "there is no checkpoint yet"
    return (
        f"The loss is not finite at step {step} (epoch {epoch}, training images {shown}); nothing was updated and {rest}. "
        "Lower optimizer.learning_rate, or set training.precision to float32."
    )
