"""A feature pyramid: maps of one width at several strides; regions are pooled from the map that fits them (Lin et al. 2017)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

"""A region of this side, in pixels, is pooled from the third finest map where the first stage's stride is 4."""


class FeaturePyramid(nn.Module):
    """Maps of four stages become five of one width: each is a stage's own and, enlarged, what lies above it.

    Args:
        channels: of the stages' maps, the finest first.
        width: channels of every map that comes out.
    """

    def __init__(self, channels: Sequence[int], *, width: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(convolution(number, width, kernel_size=1) for number in channels)
        self.output = nn.ModuleList(convolution(width, width, kernel_size=3) for _ in channels)

    def forward(self, stages: Sequence[Tensor]) -> list[Tensor]:
        """Return the maps, the finest first; the last is every second place of the one before it.

        Args:
            stages: [B, C, H, W] each, of which each has half of the sides of the one before.
        """
        above: Tensor | None = None
        maps: list[Tensor] = []
        for lateral, output, stage in reversed(list(zip(self.lateral, self.output, stages, strict=True))):
            above = lateral(stage) if above is None else lateral(stage) + F.interpolate(above, scale_factor=2.0, mode="nearest")
            maps.insert(0, output(above))
        return [*maps, F.max_pool2d(maps[-1], kernel_size=1, stride=2)]


def convolution(channels: int, width: int, *, kernel_size: int) -> nn.Sequential:
    """Return a convolution without bias and its batch norm, with uniform initial values by the number of inputs."""
    conv = nn.Conv2d(channels, width, kernel_size=kernel_size, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_uniform_(conv.weight, a=1.0)
    return nn.Sequential(conv, nn.BatchNorm2d(width))


def level_of(boxes: Tensor, *, standard: float, num_levels: int) -> Tensor:
    """Return from which map each box [R, 4] is pooled, int64 [R]: the third for a side of `standard`, one less for half of it."""
    sides = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).sqrt()
    return (2 + torch.log2(sides / standard + 1e-8)).floor().clamp(0, num_levels - 1).to(torch.int64)


def pool(maps: Sequence[Tensor], *, strides: Sequence[int], regions: Sequence[Tensor], side: int, standard: float) -> Tensor:
    """Return the regions of all images, each from the map that fits its size, [R, C, side, side].

    Args:
        maps: [B, C, H, W] each, the finest first.
        strides: of the maps, pixels.
        regions: of every image, [r, 4] each.
        side: places on a side of what is returned.
        standard: see `level_of`.
    """
    boxes = torch.cat(list(regions)).to(maps[0].dtype)
    images = torch.cat([torch.full((len(each),), place, device=boxes.device) for place, each in enumerate(regions)])
    placed = torch.cat((images[:, None].to(boxes.dtype), boxes), dim=1)
    levels = level_of(boxes, standard=standard, num_levels=len(maps))
    pooled, rows = [], []
    for level, (of_level, stride) in enumerate(zip(maps, strides, strict=True)):
        own = torch.nonzero(levels == level).squeeze(1)
        rows.append(own)
        pooled.append(
            roi_align(of_level, placed[own], output_size=side, spatial_scale=1.0 / stride, sampling_ratio=0, aligned=True)
        )
    return torch.cat(pooled)[torch.argsort(torch.cat(rows))]
