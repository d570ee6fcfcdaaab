"""The processes of one run and what they exchange; with `sync_batchnorm` the only importer of torch.distributed.

Every rank holds the same weights and the same vocabulary. One process is the ordinary case and uses no collective at all.

There are two groups of the same processes. One carries tensors, over NCCL between GPUs: a rank that waits in it for longer than
`STEP_TIMEOUT` is taken for lost. The other, always gloo, carries votes on how a piece of work ended: a rank may wait there for as
long as another measures or prepares (`WORK_TIMEOUT`), no GPU spins meanwhile, and a rank that dies is noticed at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from obowlab.config import Machine
from obowlab.errors import UserError
from obowlab.training.signals import Interrupted

T = TypeVar("T")

gather_into: Callable[[Tensor, Tensor], object] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""`gather_into(all_of_them, mine)` concatenates dense tensors of all ranks; newer versions of torch call it by the first name."""

STEP_TIMEOUT = timedelta(minutes=10)
"""For tensors: all ranks do the same at the same time."""
WORK_TIMEOUT = timedelta(hours=24)
"""For votes: one rank may hash a data set, cluster a vocabulary or measure an encoder while the others wait."""
LEAVE_TIMEOUT = timedelta(seconds=30)
"""For the end, to which all ranks come together."""


class OtherRankFailed(Exception):  # noqa: N818 - rank 0 reports the error
    """This rank did its work and another one could not; rank 0 says why."""


class OtherRankCrashed(Exception):  # noqa: N818 - the other rank reports the error
    """Another rank met an error that nobody expects; it prints its own traceback."""


@dataclass(frozen=True)
class World:
    """This process among those of the run; it is the `Comm` that methods are given.

    Attributes:
        rank: number of this process, from 0.
        world_size: number of processes.
        device: where this one computes.
        votes: the group for votes; the one for tensors if absent.
    """

    rank: int
    world_size: int
    device: torch.device
    votes: dist.ProcessGroup | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> World:
        """Return itself: copies of a network work in the same process, and a group cannot be copied."""
        return self

    @property
    def is_main(self) -> bool:
        """Return whether this process writes the run's files."""
        return self.rank == 0

    def all_gather(self, x: Tensor) -> Tensor:
        """Concatenate the tensors [n, ...] of all ranks along the first axis, in rank order; no gradient."""
        if self.world_size == 1:
            return x
        of_all = x.new_empty(self.world_size * len(x), *x.shape[1:])
        gather_into(of_all, x.contiguous())
        return of_all

    def all_gather_with_gradient(self, x: Tensor) -> Tensor:
        """Do as `all_gather`; the gradient of `x` is the sum of those that its copies have on all ranks."""
        if self.world_size == 1:
            return x
        of_all: Tensor = _Gather.apply(x, self)
        return of_all

    def all_reduce_mean(self, x: Tensor) -> Tensor:
        """Average a tensor of the same shape over all ranks; no gradient."""
        if self.world_size == 1:
            return x
        total = x.clone()
        dist.all_reduce(total)
        return total / self.world_size

    def alone(self) -> World:
        """Return this process without the others: what it does from now on, it does in a world of one."""
        return World(rank=0, world_size=1, device=self.device)

    def together(self, work: Callable[[], T]) -> T:
        """Do something on every rank, without collectives in it; when it fails on any, every rank stops.

        Without the vote on how it ended, the others would wait in their next collective for a rank that is gone.

        Returns:
            What it returned here.

        Raises:
            Exception: what it raised here. On rank 0 also the `UserError`, `OSError` or `Interrupted` of another rank, so that
                the rank that speaks can say it.
            OtherRankFailed: it went well here, and another rank failed.
            OtherRankCrashed: the same, and the other rank's error is one that nobody expects.
        """
        if self.world_size == 1:
            return work()
        try:
            result = work()
        except Exception as error:
            self._errors(error)
            raise
        errors = self._errors(None)
        if errors:
            known = [error for error in errors if error is not None]
            if not known:
                raise OtherRankCrashed
            if self.is_main:
                raise known[0]
            raise OtherRankFailed
        return result

    def on_main(self, work: Callable[[], T]) -> T | None:
        """Do something on rank 0 alone while the others wait; as `together`, with None as the result of the others."""
        return self.together(lambda: work() if self.is_main else None)

    def each(self, items: Iterator[T]) -> Iterator[T]:
        """Yield the items of an iterator that every rank has one of, of equal lengths; as `together` for every item."""
        if self.world_size == 1:
            yield from items
            return
        with closing(items) if isinstance(items, Generator) else nullcontext():
            while (item := self.together(lambda: next(items, None))) is not None:
                yield item

    def _errors(self, error: Exception | None) -> list[Exception | None]:
        """Exchange how a piece of work ended; return, for each rank that failed, what the others can report of it."""
        failed = torch.tensor([int(error is not None)], dtype=torch.int32)
        dist.all_reduce(failed, group=self.votes)
        if not failed.item():
            return []
        ends: list[tuple[bool, Exception | None]] = [(False, None)] * self.world_size
        dist.all_gather_object(ends, (error is not None, _reportable(error)), group=self.votes)
        return [reportable for has_failed, reportable in ends if has_failed]


