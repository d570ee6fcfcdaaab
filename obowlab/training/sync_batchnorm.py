"""Batch normalisation over the images of all ranks: `synchronise_batchnorm`."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from obowlab.training.distributed import World


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
