"""Masks of objects: what a network learns of them, its head, and how a predicted one is put into an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from obowlab.errors import UserError
from obowlab.methods.detection.objects import Polygons

MASK_SIDE = 28
"""Places on a side of a mask."""

SURE = 0.5
"""A place belongs to an object where the network is at least as sure as this."""

SMALLEST = 0.1
"""Sides of a box below it are taken for it when an outline is scaled, pixels."""


def targets(outlines: Sequence[Polygons], *, boxes: Tensor, side: int = MASK_SIDE) -> Tensor:
    """Return what lies within outlines at the places of boxes, 0 or 1, float [R, side, side], as pycocotools rasters it.

    Args:
        outlines: of the object of every box.
        boxes: [R, 4].
        side: places on a side.

    Raises:
        UserError: pycocotools is not installed.
    """
    mask = _pycocotools()
    found = np.zeros((len(outlines), side, side), dtype=np.float32)
    for place, (polygons, (x0, y0, x1, y1)) in enumerate(zip(outlines, boxes.double().cpu().numpy(), strict=True)):
        scale = np.array([side / max(x1 - x0, SMALLEST), side / max(y1 - y0, SMALLEST)])
        corner = np.array([x0, y0])
        moved = [((points.reshape(-1, 2) - corner) * scale).reshape(-1).tolist() for points in polygons]
        found[place] = mask.decode(mask.merge(mask.frPyObjects(moved, side, side)))
    return torch.from_numpy(found).to(boxes.device)


class MaskHead(nn.Module):
    """Four convolutions, twice as many places, and a mask for every class.

    Args:
        channels: of pooled regions.
        num_classes: of objects.
        width: channels of the convolutions.
        has_norms: whether each convolution has a batch norm in place of a bias.
    """

    def __init__(self, channels: int, *, num_classes: int, width: int, has_norms: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number in (channels, width, width, width):
            layers += convolution_relu(number, width, norm=UnevenBatchNorm2d if has_norms else None)
        self.convolutions = nn.Sequential(*layers)
        self.enlarged = nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)
        nn.init.kaiming_normal_(self.enlarged.weight, mode="fan_out", nonlinearity="relu")
        self.classes = nn.Conv2d(width, num_classes, kernel_size=1)
        nn.init.normal_(self.classes.weight, std=0.001)
        for layer in (self.enlarged, self.classes):
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """Return how sure the head is of every place of regions [R, C, S, S] for every class, as logits [R, K, 2 S, 2 S]."""
        masks: Tensor = self.classes(F.relu(self.enlarged(self.convolutions(pooled))))
        return masks


class UnevenBatchNorm2d(nn.BatchNorm2d):
    """A batch norm of inputs that are not equally many on every process: only regions that show an object have a mask."""


def convolution_relu(channels: int, width: int, *, norm: type[nn.BatchNorm2d] | None) -> list[nn.Module]:
    """Return a 3 x 3 convolution with a batch norm or a bias, and what comes after it."""
    conv = nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=norm is None)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return [conv, *([] if norm is None else [norm(width)]), nn.ReLU()]


def put_into_image(masks: Tensor, *, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Return which pixels of an image predicted masks cover, bool [D, H, W] on the CPU.

    A pixel is as sure as the mask is at its centre, by bilinear interpolation; outside of the box nothing is.

    Args:
        masks: how sure the network is, [D, S, S].
        boxes: where they lie in the image, [D, 4].
        size: height and width of the image.
    """
    height, width = size
    found = torch.zeros(len(masks), height, width, dtype=torch.bool)
    for place, (mask, box) in enumerate(zip(masks.float().cpu(), boxes.float().cpu(), strict=True)):
        x0, y0, x1, y1 = box.tolist()
        left, top = max(0, int(np.floor(x0)) - 1), max(0, int(np.floor(y0)) - 1)
        right, bottom = min(width, int(np.ceil(x1)) + 1), min(height, int(np.ceil(y1)) + 1)
        x = (torch.arange(left, right, dtype=torch.float32) + 0.5 - box[0]) / (box[2] - box[0]) * 2 - 1
        y = (torch.arange(top, bottom, dtype=torch.float32) + 0.5 - box[1]) / (box[3] - box[1]) * 2 - 1
        grid = torch.stack((x[None, :].expand(len(y), -1), y[:, None].expand(-1, len(x))), dim=-1)
        seen = F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0]
        found[place, top:bottom, left:right] = seen >= SURE
    return found


def _pycocotools() -> Any:
    try:
        from pycocotools import mask
    except ImportError:
        raise UserError("Masks need pycocotools: pip install 'obowlab[coco]'.") from None
    return mask
