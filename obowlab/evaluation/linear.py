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


def probe_learning_rate(step: int, *, config: Linear, steps_per_epoch: int) -> float:
    """Return the learning rate of a step: divided by 10 every `decay_every` epochs, or a cosine to 0 over all steps."""
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / (config.epochs * steps_per_epoch)))
    return float(config.learning_rate * 0.1 ** (step // steps_per_epoch // config.decay_every))


class _Classifier:
    """A linear classifier under SGD with momentum and weight decay, as torch.optim.SGD has it.

    The gradient is written out: on cached features autograd would cost more than the arithmetic. One step is two matrix
    products; what is beside them goes over the weight twice and over the logits a few times.
    """

    def __init__(self, num_classes: int, *, num_features: int, config: Linear, seed: int, device: torch.device):
        start = torch.empty(num_classes, num_features).normal_(0.0, 0.01, generator=torch.Generator().manual_seed(seed))
        self.weight, self.bias = start.to(device), torch.zeros(num_classes, device=device)
        self.velocities = (torch.zeros_like(self.weight), torch.zeros_like(self.bias))
        self.config = config

    def step(self, features: torch.Tensor, *, labels: torch.Tensor, learning_rate: float) -> None:
        """Take one step down the mean cross-entropy of float32 features [B, c] and int64 labels [B]."""
        error = F.softmax(torch.addmm(self.bias, features, self.weight.T), dim=1)
        error.scatter_add_(1, labels[:, None], error.new_full((len(labels), 1), -1.0))
        velocity, bias_velocity = self.velocities
        momentum, scale = self.config.momentum, 1.0 / len(features)
        velocity.addmm_(error.T, features, beta=momentum, alpha=scale)
        bias_velocity.mul_(momentum).add_(error.sum(dim=0), alpha=scale)
        for parameter, change in ((self.weight, velocity), (self.bias, bias_velocity)):
            change.add_(parameter, alpha=self.config.weight_decay)
            parameter.sub_(change, alpha=learning_rate)

    def is_finite(self) -> bool:
        """Return whether every weight is a number."""
        return bool(torch.isfinite(self.weight).all() & torch.isfinite(self.bias).all())


def _chosen_views(num_images: int, *, num_views: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return which view of every image an epoch shows, each with equal chance, int64 [num_images]."""
    images = np.arange(num_images, dtype=np.int64)
    chance = uniforms(seed=seed, epoch=epoch, indices=images, stream=Stream.EPISODES, count=1, lane=PROBE_LANE)[:, 0]
    return np.floor(chance * num_views).astype(np.int64)


def _batches(
    views: tuple[torch.Tensor, ...], *, labels: torch.Tensor, batch_size: int, seed: int, epoch: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield features [batch_size, c] and labels [batch_size] of an epoch's full batches; both are overwritten by the next.

    Rows of a batch are sorted by view, as the loss does not depend on their order: each view is then gathered at once.
    """
    num_images, num_views = len(labels), len(views)
    num_batches = num_images // batch_size
    order = epoch_order(num_images, seed=seed, epoch=epoch)[: num_batches * batch_size]
    batch_and_view = np.repeat(np.arange(num_batches), batch_size) * num_views
    batch_and_view += _chosen_views(num_images, num_views=num_views, seed=seed, epoch=epoch)[order]
    counts = np.bincount(batch_and_view, minlength=num_batches * num_views).reshape(num_batches, num_views)
    images = torch.from_numpy(order[np.argsort(batch_and_view, kind="stable")]).to(labels.device)
    features = views[0].new_empty(batch_size, views[0].shape[1])
    for batch, of_view in zip(torch.split(images, batch_size), counts.tolist(), strict=True):
        for positions, destination, view in zip(torch.split(batch, of_view), torch.split(features, of_view), views, strict=True):
            torch.index_select(view, 0, positions, out=destination)
        yield features, labels[batch]


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
        for step, (features, truth) in enumerate(batches, start=epoch * num_steps):
            rate = probe_learning_rate(step, config=config, steps_per_epoch=num_steps)
            classifier.step(features, labels=truth, learning_rate=rate)
        if not classifier.is_finite():
            raise UserError(
                f"The linear probe diverged in epoch {epoch + 1}: lower evaluation.linear.learning_rate ({config.learning_rate})."
            )
        if report is not None and (epoch + 1) % config.decay_every == 0:
            report(f"linear: epoch {epoch + 1}/{config.epochs}")
    return classifier.weight, classifier.bias


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
