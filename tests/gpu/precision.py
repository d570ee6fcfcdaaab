"""A step's number format by the names of the recipes, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

PRECISIONS = ("float32", "tf32", "bfloat16", "float16")
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@contextmanager
def precision(name: str, *, device: torch.device) -> Iterator[None]:
    """Compute in one of PRECISIONS: TF32 in products and convolutions, or autocast; restores what was set before.

    A CPU has no TF32: there `tf32` is float32.
    """
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    # The older pair of switches throughout: torch refuses a mixture with the newer ones.
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    try:
        with torch.autocast(device.type, HALVES.get(name, torch.bfloat16), enabled=name in HALVES):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
