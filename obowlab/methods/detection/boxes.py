"""Boxes (x0, y0, x1, y1) in continuous coordinates, width x1 - x0, and what a network predicts of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Weights = tuple[float, float, float, float]
RPN_WEIGHTS: Weights = (1.0, 1.0, 1.0, 1.0)
HEAD_WEIGHTS: Weights = (10.0, 10.0, 5.0, 5.0)

MAX_GROWTH = math.log(1000.0 / 16)
"""No box grows by more than this, as a logarithm of its sides."""


def encode(boxes: Tensor, *, towards: Tensor, weights: Weights) -> Tensor:
    """Return what moves boxes onto others: shifts of the centre in sides of the box, and logarithms of the sides' ratios.

    Args:
        boxes: [N, 4].
        towards: [N, 4].
        weights: what each of the four is multiplied by.

    Returns:
        [N, 4].
    """
    (x, y, w, h), (to_x, to_y, to_w, to_h) = _centres(boxes), _centres(towards)
    deltas = torch.stack(((to_x - x) / w, (to_y - y) / h, torch.log(to_w / w), torch.log(to_h / h)), dim=-1)
    return deltas * deltas.new_tensor(weights)


def decode(deltas: Tensor, *, boxes: Tensor, weights: Weights) -> Tensor:
    """Return boxes moved by what was predicted; the inverse of `encode`, but for `MAX_GROWTH`.

    Args:
        deltas: [N, ..., 4].
        boxes: [N, 4].
        weights: as for `encode`.

    Returns:
        [N, ..., 4].
    """
    between = [1] * (deltas.dim() - 2)
    x, y, w, h = (each.reshape(-1, *between) for each in _centres(boxes))
    shift_x, shift_y, log_w, log_h = (deltas / deltas.new_tensor(weights)).unbind(dim=-1)
    centre_x, centre_y = x + shift_x * w, y + shift_y * h
    half_w, half_h = (0.5 * side * torch.exp(log.clamp(max=MAX_GROWTH)) for side, log in ((w, log_w), (h, log_h)))
    return torch.stack((centre_x - half_w, centre_y - half_h, centre_x + half_w, centre_y + half_h), dim=-1)


def clip(boxes: Tensor, *, size: tuple[int, int]) -> Tensor:
    """Return boxes [..., 4] cut off at the edges of an image of `size` (height, width)."""
    height, width = size
    x0, y0, x1, y1 = boxes.unbind(dim=-1)
    return torch.stack((x0.clamp(0, width), y0.clamp(0, height), x1.clamp(0, width), y1.clamp(0, height)), dim=-1)


def has_area(boxes: Tensor, *, beyond: float = 0.0) -> Tensor:
    """Return which boxes [N, 4] have both sides longer than `beyond`, bool [N]."""
    return ((boxes[:, 2:] - boxes[:, :2]) > beyond).all(dim=1)


def _centres(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x0, y0, x1, y1 = boxes.unbind(dim=-1)
    w, h = x1 - x0, y1 - y0
    return x0 + 0.5 * w, y0 + 0.5 * h, w, h
