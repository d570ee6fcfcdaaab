"""What is random about a training batch after its views are cut, drawn on the host as tensors for the device.

`views` says how it follows from seed, epoch and image. Here it becomes what `photometric` works with: positions of the images
that an operation changes, and its factors. A loader draws in the thread that cuts the views, and all of it is one `Packed`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from obowlab.config import Views
from obowlab.randomness import Bools, Floats, Ints, Stream, uniforms
from obowlab.views.views import Colour, colour, cutmix_boxes, flips, patch_positions

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
BLUR_PASSES = 3
PIECE_PIXELS = 1 << 17
"""Pixels coloured at a time on a CPU: they stay in the cache over all operations."""


@dataclass(frozen=True)
class Recolouring:
    """What is done to N coloured images; positions are int64, and empty for an operation that changes no image.

    Attributes:
        count: N.
        blends: for every turn, factor, share of the mean grey and share of the own grey in what is blended with, float32 [3, N];
            None where no image blends.
        hues: for every turn, the positions of the images whose hue is shifted, [M].
        hue_steps: by how many of 256 steps, float32 [M] for every turn.
        grey: positions of the images that lose their colour.
        blurred: positions of the images that are blurred, [M].
        box: weights of their box filters, float32 [M, 2 * reach + 1].
        solarised: positions of the images whose bright pixels are inverted.
        mirrored: positions of the images that are flipped.
    """

    count: int
    blends: tuple[Tensor | None, ...]
    hues: tuple[Tensor, ...]
    hue_steps: tuple[Tensor, ...]
    grey: Tensor
    blurred: Tensor
    box: Tensor
    solarised: Tensor
    mirrored: Tensor


@dataclass(frozen=True)
class Draws:
    """What is random about a batch of B images.

    Attributes:
        mirrored: positions of the original views that are flipped, int64.
        crops: the crops' recolouring, all crops of image 0 first, in pieces of so many images.
        patch_source: that of the images that patches are cut from, likewise.
        small_crops: that of the small crops, likewise.
        boxes: rectangles that cutmix pastes, [B, num_crops, 4]; None without cutmix.
        corners: top and left of the patches, [B, num_patches, 2]; None without patches.
        patch_size: their side.
        solarise_threshold: level, from 0 to 255, from which a solarised pixel is inverted.
        uniforms: numbers in [0, 1) for the method, float64 [B, num_uniforms].
    """

    mirrored: Tensor
    crops: tuple[Recolouring, ...]
    patch_source: tuple[Recolouring, ...]
    small_crops: tuple[Recolouring, ...]
    boxes: Tensor | None
    corners: Tensor | None
    patch_size: int
    solarise_threshold: float
    uniforms: Tensor


def draw(
    views: Views, *, seed: int, epoch: int, indices: Ints, num_uniforms: int = 0, piece_pixels: int | None = PIECE_PIXELS
) -> Draws:
    """Draw for the images of one batch.

    Args:
        views: Probabilities and strengths.
        seed: The run's seed.
        epoch: Epoch, from 0.
        indices: Image indices, [B].
        num_uniforms: Numbers that the method needs for every image.
        piece_pixels: Pixels that are coloured at a time; None for all at once.
    """
    mirrored = flips(views, seed=seed, epoch=epoch, indices=indices)
    params = colour(views, seed=seed, epoch=epoch, indices=indices)
    boxes = corners = None

    def recoloured(first: int, count: int, *, side: int) -> tuple[Recolouring, ...]:
        """Return what is done to `count` coloured views of every image, from column `first` on."""
        if not count:
            return ()
        columns = slice(first, first + count)
        step = _piece(side, pixels=piece_pixels)
        return recolourings(params.of_views(columns), mirrored[:, 1:][:, columns].reshape(-1), piece=step)

    sources = int(views.num_patches > 0)
    if views.num_crops and views.cutmix_probability:
        boxes = torch.from_numpy(cutmix_boxes(views, seed=seed, epoch=epoch, indices=indices))
    if views.num_patches:
        corners = torch.from_numpy(patch_positions(views, seed=seed, epoch=epoch, indices=indices))
    numbers = uniforms(seed=seed, epoch=epoch, indices=indices, stream=Stream.WORDS, count=num_uniforms)
    return Draws(
        mirrored=_positions(mirrored[:, 0]),
        crops=recoloured(0, views.num_crops, side=views.cut_size),
        patch_source=recoloured(views.num_crops, sources, side=views.patch_source_size),
        small_crops=recoloured(views.num_crops + sources, views.num_small_crops, side=views.small_crop_size),
        boxes=boxes,
        corners=corners,
        patch_size=views.patch_size,
        solarise_threshold=255.0 * views.solarise_threshold,
        uniforms=torch.from_numpy(numbers),
    )


def recolourings(params: Colour, mirrored: Bools, *, piece: int | None = None) -> tuple[Recolouring, ...]:
    """Return how N images are recoloured, in pieces of at most `piece` images; None for one piece.

    Args:
        params: Their parameters, each [N] (orders [N, 4]).
        mirrored: Which are flipped, [N].
        piece: Images of a piece.
    """
    size = piece or max(1, len(mirrored))
    parts = (slice(start, start + size) for start in range(0, len(mirrored), size))
    return tuple(_recolouring(params.of_images(part), mirrored[part]) for part in parts)


def _recolouring(params: Colour, mirrored: Bools) -> Recolouring:
    factors = np.stack((params.brightness, params.contrast, params.saturation, np.ones_like(params.hue)))
    changed = np.stack((*(factors[:HUE] != 1.0), params.hue != 0.0))
    blends: list[Tensor | None] = []
    hues: list[Tensor] = []
    hue_steps: list[Tensor] = []
    for operation in params.orders.T:
        turn = (operation, np.arange(len(operation)))
        acts = changed[turn]
        blend = None
        if (acts & (operation != HUE)).any():
            blend = _floats(np.stack((factors[turn], acts & (operation == CONTRAST), acts & (operation == SATURATION))))
        blends.append(blend)
        turning = acts & (operation == HUE)
        hues.append(_positions(turning))
        hue_steps.append(_floats(np.trunc(params.hue[turning] * 255.0) % 256.0))
    blurred = params.sigma > 0
    return Recolouring(
        count=len(mirrored),
        blends=tuple(blends),
        hues=tuple(hues),
        hue_steps=tuple(hue_steps),
        grey=_positions(params.grayscale),
        blurred=_positions(blurred),
        box=box_weights(params.sigma[blurred]),
        solarised=_positions(params.solarised),
        mirrored=_positions(mirrored),
    )


# ------------------------------------------------------------------------------------------------------------------- blur


def box_radius(sigma: Floats) -> Floats:
    """Return the (fractional) radius of the box filter that, applied three times, has the standard deviation `sigma`.

    Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering", 2011; PIL blurs so.
    """
    variance = sigma**2 / BLUR_PASSES
    whole = np.floor((np.sqrt(12.0 * variance + 1.0) - 1.0) / 2.0)
    rest = (2.0 * whole + 1.0) * (whole * (whole + 1.0) - 3.0 * variance) / (6.0 * (variance - (whole + 1.0) ** 2))
    return np.asarray(whole + rest, dtype=np.float64)


def box_weights(sigma: Floats) -> Tensor:
    """Return the weights of the box filters of the standard deviations `sigma` [M] in pixels, float32 [M, 2 * reach + 1]."""
    radius = box_radius(sigma)
    whole = np.floor(radius)
    reach = int(whole.max(initial=0.0)) + 1
    inner = 1.0 / (2.0 * radius + 1.0)
    outer = (1.0 - (2.0 * whole + 1.0) * inner) / 2.0
    offset = np.abs(np.arange(-reach, reach + 1))[None]
    weights = np.where(offset <= whole[:, None], inner[:, None], np.where(offset == whole[:, None] + 1, outer[:, None], 0.0))
    return _floats(weights)


# ---------------------------------------------------------------------------------------------------------------- helpers


def _piece(side: int, *, pixels: int | None) -> int | None:
    return None if pixels is None else max(1, math.ceil(pixels / side**2))


def _positions(mask: Bools) -> Tensor:
    """Return where a mask is set; found on the host, which then does not wait for the device."""
    return torch.from_numpy(np.flatnonzero(mask))


def _floats(values: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))
