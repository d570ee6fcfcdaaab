"""The training loop: one function, top to bottom, made of named steps."""

from __future__ import annotations

import math
import signal
import time
from typing import Any

import torch

from obowlab.data.datasets import Split, open_split, subset
from obowlab.errors import UserError
from obowlab.methods import METHODS, Batch, Method
from obowlab.methods.schedules import learning_rate
from obowlab.randomness import Stream, uniforms
from obowlab.runs import provenance
from obowlab.training import checkpoint as checkpoints
from obowlab.training import online_evaluation as online
from obowlab.training.context import Interrupted, Work
from obowlab.training.distributed import parallelise, synchronise_batchnorm
from obowlab.training.memory import peak_mib
from obowlab.training.stages import Teacher, find_teacher, prepare
from obowlab.views.loaders import TrainLoader, train_loader
from obowlab.views.photometric import render

SHOWN = ("loss", "perplexity_image_conv5", "rotation_accuracy", "contrast_accuracy", "monitor_accuracy")
"""Metrics beside the progress bar."""


def train(work: Work) -> Method[Any]:
    """Train a run from its newest checkpoint to its end and return the method.

    Raises:
        Interrupted: SIGINT or SIGTERM came; a checkpoint was written.
        UserError: the loss is not finite, the data changed, or a file cannot be read or written.
    """
    folder, machine, world, recipe = work.folder, work.machine, work.world, work.recipe
    split = open_split(recipe.data.dataset, "train", data_root=machine.data_root)
    loader = open_loader(work, split=split)
    steps_per_epoch = loader.steps_per_epoch
    total_steps = recipe.training.epochs * steps_per_epoch

    teacher = find_teacher(work)
    method = build(work, split=split, total_steps=total_steps)
    synchronise_batchnorm(method, world=world)
    if machine.channels_last:
        method.to(memory_format=torch.channels_last)
    if machine.compile:
        method.encoder.compile()
    optimizer = torch.optim.SGD(
        method.param_groups(weight_decay=recipe.optimizer.weight_decay),
        lr=recipe.optimizer.learning_rate,
        momentum=recipe.optimizer.momentum,
    )
    resumed = resume(work, method=method, optimizer=optimizer, data_hash=split.content_hash, steps_per_epoch=steps_per_epoch)
    step = resumed or 0

    def save() -> None:
        if world.is_main:
            split.check_unchanged()  # nothing learnt from other images is kept
            metric_log.sync()
            state = checkpoints.Checkpoint(
                step=step,
                fingerprint=folder.info.fingerprint,
                data_hash=split.content_hash,
                method=method.state_dict(),
                optimizer=optimizer.state_dict(),
                logged_step=metric_log.last_step,
            )
            checkpoints.save(folder.path, checkpoint=state)
        world.barrier()

    log_every = max(1, math.ceil(total_steps / machine.log_points))
    if world.is_main:
        metric_log = folder.metric_log()
        announce(work, split=split, loader=loader, teacher=teacher, step=step, total_steps=total_steps)
    if resumed is None and prepare(work, method=method, teacher=teacher, split=split):
        save()
    parallel = parallelise(method, world=world).train()
    last_save = last_log = time.monotonic()
    trained_s = folder.trained_s() or 0.0
    last_logged_step = step

    with work.reporter.steps(done=step, total=total_steps):
        while step < total_steps:
            epoch, start_step = divmod(step, steps_per_epoch)
            if start_step == 0 and online.is_due(work, epoch=epoch):
                save()
                if world.is_main:
                    last_log += online.measure(work, method=method, step=step, epoch=epoch)
                world.barrier()
                last_save = time.monotonic()
            waiting_since = time.monotonic()
            for pixels in loader.batches(epoch=epoch, start_step=start_step):
                data_wait_s = time.monotonic() - waiting_since
                views = render(pixels, recipe.views, seed=work.seed, device=world.device)
                draws = uniforms(
                    seed=work.seed, epoch=epoch, indices=pixels.indices, stream=Stream.WORDS, count=method.num_uniforms
                )
                rate = learning_rate(
                    step, optimizer=recipe.optimizer, epochs=recipe.training.epochs, steps_per_epoch=steps_per_epoch
                )
                for group in optimizer.param_groups:
                    group["lr"] = rate

                with torch.autocast(world.device.type, torch.bfloat16, enabled=recipe.training.precision == "bfloat16"):
                    output = parallel(
                        Batch(
                            original=views.original,
                            views=views.student,
                            uniforms=torch.from_numpy(draws).to(world.device),
                            step=step,
                            labels=pixels.labels.to(world.device),
                            cutmix_lambda=views.cutmix_lambda,
                        )
                    )
                optimizer.zero_grad(set_to_none=True)
                output.loss.backward()
                # The one synchronisation of a step: all ranks update, save and stop together.
                save_due = time.monotonic() - last_save > machine.checkpoint_every_s
                broken, stopping, saving = world.any_rank(not math.isfinite(output.loss.item()), work.stop.signum != 0, save_due)
                if broken:
                    raise UserError(_not_finite(work, step=step, epoch=epoch, indices=pixels.indices.tolist()))
                optimizer.step()
                step += 1

                if step % log_every == 0 or step == total_steps:
                    names = sorted(output.metrics)
                    averages = world.all_reduce_mean(torch.stack([output.metrics[name].float() for name in names])).tolist()
                    values = dict(zip(names, averages, strict=True))
                    values |= {"grad_norm": grad_norm(method), "learning_rate": rate, "epoch": step / steps_per_epoch}
                    now = time.monotonic()
                    step_time_s = (now - last_log) / (step - last_logged_step)
                    images_per_s = recipe.training.batch_size / step_time_s
                    trained_s += now - last_log
                    last_log, last_logged_step = now, step
                    if world.is_main:
                        timing = {"images_per_s": images_per_s, "step_time_s": step_time_s, "data_wait_s": data_wait_s}
                        metric_log.append(step, values | timing)
                        peak = round(peak_mib(world.device), 1)
                        folder.set_state(
                            status="running", step=step, total_steps=total_steps, trained_s=round(trained_s, 1), memory_mib=peak
                        )
                    shown = {name: values[name] for name in SHOWN if name in values}
                    left_s = (total_steps - step) * step_time_s
                    work.reporter.step(done=step, total=total_steps, images_per_s=images_per_s, left_s=left_s, values=shown)

                if saving or stopping:
                    save()
                    last_save = time.monotonic()
                if stopping:
                    raise Interrupted(work.stop.signum or signal.SIGTERM)
                waiting_since = time.monotonic()
    save()
    return method


