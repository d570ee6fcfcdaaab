"""The training loop: `train` on one screen, its steps in `Trainer`."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from obowlab.config import Detector
from obowlab.config.compatibility import check_cpu
from obowlab.config.methods import needs_classes
from obowlab.data.datasets import Split, open_split
from obowlab.data.protocol_needs import refuse_unlabelled
from obowlab.errors import UserError
from obowlab.methods import METHODS, Batch, Method, StepOutput, compile_encoders
from obowlab.methods.schedules import learning_rate
from obowlab.precision import autocast, loss_scaler, set_float32_mode
from obowlab.randomness import Ints
from obowlab.runs import provenance
from obowlab.runs.metric_log import MetricLog
from obowlab.training import checkpoint as checkpoints
from obowlab.training import online_evaluation as online
from obowlab.training.context import RunContext
from obowlab.training.distributed import parallelise
from obowlab.training.feed import Item, open_feed
from obowlab.training.memory import peak_mib
from obowlab.training.optimizers import build_optimizer, grad_norm, set_learning_rate
from obowlab.training.render_ahead import rendered
from obowlab.training.reporter import training_facts
from obowlab.training.resume import check_logs, check_same, newest_checkpoint
from obowlab.training.signals import Interrupted
from obowlab.training.stages import Teacher, find_teacher, prepare
from obowlab.training.sync_batchnorm import synchronise_batchnorm
from obowlab.training.votes import Decision, Votes
from obowlab.training.window import MetricWindow, Timer

SHOWN = ("loss", "perplexity_image_conv5", "rotation_accuracy", "contrast_accuracy", "class_accuracy", "monitor_accuracy")
"""Metrics beside the progress bar."""


class _Place(NamedTuple):
    """A step, and the images that it saw: what a sentence on it needs."""

    step: int
    epoch: int
    indices: Ints


def train(run: RunContext) -> Method[Any]:
    """Train a run from its newest checkpoint to its end and return the method.

    Raises:
        Interrupted: SIGINT or SIGTERM came; a checkpoint was written.
        OtherRankFailed: another rank failed; rank 0 has its error.
        UserError: the loss is not finite, the data changed, or a file cannot be read or written.
    """
    trainer = run.world.together(lambda: Trainer(run))
    trainer.resume_or_prepare()
    with run.reporter.steps(done=trainer.step, total=trainer.total_steps):
        for epoch, start_step in trainer.epochs():
            trainer.evaluate_if_due(epoch)
            loaded = trainer.timer.waiting_for(run.world.each(trainer.load(epoch, start_step)))
            for item, batch in rendered(loaded, trainer.render, device=run.world.device):
                save_due, stopping = trainer.train_step(batch, item=item)
                if batch.wants_metrics:
                    trainer.log_step()
                if save_due or stopping:
                    trainer.save(wait=stopping)
                if stopping:
                    raise Interrupted(run.stop.signum or signal.SIGTERM)
    trainer.finish()
    trainer.save()
    return trainer.method


class Trainer:
    """A run in training: what the steps of the loop share. Every rank has one, and all take the same steps.

    Attributes:
        run: folder, machine, ranks.
        split: the training images.
        loader: gives this rank's share of them.
        total_steps: of the whole training.
        log_every: steps between two logged points.
        method: what is trained.
        optimizer: moves it.
        step: updates done.
        timer: how long the steps take.
    """

    def __init__(self, run: RunContext, *, kind: type[Method[Any]] | None = None) -> None:
        """Open the images and build the method.

        Args:
            run: folder, machine, ranks.
            kind: another class for the recipe's method, with the same settings.

        Raises:
            UserError: the images are not prepared, or the recipe does not fit them or the number of processes.
        """
        recipe, machine = run.recipe, run.machine
        set_up_device(run)
        self.run = run
        self.split = open_split(recipe.data.dataset, "train", data_root=machine.data_root, runs_root=machine.runs_root)
        self.loader = open_feed(run, split=self.split)
        self.total_steps = recipe.training.epochs * self.loader.steps_per_epoch
        self.log_every = max(1, math.ceil(self.total_steps / machine.log_points))
        self.method = build(run, split=self.split, total_steps=self.total_steps, kind=kind)
        synchronise_batchnorm(self.method, world=run.world)
        if channels_last(run):
            self.method.to(memory_format=torch.channels_last)
        if machine.compile:
            compile_encoders(self.method)
        self.optimizer = build_optimizer(recipe.optimizer, method=self.method)
        self._scaler = loss_scaler(recipe.training.precision, device=run.world.device)
        self._votes: Votes[_Place] = Votes(run.world)
        self.step = 0
        self.timer = Timer(trained_s=run.folder.trained_s() or 0.0)
        self._window = MetricWindow()
        self._writer = checkpoints.Writer(run.folder.path, device=run.world.device)
        self._metric_log: MetricLog | None = None  # rank 0 alone writes it
        self._measured_step = -1

    # ----------------------------------------------------------------------------------------------- before the first step

    def resume_or_prepare(self) -> None:
        """Restore the newest valid checkpoint, or let the method prepare when there is none.

        Raises:
            UserError: the checkpoint is of other images, or points logged before it are lost.
        """
        run = self.run
        teacher = run.world.together(lambda: find_teacher(run, runs_root=run.folder.path.parent))
        found = run.world.together(lambda: newest_checkpoint(run, data_hash=self.split.content_hash))
        check_same(run, found=found)
        run.world.on_main(lambda: self.open_metric_log(found))
        if found is not None:
            run.world.together(lambda: self._restore(found))
        run.world.on_main(lambda: self._announce(teacher))
        if found is None and prepare(run, method=self.method, teacher=teacher, split=self.split):
            self.save()
        self.start()

    def start(self) -> None:
        """Connect the ranks' gradients, and begin to count the time."""
        self.parallel = parallelise(self.method, world=self.run.world).train()
        self.timer.start()

    def open_metric_log(self, found: checkpoints.Checkpoint | None) -> None:
        """Open the metric file on rank 0, as the checkpoint left it."""
        if found is not None:
            check_logs(self.run, found=found)
        self._metric_log = self.run.folder.metric_log()
        self._measured_step = online.last_step(self.run)

    def _restore(self, found: checkpoints.Checkpoint) -> None:
        self.step = checkpoints.restore(found, method=self.method, optimizer=self.optimizer)
        if found.scaler is not None:
            self._scaler.load_state_dict(found.scaler)
        if found.window is not None:
            self._window.load(found.window, world=self.run.world)
        self.run.reporter.say(f"Resuming from step {self.step}.")

    def _announce(self, teacher: Teacher | None) -> None:
        """Print what is trained, and record the facts of this start of the run: code, software, machine, data."""
        run = self.run
        folder, machine, world, training = run.folder, run.machine, run.world, run.recipe.training
        code = provenance.code()
        if code.diff:
            folder.write_artifact("dirty.diff", code.diff)
        facts = {
            "commit": code.commit,
            "branch": code.branch,
            "dirty": code.dirty,
            "dataset": self.split.dataset,
            "data_hash": self.split.content_hash,
            "loader": self.loader.backend,
            "device": world.device.type,
            "procs": world.world_size,
            "threads": torch.get_num_threads(),
            "channels_last": channels_last(run),
            "compile": machine.compile,
            "deterministic": machine.deterministic,
            "step": self.step,
        }
        if teacher is not None:
            facts |= {"teacher_run": teacher.run_id, "teacher_weights": teacher.weights_hash}
        run.reporter.say(
            f"Training {folder.run_id}: {training.epochs} epochs of {self.split.dataset}, {self.total_steps} steps of "
            f"{training.batch_size} images, {world.world_size} process(es) on {world.device.type}, {self.loader.backend} loader."
            + (f" It begins with {teacher.run_id}." if teacher is not None else "")
        )
        attempt = folder.append_attempt({**provenance.environment(), **facts})
        folder.set_state(status="running", attempt=attempt, step=self.step, total_steps=self.total_steps, message="")

    # ---------------------------------------------------------------------------------------------------------- the steps

    def epochs(self) -> Iterator[tuple[int, int]]:
        """Yield every epoch that is not over yet, and the step within it to begin with."""
        while self.step < self.total_steps:
            yield divmod(self.step, self.loader.steps_per_epoch)

    def load(self, epoch: int, start_step: int) -> Iterator[Any]:
        """Yield what is loaded of an epoch, from a step on, with all that is drawn for it."""
        return self.loader.batches(epoch=epoch, start_step=start_step, num_uniforms=self.method.num_uniforms)

    def render(self, item: Any) -> Batch:
        """Make a batch of what was loaded, on the device."""
        wants_metrics = (self.step + 1) % self.log_every == 0 or self.step + 1 == self.total_steps
        return self.loader.on_device(item, step=self.step, wants_metrics=wants_metrics, pixels=self.method.pixel_statistics)

    def finish(self) -> None:
        """Let the method do what is due after the last step."""

        def further(number: int) -> Iterator[Batch]:
            pixels = self.method.pixel_statistics
            for place, item in enumerate(self.loader.further(number, after=self.total_steps)):
                yield self.loader.on_device(item, step=self.total_steps + place, wants_metrics=False, pixels=pixels)

        self.method.finish(further)

    def train_step(self, batch: Batch, *, item: Item) -> tuple[bool, bool]:
        """Do one update of the optimiser and return whether a checkpoint is due and whether the run was asked to stop.

        Raises:
            UserError: the loss is not finite: on a CPU that of this step, and nothing was updated; see `Votes`.
        """
        run = self.run
        output = self.forward(batch)
        self.backward(output.loss)
        # All ranks update, save and stop together.
        save_due = self.timer.since_save_s > run.machine.checkpoint_every_s
        stopping = run.stop.asked_after_step()
        decision = self._votes.cast(
            output.loss, save_due=save_due, stopping=stopping, place=_Place(self.step, item.epoch, item.indices)
        )
        self._refuse_broken(decision)
        self.update()
        self._window.add(output.metrics)
        return decision.save_due, decision.stopping

    def forward(self, batch: Batch) -> StepOutput:
        """Set the learning rate of this step, and do the step up to its loss."""
        recipe = self.run.recipe
        rate = learning_rate(
            self.step,
            optimizer=recipe.optimizer,
            epochs=recipe.training.epochs,
            steps_per_epoch=self.loader.steps_per_epoch,
        )
        set_learning_rate(self.optimizer, rate, fixed=recipe.optimizer.learning_rate)
        with autocast(recipe.training.precision, device=self.run.world.device):
            output: StepOutput = self.parallel(batch)
        return output

    def backward(self, loss: Tensor) -> None:
        """Replace the gradients by those of a loss, 0-dim, times the loss scale of float16."""
        self.optimizer.zero_grad(set_to_none=True)
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def update(self) -> None:
        """Move the weights along the gradients."""
        self._scaler.unscale_(self.optimizer)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.step += 1

    def _refuse_broken(self, decision: Decision[_Place]) -> None:
        if decision.broken and decision.place is not None:
            raise UserError(_not_finite(self.run, decision.place))

    def log_step(self) -> None:
        """Append the means over the steps since the last point to the metric file, and show a few of them."""
        run = self.run
        values = self._window.take(run.world) | {
            "grad_norm": grad_norm(self.optimizer),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "epoch": self.step / self.loader.steps_per_epoch,
        }
        step_time_s, data_wait_s = self.timer.lap()
        images_per_s = run.recipe.training.batch_size / step_time_s
        timing = {"images_per_s": images_per_s, "step_time_s": step_time_s, "data_wait_s": data_wait_s}
        run.world.on_main(lambda: self._write_point(values | timing))

    def _write_point(self, values: dict[str, float]) -> None:
        assert self._metric_log is not None
        self._writer.check()
        self._metric_log.append(self.step, values)
        self.run.reporter.step(
            done=self.step,
            left_s=(self.total_steps - self.step) * values["step_time_s"],
            facts=training_facts(
                epoch=values["epoch"],
                epochs=self.run.recipe.training.epochs,
                step=self.step,
                steps=self.total_steps,
                images_per_s=values["images_per_s"],
                values={name: values[name] for name in SHOWN if name in values},
            ),
        )
        self.run.folder.set_state(
            status="running",
            step=self.step,
            total_steps=self.total_steps,
            trained_s=round(self.timer.trained_s, 1),
            memory_mib=round(peak_mib(self.run.world.device), 1),
        )

    def evaluate_if_due(self, epoch: int) -> None:
        """Measure the student after so many whole epochs, if the recipe asks for it; a checkpoint is written first."""
        run = self.run
        if self.step % self.loader.steps_per_epoch or not online.is_due(run, epoch=epoch):
            return
        self.save()
        run.world.on_main(lambda: self._measure(epoch))

    def _measure(self, epoch: int) -> None:
        self.timer.leave_out(online.measure(self.run, method=self.method, step=self.step, epoch=epoch))
        self._measured_step = online.last_step(self.run)

    def save(self, *, wait: bool = True) -> None:
        """Write a checkpoint, of steps whose loss was finite and whose weights are.

        Args:
            wait: until it is on the disk; else it may be written while training goes on.

        Raises:
            UserError: a loss or a weight was not finite, the checkpoint cannot be written, or the data changed.
        """
        self._refuse_broken(self._votes.settle())
        if not all_finite(self.method):
            raise UserError(_broken(self.run, f"The weights are not finite after step {self.step}"))
        window = self._window.state(self.run.world)
        self.run.world.on_main(lambda: self._write_checkpoint(window, wait=wait))
        self.timer.saved()

    def _write_checkpoint(self, window: dict[str, Any], *, wait: bool) -> None:
        assert self._metric_log is not None
        self.split.check_unchanged()  # nothing learnt from other images is kept
        self._metric_log.sync()
        state = checkpoints.Checkpoint(
            step=self.step,
            fingerprint=self.run.folder.info.fingerprint,
            data_hash=self.split.content_hash,
            method=self.method.state_dict(),
            optimizer=self.optimizer.state_dict(),
            logged_step=self._metric_log.last_step,
            measured_step=self._measured_step,
            window=window,
            scaler=self._scaler.state_dict() or None,
        )
        self._writer.write(state)
        if wait:
            self._writer.finish()


