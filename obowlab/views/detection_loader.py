"""In which order a detector sees its images: an endless stream of permutations, in batches of one orientation."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np

from obowlab.randomness import Bools, Ints, epoch_order


def batch_order(is_wide: Bools, *, batch_size: int, seed: int) -> Iterator[Ints]:
    """Yield the images of every step, without end; a function of the seed.

    Images wait until there are as many of their orientation as a batch has, so that little of a batch is padding. Detectron2 lets
    every process do so on its own; here batches are made for all of them together, so that their number changes nothing.

    Args:
        is_wide: which images are wider than high, [N].
        batch_size: images of a step, over all processes.
        seed: of the run.
    """
    waiting: tuple[list[int], list[int]] = ([], [])
    for epoch in count():
        for image in epoch_order(len(is_wide), seed=seed, epoch=epoch).tolist():
            group = waiting[int(is_wide[image])]
            group.append(image)
            if len(group) == batch_size:
                yield np.array(group, dtype=np.int64)
                group.clear()
