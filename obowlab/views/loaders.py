"""Batches of cut views: which images a step sees, and two backends that read them.

Both backends ask `views` for the geometry of every image and give the same bytes, so a run may change backend, number of
workers or number of processes, and may start in the middle of an epoch, without changing its data. The *torch* backend
decodes and resizes with PIL in worker processes; the *ffcv* backend (`ffcv_backend`) does it in compiled threads.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from obowlab.config import Machine, Views
from obowlab.config.compatibility import check_share
from obowlab.errors import UserError
from obowlab.randomness import Ints, epoch_order
from obowlab.views.pil_views import BATCHES_AHEAD, CutBatch, Cutter, Numbers

if TYPE_CHECKING:
    from obowlab.data.datasets import Split

BackendName = Literal["ffcv", "torch"]
T = TypeVar("T")


@dataclass(frozen=True)
class PixelBatch:
    """One process's share of the images of a step, cut but without colours and flips.

    Attributes:
        epoch: Epoch, from 0.
        step: Step within the epoch, from 0.
        indices: Positions of the images in the split, int64 [B].
        numbers: What is random about it, and the classes of its images, on the host.
        original: The teacher's view, uint8 [B, S, S, 3].
        crops: The student's crops, uint8 [B, num_crops, s, s, 3], or None.
        patch_source: The image that patches are cut from, uint8 [B, P, P, 3], or None.
        small_crops: The student's crops of the second size, uint8 [B, num_small_crops, s, s, 3], or None.
    """

    epoch: int
    step: int
    indices: Ints
    numbers: Numbers
    original: Tensor
    crops: Tensor | None
    patch_source: Tensor | None
    small_crops: Tensor | None = None


class Backend(Protocol):
    """Cuts the views of one batch of images after the other."""

    def run(self, batches: Sequence[Ints], *, epoch: int, num_uniforms: int = 0) -> Generator[CutBatch, None, None]:
        """Yield each batch in order, in fresh memory every time."""
        ...


class TrainLoader:
    """The batches of a run for one process; made by `train_loader`.

    Attributes:
        backend: The backend in use.
        steps_per_epoch: Whole batches in an epoch.
    """

    def __init__(
        self,
        cutter: Cutter,
        *,
        subset: Ints,
        batch_size: int,
        rank: int,
        world_size: int,
        backend: BackendName,
        workers: int,
        pin: bool,
    ) -> None:
        self.backend: BackendName = backend
        self.steps_per_epoch = len(subset) // batch_size
        self._cutter, self._subset, self._batch_size = cutter, subset, batch_size
        self._share = batch_size // world_size
        self._start = rank * self._share
        self._reader = _backend(cutter, name=backend, batch_size=self._share, workers=workers, pin=pin)

    def batches(self, *, epoch: int, start_step: int = 0, num_uniforms: int = 0) -> Iterator[PixelBatch]:
        """Yield the batches of an epoch from `start_step` on; nothing before it is read. Close the generator to end early.

        Args:
            epoch: Epoch, from 0.
            start_step: Step within the epoch to begin with.
            num_uniforms: Numbers that the method needs for every image.

        Raises:
            UserError: a record cannot be decoded, or a worker process died.
        """
        assert self._cutter.seed is not None
        order = self._subset[epoch_order(len(self._subset), seed=self._cutter.seed, epoch=epoch)]
        steps = range(start_step, self.steps_per_epoch)
        starts = [step * self._batch_size + self._start for step in steps]
        mine = [order[start : start + self._share] for start in starts]
        with closing(self._reader.run(mine, epoch=epoch, num_uniforms=num_uniforms)) as stream:
            for step, indices, (kinds, numbers) in zip(steps, mine, stream, strict=True):
                assert numbers is not None
                original, *student = kinds
                views = self._cutter.views
                yield PixelBatch(
                    epoch=epoch,
                    step=step,
                    indices=indices,
                    numbers=numbers,
                    original=original[:, 0],
                    crops=student.pop(0) if views.num_crops else None,
                    patch_source=student.pop(0)[:, 0] if views.num_patches else None,
                    small_crops=student.pop(0) if views.num_small_crops else None,
                )


class CentreLoader:
    """The centre view of every image once, in order; made by `centre_loader`.

    Attributes:
        backend: The backend in use.
    """

    def __init__(self, cutter: Cutter, *, indices: Ints, batch_size: int, backend: BackendName, workers: int, pin: bool) -> None:
        self.backend: BackendName = backend
        self._batches = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
        self._reader = _backend(cutter, name=backend, batch_size=min(batch_size, max(1, len(indices))), workers=workers, pin=pin)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Ints, Tensor]]:
        """Yield indices [B] and uint8 views [B, S, S, 3].

        Raises:
            UserError: a record cannot be decoded, or a worker process died.
        """
        with closing(self._reader.run(self._batches, epoch=0)) as stream:
            for indices, (kinds, _) in zip(self._batches, stream, strict=True):
                yield indices, kinds[0][:, 0]


def train_loader(
    split: Split,
    *,
    subset: Ints,
    views: Views,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    backend: str = "auto",
    workers: int = 0,
    pin: bool = False,
) -> TrainLoader:
    """Return the training batches of one process.

    Step t of an epoch sees `subset[order[t * batch_size : (t + 1) * batch_size]]`, of which rank r has the r-th of
    `world_size` equal, contiguous parts; what is left over at the end of an epoch is dropped.

    Args:
        split: Prepared images.
        subset: Positions in the split to train on, int64.
        views: Sizes and ranges of the views.
        batch_size: Images per step over all processes.
        seed: The run's seed.
        rank: This process.
        world_size: Number of processes.
        backend: auto, ffcv or torch.
        workers: Threads (ffcv; at least one is used) or processes (torch; 0 works in this process).
        pin: Whether batches lie in pinned memory, from which a GPU copies while it computes.

    Raises:
        UserError: the batch cannot be split over the processes, there are fewer images than one batch, or ffcv is missing.
    """
    check_share(batch_size, procs=world_size, in_pairs=views.cutmix_probability > 0)
    if len(subset) < batch_size:
        raise UserError(f"training.batch_size ({batch_size}) is larger than the training set ({len(subset)} images).")
    return TrainLoader(
        Cutter(split=split, views=views, seed=seed),
        subset=np.asarray(subset, dtype=np.int64),
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        backend=resolve_backend(backend),
        workers=workers,
        pin=pin,
    )


def centre_loader(
    split: Split, *, indices: Ints, views: Views, batch_size: int, backend: str = "auto", workers: int = 0, pin: bool = False
) -> CentreLoader:
    """Return the view that evaluation uses (Resize, CenterCrop) of the given images, in order, every one once.

    Args:
        split: Prepared images.
        indices: Positions in the split, int64.
        views: Sizes; only those of the original view are used.
        batch_size: Images per batch; the last may be smaller.
        backend: auto, ffcv or torch.
        workers: Threads (ffcv; at least one is used) or processes (torch; 0 works in this process).
        pin: Whether batches lie in pinned memory, from which a GPU copies while it computes.

    Raises:
        UserError: ffcv is asked for and missing.
    """
    return CentreLoader(
        Cutter(split=split, views=views, seed=None),
        indices=np.asarray(indices, dtype=np.int64),
        batch_size=batch_size,
        backend=resolve_backend(backend),
        workers=workers,
        pin=pin,
    )


def num_workers(machine: Machine) -> int:
    """Return the loader workers of a process: as set, or as many as PyTorch has threads."""
    return torch.get_num_threads() if machine.workers is None else machine.workers


def resolve_backend(name: str) -> BackendName:
    """Return the backend that `auto` means here, or the one asked for.

    Raises:
        UserError: ffcv is asked for and cannot be imported, or there is no such backend.
    """
    if name == "torch":
        return "torch"
    if name not in ("auto", "ffcv"):
        raise UserError(f"--loader must be auto, ffcv or torch, not '{name}'.")
    try:
        with _torch_threads_kept():
            importlib.import_module("obowlab.views.ffcv_backend")
    except (ImportError, OSError) as error:
        if name == "ffcv":
            raise UserError(
                f"--loader is ffcv, which cannot be imported ({error}): install obowlab[ffcv] or choose torch."
            ) from None
        return "torch"
    return "ffcv"


def _backend(cutter: Cutter, *, name: BackendName, batch_size: int, workers: int, pin: bool) -> Backend:
    if name == "torch":
        return TorchBackend(cutter, workers=workers, pin=pin)
    from obowlab.views.ffcv_backend import FfcvBackend  # ffcv need not be installed

    with _torch_threads_kept():
        return FfcvBackend(cutter, batch_size=batch_size, workers=workers, pin=pin)


@contextlib.contextmanager
def _torch_threads_kept() -> Iterator[None]:
    """Restore torch's number of threads, which ffcv sets when it is imported and when a loader is built."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------- torch backend


