"""Anchors: boxes of some sizes and shapes around every place of a map, from which a region proposal network starts."""

from __future__ import annotations

import torch
from torch import Tensor

RATIOS = (0.5, 1.0, 2.0)


def shapes(sizes: tuple[float, ...]) -> Tensor:
    """Return the anchors of one place at (0, 0), float32 [3 len(sizes), 4]: of a size all `RATIOS`, then the next.

    A ratio is height over width at an area of size². Nothing is rounded, unlike in torchvision.
    """
    found = []
    for size in sizes:
        for ratio in RATIOS:
            width = size / ratio**0.5
            height = width * ratio
            found.append((-width / 2, -height / 2, width / 2, height / 2))
    return torch.tensor(found, dtype=torch.float32)


def anchors_of(rows: int, columns: int, *, stride: int, at_origin: Tensor) -> Tensor:
    """Return the anchors of a map, row by row and place by place, [rows * columns * A, 4].

    Args:
        rows: of the map.
        columns: of the map.
        stride: pixels between two places; the first lies at (0, 0).
        at_origin: as `shapes` gives them, [A, 4].
    """
    y = torch.arange(rows, device=at_origin.device, dtype=at_origin.dtype) * stride
    x = torch.arange(columns, device=at_origin.device, dtype=at_origin.dtype) * stride
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    places = torch.stack((grid_x, grid_y, grid_x, grid_y), dim=-1).reshape(-1, 1, 4)
    return (places + at_origin).reshape(-1, 4)
