"""Which boxes are which objects, and which of them a step learns from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

POSITIVE, NEGATIVE, IGNORED = 1, 0, -1


@dataclass(frozen=True)
class Matches:
    """What boxes are taken for.

    Attributes:
        objects: int64 [N], the object that overlaps most with each box; 0 where there is none.
        labels: int8 [N], `POSITIVE`, `NEGATIVE` or `IGNORED`.
    """

    objects: Tensor
    labels: Tensor


def match(overlaps: Tensor, *, below: float, above: float, best_too: bool) -> Matches:
    """Return which object every box is, by their overlaps.

    Args:
        overlaps: of every object and box, [G, N].
        below: overlaps below it are background.
        above: overlaps of it and more are objects; what lies between the two is ignored.
        best_too: whether the boxes that overlap most with an object are that object however little it is, ties included. What
            they learn to become stays the object that overlaps most with *them*.
    """
    num_objects, num_boxes = overlaps.shape
    if num_objects == 0:
        device = overlaps.device
        return Matches(
            torch.zeros(num_boxes, dtype=torch.int64, device=device), torch.zeros(num_boxes, dtype=torch.int8, device=device)
        )
    most, objects = overlaps.max(dim=0)
    labels = torch.full((num_boxes,), IGNORED, dtype=torch.int8, device=overlaps.device)
    labels[most < below] = NEGATIVE
    labels[most >= above] = POSITIVE
    if best_too:
        labels[(overlaps == overlaps.max(dim=1, keepdim=True).values).any(dim=0)] = POSITIVE
    return Matches(objects, labels)


def sample(labels: Tensor, *, count: int, positives: float, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positive and the negative boxes that a step learns from: as many positive ones as allowed, then negative ones.

    Args:
        labels: as `Matches` has them, [N].
        count: boxes in all.
        positives: the largest share of positive ones.
        keys: random numbers, [N]; those with the smallest are taken.

    Returns:
        Indices of positive and of negative boxes, ascending.
    """
    chosen = []
    room = int(count * positives)
    for label in (POSITIVE, NEGATIVE):
        candidates = torch.nonzero(labels == label).squeeze(1)
        order = torch.argsort(keys[candidates], stable=True)[:room]
        chosen.append(candidates[order].sort().values)
        room = count - len(chosen[0])
    return chosen[0], chosen[1]
