"""The uint8 views of one image, cut by PIL: what both loader backends must give, to the byte.

A `Cutter` knows a split and its view geometry. The torch backend runs it in worker processes; the ffcv backend does the same
in compiled code (`ffcv_backend`) and uses this one for records that its JPEG decoder rejects.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from obowlab.config import Views
from obowlab.errors import UserError, memory_sentence
from obowlab.randomness import Ints
from obowlab.views.draws import PIECE_PIXELS, Draws, draw
from obowlab.views.packed import Packed, pack
from obowlab.views.views import Geometry, centre_geometry, geometry

if TYPE_CHECKING:
    from obowlab.data.datasets import Split

Pixels = npt.NDArray[np.uint8]

BATCHES_AHEAD = 2
"""Batches that a backend prepares in advance; of worker processes, each."""

Numbers: TypeAlias = Packed[tuple[Draws, Tensor]]
"""What is random about a batch, and the classes of its images, int64 [B]."""


class CutBatch(NamedTuple):
    """What a backend makes of a batch.

    Attributes:
        kinds: The views, per kind uint8 [N, count, side, side, 3].
        numbers: As `Cutter.numbers`.
    """

    kinds: list[Tensor]
    numbers: Numbers | None


@dataclass(frozen=True)
class Cutter:
    """Cuts the views of a split's images.

    Attributes:
        split: The prepared images.
        views: Sizes and ranges of the views.
        seed: The run's seed; None cuts the centre view of evaluation alone.
    """

    split: Split
    views: Views
    seed: int | None

    def geometry(self, indices: Ints, *, epoch: int) -> Geometry:
        """Return how the images are cut in one epoch."""
        heights, widths = self.split.heights[indices].astype(np.int64), self.split.widths[indices].astype(np.int64)
        if self.seed is None:
            return centre_geometry(self.views, heights=heights, widths=widths)
        return geometry(self.views, seed=self.seed, epoch=epoch, indices=indices, heights=heights, widths=widths)

    @property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """Return number and side of each kind's views, in the geometry's order: original, crops, patch source, small crops."""
        groups = [(1, self.views.original_size)]
        if self.seed is not None and self.views.num_crops:
            groups.append((self.views.num_crops, self.views.cut_size))
        if self.seed is not None and self.views.num_patches:
            groups.append((1, self.views.patch_source_size))
        if self.seed is not None and self.views.num_small_crops:
            groups.append((self.views.num_small_crops, self.views.small_crop_size))
        return tuple(groups)

    def cut(self, indices: Ints, *, epoch: int) -> list[Pixels]:
        """Return the views of some images: per kind, uint8 [N, count, side, side, 3].

        Raises:
            UserError: a record cannot be decoded.
        """
        plan = self.geometry(indices, epoch=epoch)
        out = [np.empty((len(indices), count, side, side, 3), dtype=np.uint8) for count, side in self.groups]
        for row, index in enumerate(indices.tolist()):
            self.cut_image(index, plan, row, out)
        return out

    def numbers(self, indices: Ints, *, epoch: int, num_uniforms: int, pieces: bool) -> Numbers | None:
        """Return what is random about a batch of these images, and their classes; None for the centre view of evaluation.

        Args:
            indices: Image indices, [B].
            epoch: Epoch, from 0.
            num_uniforms: Numbers that the method needs for every image.
            pieces: Colour in pieces that fit a CPU's cache, and not all images at once.
        """
        if self.seed is None:
            return None
        pixels = PIECE_PIXELS if pieces else None
        draws = draw(self.views, seed=self.seed, epoch=epoch, indices=indices, num_uniforms=num_uniforms, piece_pixels=pixels)
        return pack((draws, torch.from_numpy(self.split.labels[indices])))

    def cut_image(self, index: int, plan: Geometry, row: int, out: list[Pixels]) -> None:
        """Write the views of image `index`, which is row `row` of the plan, to that row of `out`.

        Raises:
            UserError: the record cannot be decoded.
        """
        image = decode(self.split, index)
        view = 0
        for kind in out:
            for place in kind[row]:
                place[...] = cut_view(image, plan, row, view)
                view += 1


def decode(split: Split, index: int) -> Image.Image:
    """Return one image of a split, decoded, as RGB.

    Raises:
        UserError: the record cannot be decoded, or its size is not the one in the file's index.
    """
    try:
        with Image.open(io.BytesIO(split.jpeg(index))) as image:
            rgb = image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        if memory_sentence(error) is not None:
            raise
        raise broken_record(split, index, str(error)) from None
    if rgb.size != (split.widths[index], split.heights[index]):
        raise broken_record(
            split, index, f"{rgb.size[0]}x{rgb.size[1]} pixels where {split.widths[index]}x{split.heights[index]} are due"
        )
    return rgb


def cut_view(image: Image.Image, plan: Geometry, row: int, view: int) -> Pixels:
    """Return one view, uint8 [side, side, 3]: torchvision's resized_crop, or Resize and CenterCrop, on a PIL image.

    Bytes are rounded between the resize's two passes, so their order matters by a level; it is fixed here, whatever Pillow's
    version, and is the one that Pillow had when the paper was written.
    """
    top, left, height, width = plan.boxes[row, view].tolist()
    # Cropping first matters: PIL's resize(box=...) would blend in pixels from outside the box.
    if (left, top, width, height) != (0, 0, *image.size):
        image = image.crop((left, top, left + width, top + height))
    resized_height, resized_width = plan.resized[row, view].tolist()
    image = resized(image, width=resized_width, height=resized_height, bicubic=plan.bicubic[view])
    side = plan.sizes[view]
    if (resized_width, resized_height) != (side, side):
        top, left = plan.windows[row, view].tolist()
        image = image.crop((left, top, left + side, top + side))
    return np.asarray(image)


def resized(image: Image.Image, *, width: int, height: int, bicubic: bool = False) -> Image.Image:
    """Return an image of another size, under PIL's triangle or its cubic."""
    # Rows first, as Pillow did up to version 12; left to itself, Pillow 13 starts with the columns of tall images.
    resampling = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    return image.resize((width, image.height), resampling).resize((width, height), resampling)


def broken_record(split: Split, index: int, reason: str) -> UserError:
    """Return the error for a record that cannot be read."""
    return UserError(
        f"Record {index} of {split.path} cannot be read ({reason}): the file is damaged, "
        f"build it again with `obowlab data prepare {split.dataset} --source DIR`."
    )