class TorchBackend:
    """Cuts views with PIL, in this process or in worker processes that live as long as an epoch."""

    def __init__(self, cutter: Cutter, *, workers: int, pin: bool) -> None:
        self._cutter, self._workers, self._pin = cutter, workers, pin

    def run(self, batches: Sequence[Ints], *, epoch: int, num_uniforms: int = 0) -> Generator[CutBatch, None, None]:
        """Yield each batch in order.

        Raises:
            UserError: a record cannot be decoded, or a worker process died.
        """
        steps = _Steps(self._cutter, batches, epoch, num_uniforms, pieces=not self._pin)
        yield from in_workers(steps, workers=self._workers, pin=self._pin)


def in_workers(steps: Dataset[T | str], *, workers: int, pin: bool) -> Generator[T, None, None]:
    """Yield the items of a data set in order, made in this process or in worker processes that live as long as this generator.

    Args:
        steps: gives an error message in place of an item that cannot be made.
        workers: processes; 0 works in this one.
        pin: whether tensors are put into pinned memory.

    Raises:
        UserError: an item cannot be made, or a worker process died.
    """
    number = len(steps)  # type: ignore[arg-type]
    if workers == 0:
        yield from (_made(steps[place]) for place in range(number))
        return
    loader = DataLoader(
        steps,
        batch_size=None,  # an item is a batch already
        num_workers=min(workers, max(1, number)),
        prefetch_factor=BATCHES_AHEAD,
        collate_fn=_as_it_is,
        multiprocessing_context="fork" if "fork" in multiprocessing.get_all_start_methods() else None,
        pin_memory=pin,
        generator=torch.Generator(),  # the global generator's state must not depend on the number of workers
    )
    stream = iter(loader)
    try:
        while (item := _next_item(stream)) is not None:
            yield _made(item)
    finally:
        del stream  # ends the workers


