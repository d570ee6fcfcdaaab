"""Colour jitter, grayscale, blur, flip and normalisation of whole batches on the training device.

Every view has its own parameters (`draws`), drawn from its image's counter, so a view looks the same whatever batch it is
rendered in. The operations mean what torchvision means on PIL images (paper, appendix G): pixels are kept as whole
numbers between them, as PIL keeps bytes. Brightness, contrast, saturation and grayscale equal PIL; hue differs by rare single
levels; the blur is PIL's (three box filters of fractional width per direction) without its rounding to bytes.

Pixels are float32 *planes* [3, N, H, W] of whole numbers from 0 to 255 while they are worked on: every channel is one
contiguous block, which is what makes elementwise work fast on CPUs and GPUs alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from obowlab.precision import full_precision
from obowlab.views.draws import BLUR_PASSES, Draws, Recolouring
from obowlab.views.views import MEAN, STD

if TYPE_CHECKING:
    from obowlab.views.loaders import PixelBatch

LUMA = (19595.0, 38470.0, 7471.0)
"""Weights of red, green and blue in PIL's grey value, times 2^16; with them the sum is exact in float32."""


@dataclass(frozen=True)
class RenderedViews:
    """Normalised float32 views of B images, in channels_last memory.

    Attributes:
        original: [B, 3, S, S].
        student: what the student sees by kind, where there is any: `crops` [B * num_crops, 3, s, s] and `patches`
            [B * num_patches, 3, p, p], and `small_crops` as `crops`; all views of image 0 first.
        cutmix_lambda: for kinds that cutmix mixed, the fraction of every view's pixels that are its own image's,
            [B * num_crops]; the others are those of the image's neighbour (0 and 1, 2 and 3, ...).
    """

    original: Tensor
    student: dict[str, Tensor]
    cutmix_lambda: dict[str, Tensor]


def render(batch: PixelBatch, draws: Draws, *, device: torch.device) -> RenderedViews:
    """Return the normalised views of a batch, with the colours and flips that were drawn for it.

    Args:
        batch: Cut views, uint8.
        draws: What is random, on the device.
        device: Where to work and where the result lies.
    """
    student: dict[str, Tensor] = {}
    cutmix_lambda: dict[str, Tensor] = {}
    with torch.no_grad():
        original = batch.original.to(device, non_blocking=True)
        chosen = draws.mirrored
        original = normalise(original.index_copy(0, chosen, original[chosen].flip(2)), device=device)
        if batch.crops is not None:
            student["crops"] = coloured(
                batch.crops.to(device, non_blocking=True).flatten(0, 1), draws.crops, threshold=draws.solarise_threshold
            )
            if draws.boxes is not None:
                student["crops"], cutmix_lambda["crops"] = cutmix(student["crops"], draws.boxes)
        if batch.patch_source is not None:
            assert draws.corners is not None
            source = coloured(batch.patch_source.to(device, non_blocking=True), draws.patch_source)
            student["patches"] = cut_patches(source, draws.corners, size=draws.patch_size)
        if batch.small_crops is not None:
            small = batch.small_crops.to(device, non_blocking=True).flatten(0, 1)
            student["small_crops"] = coloured(small, draws.small_crops, threshold=draws.solarise_threshold)
    return RenderedViews(original=original, student=student, cutmix_lambda=cutmix_lambda)


