"""A training step on a fixed batch, and the encoder work in it: what is timed where no data are read."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from obowlab.config import Recipe
from obowlab.config.methods import learns_from_labels
from obowlab.methods import METHODS, Batch, BoWNet, Method, OBoW, OneProcess, compile_encoders
from obowlab.precision import computing_in, loss_scaler
from obowlab.training.optimizers import build_optimizer, set_learning_rate

NUM_CLASSES = 1000
"""Of methods that learn from labels."""

STEPS = 1000
"""Steps of the training that schedules are made for; it is never done."""


class Work:
    """A step of a recipe on a fixed batch of random views, and the encoder work in it.

    The encoder work is the student's forward and backward pass on the same views and the teacher's forward pass. The step adds
    everything else: for OBoW vocabulary, BoW targets, G, losses, the teacher's update and SGD.

    Attributes:
        recipe: what is trained.
        batch_size: images of a step.
        device: where.
        model: the method.
        original: the teacher's views, [B, 3, S, S].
        views: the student's, by kind.
    """

    def __init__(
        self, recipe: Recipe, *, batch_size: int, device: torch.device, channels_last: bool = True, compiled: bool = False
    ) -> None:
        """Build method, optimiser and batch.

        Args:
            recipe: says the method, the views and the precision.
            batch_size: images of this process.
            device: where.
            channels_last: memory layout of images and weights, or plain NCHW.
            compiled: compile student and teacher.
        """
        self.recipe, self.batch_size, self.device = recipe, batch_size, device
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        classes = NUM_CLASSES if learns_from_labels(recipe.method) else None
        self.model: Method[Any] = METHODS[recipe.method.name](
            recipe.method, backbone=recipe.backbone, total_steps=STEPS, seed=0, num_classes=classes, comm=OneProcess()
        )
        self.model.to(device).to(memory_format=self._layout)
        if compiled:
            compile_encoders(self.model)
        self._optimizer = build_optimizer(recipe.optimizer, method=self.model)
        set_learning_rate(self._optimizer, 0.0, fixed=0.0)  # noise is not to be learnt
        self._scaler = loss_scaler(recipe.training.precision, device=device)
        views = recipe.views
        self._generator = torch.Generator(device).manual_seed(0)
        self.original = self._images(batch_size, views.original_size)
        kinds = {
            "crops": (views.num_crops, views.cut_size),
            "patches": (views.num_patches, views.patch_size),
            "small_crops": (views.num_small_crops, views.small_crop_size),
        }
        self.views = {kind: self._images(batch_size * count, size) for kind, (count, size) in kinds.items() if count}
        shape = (batch_size, self.model.num_uniforms)
        self._uniforms = torch.rand(shape, dtype=torch.float64, device=device, generator=self._generator)
        self._labels = None if classes is None else torch.arange(batch_size, device=device) % classes
        self._done = 0

    def _images(self, count: int, size: int) -> torch.Tensor:
        shape = (count, 3, size, size)
        return torch.randn(shape, device=self.device, generator=self._generator).contiguous(memory_format=self._layout)

    def step(self) -> None:
        """Do one update of the optimiser."""
        with computing_in(self.recipe.training.precision, device=self.device):
            batch = Batch(
                original=self.original,
                views=self.views,
                uniforms=self._uniforms,
                step=self._done,
                labels=self._labels,
                wants_metrics=False,
            )
            output = self.model(batch)
        self._backward(self._scaler.scale(output.loss))
        with computing_in(self.recipe.training.precision, device=self.device):
            self._scaler.step(self._optimizer)
            self._scaler.update()
        self._done += 1

    @property
    def has_encoder_work(self) -> bool:
        """Return whether `encoders` is the encoder work of this method's step."""
        return isinstance(self.model, OBoW | BoWNet)

    def encoders(self) -> None:
        """Do the encoder work of a step."""
        assert isinstance(self.model, OBoW | BoWNet)
        with computing_in(self.recipe.training.precision, device=self.device):
            loss = torch.stack([self.model.student(each).float().square().mean() for each in self.views.values()]).sum()
            with torch.no_grad():
                self.model.teacher(self.original)
        self._backward(loss)

    def _backward(self, loss: torch.Tensor) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        name = "tf32" if self.recipe.training.precision == "tf32" else "float32"
        with computing_in(name, device=self.device):  # autocast is forward's alone
            loss.backward()  # type: ignore[no-untyped-call]

    def forget(self) -> None:
        """Give the memory back; nothing can be done with this object any more."""
        del self.model, self._optimizer, self.original, self.views
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], None]) -> tuple[float, float]:
        """Return wall time and processor time of `step` or `encoders`."""
        start, start_cpu = time.perf_counter(), time.process_time()
        work()
        self.wait()
        return time.perf_counter() - start, time.process_time() - start_cpu

    def rounds(self, number: int) -> list[tuple[tuple[float, float], tuple[float, float]]]:
        """Return the times of the encoder work and of the step, in turns; the first of each is not counted."""
        for work in (self.encoders, self.step):  # they pay for kernels and memory
            work()
        self.wait()
        return [(self.seconds(self.encoders), self.seconds(self.step)) for _ in range(number)]
