"""Teachers whose parameters are a moving average of the student's."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def follow_student(pairs: Iterable[tuple[nn.Module, nn.Module]], *, momentum: float) -> None:
    """Move the teacher's parameters towards the student's (docs/method.md, eq. 3); batch-norm statistics are not touched.

    Args:
        pairs: part of the teacher and what it follows, of equal architecture.
        momentum: what is left of the teacher, alpha.
    """
    teacher: list[Tensor] = []
    student: list[Tensor] = []
    for behind, ahead in pairs:
        teacher += behind.parameters()
        student += ahead.parameters()
    torch._foreach_lerp_(teacher, student, 1.0 - momentum)
