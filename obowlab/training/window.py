"""What happened since the last logged point: sums of the metrics, and the time the steps took."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from obowlab.training.distributed import World

T = TypeVar("T")


class MetricWindow:
    """Sums of a method's metrics since the last logged point, kept on the device: adding waits for nothing.

    A logged value is the mean over the steps that reported it: all of the window for losses and accuracies, the logged step
    alone for what a method computes only when its batch wants metrics.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Take in the metrics of one step, 0-dim."""
        for name, value in metrics.items():
            self._counts[name] = self._counts.get(name, 0) + 1
            self._sums[name] = self._sums[name] + value if name in self._sums else value.double()

    def take(self, world: World) -> dict[str, float]:
        """Return the means over the window and over all ranks, and begin a new window."""
        names = sorted(self._sums)
        means = torch.stack([self._sums[name] / self._counts[name] for name in names])
        self._sums, self._counts = {}, {}
        return dict(zip(names, world.all_reduce_mean(means).tolist(), strict=True))

    def state(self, world: World) -> dict[str, Any]:
        """Return what a checkpoint keeps, as plain numbers: a resumed run logs the very points of one that was not stopped."""
        names = sorted(self._sums)
        sums = world.all_gather(torch.stack([self._sums[name] for name in names])[None]).tolist() if names else []
        return {"counts": {name: self._counts[name] for name in names}, "sums": sums}

    def load(self, state: Mapping[str, Any], *, world: World) -> None:
        """Continue a window; with another number of ranks than before, from the mean over those."""
        if not state["counts"]:
            return
        sums = torch.tensor(state["sums"], dtype=torch.float64, device=world.device)
        mine = sums[world.rank] if len(sums) == world.world_size else sums.mean(dim=0)
        self._counts = dict(state["counts"])
        self._sums = dict(zip(self._counts, mine, strict=True))


class Timer:
    """Wall time of the steps since the last logged point, and of all training.

    Attributes:
        trained_s: seconds of training up to the last logged point, all starts of the run together.
    """

    def __init__(self, *, trained_s: float) -> None:
        self.trained_s = trained_s
        self.start()

    def start(self) -> None:
        """Begin a window: what was before does not count."""
        self._began = self._saved = time.monotonic()
        self._waited_s, self._steps = 0.0, 0

    def waiting_for(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches of the steps, and count how long each was waited for."""
        began = time.monotonic()
        for batch in batches:
            self._waited_s += time.monotonic() - began
            self._steps += 1
            yield batch
            began = time.monotonic()

    def lap(self) -> tuple[float, float]:
        """Return the mean time of a step and the part of it spent waiting, in seconds, and begin a new window."""
        now = time.monotonic()
        self.trained_s += now - self._began
        means = (now - self._began) / self._steps, self._waited_s / self._steps
        self._began, self._waited_s, self._steps = now, 0.0, 0
        return means

    def leave_out(self, seconds: float) -> None:
        """Do not count the last so many seconds as training."""
        self._began += seconds

    def saved(self) -> None:
        """Remember that a checkpoint was written just now."""
        self._saved = time.monotonic()

    @property
    def since_save_s(self) -> float:
        """Seconds since the last checkpoint."""
        return time.monotonic() - self._saved
