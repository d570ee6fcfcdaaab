"""Batch normalisation over the images of all ranks: `synchronise_batchnorm`.

On CUDA it computes with the kernels of torch's `nn.SyncBatchNorm`. That module allows ranks without images, and to leave them out
the host waits for the GPU in every layer and pass. Here every rank has equally many images, as `train_loader` sees to, so the
counts are known and the host does not wait; of an `UnevenBatchNorm2d` they are gathered, and every rank has one input at least.
Gloo has none of these kernels; there, sums are taken in float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from obowlab.methods.detection.masks import UnevenBatchNorm2d
from obowlab.methods.projection import GlobalBatchNorm1d
from obowlab.training.distributed import World, gather_into


def synchronise_batchnorm(module: nn.Module, *, world: World) -> None:
    """Let every BatchNorm2d and GlobalBatchNorm1d of the module, in place, use the statistics of the global batch.

    Parameters and buffers are those of before. An ordinary BatchNorm1d is left alone: the prediction head's sees the same words
    on every rank. So are subclasses of BatchNorm2d: `SplitBatchNorm2d` has groups of its own.
    """
    if world.world_size == 1:
        return
    kind = CudaBatchNorm if world.device.type == "cuda" else GlooBatchNorm
    for name, child in module.named_children():
        if type(child) in (nn.BatchNorm2d, UnevenBatchNorm2d, GlobalBatchNorm1d):
            assert isinstance(child, nn.BatchNorm2d | nn.BatchNorm1d)
            setattr(module, name, kind.like(child))
        else:
            synchronise_batchnorm(child, world=world)


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm, ABC):
    """Batch normalisation of [N, C, H, W] or [N, C] over N, H, W of every rank when training, by running statistics otherwise.

    Every rank must call it, with an input of the same shape unless it is uneven.

    Attributes:
        is_uneven: whether N may differ between ranks.
    """

    is_uneven = False

    @classmethod
    def like(cls, other: nn.BatchNorm2d | nn.BatchNorm1d) -> SyncBatchNorm:
        """Return a copy that shares the parameters and buffers of an ordinary batch-norm."""
        new = cls(other.num_features, eps=other.eps, momentum=other.momentum, affine=other.affine)
        new.train(other.training)
        new.weight, new.bias = other.weight, other.bias
        new.running_mean, new.running_var = other.running_mean, other.running_var
        new.num_batches_tracked = other.num_batches_tracked
        new.is_uneven = isinstance(other, UnevenBatchNorm2d)
        return new

    def _check_input_dim(self, input: Tensor) -> None:
        assert input.dim() in (2, 4)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise."""
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        momentum = 0.1 if self.momentum is None else self.momentum
        if input.dim() == 4:
            return self._normalise(input, self.running_mean, self.running_var, momentum)
        return self._normalise(input[:, :, None, None], self.running_mean, self.running_var, momentum).flatten(1)

    @abstractmethod
    def _normalise(self, x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float) -> Tensor:
        """Return the normalised input, and move the running statistics."""


# ------------------------------------------------------------------------------------------------------------------- CUDA


class CudaBatchNorm(SyncBatchNorm):
    """The one for NCCL: the host waits for nothing."""

    def _normalise(self, x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float) -> Tensor:
        count, ranks = x.numel() // x.shape[1], dist.get_world_size()
        counts = _gathered_counts(ranks, count, x.device) if self.is_uneven else _counts(ranks, count, x.device)
        normalised: Tensor = _Normalise.apply(x, self.weight, self.bias, running_mean, running_var, self.eps, momentum, *counts)
        return normalised


@cache  # copying numbers to a GPU would make the host wait; a network has few shapes of maps
def _counts(world_size: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return how many values a channel has on each rank, [world_size], as the forward and as the backward kernel takes them."""
    counts = torch.full((world_size,), count, device=device, dtype=torch.int32)
    return counts.float(), counts


def _gathered_counts(world_size: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the same of ranks whose counts may differ."""
    counts = torch.empty(world_size, device=device, dtype=torch.int32)
    gather_into(counts, torch.tensor([count], device=device, dtype=torch.int32))
    return counts.float(), counts


class _Normalise(torch.autograd.Function):
    """`torch.nn.modules._functions.SyncBatchNorm` for counts that are known.

    In float32 [C] whatever the type of the images: the mean, the inverse standard deviation, and all sums.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        eps: float,
        momentum: float,
        counts: Tensor,
        whole_counts: Tensor,
    ) -> Tensor:
        x = _dense(x)
        mean, invstd = torch.batch_norm_stats(x, eps)
        of_all = mean.new_empty(len(counts) * 2 * len(mean))
        gather_into(of_all, torch.cat((mean, invstd)))
        means, invstds = of_all.view(len(counts), 2, len(mean)).unbind(1)
        mean, invstd = torch.batch_norm_gather_stats_with_counts(
            x, means, invstds, running_mean, running_var, momentum, eps, counts
        )
        ctx.save_for_backward(x, weight, mean, invstd, whole_counts)
        return torch.batch_norm_elemt(x, weight, bias, mean, invstd, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd, counts = ctx.saved_tensors
        gradient = _dense(gradients[0])
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        sum_dy, sum_dy_xmu, of_weight, of_bias = torch.batch_norm_backward_reduce(
            gradient, x, mean, invstd, weight, wants_x, wants_weight, wants_bias
        )
        of_x = None
        if wants_x:
            sums = torch.cat((sum_dy, sum_dy_xmu))
            dist.all_reduce(sums)
            sum_dy, sum_dy_xmu = sums.chunk(2)
            scale = None if weight is None else weight.to(mean.dtype)
            of_x = torch.batch_norm_backward_elemt(gradient, x, mean, invstd, scale, sum_dy, sum_dy_xmu, counts)
        # Those of the parameters are of this rank's images: DistributedDataParallel averages them as all others.
        return (of_x, of_weight if wants_weight else None, of_bias if wants_bias else None, *[None] * 6)


def _dense(x: Tensor) -> Tensor:
    """Return a tensor in one of the two layouts that the kernels know."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


# ------------------------------------------------------------------------------------------------------------------- gloo


class GlooBatchNorm(SyncBatchNorm):
    """The one for the CPU, where `nn.SyncBatchNorm` refuses to run.

    Sums are taken in float64, so that uneven shards and one process agree to float32 rounding.
    """

    def _normalise(self, x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float) -> Tensor:
        kind, x = x.dtype, x.double()
        count = x.new_tensor([x.numel() / x.shape[1]])
        sums = torch.cat([x.sum((0, 2, 3)), x.square().sum((0, 2, 3)), count])
        sums = _SumOverRanks.apply(sums)
        count = sums[-1]
        mean, square = (sums[:-1] / count).chunk(2)
        variance = square - mean.square()
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean), momentum)
            running_var.lerp_((variance * count / (count - 1)).to(running_var), momentum)
        shape = (1, -1, 1, 1)
        normal = (x - mean.view(shape)) * (variance + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            normal = normal * self.weight.view(shape)
        if self.bias is not None:
            normal = normal + self.bias.view(shape)
        normalised: Tensor = normal.to(kind)
        return normalised


class _SumOverRanks(torch.autograd.Function):
    """Sum of a tensor over ranks; the gradient of a sum is the sum of the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total
