"""Projections: the MLPs behind the pooled feature in which methods compare views, and how spread out what they give is."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from obowlab.methods import bow


class GlobalBatchNorm1d(nn.BatchNorm1d):
    """Batch norm of the rows [N, C] of all processes: `training.sync_batchnorm` finds it by its type.

    Any other BatchNorm1d sees its own process's rows alone. Where a method needs no scale or no shift, `weight` or `bias` may be
    None.
    """


def hidden_layer(inputs: int, outputs: int, *, bias: bool = False) -> tuple[nn.Module, ...]:
    """Return a linear layer, batch norm over all processes, ReLU."""
    return nn.Linear(inputs, outputs, bias=bias), GlobalBatchNorm1d(outputs), nn.ReLU(inplace=True)


def channel_std(projected_ND: Tensor) -> Tensor:
    """Return the standard deviation over rows of normalised projections, mean over channels, 0-dim.

    It is about 1/√D for directions that are spread out, and 0 when all rows are one.
    """
    return F.normalize(bow.at_least_float32(projected_ND), dim=1).std(dim=0).mean()