class _Gather(torch.autograd.Function):
    """`World.all_gather`, with a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, world: World) -> Tensor:
        ctx.mine = slice(world.rank * len(x), (world.rank + 1) * len(x))
        return world.all_gather(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[ctx.mine], None


def _reportable(error: Exception | None) -> Exception | None:
    """Return what another rank can raise in place of an error; None for one that nobody expects."""
    if isinstance(error, UserError):
        return UserError(str(error))
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror or str(error), error.filename)
    return error if isinstance(error, Interrupted) else None


@contextmanager
def join(machine: Machine) -> Iterator[World]:
    """Join the processes that torchrun started, or be the only one.

    All ranks leave together at the end of the context, also with an error on which they agreed. With any other, this rank alone
    is there: then nothing is left, because the others would be waited for, and the process must end at once.

    Raises:
        UserError: a GPU was asked for and there is none for a process of this node.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    device = device_of(machine, local_rank=int(os.environ.get("LOCAL_RANK", "0")))
    if world_size == 1:
        yield World(rank=rank, world_size=world_size, device=device)
        return
    with joined(rank=rank, world_size=world_size, device=device) as world:
        yield world


@contextmanager
def joined(*, rank: int, world_size: int, device: torch.device) -> Iterator[World]:
    """Connect the two groups for as long as the context lasts; see `join` for its end."""
    if device.type == "cuda":  # bound to its GPU: connected at once, and no collective has to guess which GPU it is for
        dist.init_process_group("nccl", timeout=STEP_TIMEOUT, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=STEP_TIMEOUT)
    votes = dist.new_group(backend="gloo", timeout=WORK_TIMEOUT)
    assert isinstance(votes, dist.ProcessGroup)
    try:
        yield World(rank=rank, world_size=world_size, device=device, votes=votes)
    except (UserError, OtherRankFailed):
        _leave(votes)
        raise
    _leave(votes)


def _leave(votes: dist.ProcessGroup) -> None:
    """End the groups when all ranks have come here: to tear NCCL down is a collective too."""
    dist.monitored_barrier(votes, timeout=LEAVE_TIMEOUT)
    dist.destroy_process_group()


def device_of(machine: Machine, *, local_rank: int) -> torch.device:
    """Return where a process of this node computes; a GPU becomes the current one.

    Raises:
        UserError: a GPU was asked for and there is none for it.
    """
    wanted = machine.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1)) > count:  # all of this node see it: none waits for the others
        raise UserError(f"{machine.procs} GPUs were asked for but torch sees {count}: use --gpus {count} or --device cpu.")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def parallelise(method: nn.Module, *, world: World) -> nn.Module:
    """Wrap a method so that one call of it is one data-parallel training step; gradients are averaged over ranks.

    Buffers are not broadcast: each is a function of all ranks' data and therefore already equal.
    """
    if world.world_size == 1:
        return method
    ids = [world.device.index] if world.device.type == "cuda" else None
    # On the CPU a resumed run equals an uninterrupted one to the bit. So buckets must not be laid out anew after the first step
    # of a start: with more than two processes the order of sums follows the layout. Looking for unused parameters keeps it.
    keep_layout = world.device.type == "cpu"
    parallel = nn.parallel.DistributedDataParallel(
        method,
        device_ids=ids,
        find_unused_parameters=keep_layout,
        gradient_as_bucket_view=True,  # what is summed over ranks need not be copied to the gradients
    )
    parallel.broadcast_buffers = False  # as an argument it was renamed; the attribute is there in old and new torch
    return parallel