# ------------------------------------------------------------------------------------------------------------- its parts


def set_up_device(run: RunContext) -> None:
    """Choose the number format of a GPU's float32, and whether its libraries look for the fastest kernels or for equal bits."""
    if run.world.device.type == "cuda":
        set_float32_mode(run.recipe.training.precision)
        torch.use_deterministic_algorithms(run.machine.deterministic)
        sizes_change = isinstance(run.recipe.method, Detector)
        torch.backends.cudnn.benchmark = not (run.machine.deterministic or sizes_change)


def channels_last(run: RunContext) -> bool:
    """Return whether the weights lie in memory with their channels last: as the machine's settings say, where PyTorch can.

    On a CPU, the backward pass of a 1x1 convolution with a stride and fewer than 16 channels writes beyond its memory where maps
    are large and their channels last. Whole images are that large; views that are so are refused (`compatibility.check_cpu`).
    """
    breaks = isinstance(run.recipe.method, Detector) and run.world.device.type == "cpu" and run.recipe.backbone.width < 16
    return run.machine.channels_last and not breaks


def build(run: RunContext, *, split: Split, total_steps: int, kind: type[Method[Any]] | None = None) -> Method[Any]:
    """Build the recipe's method, or another class, with the initial weights of the run's seed, on this process's device."""
    recipe = run.recipe
    kind = METHODS[recipe.method.name] if kind is None else kind
    refuse_unlabelled(recipe, train=split)
    kind.check_views(recipe.method, backbone=recipe.backbone, views=recipe.views)
    kind.check_batch(recipe.method, batch_size=recipe.training.batch_size, world_size=run.world.world_size)
    if run.world.device.type == "cpu":
        check_cpu(recipe)
    method = kind(
        recipe.method,
        backbone=recipe.backbone,
        total_steps=total_steps,
        seed=run.seed,
        num_classes=split.num_classes if needs_classes(recipe.method) or _can_monitor(run, split=split) else None,
        comm=run.world,
    )
    return method.to(run.world.device)


def _can_monitor(run: RunContext, *, split: Split) -> bool:
    """Return whether there is an online classifier, and say it where one is wanted that has nothing to tell apart."""
    wanted = run.recipe.training.monitor
    if wanted and split.num_classes < 2:
        run.reporter.say("No online classifier (training.monitor): the images have no labels, or one class.")
    return wanted and split.num_classes > 1


def _not_finite(run: RunContext, place: _Place) -> str:
    indices = place.indices.tolist()
    shown = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
    return _broken(run, f"The loss is not finite at step {place.step} (epoch {place.epoch}, training images {shown})")


def all_finite(module: nn.Module) -> bool:
    """Return whether every parameter and buffer is finite, waiting for the device once."""
    return bool(torch.stack([torch.isfinite(value).all() for value in module.state_dict().values()]).all())


def _broken(run: RunContext, what: str) -> str:
    good = run.folder.path / checkpoints.CURRENT
    rest = f"the last good checkpoint is {good}" if good.exists() else "there is no checkpoint yet"
    return f"{what}; {rest}. Lower optimizer.learning_rate, or set training.precision to float32."
