"""What the training loop and a method say to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Comm(Protocol):
    """Talk between the processes of a run; every process makes the same calls in the same order."""

    @property
    def world_size(self) -> int:
        """How many processes there are."""
        ...

    def gather(self, x: Tensor) -> Tensor:
        """Concatenate `x` over the processes along dimension 0, in rank order, without gradient."""
        ...

    def mean(self, x: Tensor) -> Tensor:
        """Average `x` over the processes, without gradient."""
        ...


class OneProcess:
    """The Comm of a run with a single process."""

    world_size: int = 1

    def gather(self, x: Tensor) -> Tensor:
        """Return `x`: there is nobody else."""
        return x.detach()

    def mean(self, x: Tensor) -> Tensor:
        """Return `x`: there is nobody else."""
        return x.detach()


@dataclass
class StepOutput:
    """What one training step returns.

    Attributes:
        loss: 0-dim, to be differentiated; includes the monitor's loss (whose features are detached).
        metrics: 0-dim detached tensors of this process, under the names of `obowlab.track.metrics`.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
