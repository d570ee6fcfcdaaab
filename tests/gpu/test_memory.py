"""The peak memory of a step of `full`: ResNet-50, all views, 8192 words."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from obowlab.config import load_recipe
from obowlab.training.work import Work

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
GB = 1e9
LIMIT_GB = {64: 20.0}
NEEDED_GB = {64: 22.0, 256: 50.0}
"""What a GPU must have free for the test to be tried, with activations growing with the batch."""


@pytest.mark.parametrize("batch_size", [64, 256])
def test_peak_memory_of_a_full_step(batch_size: int, record_property: Callable[[str, object], None]) -> None:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < NEEDED_GB[batch_size] * GB:
        pytest.skip(f"{free / GB:.0f} GB are free, and {NEEDED_GB[batch_size]:.0f} are needed")
    torch.cuda.reset_peak_memory_stats()
    work = Work(load_recipe("full-fast").recipe, batch_size=batch_size, device=CUDA)
    for _ in range(2):
        work.step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / GB
    reserved = torch.cuda.max_memory_reserved() / GB
    del work
    torch.cuda.empty_cache()
    record_property(f"full, peak memory at {batch_size} images, GB", round(peak, 2))
    record_property(f"full, reserved memory at {batch_size} images, GB", round(reserved, 2))
    assert peak < LIMIT_GB.get(batch_size, float("inf"))


def test_pinned_memory_of_batches_is_used_again() -> None:
    """Loaders take pinned memory for every batch; torch gives back what a copy is done with, and asks the system for no more."""
    if not hasattr(torch.cuda, "host_memory_stats"):
        pytest.skip("this version of torch does not count its pinned memory")
    allocated = []
    for _ in range(40):
        pixels = [torch.empty(16, 3, 96, 96, dtype=torch.uint8, pin_memory=True) for _ in range(3)]
        copies = [each.to(CUDA, non_blocking=True).float() for each in pixels]
        allocated.append(torch.cuda.host_memory_stats()["num_host_alloc"])
        torch.cuda.synchronize()
        del pixels, copies
    assert allocated[-1] == allocated[4]
