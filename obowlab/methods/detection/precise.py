"""Precise batch norm: statistics of a trained network over many batches, instead of a moving average (Wu and Johnson 2021)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class _Statistics:
    """Mean and mean square of a layer's input, over batches that count alike."""

    def __init__(self, channels: int, *, total: Callable[[Tensor], Tensor]) -> None:
        self.mean, self.square = torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
        self.batches = 0
        self._total = total

    def add(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Take in an input [B, C, H, W] or [B, C]."""
        x = arguments[0].detach().double()
        others = [axis for axis in range(x.dim()) if axis != 1]
        number = x.new_full((x.shape[1],), x.numel() / x.shape[1])
        sums = self._total(torch.stack((x.sum(dim=others), x.square().sum(dim=others), number))).cpu()
        self.mean += sums[0] / sums[2]
        self.square += sums[1] / sums[2]
        self.batches += 1


@torch.no_grad()
def set_precise_statistics(
    network: nn.Module, *, forward: Callable[[Any], object], batches: Iterable[Any], total: Callable[[Tensor], Tensor]
) -> None:
    """Give every batch norm the mean of its batches' means and the variance of all that it saw; nothing else changes.

    Args:
        network: in training mode.
        forward: runs it on a batch, as a training step does.
        batches: of training images.
        total: adds a tensor up over all processes; itself for one.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    found = [(norm, _Statistics(norm.num_features, total=total)) for norm in norms]
    before = [{name: value.clone() for name, value in norm.named_buffers()} for norm in norms]
    handles = [norm.register_forward_pre_hook(statistics.add) for norm, statistics in found]
    try:
        for batch in batches:
            forward(batch)
    finally:
        for handle in handles:
            handle.remove()
    for (norm, statistics), buffers in zip(found, before, strict=True):
        for name, value in norm.named_buffers():
            value.copy_(buffers[name])
        if statistics.batches and norm.running_mean is not None and norm.running_var is not None:
            mean = statistics.mean / statistics.batches
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(statistics.square / statistics.batches - mean.square())
