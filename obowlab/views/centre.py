"""The view of evaluation, of one image that is in no data set."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from obowlab.config import Views
from obowlab.data.decoding import UnreadableImageError, to_rgb
from obowlab.errors import UserError
from obowlab.views.photometric import normalise
from obowlab.views.pil_views import Pixels, cut_view
from obowlab.views.views import MEAN, STD, centre_geometry


@dataclass(frozen=True)
class CentreView:
    """Resize the shorter side, cut the centre, normalise: the very pixels that evaluation sees of a prepared image.

    Attributes:
        resize: Length of the shorter side, in pixels.
        size: Side S of the square that is cut.
        mean: Subtracted from pixels in [0, 1], per channel.
        std: Divides the difference.
    """

    resize: int
    size: int
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD

    def __call__(self, image: Image.Image) -> Tensor:
        """Return an image as an encoder takes it, float32 [3, S, S].

        Args:
            image: Of any size and mode; orientation tags are ignored.

        Raises:
            UserError: It has more than 8 bits a channel, in a range that is not known.
        """
        pixels = torch.from_numpy(self.pixels(image)[None])
        return normalise(pixels, device=torch.device("cpu"), mean=self.mean, std=self.std)[0]

    def pixels(self, image: Image.Image) -> Pixels:
        """Return the view without its normalisation, uint8 [S, S, 3].

        Raises:
            UserError: As for a call.
        """
        try:
            rgb = to_rgb(image)
        except UnreadableImageError as error:
            raise UserError(f"The image has {error}.") from None
        views = Views(original_resize=self.resize, original_size=self.size)
        heights, widths = np.array([rgb.height]), np.array([rgb.width])
        return np.array(cut_view(rgb, centre_geometry(views, heights=heights, widths=widths), 0, 0))
