"""A linear classifier on cached features (docs/method.md, section 11.3; paper, appendix C.2).

As the authors' code does it: no normalisation of the features, weights from N(0, 0.01²) and a bias of zeros, weight decay on
both; in every epoch each training image appears once, as its centre crop or that crop's mirror image with equal chance; the
last partial batch is dropped. The order and the choice of view are counter-based, so the probe is a function of its seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from obowlab.config import Linear
from obowlab.errors import UserError
from obowlab.evaluation.result import Measurement, proportion_with_interval
from obowlab.randomness import Stream, epoch_order, uniforms

PROBE_LANE = 1
"""Keeps the probe's draws apart from those of the episodes, which use lane 0 of the same stream."""

ALIGNMENT = 16
"""Rows are a multiple of this many float32 values (64 bytes) long: matrix products of odd lengths take longer."""


def probe_learning_rate(step: int, *, config: Linear, steps_per_epoch: int) -> float:
    """Return the learning rate of a step: divided by 10 every `decay_every` epochs, or a cosine to 0 by steps or by epochs."""
    epoch = step // steps_per_epoch
    if config.schedule == "steps":
        return float(config.learning_rate * 0.1 ** (epoch // config.decay_every))
    place, end = (epoch, config.epochs) if config.cosine_per == "epoch" else (step, config.epochs * steps_per_epoch)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * place / end))


class _Classifier:
    """A linear classifier under SGD with momentum and weight decay, as torch.optim.SGD has it.

    The gradient is written out: on cached features autograd would cost more than the arithmetic. Weight and bias share every
    rule of the optimiser and are one matrix [num_classes, width]: c columns of the weight, one of the bias, which meets a
    feature of 1, and zeros up to a multiple of `ALIGNMENT`.
    """

    def __init__(self, num_classes: int, *, num_features: int, config: Linear, seed: int, device: torch.device):
        start = torch.empty(num_classes, num_features).normal_(0.0, 0.01, generator=torch.Generator().manual_seed(seed))
        self.theta = F.pad(start, (0, _width(num_features) - num_features)).to(device)
        self.velocity, self.gradient = torch.zeros_like(self.theta), torch.zeros_like(self.theta)
        self.config = config

    def step(self, x: torch.Tensor, *, labels: torch.Tensor, learning_rate: float) -> None:
        """Take one step down the mean cross-entropy of rows x [B, width] and int64 labels [B]."""
        error = F.softmax(x @ self.theta.T, dim=1)
        error.scatter_add_(1, labels[:, None], error.new_full((len(labels), 1), -1.0))
        torch.addmm(self.theta, error.T, x, beta=self.config.weight_decay, alpha=1.0 / len(x), out=self.gradient)
        self.velocity.mul_(self.config.momentum).add_(self.gradient)
        self.theta.sub_(self.velocity, alpha=learning_rate)


def _width(num_features: int) -> int:
    """Return the length of a row: the features, a one for the bias, and zeros."""
    return (num_features // ALIGNMENT + 1) * ALIGNMENT


def _chosen_views(num_images: int, *, num_views: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return which view of every image an epoch shows, each with equal chance, int64 [num_images]."""
    images = np.arange(num_images, dtype=np.int64)
    chance = uniforms(seed=seed, epoch=epoch, indices=images, stream=Stream.EPISODES, count=1, lane=PROBE_LANE)[:, 0]
    return np.floor(chance * num_views).astype(np.int64)


def _batches(
    views: tuple[torch.Tensor, ...], *, labels: torch.Tensor, batch_size: int, seed: int, epoch: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield rows [batch_size, width] and labels [batch_size] of an epoch's full batches; the rows are overwritten by the next.

    Only a batch is ever gathered: a table of all views, with its column of ones, would hold the features once more.
    """
    num_images, num_features = views[0].shape
    order = epoch_order(num_images, seed=seed, epoch=epoch)[: num_images // batch_size * batch_size].reshape(-1, batch_size)
    chosen = _chosen_views(num_images, num_views=len(views), seed=seed, epoch=epoch)[order]
    by_view = np.argsort(chosen, axis=1, kind="stable")  # the places in a batch of its first view, then of the second, ...
    counts = [np.bincount(each, minlength=len(views)).tolist() for each in chosen]
    places = torch.from_numpy(by_view).to(labels.device)
    images = torch.from_numpy(order).to(labels.device)
    x = views[0].new_zeros(batch_size, _width(num_features))
    x[:, num_features] = 1.0
    for place, image, count in zip(places, images, counts, strict=True):
        for rows, view in zip(torch.split(place, count), views, strict=True):
            x[:, :num_features].index_copy_(0, rows, view[image[rows]])
        yield x, labels[image]


def train_probe(
    views: tuple[torch.Tensor, ...],
    *,
    labels: torch.Tensor,
    num_classes: int,
    config: Linear,
    seed: int,
    report: Callable[[str], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Train the classifier by SGD with momentum on the mean cross-entropy; the views are read in place, never copied whole.

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
    classifier = _Classifier(num_classes, num_features=num_features, config=config, seed=seed, device=views[0].device)
    for epoch in range(config.epochs):
        batches = _batches(views, labels=labels, batch_size=batch_size, seed=seed, epoch=epoch)
        for step, (x, truth) in enumerate(batches, start=epoch * num_steps):
            rate = probe_learning_rate(step, config=config, steps_per_epoch=num_steps)
            classifier.step(x, labels=truth, learning_rate=rate)
        if not torch.isfinite(classifier.theta).all():
            raise UserError(
                f"The linear probe diverged in epoch {epoch + 1}: lower evaluation.linear.learning_rate ({config.learning_rate})."
            )
        if report is not None and (epoch + 1) % config.decay_every == 0:
            report(f"linear: epoch {epoch + 1}/{config.epochs}")
    return classifier.theta[:, :num_features], classifier.theta[:, num_features]


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
