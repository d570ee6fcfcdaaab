"""The optimiser of a recipe: one factory for the training loop and the benchmark."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from obowlab.config import Optimizer
from obowlab.methods import Method

LARC_EPSILON = 1e-8
"""Keeps the divisor of LARC's ratio from 0, as apex has it; LARS has none."""


def build_optimizer(settings: Optimizer, *, method: Method[Any]) -> torch.optim.Optimizer:
    """Return SGD with momentum over what a method learns, or its form that looks at norms (docs/method.md, 6.5)."""
    groups = method.param_groups(weight_decay=settings.weight_decay)
    if settings.name == "sgd":
        on_gpu = next(method.parameters()).device.type == "cuda"
        fused = True if on_gpu else None
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum, fused=fused)
    if settings.name != "larc":
        groups = [part for group in groups for part in _without_vectors(group)]
    return NormScaledSGD(
        [{**group, "trust": 0.0} if group["name"] == "monitor" else group for group in groups],
        form=settings.name,
        lr=settings.learning_rate,
        momentum=settings.momentum,
        trust=settings.trust,
    )


def _without_vectors(group: dict[str, Any]) -> list[dict[str, Any]]:
    """Split the vectors and numbers off a group: biases and batch norms have no decay in LARS, and their step is not scaled."""
    if group["name"] == "monitor":
        return [group]
    matrices = {**group, "params": [p for p in group["params"] if p.ndim > 1]}
    vectors = {"name": f"{group['name']}_vectors", "params": [p for p in group["params"] if p.ndim <= 1]}
    return [each for each in (matrices, {**group, **vectors, "weight_decay": 0.0, "trust": 0.0}) if each["params"]]


class NormScaledSGD(torch.optim.Optimizer):
    """SGD with momentum in which the step of every tensor is scaled by its norm: LARS in two forms, and LARC.

    The norm of a step at a learning rate of 1 is `trust` times that of the tensor; a group with a `trust` of 0 is left to plain
    SGD. Nothing is clipped, there is no Nesterov momentum, and no step waits for the device.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        form: Literal["lars_byol", "lars_simclr", "larc"],
        lr: float,
        momentum: float,
        trust: float,
    ) -> None:
        """Move groups of parameters, each with a `weight_decay`.

        Args:
            groups: of parameters; what one does not say is as below.
            form: `lars_byol` multiplies the momentum by the learning rate, `lars_simclr` what is added to it. They are equal
                while the rate stays as it is. `larc` is as the first, with another ratio.
            lr: learning rate.
            momentum: of the steps.
            trust: the coefficient of the ratio.
        """
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": 0.0, "trust": trust})
        self.form = form

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move all parameters that have a gradient."""
        assert closure is None, "the loss is not evaluated again"
        for group in self.param_groups:
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not params:
                continue
            scaled = self._scaled([parameter.grad for parameter in params], params, group=group)
            momenta = [self._momentum(parameter) for parameter in params]
            rate_inside = self.form == "lars_simclr"
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, scaled, alpha=group["lr"] if rate_inside else 1.0)
            torch._foreach_add_(params, momenta, alpha=-1.0 if rate_inside else -group["lr"])

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        momentum: Tensor = state["momentum_buffer"]
        return momentum

    def _scaled(self, grads: list[Tensor], params: list[Tensor], *, group: dict[str, Any]) -> tuple[Tensor, ...]:
        """Return gradients with the decay of weights, times the ratio of each tensor."""
        decay, trust = group["weight_decay"], group["trust"]
        if not trust:
            return torch._foreach_add(grads, params, alpha=decay)
        if self.form == "larc":
            return _larc(grads, params, decay=decay, trust=trust)
        decayed = torch._foreach_add(grads, params, alpha=decay)
        sizes, slopes = _norms(params), _norms(decayed)
        ratios = torch.where((sizes > 0) & (slopes > 0), trust * sizes / slopes, 1.0)
        return torch._foreach_mul(decayed, ratios.unbind())


def _larc(grads: list[Tensor], params: list[Tensor], *, decay: float, trust: float) -> tuple[Tensor, ...]:
    """Return the gradients of LARC; where a tensor or its gradient is 0, the gradient alone."""
    sizes, slopes = _norms(params), _norms(grads)
    both = (sizes > 0) & (slopes > 0)
    ratios = torch.where(both, trust * sizes / (slopes + decay * sizes + LARC_EPSILON), 1.0)
    decayed = torch._foreach_add(grads, torch._foreach_mul(params, (decay * both.to(sizes)).unbind()))
    return torch._foreach_mul(decayed, ratios.unbind())


def _norms(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """Return the Euclidean norm of every tensor, [N], in one tensor."""
    return torch.stack(torch._foreach_norm(tensors))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float, *, fixed: float) -> None:
    """Set the learning rate of the next update.

    Args:
        optimizer: whose groups may have a `rate_factor` and a `fixed_rate`, see `Method.rate_groups`.
        rate: of this step by the schedule.
        fixed: of groups with a fixed rate.
    """
    for group in optimizer.param_groups:
        group["lr"] = group.get("rate_factor", 1.0) * (fixed if group.get("fixed_rate") else rate)


def grad_norm(optimizer: torch.optim.Optimizer) -> float:
    """Return the Euclidean norm of the last gradient of what the method learns, student and heads."""
    learnt = [p for group in optimizer.param_groups if group["name"] != "monitor" for p in group["params"]]
    return float(torch.nn.utils.get_total_norm([p.grad for p in learnt if p.grad is not None]))
