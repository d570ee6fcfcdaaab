"""The geometry and the colours of every view, as pure functions of (seed, epoch, image index); see `obowlab.randomness`.

The same image in the same epoch gets the same views from either loader backend, however many workers or processes there are.

Shapes: N images, V views of each: the original, `num_crops` crops, where there are patches the image they are cut from, and
`num_small_crops` small crops. Coordinates are pixels, rows first.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np

from obowlab.config import Views
from obowlab.config.pixels import MEAN as MEAN
from obowlab.config.pixels import STD as STD
from obowlab.randomness import Bools, Floats, Ints, Stream, uniforms

CROP_TRIES = 10
CROP_RATIO = (3 / 4, 4 / 3)
"""Tries and width-to-height range of torchvision's RandomResizedCrop, which the paper uses with its defaults."""

GRID_SIDE = 3
"""Patches are chosen from a grid of 3x3 (paper, appendix G)."""

JITTER_ORDERS: Ints = np.array(list(permutations(range(4))), dtype=np.int64)
"""The 24 orders in which brightness (0), contrast (1), saturation (2) and hue (3) may follow each other."""


@dataclass(frozen=True)
class Geometry:
    """How V views are cut from each of N images: resize `boxes` to `resized`, keep the square at `windows`.

    Attributes:
        sizes: Side of the square kept, one per view.
        bicubic: Whether a view is resized by PIL's bicubic filter, and not by its bilinear one; one per view.
        boxes: Top, left, height and width of the source rectangle, [N, V, 4].
        resized: Height and width that the rectangle is resized to, [N, V, 2].
        windows: Top and left of the square within the resized rectangle, [N, V, 2].
    """

    sizes: tuple[int, ...]
    bicubic: tuple[bool, ...]
    boxes: Ints
    resized: Ints
    windows: Ints


@dataclass(frozen=True)
class Colour:
    """Photometric parameters of K coloured views (the crops, the patch source, the small crops) of N images.

    Attributes:
        orders: Order of brightness, contrast, saturation and hue (0 to 3), [N, K, 4].
        brightness: Factor, 1 where there is no jitter, [N, K]; likewise `contrast` and `saturation`.
        hue: Shift in turns, in [-0.5, 0.5], 0 where there is no jitter, [N, K].
        grayscale: Whether the view loses its colour, [N, K].
        sigma: Standard deviation of the blur in pixels, 0 for none, [N, K].
        solarised: Whether the view's bright pixels are inverted, [N, K].
    """

    orders: Ints
    brightness: Floats
    contrast: Floats
    saturation: Floats
    hue: Floats
    grayscale: Bools
    sigma: Floats
    solarised: Bools

    def of_views(self, columns: slice) -> Colour:
        """Return the parameters of some of the views, image by image, each [N * views]."""
        chosen = {name: values[:, columns] for name, values in vars(self).items()}
        return Colour(**{name: values.reshape(-1, *values.shape[2:]) for name, values in chosen.items()})

    def of_images(self, rows: slice) -> Colour:
        """Return the parameters of some of the images."""
        return Colour(**{name: values[rows] for name, values in vars(self).items()})


# -------------------------------------------------------------------------------------------------------------- geometry


def geometry(views: Views, *, seed: int, epoch: int, indices: Ints, heights: Ints, widths: Ints) -> Geometry:
    """Return how every view of every image is cut in one epoch (paper, appendix G).

    The original is Resize + CenterCrop, always bilinear as in evaluation; crops and the patch source are torchvision's
    RandomResizedCrop, crops of a resized image its Resize + RandomCrop.

    Args:
        views: Sizes and ranges.
        seed: The run's seed.
        epoch: Epoch, from 0.
        indices: Image indices, [N].
        heights: Heights of the images in pixels, [N].
        widths: Widths of the images in pixels, [N].
    """
    centre = centre_geometry(views, heights=heights, widths=widths)
    crops = [(lane, views.crop(lane)) for lane in range(views.num_crops)]
    small = [(lane, views.crop(lane)) for lane in small_lanes(views)]
    lanes = [(Stream.CROPS, lane, crop.cut_scale, views.cut_size, crop.interpolation) for lane, crop in crops]
    if views.num_patches:
        lanes.append((Stream.PATCH_SOURCE, 0, views.patch_scale, views.patch_source_size, views.interpolation))
    lanes += [(Stream.CROPS, lane, crop.small_crop_scale, views.small_crop_size, crop.interpolation) for lane, crop in small]
    boxes, resized, windows = [centre.boxes[:, 0]], [centre.resized[:, 0]], [centre.windows[:, 0]]
    for stream, lane, scale, size, _ in lanes:
        draws = uniforms(seed=seed, epoch=epoch, indices=indices, stream=stream, count=2 * CROP_TRIES + 2, lane=lane)
        if views.crop_extent == "resized" and stream == Stream.CROPS and lane < views.num_crops:
            free = centre.resized[:, 0] - size
            boxes.append(centre.boxes[:, 0])
            resized.append(centre.resized[:, 0])
            windows.append((draws[:, -2:] * (free + 1)).astype(np.int64))
            continue
        boxes.append(random_boxes(draws, heights=heights, widths=widths, scale=scale))
        resized.append(np.full_like(centre.resized[:, 0], size))
        windows.append(np.zeros_like(centre.windows[:, 0]))
    return Geometry(
        sizes=(views.original_size, *(size for *_, size, _ in lanes)),
        bicubic=(False, *(filtering == "bicubic" for *_, filtering in lanes)),
        boxes=np.stack(boxes, axis=1),
        resized=np.stack(resized, axis=1),
        windows=np.stack(windows, axis=1),
    )