def _made(item: T | str) -> T:
    if isinstance(item, str):
        raise UserError(item)
    return item


class _Steps(Dataset[CutBatch | str]):
    """The batches of an epoch; for a batch with a record that cannot be decoded, an error message, which can be pickled."""

    def __init__(self, cutter: Cutter, batches: Sequence[Ints], epoch: int, num_uniforms: int, *, pieces: bool) -> None:
        self._cutter, self._batches, self._epoch = cutter, batches, epoch
        self._num_uniforms, self._pieces = num_uniforms, pieces

    def __len__(self) -> int:
        return len(self._batches)

    def cut(self, step: int) -> CutBatch:
        indices = self._batches[step]
        kinds = [torch.from_numpy(kind) for kind in self._cutter.cut(indices, epoch=self._epoch)]
        numbers = self._cutter.numbers(indices, epoch=self._epoch, num_uniforms=self._num_uniforms, pieces=self._pieces)
        return CutBatch(kinds, numbers)

    def __getitem__(self, step: int) -> CutBatch | str:
        try:
            return self.cut(step)
        except UserError as error:
            return str(error)


def _as_it_is(item: Any) -> Any:
    return item


def _next_item(stream: Iterator[T]) -> T | None:
    """Return the next batch, or None at the end.

    Raises:
        UserError: a worker process was killed.
    """
    try:
        return next(stream, None)
    except RuntimeError as error:
        if str(error).startswith("DataLoader worker (pid"):
            raise UserError(
                "A loader process was killed, most likely because memory or shared memory ran out: lower --workers."
            ) from error
        raise
