"""Methods that begin with the weights of another encoder, whose pixels may have been normalised in a way of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from obowlab.config.pixels import MEAN, STD
from obowlab.methods.base import Method, Preparation, SettingsT


class FineTuning(Method[SettingsT]):
    """Takes an encoder's weights before the first step, and keeps how its pixels are normalised.

    Attributes:
        pixels: mean and deviation of the pixels that the encoder was trained on, float64 [2, 3].
    """

    pixels: Tensor

    def keep_pixels(self) -> None:
        """Begin with ImageNet's mean and deviation; `look_at_pixels` is to be called once encoder and buffers are there."""
        self.register_buffer("pixels", torch.tensor((MEAN, STD), dtype=torch.float64))
        self.register_load_state_dict_post_hook(lambda *_: self.look_at_pixels())  # type: ignore[no-untyped-call]

    def look_at_pixels(self) -> None:
        """Tell the encoder which pixels it is used to: after every change, as to ask a GPU in every step is to wait for it."""
        mean, std = self.pixels.tolist()
        self.encoder.pixel_mean, self.encoder.pixel_std = tuple(mean), tuple(std)

    def prepare(self, preparation: Preparation) -> bool:
        """Take the weights of the encoder that the settings name."""
        if preparation.teacher is None:
            return False
        self.encoder.load_state_dict(preparation.teacher.state_dict())
        own = [getattr(preparation.teacher, name, usual) for name, usual in (("pixel_mean", MEAN), ("pixel_std", STD))]
        self.pixels.copy_(torch.tensor(own, dtype=torch.float64))
        self.look_at_pixels()
        return True
