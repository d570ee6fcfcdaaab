"""What files beside a prepared split need to know of it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Prepared(Protocol):
    """A split: `datasets.Split`."""

    @property
    def dataset(self) -> str:
        """Return its data set's name."""
        ...

    @property
    def path(self) -> Path:
        """Return the file of its images."""
        ...

    @property
    def num_images(self) -> int:
        """Return how many there are."""
        ...

    @property
    def num_classes(self) -> int:
        """Return how many classes the data set has."""
        ...

    @property
    def heights(self) -> NDArray[np.int32]:
        """Return their heights, [N]."""
        ...

    @property
    def widths(self) -> NDArray[np.int32]:
        """Return their widths, [N]."""
        ...
