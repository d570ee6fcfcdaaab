"""The view of VOC07 classification: the shorter side resized, then the whole image stretched to a square (docs/transfer.md)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from obowlab.config import Views
from obowlab.randomness import Ints
from obowlab.views.pil_views import Pixels, decode, resized

if TYPE_CHECKING:
    from obowlab.data.datasets import Split


def stretched(image: Image.Image, views: Views) -> Pixels:
    """Return the view of an RGB image, uint8 [S, S, 3]: Resize(original_resize), then both sides to `original_size`."""
    shorter = min(image.size)
    width, height = (views.original_resize * side // shorter for side in image.size)
    image = resized(image, width=width, height=height)
    return np.array(resized(image, width=views.original_size, height=views.original_size))


def stretched_batches(
    split: Split, *, indices: Ints, views: Views, batch_size: int, workers: int
) -> Iterator[tuple[Ints, Tensor]]:
    """Yield indices [B] and uint8 views [B, S, S, 3] of the given images, in order, every one once.

    PIL decodes and resizes in threads, whatever the loader's backend: some ten thousand images need no faster way.

    Args:
        split: prepared images.
        indices: positions in the split, int64.
        views: sizes; only those of the original view are used.
        batch_size: images per batch; the last may be smaller.
        workers: threads, at least one.

    Raises:
        UserError: a record cannot be decoded.
    """
    batches = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    waiting: deque[tuple[Ints, list[Future[Pixels]]]] = deque()
    with ThreadPoolExecutor(max(1, workers)) as pool:
        try:
            for batch in batches:
                waiting.append((batch, [pool.submit(partial(_read, split, views), index) for index in batch.tolist()]))
                if len(waiting) > 1:
                    yield _ready(*waiting.popleft())
            while waiting:
                yield _ready(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _read(split: Split, views: Views, index: int) -> Pixels:
    return stretched(decode(split, index), views)


def _ready(batch: Ints, views: list[Future[Pixels]]) -> tuple[Ints, Tensor]:
    return batch, torch.from_numpy(np.stack([view.result() for view in views]))
