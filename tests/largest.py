"""How large the largest tensor was that a computation made."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LargestFloats(TorchDispatchMode):
    """Remembers how many elements the largest float tensor had that any operation made; views make none."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        inputs = {each.untyped_storage().data_ptr() for each in args if isinstance(each, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point() and out.untyped_storage().data_ptr() not in inputs:
            self.largest = max(self.largest, out.untyped_storage().nbytes() // out.element_size())
        return out
