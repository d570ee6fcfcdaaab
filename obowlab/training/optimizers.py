"""The optimiser of a recipe: one factory for the training loop and the benchmark."""

from __future__ import annotations

from typing import Any

import torch

from obowlab.config import Optimizer
from obowlab.methods import Method


def build_optimizer(settings: Optimizer, *, method: Method[Any]) -> torch.optim.Optimizer:
    """Return SGD with momentum over what a method learns (docs/method.md, 6.5)."""
    on_gpu = next(method.parameters()).device.type == "cuda"
    return torch.optim.SGD(
        method.param_groups(weight_decay=settings.weight_decay),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        fused=True if on_gpu else None,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let the next update of all parameters have this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def grad_norm(optimizer: torch.optim.Optimizer) -> float:
    """Return the Euclidean norm of the last gradient of what the method learns, student and heads."""
    (method,) = (group for group in optimizer.param_groups if group["name"] == "method")
    return float(torch.nn.utils.get_total_norm([p.grad for p in method["params"] if p.grad is not None]))
