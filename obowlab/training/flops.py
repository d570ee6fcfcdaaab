"""Floating-point operations: how many a piece of work has, and the most that a device does in a second."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

TFLOPS: dict[str, dict[str, float]] = {
    "H100 PCIe": {"float32": 51, "tf32": 378, "bfloat16": 756},
    "H100": {"float32": 67, "tf32": 494, "bfloat16": 989},
    "H200": {"float32": 67, "tf32": 494, "bfloat16": 989},
    "A100": {"float32": 19.5, "tf32": 156, "bfloat16": 312},
    "L40S": {"float32": 91.6, "tf32": 183, "bfloat16": 362},
}
"""Peak of dense products by a part of the card's name, from NVIDIA's data sheets; the first that fits counts.

That of float16 is that of bfloat16.
"""

MATRIX = 1024
"""Rows and columns of the matrices whose product is timed."""


def peak_tflops(card: str, precision: str) -> float | None:
    """Return the peak of a card's dense products in TFLOP/s; None for cards that are not listed."""
    precision = "bfloat16" if precision == "float16" else precision
    return next((peaks[precision] for name, peaks in TFLOPS.items() if all(w in card for w in name.split())), None)


def count_flops(work: Callable[[], object]) -> int:
    """Do something once and return the floating-point operations that torch counts in it: products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def matmul_tflops(*, seconds: float = 1.0) -> float:
    """Return the TFLOP/s of square float32 products on this CPU with torch's threads: the best of those timed."""
    left, right = torch.randn(MATRIX, MATRIX), torch.randn(MATRIX, MATRIX)
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < seconds or best == float("inf"):
        started = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - started)
    return 2 * MATRIX**3 / best / 1e12
