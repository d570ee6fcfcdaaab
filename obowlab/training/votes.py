"""What the ranks decide together after every step: whether the loss is broken, a checkpoint is due, the run was asked to stop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from obowlab.training.distributed import World

PlaceT = TypeVar("PlaceT")


class Decision(NamedTuple, Generic[PlaceT]):
    """What at least one rank voted for at a step.

    Attributes:
        broken: the loss is not finite.
        save_due: it is time for a checkpoint.
        stopping: a signal came.
        place: of the step, as it was given; None when nothing was voted on.
    """

    broken: bool = False
    save_due: bool = False
    stopping: bool = False
    place: PlaceT | None = None


@dataclass(frozen=True)
class _Ballot(Generic[PlaceT]):
    """Votes that are on their way to the host."""

    votes: Tensor
    arrived: torch.cuda.Event | None
    place: PlaceT


class Votes(Generic[PlaceT]):
    """The ranks' votes after each step.

    On a CPU they are counted at once. On a GPU the host would then wait until the step is computed, with nothing queued for the
    next one: there the votes of a step are counted after the next step is queued. Ranks save and stop one step later, and a
    broken loss is noticed one update late; `settle` counts what is on its way, before anything is kept.
    """

    def __init__(self, world: World, *, late: bool | None = None) -> None:
        """Begin without votes.

        Args:
            world: the ranks.
            late: whether to count a step's votes after the next step; by default on a GPU.
        """
        self._world = world
        self._late = world.device.type == "cuda" if late is None else late
        self._pending: _Ballot[PlaceT] | None = None

    def cast(self, loss: Tensor, *, save_due: bool, stopping: bool, place: PlaceT) -> Decision[PlaceT]:
        """Vote after the backward pass of a step, and return the decision on this step, or when late on the one before.

        Args:
            loss: of this rank, 0-dim.
            save_due: whether it is time for a checkpoint.
            stopping: whether a signal came.
            place: what identifies the step.
        """
        before, self._pending = self._pending, self._ballot(loss, save_due=save_due, stopping=stopping, place=place)
        return self._count(before) if self._late else self.settle()

    def settle(self) -> Decision[PlaceT]:
        """Return the decision on the step that was not counted yet."""
        before, self._pending = self._pending, None
        return self._count(before)

    def _ballot(self, loss: Tensor, *, save_due: bool, stopping: bool, place: PlaceT) -> _Ballot[PlaceT]:
        on_gpu = self._world.device.type == "cuda"
        votes = torch.tensor((False, save_due, stopping), dtype=torch.float32, pin_memory=on_gpu)
        votes = votes.to(self._world.device, non_blocking=True)
        votes[0] = (~torch.isfinite(loss.detach())).to(votes.dtype)
        votes = self._world.all_reduce_mean(votes)
        if not on_gpu:
            return _Ballot(votes, None, place)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        votes = torch.empty(votes.shape, dtype=votes.dtype, pin_memory=True).copy_(votes, non_blocking=True)
        arrived.record()
        return _Ballot(votes, arrived, place)

    def _count(self, ballot: _Ballot[PlaceT] | None) -> Decision[PlaceT]:
        if ballot is None:
            return Decision()
        if ballot.arrived is not None:
            ballot.arrived.synchronize()
        broken, save_due, stopping = (share > 0 for share in ballot.votes.tolist())
        return Decision(broken, save_due, stopping, ballot.place)
