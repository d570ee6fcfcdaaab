"""A linear classifier on cached features (docs/method.md, section 11.3; paper, appendix C.2).

As the authors' code does it: no normalisation of the features, weights from N(0, 0.01²) and a bias of zeros, weight decay on
both; in every epoch each training image appears once, as its centre crop or that crop's mirror image with equal chance; the
last partial batch is dropped. The order and the choice of view are counter-based, so the probe is a function of its seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from obowlab.config import Linear
from obowlab.errors import UserError
from obowlab.evaluation.result import Measurement, proportion_with_interval
from obowlab.randomness import Stream, epoch_order, uniforms

PROBE_LANE = 1
"""Keeps the probe's draws apart from those of the episodes, which use lane 0 of the same stream."""


def probe_learning_rate(step: int, *, config: Linear, steps_per_epoch: int) -> float:
    """Return the learning rate of a step: divided by 10 every `decay_every` epochs, or a cosine to 0 over all steps."""
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / (config.epochs * steps_per_epoch)))
    return float(config.learning_rate * 0.1 ** (step // steps_per_epoch // config.decay_every))


def train_probe(
    views: tuple[torch.Tensor, ...],
    *,
    labels: torch.Tensor,
    num_classes: int,
    config: Linear,
    seed: int,
    report: Callable[[str], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Train the classifier by SGD with momentum on the mean cross-entropy.

    The gradient of a linear classifier is written out: on cached features autograd would cost more than the arithmetic.

    Args:
        views: one float32 [N, c] per view of the same images (centre crop, mirror image), all on one device.
        labels: int64 [N] on that device.
        num_classes: rows of the classifier.
        config: the schedule.
        seed: of initial weights, order and choice of view.
        report: called with a line now and then.

    Returns:
        weight [num_classes, c] and bias [num_classes].

    Raises:
        UserError: the weights stopped being finite.
    """
    num_images, num_features = views[0].shape
    batch_size = min(config.batch_size, num_images)
    num_steps = num_images // batch_size
    device = views[0].device
    # Features with a column of ones: weight and bias are one matrix, as they share every rule of the optimiser.
    table = torch.cat([F.pad(view, (0, 1), value=1.0) for view in views])  # [num_views * N, c + 1]
    start = torch.empty(num_classes, num_features).normal_(0.0, 0.01, generator=torch.Generator().manual_seed(seed))
    theta = F.pad(start, (0, 1)).to(device)
    velocity = torch.zeros_like(theta)
    rows = torch.arange(batch_size, device=device)
    for epoch in range(config.epochs):
        order = epoch_order(num_images, seed=seed, epoch=epoch)
        chance = uniforms(
            seed=seed,
            epoch=epoch,
            indices=np.arange(num_images, dtype=np.int64),
            stream=Stream.EPISODES,
            count=1,
            lane=PROBE_LANE,
        )[:, 0]
        chosen = np.floor(chance * len(views)).astype(np.int64) * num_images + np.arange(num_images)
        positions = torch.from_numpy(chosen[order]).to(device)
        truth = labels[torch.from_numpy(order).to(device)]
        for step in range(num_steps):
            batch = slice(step * batch_size, (step + 1) * batch_size)
            x = table[positions[batch]]
            error = F.softmax(x @ theta.T, dim=1)
            error[rows, truth[batch]] -= 1.0
            gradient = torch.addmm(theta, error.T, x, beta=config.weight_decay, alpha=1.0 / batch_size)
            velocity.mul_(config.momentum).add_(gradient)
            theta.sub_(velocity, alpha=probe_learning_rate(epoch * num_steps + step, config=config, steps_per_epoch=num_steps))
        if not torch.isfinite(theta).all():
            raise UserError(
                f"The linear probe diverged in epoch {epoch + 1}: lower evaluation.linear.learning_rate ({config.learning_rate})."
            )
        if report is not None and (epoch + 1) % config.decay_every == 0:
            report(f"linear: epoch {epoch + 1}/{config.epochs}")
    return theta[:, :-1], theta[:, -1]


def linear_probe(
    views: tuple[torch.Tensor, ...],
    *,
    labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    num_classes: int,
    config: Linear,
    seed: int,
    report: Callable[[str], None] | None = None,
) -> tuple[Measurement, ...]:
    """Train on the views of the training images and measure top-1 on the centre crops of the test images.

    Args:
        views: one float32 [N, c] per view of the training images.
        labels: int64 [N].
        test_features: float32 [M, c].
        test_labels: int64 [M].
        num_classes: number of classes.
        config: the schedule.
        seed: of the probe.
        report: called with a line now and then.

    Returns:
        `linear_top1` in percent, with Wilson's interval over the M images.
    """
    weight, bias = train_probe(views, labels=labels, num_classes=num_classes, config=config, seed=seed, report=report)
    correct: list[int] = []
    for features, truth in zip(torch.split(test_features, 8192), torch.split(test_labels, 8192), strict=True):
        correct += (F.linear(features, weight, bias).argmax(dim=1) == truth).int().tolist()
    return (proportion_with_interval("linear_top1", correct),)
