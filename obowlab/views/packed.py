"""Many small tensors of the host that travel to a device in one copy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Generic, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")
ALIGNMENT = 64
"""Bytes; every tensor begins at a multiple of it, as those that torch makes itself."""


class _Place(NamedTuple):
    """Where a tensor lies in the buffer."""

    start: int
    dtype: torch.dtype
    shape: torch.Size

    def cut(self, buffer: Tensor) -> Tensor:
        """Return the tensor that lies there."""
        end = self.start + self.shape.numel() * self.dtype.itemsize
        return buffer[self.start : end].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Packed(Generic[T]):
    """A structure of dataclasses and tuples whose tensors lie in one buffer; made by `pack`."""

    _content: T
    _buffer: Tensor

    def pin_memory(self) -> Packed[T]:
        """Return it in pinned memory, from which a GPU copies while it computes."""
        return replace(self, _buffer=self._buffer.pin_memory())

    def on(self, device: torch.device) -> T:
        """Return the structure with its tensors on a device; the host does not wait for the copy."""
        buffer = self._buffer.to(device, non_blocking=True)
        return _rebuilt(self._content, lambda leaf: leaf.cut(buffer) if isinstance(leaf, _Place) else leaf)


def pack(content: T) -> Packed[T]:
    """Copy the tensors of a structure of dataclasses and tuples into one buffer of the host."""
    tensors: list[tuple[_Place, Tensor]] = []
    size = 0

    def place(leaf: object) -> object:
        nonlocal size
        if not isinstance(leaf, Tensor):
            return leaf
        found = _Place(size, leaf.dtype, leaf.shape)
        size += math.ceil(leaf.nbytes / ALIGNMENT) * ALIGNMENT
        tensors.append((found, leaf))
        return found

    layout = _rebuilt(content, place)
    buffer = torch.zeros(size, dtype=torch.uint8)
    for found, tensor in tensors:
        found.cut(buffer).copy_(tensor)
    return Packed(layout, buffer)


def _rebuilt(value: T, change: Callable[[object], object]) -> T:
    """Return the structure with every leaf changed."""
    if isinstance(value, _Place) or not (isinstance(value, tuple) or is_dataclass(value)):
        return cast(T, change(value))
    if isinstance(value, tuple):
        return cast(T, tuple(_rebuilt(each, change) for each in value))
    parts = {each.name: _rebuilt(getattr(value, each.name), change) for each in fields(value)}
    return cast(T, replace(value, **parts))  # type: ignore[type-var]
