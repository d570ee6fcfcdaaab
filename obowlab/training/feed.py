"""What a training sees: the batches of a loader, and how they become a method's `Batch` on the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Generic, Protocol, TypeVar

import torch

from obowlab.config import Detector
from obowlab.data.datasets import Split, trained_on
from obowlab.data.objects import read_objects
from obowlab.methods import Batch, Objects
from obowlab.randomness import Ints
from obowlab.training.context import RunContext
from obowlab.views.detection_loader import DetectionLoader, ImageBatch
from obowlab.views.loaders import PixelBatch, TrainLoader, num_workers, train_loader
from obowlab.views.photometric import normalise, render


class Item(Protocol):
    """What a loader gives: the images of a step, on the host."""

    @property
    def epoch(self) -> int:
        """Return the epoch, from 0."""
        ...

    @property
    def indices(self) -> Ints:
        """Return the positions of the images in the split."""
        ...


ItemT = TypeVar("ItemT", bound=Item)
Pixels = tuple[tuple[float, ...], tuple[float, ...]]


class Feed(ABC, Generic[ItemT]):
    """The images of a training, for one process.

    Attributes:
        backend: of the loader.
        steps_per_epoch: whole batches in an epoch.
    """

    backend: str
    steps_per_epoch: int

    @abstractmethod
    def batches(self, *, epoch: int, start_step: int, num_uniforms: int) -> Iterator[ItemT]:
        """Yield what is loaded for an epoch, from a step on."""

    @abstractmethod
    def on_device(self, item: ItemT, *, step: int, wants_metrics: bool, pixels: Pixels) -> Batch:
        """Make a batch of what was loaded.

        Args:
            item: what was loaded.
            step: of the training.
            wants_metrics: see `Batch`.
            pixels: mean and deviation that whole images are normalised by.
        """

    def further(self, number: int, *, after: int) -> Iterator[ItemT]:
        """Yield so many batches that come after a step of the training; for methods that want some after the last."""
        raise NotImplementedError


class ViewFeed(Feed[PixelBatch]):
    """Views of images, coloured on the device."""

    def __init__(self, loader: TrainLoader, *, device: torch.device) -> None:
        self.backend, self.steps_per_epoch = loader.backend, loader.steps_per_epoch
        self._loader, self._device = loader, device

    def batches(self, *, epoch: int, start_step: int, num_uniforms: int) -> Iterator[PixelBatch]:
        """Yield the cut images of an epoch, with all that is drawn for them."""
        return self._loader.batches(epoch=epoch, start_step=start_step, num_uniforms=num_uniforms)

    def on_device(self, item: PixelBatch, *, step: int, wants_metrics: bool, pixels: Pixels) -> Batch:
        """Colour the cut views."""
        draws, labels = item.numbers.on(self._device)
        views = render(item, draws, device=self._device)
        return Batch(
            original=views.original,
            views=views.student,
            uniforms=draws.uniforms,
            step=step,
            labels=labels,
            cutmix_lambda=views.cutmix_lambda,
            wants_metrics=wants_metrics,
        )


class ObjectFeed(Feed[ImageBatch]):
    """Whole images and their objects, for a detector."""

    def __init__(self, loader: DetectionLoader, *, device: torch.device) -> None:
        self.backend, self.steps_per_epoch = loader.backend, loader.steps_per_epoch
        self._loader, self._device = loader, device

    def batches(self, *, epoch: int, start_step: int, num_uniforms: int) -> Iterator[ImageBatch]:
        """Yield the images of an epoch."""
        return self._loader.batches(epoch=epoch, start_step=start_step)

    def further(self, number: int, *, after: int) -> Iterator[ImageBatch]:
        """Yield the images of so many further steps."""
        epoch, start_step = divmod(after, self.steps_per_epoch)
        return self._loader.batches(epoch=epoch, start_step=start_step, num_steps=number)

    def on_device(self, item: ImageBatch, *, step: int, wants_metrics: bool, pixels: Pixels) -> Batch:
        """Normalise the images and pad them, all processes' alike, at the right and below."""
        mean, std = pixels
        images = torch.zeros(len(item.images), 3, *item.size, device=self._device)
        objects = []
        for place, image in zip(images, item.images, strict=True):
            height, width = image.pixels.shape[:2]
            place[:, :height, :width] = normalise(image.pixels[None], device=self._device, mean=mean, std=std)[0]
            boxes, labels = (values.to(self._device, non_blocking=True) for values in (image.boxes, image.labels))
            objects.append(Objects(boxes, labels, (height, width), image.outlines))
        return Batch(
            original=images,
            views={},
            uniforms=torch.zeros(len(images), 0, dtype=torch.float64, device=self._device),
            step=step,
            wants_metrics=wants_metrics,
            objects=tuple(objects),
            first=item.first,
        )


def open_feed(run: RunContext, *, split: Split) -> Feed[Any]:
    """Open the recipe's training images as this rank's share of every global batch.

    Raises:
        UserError: the batch does not fit the images or the number of processes, ffcv is missing, or there are no boxes.
    """
    recipe, machine, device = run.recipe, run.machine, run.world.device
    if isinstance(recipe.method, Detector):
        objects = DetectionLoader(
            split,
            subset=trained_on(split, recipe.data),
            annotations=read_objects(split),
            config=recipe.method,
            batch_size=recipe.training.batch_size,
            seed=run.seed,
            rank=run.world.rank,
            world_size=run.world.world_size,
            workers=num_workers(machine),
            pin=device.type == "cuda",
        )
        return ObjectFeed(objects, device=device)
    return ViewFeed(open_loader(run, split=split), device=device)


def open_loader(run: RunContext, *, split: Split) -> TrainLoader:
    """Open the views of the recipe's training images, this rank's share of every global batch."""
    recipe, machine = run.recipe, run.machine
    return train_loader(
        split,
        subset=trained_on(split, recipe.data),
        views=recipe.views,
        batch_size=recipe.training.batch_size,
        seed=run.seed,
        rank=run.world.rank,
        world_size=run.world.world_size,
        backend=machine.loader,
        workers=num_workers(machine),
        pin=run.world.device.type == "cuda",
    )
