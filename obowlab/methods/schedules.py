"""Learning rate and teacher momentum as pure functions of the step (docs/method.md, 8)."""

from __future__ import annotations

import math

from obowlab.config import Optimizer


def learning_rate(step: int, *, optimizer: Optimizer, epochs: int, steps_per_epoch: int) -> float:
    """Return the learning rate of the update with number `step`, counted from 0.

    A linear warm-up from `warmup_start` over `warmup_epochs` (per step), then half a cosine from `learning_rate` towards
    `end_learning_rate`, reached at the step after the last. With `cosine_per = "epoch"` the cosine stands still within
    an epoch, at its value at the epoch's start, as the authors' code does (docs/method.md, 8.1):
    https://github.com/valeoai/obow/blob/45af1490d3c076a924ceaf02bbaf201bc74c7f99/obow/solver.py#L123-L140
    With `schedule = "steps"` it is divided by 10 after every `decay_every` epochs instead, or multiplied by `decay_factor` after
    each epoch of `decay_after`.
    """
    warmup_steps = optimizer.warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        return optimizer.warmup_start + (optimizer.learning_rate - optimizer.warmup_start) * step / warmup_steps
    if optimizer.schedule == "steps" and optimizer.decay_after:
        passed = sum(step >= epoch * steps_per_epoch for epoch in optimizer.decay_after)
        return optimizer.learning_rate * optimizer.decay_factor**passed
    if optimizer.schedule == "steps":
        return optimizer.learning_rate / 10.0 ** (step // (optimizer.decay_every * steps_per_epoch))
    position = step if optimizer.cosine_per == "step" else step // steps_per_epoch * steps_per_epoch
    length = epochs * steps_per_epoch - warmup_steps
    progress = min(1.0, max(0.0, (position - warmup_steps) / length)) if length > 0 else 1.0
    span = optimizer.learning_rate - optimizer.end_learning_rate
    return optimizer.end_learning_rate + span * half_cosine(progress)


def teacher_momentum(step: int, *, start: float, schedule: str, total_steps: int) -> float:
    """Return the teacher's momentum alpha of eq. 3 at `step`, counted from 0: from `start` to 1 by a cosine, or constant."""
    if schedule == "constant":
        return start
    return 1.0 - (1.0 - start) * half_cosine(min(1.0, step / total_steps))


def half_cosine(progress: float) -> float:
    """Return a cosine falling from 1 at progress 0 to 0 at progress 1."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))
