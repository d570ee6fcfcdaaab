"""A step's number format by the names of the recipes, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from obowlab.precision import AUTOCAST, autocast, set_float32_mode

PRECISIONS = ("float32", "tf32", "bfloat16", "float16")
HALVES = tuple(AUTOCAST)


@contextmanager
def precision(name: str, *, device: torch.device) -> Iterator[None]:
    """Compute in one of PRECISIONS, with the switches of training; restores what was set before.

    A CPU has no TF32: there `tf32` is float32.
    """
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    set_float32_mode(name)
    try:
        with autocast(name, device=device):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
