"""The processes of one run and what they exchange. The only importer of torch.distributed.

Every rank holds the same weights and the same vocabulary. One process is the ordinary case and uses no collective at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from obowlab.config import Machine
from obowlab.errors import UserError

T = TypeVar("T")


class MainFailed(Exception):  # noqa: N818 - rank 0 reports the error
    """Rank 0 failed at something that it does alone."""


@dataclass(frozen=True)
class World:
    """This process among those of the run; it is the `Comm` that methods are given."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Return whether this process writes the run's files."""
        return self.rank == 0

    def all_gather(self, x: Tensor) -> Tensor:
        """Concatenate the tensors [n, ...] of all ranks along the first axis, in rank order; no gradient."""
        if self.world_size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.world_size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    def all_reduce_mean(self, x: Tensor) -> Tensor:
        """Average a tensor of the same shape over all ranks; no gradient."""
        if self.world_size == 1:
            return x
        total = x.clone()
        dist.all_reduce(total)
        return total / self.world_size

    def any_rank(self, *flags: bool) -> tuple[bool, ...]:
        """Return for every flag whether it is set on any rank."""
        if self.world_size == 1:
            return flags
        votes = torch.tensor(flags, dtype=torch.float32, device=self.device)
        dist.all_reduce(votes)
        return tuple(count > 0 for count in votes.tolist())

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        if self.world_size > 1:
            dist.barrier()

    def on_main(self, work: Callable[[], T]) -> T | None:
        """Do something on rank 0 alone while the others wait; when it fails there, every rank stops.

        Without the vote on how it ended, the others would wait in their next collective for a rank that is gone.

        Returns:
            What it returned, on rank 0; None on the others.

        Raises:
            MainFailed: on the other ranks, when it raised an exception on rank 0, where that one is raised.
        """
        try:
            result = work() if self.is_main else None
        except Exception:
            self.any_rank(True)
            raise
        (failed,) = self.any_rank(False)
        if failed:
            raise MainFailed
        return result


@contextmanager
def join(machine: Machine) -> Iterator[World]:
    """Join the processes that torchrun started, or be the only one.

    Raises:
        UserError: a GPU was asked for and there is none for this process.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = _device(machine, local_rank)
    if world_size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
    try:
        yield World(rank=rank, world_size=world_size, device=device)
    finally:
        if world_size > 1:
            dist.destroy_process_group()


def _device(machine: Machine, local_rank: int) -> torch.device:
    wanted = machine.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
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
    parallel = nn.parallel.DistributedDataParallel(method, device_ids=ids, find_unused_parameters=keep_layout)
    parallel.broadcast_buffers = False  # as an argument it was renamed; the attribute is there in old and new torch
    return parallel


def synchronise_batchnorm(module: nn.Module, *, world: World) -> None:
    """Let every BatchNorm2d of the module, in place, use the statistics of the global batch.

    BatchNorm1d is left alone: the prediction head's sees the same words on every rank. So are subclasses of BatchNorm2d:
    `SplitBatchNorm2d` has groups of its own.
    """
    if world.world_size == 1:
        return
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            if world.device.type == "cuda":
                setattr(module, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))  # type: ignore[no-untyped-call]
            else:
                setattr(module, name, GlooBatchNorm2d.like(child))
        else:
            synchronise_batchnorm(child, world=world)


class _SumOverRanks(torch.autograd.Function):
    """Sum of a tensor over ranks; the gradient of a sum is the sum of the gradients."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


class GlooBatchNorm2d(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation over all ranks' images [N, C, H, W] on CPU, where `nn.SyncBatchNorm` refuses to run.

    Sums are taken in float64, so that uneven shards and one process agree to float32 rounding.
    """

    @classmethod
    def like(cls, other: nn.BatchNorm2d) -> GlooBatchNorm2d:
        """Return a copy that shares the parameters and buffers of an ordinary batch-norm."""
        new = cls(other.num_features, eps=other.eps, momentum=other.momentum, affine=other.affine)
        new.train(other.training)
        new.weight, new.bias = other.weight, other.bias
        new.running_mean, new.running_var = other.running_mean, other.running_var
        new.num_batches_tracked = other.num_batches_tracked
        return new

    def _check_input_dim(self, input: Tensor) -> None:
        assert input.dim() == 4

    def forward(self, input: Tensor) -> Tensor:
        """Normalise [N, C, H, W] over N, H, W of every rank when training, by the running statistics otherwise."""
        if not self.training:
            return super().forward(input)
        x = input.double()
        count = x.new_tensor([x.numel() / x.shape[1]])
        sums = torch.cat([x.sum((0, 2, 3)), x.square().sum((0, 2, 3)), count])
        sums = _SumOverRanks.apply(sums)
        count = sums[-1]
        mean, square = (sums[:-1] / count).chunk(2)
        variance = square - mean.square()
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            momentum = 0.1 if self.momentum is None else self.momentum
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean), momentum)
            self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var), momentum)
        shape = (1, -1, 1, 1)
        normal = (x - mean.view(shape)) * (variance + self.eps).rsqrt().view(shape)
        scaled: Tensor = normal * self.weight.view(shape) + self.bias.view(shape)
        return scaled.to(input.dtype)
