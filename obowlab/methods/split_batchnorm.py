"""Batch normalisation in groups of the global batch, over which MoCo shuffles its keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from obowlab.methods.base import Comm


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Normalise contiguous, equally large groups of the batch [N, C, H, W] with their own statistics.

    The groups are those of the global batch, whichever process holds them, so that a result does not depend on their number.
    Running statistics follow the mean over all groups of means and of unbiased variances; evaluation uses them as usual.
    """

    num_groups: int
    comm: Comm

    @classmethod
    def like(cls, other: nn.BatchNorm2d, *, num_groups: int, comm: Comm) -> SplitBatchNorm2d:
        """Return a copy that shares the parameters and buffers of an ordinary batch-norm.

        Args:
            other: the batch-norm to copy.
            num_groups: groups of this process's part of the batch.
            comm: the other processes of the run.
        """
        new = cls(other.num_features, eps=other.eps, momentum=other.momentum, affine=other.affine)
        new.train(other.training)
        new.weight, new.bias = other.weight, other.bias
        new.running_mean, new.running_var = other.running_mean, other.running_var
        new.num_batches_tracked = other.num_batches_tracked
        new.num_groups, new.comm = num_groups, comm
        return new

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each group over N, H, W when training, by the running statistics otherwise."""
        if not self.training:
            return super().forward(input)
        assert len(input) % self.num_groups == 0, "config.compatibility.check_batch refuses it"
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        mean_GC = self.running_mean.new_zeros(self.num_groups, self.num_features)
        variance_GC = torch.zeros_like(mean_GC)
        parts = [
            # With momentum 1 the "running" statistics are those of the group.
            F.batch_norm(part, mean, variance, self.weight, self.bias, training=True, momentum=1.0, eps=self.eps)
            for part, mean, variance in zip(input.chunk(self.num_groups), mean_GC, variance_GC, strict=True)
        ]
        with torch.no_grad():
            statistics = self.comm.all_reduce_mean(torch.stack((mean_GC.mean(0), variance_GC.mean(0))))
            momentum = 0.1 if self.momentum is None else self.momentum
            self.num_batches_tracked += 1
            self.running_mean.lerp_(statistics[0], momentum)
            self.running_var.lerp_(statistics[1], momentum)
        return torch.cat(parts)


def split_batchnorm(module: nn.Module, *, num_groups: int, comm: Comm) -> None:
    """Let every BatchNorm2d of the module, in place, normalise groups of the batch; see `SplitBatchNorm2d.like`."""
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            setattr(module, name, SplitBatchNorm2d.like(child, num_groups=num_groups, comm=comm))
        else:
            split_batchnorm(child, num_groups=num_groups, comm=comm)
