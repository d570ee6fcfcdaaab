"""Number formats: the precision that a recipe names, and full float32 where everything depends on it (docs/method.md, 9.2)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""Precisions in which encoders and heads compute in half the width, and their type."""


def set_float32_mode(precision: str) -> None:
    """Let a GPU compute this process's float32 convolutions and matrix products exactly, or for `tf32` in TensorFloat-32.

    PyTorch's own defaults are a mixture: TF32 in convolutions, float32 in matrix products.
    """
    tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")


def autocast(precision: str, *, device: torch.device) -> torch.autocast:
    """Return the context in which a training step computes its forward pass."""
    dtype = AUTOCAST.get(precision)
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def loss_scaler(precision: str, *, device: torch.device) -> torch.amp.GradScaler:
    """Return what scales the loss so that float16 gradients do not underflow; for other precisions it does nothing."""
    return torch.amp.GradScaler(device.type, enabled=precision == "float16")


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Switch autocast and TF32 off for matrix products, then restore both."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


@contextmanager
def computing_in(precision: str, *, device: torch.device) -> Iterator[None]:
    """Compute a step's forward pass in the precision of a recipe for as long as the context lasts; a CPU has no TF32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    set_float32_mode(precision)
    try:
        with autocast(precision, device=device):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