# ---------------------------------------------------------------------------------------------------- the loop's steps


def open_loader(work: Work, *, split: Split) -> TrainLoader:
    """Open the recipe's training images as this rank's share of every global batch."""
    recipe, machine = work.recipe, work.machine
    return train_loader(
        split,
        subset=subset(split, images_per_class=recipe.data.images_per_class),
        views=recipe.views,
        batch_size=recipe.training.batch_size,
        seed=work.seed,
        rank=work.world.rank,
        world_size=work.world.world_size,
        backend=machine.loader,
        workers=torch.get_num_threads() if machine.workers is None else machine.workers,
    )


def build(work: Work, *, split: Split, total_steps: int) -> Method[Any]:
    """Build the recipe's method with the initial weights of the run's seed, on this process's device."""
    recipe = work.recipe
    kind = METHODS[recipe.method.name]
    kind.check_views(recipe.method, backbone=recipe.backbone, views=recipe.views)
    kind.check_batch(recipe.method, batch_size=recipe.training.batch_size, world_size=work.world.world_size)
    method = kind(
        recipe.method,
        backbone=recipe.backbone,
        total_steps=total_steps,
        seed=work.seed,
        num_classes=split.num_classes if recipe.training.monitor else None,
        comm=work.world,
    )
    return method.to(work.world.device)


def resume(
    work: Work, *, method: Method[Any], optimizer: torch.optim.Optimizer, data_hash: str, steps_per_epoch: int
) -> int | None:
    """Load the newest valid checkpoint of the run and return the step to go on from; None when there is no checkpoint."""
    folder = work.folder
    found, complaints = checkpoints.newest(folder.path, fingerprint=folder.info.fingerprint, map_location=work.world.device)
    for complaint in complaints:
        work.reporter.say(f"Warning: {complaint} Going on from the one before.")
    if found is None:
        return None
    if found.data_hash != data_hash:
        raise UserError(
            f"The training images are not those that {folder.run_id} began with (content hash {data_hash[:12]}, "
            f"was {found.data_hash[:12]}): restore the data set, or start over with --fresh."
        )
    if work.world.is_main:
        check_logs(work, found=found, steps_per_epoch=steps_per_epoch)
    step = checkpoints.restore(found, method=method, optimizer=optimizer)
    work.reporter.say(f"Going on from step {step}.")
    return step


def check_logs(work: Work, *, found: checkpoints.Checkpoint, steps_per_epoch: int) -> None:
    """Refuse to go on from a checkpoint whose points are no longer all in the metric files: nobody would log them again.

    Raises:
        UserError: names the file and the step at which it ends.
    """
    measured = [epoch * steps_per_epoch for epoch in range(work.recipe.training.epochs) if online.is_due(work, epoch=epoch)]
    expected = {
        "metrics": found.logged_step if found.logged_step is not None else -1,
        online.ONLINE: max((step for step in measured if step < found.step), default=-1),
    }
    for name, step in expected.items():
        last = max((point.step for point in work.folder.metrics(name)), default=-1)
        if last < step:
            raise UserError(
                f"{work.folder.path / name}.jsonl ends at step {max(last, 0)}, but by the checkpoint it had step {step}: put a "
                f"copy of it back, or remove {checkpoints.CURRENT} and {checkpoints.PREVIOUS} beside it and train on."
            )


def announce(work: Work, *, split: Split, loader: TrainLoader, teacher: Teacher | None, step: int, total_steps: int) -> None:
    """Say what begins, and file the facts of this start of the run: code, software, machine, data."""
    folder, machine, world = work.folder, work.machine, work.world
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
    if teacher is not None:
        facts |= {"teacher_run": teacher.run_id, "teacher_weights": teacher.weights_hash}
    epochs, batch_size = work.recipe.training.epochs, work.recipe.training.batch_size
    work.reporter.say(
        f"Training {folder.run_id}: {epochs} epochs of {split.dataset}, {total_steps} steps of {batch_size} images, "
        f"{world.world_size} process(es) on {world.device.type}, {loader.backend} loader."
        + (f" Teacher: {teacher.run_id}." if teacher is not None else "")
    )
    attempt = folder.append_attempt({**provenance.environment(), **facts})
    folder.set_state(status="running", attempt=attempt, step=step, total_steps=total_steps, message="")


def grad_norm(method: Method[Any]) -> float:
    """Return the Euclidean norm of all gradients of the last backward pass."""
    gradients = [parameter.grad for parameter in method.parameters() if parameter.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def _not_finite(work: Work, *, step: int, epoch: int, indices: list[int]) -> str:
    shown = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
    good = work.folder.path / checkpoints.CURRENT
    rest = f"the last good checkpoint is {good}" if good.exists() else "there is no checkpoint yet"
    return (
        f"The loss is not finite at step {step} (epoch {epoch}, training images {shown}); nothing was updated and {rest}. "
        "Lower optimizer.learning_rate, or set training.precision to float32."
    )
