"""The single observations behind a measurement, small enough to travel with it: right answers per episode, or per image.

Two runs are compared on identical episodes or images, which needs every observation and not just their mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def pack(correct: Sequence[int], *, of: int) -> dict[str, Any]:
    """Return observations as JSON values: a list of counts, or for single questions (`of` = 1) bits in hexadecimal digits.

    Args:
        correct: right answers of every observation, each from 0 to `of`.
        of: questions in one observation.
    """
    counts = np.asarray(correct, dtype=np.int64)
    assert counts.ndim == 1
    assert ((counts >= 0) & (counts <= of)).all()
    packed = np.packbits(counts.astype(np.uint8)).tobytes().hex() if of == 1 else counts.tolist()
    return {"of": of, "count": len(counts), "correct": packed}


def unpack(samples: Mapping[str, Any]) -> npt.NDArray[np.float64]:
    """Return the observations in percent, [count]; the inverse of `pack`."""
    of, count, packed = int(samples["of"]), int(samples["count"]), samples["correct"]
    if of == 1:
        bits = np.frombuffer(bytes.fromhex(packed), dtype=np.uint8)
        correct = np.unpackbits(bits, count=count)
    else:
        correct = np.asarray(packed, dtype=np.uint8 if of < 256 else np.int64)
    assert len(correct) == count
    return 100.0 * correct.astype(np.float64) / of