def small_lanes(views: Views) -> range:
    """Return the numbers of the small crops among the crops: they come after the others."""
    return range(views.num_crops, views.num_crops + views.num_small_crops)


def flips(views: Views, *, seed: int, epoch: int, indices: Ints) -> Bools:
    """Return which views are mirrored left to right (done by `photometric`), [N, V]."""
    count = 1 + views.num_crops + (views.num_patches > 0) + views.num_small_crops
    return uniforms(seed=seed, epoch=epoch, indices=indices, stream=Stream.FLIPS, count=count) < views.flip_probability


def centre_geometry(views: Views, *, heights: Ints, widths: Ints) -> Geometry:
    """Return the one view that evaluation uses: Resize(original_resize), CenterCrop(original_size).

    Both round as torchvision does: the longer side of the resized image downwards, the window's corner half to even.
    """
    heights, widths = np.asarray(heights, dtype=np.int64), np.asarray(widths, dtype=np.int64)
    shorter = np.minimum(heights, widths)
    resized = np.stack((heights, widths), axis=-1)[:, None]
    resized = (views.original_resize * resized / shorter[:, None, None]).astype(np.int64)
    zeros = np.zeros_like(heights)
    return Geometry(
        sizes=(views.original_size,),
        bicubic=(False,),
        boxes=np.stack((zeros, zeros, heights, widths), axis=-1)[:, None],
        resized=resized,
        windows=np.rint((resized - views.original_size) / 2.0).astype(np.int64),
    )