def normalise(images: Tensor, *, device: torch.device, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> Tensor:
    """Return uint8 images [N, H, W, 3] as normalised float32 [N, 3, H, W] in channels_last memory.

    Args:
        images: Bytes.
        device: Where to work and where the result lies.
        mean: Subtracted from pixels in [0, 1], per channel.
        std: Divides the difference.
    """
    pixels = images.to(device, non_blocking=True).to(torch.float32)
    # One factor per column and channel: a row is then one contiguous run, where three factors would be runs of three.
    scale, shift = (values.repeat(images.shape[2]) for values in _normalisation(pixels.device, mean, std))
    pixels.view(len(images), images.shape[1], -1).mul_(scale).add_(shift)
    return pixels.permute(0, 3, 1, 2)


def coloured(images: Tensor, pieces: Sequence[Recolouring], *, threshold: float = 127.5) -> Tensor:
    """Return uint8 images [N, H, W, 3] jittered, blurred, solarised, flipped and normalised, float32 [N, 3, H, W] channels_last.

    Args:
        images: The cut views.
        pieces: What is done to them, so many images at a time.
        threshold: Level from which solarised pixels are inverted.
    """
    out = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    scale, shift = _normalisation(images.device)
    start = 0
    for piece in pieces:
        part = slice(start, start := start + piece.count)
        planes = images[part].permute(3, 0, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        jitter(planes, piece)
        if len(chosen := piece.grey):
            planes[:, chosen] = luma(planes[:, chosen])
        if len(chosen := piece.blurred):
            planes[:, chosen] = blur(planes[:, chosen], piece.box)
        if len(chosen := piece.solarised):
            planes[:, chosen] = solarise(planes[:, chosen], threshold=threshold)
        if len(chosen := piece.mirrored):
            planes[:, chosen] = planes[:, chosen].flip(-1)
        planes.mul_(scale.view(3, 1, 1, 1)).add_(shift.view(3, 1, 1, 1))
        out[part] = planes.permute(1, 2, 3, 0)
    return out.permute(0, 3, 1, 2)


def cut_patches(source: Tensor, corners: Tensor, *, size: int) -> Tensor:
    """Return the squares of side `size` at `corners` [N, P, 2] of images [N, C, H, W]: [N * P, C, size, size]."""
    count = corners.shape[1]
    image = torch.arange(len(source), device=source.device).repeat_interleave(count)
    top, left = corners.reshape(-1, 2).unbind(-1)
    squares = source.permute(0, 2, 3, 1).unfold(1, size, 1).unfold(2, size, 1)  # a view: [N, tops, lefts, C, size, size]
    return squares.permute(0, 1, 2, 4, 5, 3)[image, top, left].permute(0, 3, 1, 2)


def cutmix(crops: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Paste a rectangle of the same crop of the neighbouring image into every crop; neighbours are images 0 and 1, 2 and 3, ...

    Args:
        crops: [B * V, C, s, s], all crops of image 0 first; B even.
        boxes: top, left, bottom, right of the rectangles, [B, V, 4]; empty where nothing is pasted.

    Returns:
        The mixed crops in channels_last memory, and the fraction of pixels each kept, [B * V].
    """
    count, num_views = boxes.shape[:2]
    assert count % 2 == 0, "neighbours come in pairs"
    side = crops.shape[-1]
    top, left, bottom, right = boxes.reshape(-1, 4, 1).unbind(1)
    place = torch.arange(side, device=crops.device)
    rows, columns = (top <= place) & (place < bottom), (left <= place) & (place < right)
    pasted = rows[:, None, :, None] & columns[:, None, None, :]
    neighbours = crops.view(count // 2, 2, num_views, *crops.shape[1:]).flip(1).view_as(crops)
    mixed = torch.where(pasted, neighbours, crops).contiguous(memory_format=torch.channels_last)
    area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    return mixed, 1.0 - area.flatten().to(crops.dtype) / side**2


# ------------------------------------------------------------------------------------------------------------- operations


def jitter(planes: Tensor, piece: Recolouring) -> None:
    """Apply brightness, contrast, saturation and hue to planes [3, N, H, W] in place, in the order of every image.

    The first three are one operation, a blend with black, with the mean grey or with the own grey, so every position of
    the order takes one pass over all images; images whose turn it is not have the factor 1, which changes nothing.
    """
    for blend, chosen, steps in zip(piece.blends, piece.hues, piece.hue_steps, strict=True):
        if blend is not None:
            factor, to_mean, to_grey = blend[..., None, None]
            grey = luma(planes)
            base = grey.mul(to_grey).add_(mean_grey(grey).mul_(to_mean))
            planes.sub_(base).mul_(factor).add_(base).clamp_(0.0, 255.0).floor_()
        if len(chosen):
            planes[:, chosen] = shift_hue(planes[:, chosen], steps)


def luma(planes: Tensor) -> Tensor:
    """Return PIL's grey value of planes [3, N, H, W], whole numbers [N, H, W]."""
    red, green, blue = planes.unbind(0)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2]).add_(32768.0).mul_(2.0**-16).floor_()


def mean_grey(grey: Tensor) -> Tensor:
    """Return the rounded mean of grey images [N, H, W], [N, 1, 1]: what contrast blends with."""
    mean = grey.sum(dim=(1, 2), dtype=torch.float64) / (grey.shape[1] * grey.shape[2])
    return mean.add_(0.5).floor_().to(torch.float32)[:, None, None]


def shift_hue(planes: Tensor, steps: Tensor) -> Tensor:
    """Return planes [3, N, H, W] with the hue turned by `steps` [N] of 256; hue and saturation have 8 bits, as in PIL."""
    red, green, blue = planes.unbind(0)
    value = torch.maximum(torch.maximum(red, green), blue)
    spread = value - torch.minimum(torch.minimum(red, green), blue)
    divisor = spread.clamp(min=1.0)
    # Position on the hexagon of hues, from -1 to 5, and from there to a byte.
    angle = torch.where(
        red == value,
        (green - blue).div_(divisor),
        torch.where(green == value, (blue - red).div_(divisor).add_(2.0), (red - green).div_(divisor).add_(4.0)),
    )
    angle = angle.mul_(42.5).add_((angle < 0).to(torch.float32), alpha=255.0).floor_()
    angle = angle.add_(steps[:, None, None])
    angle = angle.sub_((angle >= 256.0).to(torch.float32), alpha=256.0).mul_(6.0 / 255.0)
    saturation = spread.mul_(255.0).div_(value.clamp(min=1.0)).floor_()
    span = saturation.mul_(value).mul_(1.0 / 255.0)
    value = value + 0.5
    out = torch.empty_like(planes)
    for channel, trough in enumerate((0.0, 2.0, 4.0)):  # where on the hexagon the channel is at its highest
        distance = (angle - 3.0).abs_().neg_().add_(3.0) if channel == 0 else (angle - trough).abs_()
        torch.sub(value, distance.sub_(1.0).clamp_(0.0, 1.0).mul_(span), out=out[channel]).floor_()
    return out


def blur(planes: Tensor, box: Tensor) -> Tensor:
    """Return planes [3, N, H, W] blurred by three passes of box filters of the weights `box` [N, R]; edges are repeated.

    A blur is one matrix per image and direction: the cube of a box filter's. Pixels are not rounded.
    """
    _, count, height, width = planes.shape
    rows = planes.permute(1, 2, 0, 3).reshape(count, height, 3 * width)
    with full_precision(planes.device):
        rows = torch.bmm(_blur_matrices(box, height), rows)
        columns = torch.bmm(rows.view(count, height * 3, width), _blur_matrices(box, width).transpose(1, 2))
    return columns.view(count, height, 3, width).permute(2, 0, 1, 3)


def solarise(planes: Tensor, *, threshold: float) -> Tensor:
    """Return planes with every value from a threshold on inverted, 255 minus the value."""
    return torch.where(planes < threshold, planes, 255.0 - planes)


# ---------------------------------------------------------------------------------------------------------------- helpers


def _blur_matrices(weights: Tensor, size: int) -> Tensor:
    """Return the matrices [N, size, size] that blur a column of pixels with box filters of these weights [N, R]."""
    box = (weights @ _shifts(size, weights.shape[1] // 2, weights.device)).view(-1, size, size)
    cube = box
    for _ in range(BLUR_PASSES - 1):
        cube = torch.bmm(cube, box)
    return cube


@lru_cache(maxsize=16)
def _shifts(size: int, reach: int, device: torch.device) -> Tensor:
    """Return the matrices that shift a column by -reach .. reach pixels and repeat its ends, [2 * reach + 1, size * size]."""
    rows = torch.arange(size)
    shifts = torch.zeros(2 * reach + 1, size, size)
    for index, offset in enumerate(range(-reach, reach + 1)):
        shifts[index, rows, (rows + offset).clamp(0, size - 1)] = 1.0
    shifts = shifts.view(2 * reach + 1, -1)
    return shifts.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else shifts


@lru_cache(maxsize=8)
def _normalisation(device: torch.device, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> tuple[Tensor, Tensor]:
    """Return factor and addend, [3] each, that take a byte to the normalised value."""
    means, deviations = torch.tensor(mean, device=device), torch.tensor(std, device=device)
    return 1.0 / (255.0 * deviations), -means / deviations
