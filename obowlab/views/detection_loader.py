"""Batches of whole images for a detector: which images a step sees, how large, and where their objects are then.

Images come in an endless stream of permutations, in batches of one orientation. Everything that is drawn is a function of the
seed, the step and the image, so that a run may change its number of workers or processes, and may start at any step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from obowlab.config import Detector
from obowlab.config.compatibility import check_share
from obowlab.data.annotations import Annotation
from obowlab.errors import UserError
from obowlab.randomness import Bools, Ints, Stream, epoch_order, uniforms
from obowlab.views.detection_views import Floats, View, is_kept, moved, moved_points, show, train_view
from obowlab.views.loaders import in_workers
from obowlab.views.pil_views import decode

if TYPE_CHECKING:
    from obowlab.data.datasets import Split


@dataclass(frozen=True)
class ShownImage:
    """An image as a detector sees it in a step.

    Attributes:
        pixels: uint8 [H, W, 3].
        boxes: of its objects, float32 [G, 4].
        labels: int64 [G].
        outlines: polygons of every object, where they are known; see `methods.Objects`.
    """

    pixels: Tensor
    boxes: Tensor
    labels: Tensor
    outlines: tuple[tuple[Floats, ...], ...] = ()


@dataclass(frozen=True)
class ImageBatch:
    """One process's share of the images of a step.

    Attributes:
        epoch: epoch, from 0.
        step: step within the epoch, from 0.
        indices: positions of the images in the split, int64 [B].
        images: as they are shown.
        size: the largest height and width of all processes' images.
        first: place of the first of them among all processes' images.
    """

    epoch: int
    step: int
    indices: Ints
    images: tuple[ShownImage, ...]
    size: tuple[int, int]
    first: int


class DetectionLoader:
    """The batches of a run for one process.

    Attributes:
        backend: always torch: PIL decodes and resizes.
        steps_per_epoch: that count as an epoch.
    """

    backend = "torch"

    def __init__(
        self,
        split: Split,
        *,
        subset: Ints,
        annotations: Sequence[Annotation],
        config: Detector,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        pin: bool = False,
    ) -> None:
        """Choose the images that show something.

        Args:
            split: prepared images.
            subset: positions of those that are trained on.
            annotations: what all of them show.
            config: sizes, and how many steps are an epoch.
            batch_size: images of a step, over all processes.
            seed: of the run.
            rank: this process.
            world_size: number of processes.
            workers: processes that decode; 0 works in this one.
            pin: whether pixels lie in pinned memory.

        Raises:
            UserError: the batch cannot be shared out, or there are fewer images with objects than one batch.
        """
        check_share(batch_size, procs=world_size)
        learned = ((index, annotations[index]) for index in subset.tolist())
        shown = {index: annotation.size for index, annotation in learned if annotation.is_trained_on.any()}
        chosen = list(shown)
        if len(chosen) < batch_size:
            raise UserError(
                f"training.batch_size ({batch_size}) is larger than the training set ({len(chosen)} images with objects)."
            )
        self.steps_per_epoch = config.steps_per_epoch
        self._chosen = np.array(chosen, dtype=np.int64)
        self._is_wide = np.array([width > height for height, width in shown.values()])
        self._shower = _Shower(split, annotations, config, seed)
        self._batch_size, self._seed, self._workers, self._pin = batch_size, seed, workers, pin
        self._share = batch_size // world_size
        self._first = rank * self._share

    def batches(
        self, *, epoch: int, start_step: int = 0, num_uniforms: int = 0, num_steps: int | None = None
    ) -> Iterator[ImageBatch]:
        """Yield the batches of an epoch from `start_step` on. Close the generator to end early.

        Args:
            epoch: epoch, from 0.
            start_step: step within the epoch to begin with.
            num_uniforms: is 0 for a detector.
            num_steps: how many; those left of the epoch if absent.

        Raises:
            UserError: a record cannot be decoded, or a worker process died.
        """
        number = self.steps_per_epoch - start_step if num_steps is None else num_steps
        first = epoch * self.steps_per_epoch + start_step
        order = batch_order(self._is_wide, batch_size=self._batch_size, seed=self._seed)
        steps = [(first + place, self._chosen[batch]) for place, batch in enumerate(islice(order, first, first + number))]
        own = slice(self._first, self._first + self._share)
        shown = in_workers(
            _Steps(self._shower, [(step, batch[own]) for step, batch in steps]), workers=self._workers, pin=self._pin
        )
        for (step, batch), images in zip(steps, shown, strict=True):
            sizes = [view.size for view in self._shower.views(batch, step=step)]
            yield ImageBatch(
                epoch=epoch,
                step=step - epoch * self.steps_per_epoch,
                indices=batch[own],
                images=tuple(images),
                size=(max(height for height, _ in sizes), max(width for _, width in sizes)),
                first=self._first,
            )


@dataclass(frozen=True)
class _Shower:
    """Shows images as a training step sees them."""

    split: Split
    annotations: Sequence[Annotation]
    config: Detector
    seed: int

    def views(self, indices: Ints, *, step: int) -> list[View]:
        """Return how the images of a step are shown."""
        numbers = uniforms(seed=self.seed, epoch=step, indices=indices, stream=Stream.SIDES, count=2)
        return [
            train_view(self.annotations[index].size, uniforms=each, sides=self.config.sides, longest=self.config.longest)
            for index, each in zip(indices.tolist(), numbers, strict=True)
        ]

    def show(self, indices: Ints, *, step: int) -> list[ShownImage]:
        """Return the images of a step."""
        found = []
        for index, view in zip(indices.tolist(), self.views(indices, step=step), strict=True):
            annotation = self.annotations[index]
            boxes = moved(annotation.boxes, size=annotation.size, view=view)
            kept = is_kept(boxes) & annotation.is_trained_on
            outlines = [outline for outline, is_own in zip(annotation.outlines, kept, strict=False) if is_own]
            found.append(
                ShownImage(
                    pixels=torch.from_numpy(show(decode(self.split, index), view=view)),
                    boxes=torch.from_numpy(boxes[kept]).float(),
                    labels=torch.from_numpy(annotation.labels[kept]),
                    outlines=tuple(
                        tuple(moved_points(points, size=annotation.size, view=view) for points in outline.drawn)
                        for outline in outlines
                    ),
                )
            )
        return found


class _Steps(Dataset[list[ShownImage] | str]):
    """The images of several steps; for one that cannot be decoded, an error message, which can be pickled."""

    def __init__(self, shower: _Shower, steps: Sequence[tuple[int, Ints]]) -> None:
        self._shower, self._steps = shower, steps

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, place: int) -> list[ShownImage] | str:
        step, indices = self._steps[place]
        try:
            return self._shower.show(indices, step=step)
        except UserError as error:
            return str(error)


def batch_order(is_wide: Bools, *, batch_size: int, seed: int) -> Iterator[Ints]:
    """Yield the images of every step, without end; a function of the seed.

    Images wait until there are as many of their orientation as a batch has, so that little of a batch is padding. Detectron2 lets
    every process do so on its own; here batches are made for all of them together, so that their number changes nothing.

    Args:
        is_wide: which images are wider than high, [N].
        batch_size: images of a step, over all processes.
        seed: of the run.
    """
    waiting: tuple[list[int], list[int]] = ([], [])
    for epoch in count():
        for image in epoch_order(len(is_wide), seed=seed, epoch=epoch).tolist():
            group = waiting[int(is_wide[image])]
            group.append(image)
            if len(group) == batch_size:
                yield np.array(group, dtype=np.int64)
                group.clear()