def random_boxes(draws: Floats, *, heights: Ints, widths: Ints, scale: tuple[float, float]) -> Ints:
    """Return torchvision's RandomResizedCrop rectangles, [N, 4]: top, left, height, width.

    Area fraction uniform in `scale`, logarithm of width over height uniform in `CROP_RATIO`; the first of ten tries that
    fits into the image, else the largest centred rectangle whose ratio is in range.

    Args:
        draws: Uniform numbers, [N, 22]: area and ratio of every try, then the position's row and column.
        heights: Heights of the images, [N].
        widths: Widths of the images, [N].
        scale: Smallest and largest area as a fraction of the image's.
    """
    heights, widths = np.asarray(heights, dtype=np.int64), np.asarray(widths, dtype=np.int64)
    tries = draws[:, : 2 * CROP_TRIES].reshape(-1, CROP_TRIES, 2)
    area = (heights * widths)[:, None] * (scale[0] + tries[..., 0] * (scale[1] - scale[0]))
    low, high = np.log(CROP_RATIO)
    ratio = np.exp(low + tries[..., 1] * (high - low))
    box_widths = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    box_heights = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (box_widths > 0) & (box_widths <= widths[:, None]) & (box_heights > 0) & (box_heights <= heights[:, None])
    rows, first = np.arange(len(heights)), fits.argmax(axis=1)
    found = fits[rows, first]

    # No try fits: the whole image, cut in the middle to the nearest allowed ratio.
    whole = widths / heights
    height = np.where(whole < CROP_RATIO[0], np.rint(widths / CROP_RATIO[0]).astype(np.int64), heights)
    width = np.where(whole > CROP_RATIO[1], np.rint(heights * CROP_RATIO[1]).astype(np.int64), widths)
    height = np.where(found, box_heights[rows, first], height)
    width = np.where(found, box_widths[rows, first], width)
    free_rows, free_columns = heights - height, widths - width
    top = np.where(found, (draws[:, -2] * (free_rows + 1)).astype(np.int64), free_rows // 2)
    left = np.where(found, (draws[:, -1] * (free_columns + 1)).astype(np.int64), free_columns // 2)
    return np.stack((top, left, height, width), axis=-1)


# ------------------------------------------------------------------------------------------------------ colour and patches


def colour(views: Views, *, seed: int, epoch: int, indices: Ints) -> Colour:
    """Return the photometric parameters of the coloured views (paper, appendix G); patches of one image share theirs."""
    lanes = [(Stream.CROP_COLOUR, lane, views.crop(lane)) for lane in range(views.num_crops)]
    if views.num_patches:  # the paper blurs no patches
        unblurred = views.model_copy(update={"blur_probability": 0.0, "solarise_probability": 0.0})
        lanes.append((Stream.PATCH_COLOUR, 0, unblurred))
    lanes += [(Stream.CROP_COLOUR, lane, views.crop(lane)) for lane in small_lanes(views)]
    draws = [uniforms(seed=seed, epoch=epoch, indices=indices, stream=stream, count=10, lane=lane) for stream, lane, _ in lanes]
    u = np.stack(draws, axis=1)

    def of(name: str) -> Floats:
        """Return a setting of every view, [K], or [2, K] for a range."""
        return np.array([getattr(settings, name) for *_, settings in lanes]).T

    jittered = u[..., 0] < of("jitter_probability")

    def factor(draw: Floats, strength: Floats) -> Floats:
        low, high = 1.0 - strength, 1.0 + strength
        return np.where(jittered, low + draw * (high - low), 1.0)

    low, high = of("blur_sigma")
    return Colour(
        orders=JITTER_ORDERS[(u[..., 1] * len(JITTER_ORDERS)).astype(np.int64)],
        brightness=factor(u[..., 2], of("brightness")),
        contrast=factor(u[..., 3], of("contrast")),
        saturation=factor(u[..., 4], of("saturation")),
        hue=np.where(jittered, (2.0 * u[..., 5] - 1.0) * of("hue"), 0.0),
        grayscale=u[..., 6] < of("grayscale_probability"),
        sigma=np.where(u[..., 7] < of("blur_probability"), low + u[..., 8] * (high - low), 0.0),
        solarised=u[..., 9] < of("solarise_probability"),
    )


def cutmix_boxes(views: Views, *, seed: int, epoch: int, indices: Ints) -> Ints:
    """Return the rectangles of the crops that cutmix gives away, [N, num_crops, 4]: top, left, bottom, right; empty for none.

    As in the released code of CutMix (Yun et al., ICCV 2019, section 3.1): the rectangle has the crop's shape and the area
    1 - lambda before it is clipped, lambda follows Beta(alpha, alpha), and its centre is uniform over the pixels.
    """
    side = views.cut_size
    u = np.stack(
        [
            uniforms(seed=seed, epoch=epoch, indices=indices, stream=Stream.CUTMIX, count=4, lane=lane)
            for lane in range(views.num_crops)
        ],
        axis=1,
    )
    share = u[..., 1]
    if views.cutmix_alpha != 1.0:  # Beta(1, 1) is uniform
        from scipy.special import betaincinv

        share = betaincinv(views.cutmix_alpha, views.cutmix_alpha, share)
    half = (side * np.sqrt(1.0 - share)).astype(np.int64)[..., None] // 2
    centre = (u[..., 2:] * side).astype(np.int64)
    boxes = np.concatenate((centre - half, centre + half), axis=-1).clip(0, side)
    return np.where((u[..., :1] < views.cutmix_probability), boxes, 0)


def patch_positions(views: Views, *, seed: int, epoch: int, indices: Ints) -> Ints:
    """Return top and left of the patches in their (flipped) source, [N, num_patches, 2].

    The source is split into 3x3 overlapping cells; a patch is shifted in its cell by 0 to `patch_jitter` pixels, and
    `num_patches` of the nine cells are kept in random order (all nine in reading order, as in appendix G).
    """
    cells = GRID_SIDE**2
    u = uniforms(seed=seed, epoch=epoch, indices=indices, stream=Stream.PATCHES, count=3 * cells)
    offset = (views.patch_source_size - views.patch_size - views.patch_jitter) // (GRID_SIDE - 1)
    jitter = (u[:, : 2 * cells] * (views.patch_jitter + 1)).astype(np.int64).reshape(-1, cells, 2)
    corners = np.stack(np.divmod(np.arange(cells), GRID_SIDE), axis=-1) * offset + jitter
    if views.num_patches == cells:
        return corners
    kept = np.argsort(u[:, 2 * cells :], axis=1, kind="stable")[:, : views.num_patches]
    return np.take_along_axis(corners, kept[..., None], axis=1)
