"""Projections: the MLPs behind the pooled feature in which methods compare views."""

from __future__ import annotations

from torch import nn


class GlobalBatchNorm1d(nn.BatchNorm1d):
    """Batch norm of the rows [N, C] of all processes: `training.sync_batchnorm` finds it by its type.

    Any other BatchNorm1d sees its own process's rows alone. Where a method needs no scale or no shift, `weight` or `bias` may be
    None.
    """
