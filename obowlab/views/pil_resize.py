"""Compiled resizing that equals PIL's bilinear and bicubic filters bit for bit (numba).

PIL resizes bytes in two passes, first along the rows, then along the columns, and rounds to bytes between them. Each output
pixel is a weighted sum of the input pixels under a triangle or a cubic that widens with the reduction (antialiasing); the weights
are integers of 22 bits. Integer sums do not depend on their order, so a compiled loop can give exactly PIL's bytes.

Along a row three interleaved channels are awkward for vector instructions, so the first pass reads a transposed copy of the
image, made once for all views: there too the inner loop runs over neighbouring bytes. Only the window that is kept is computed.

The functions are compiled without Python objects and hold no lock; numba keeps the machine code in its cache folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from obowlab.files.sharing import only_we_write

Pixels = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]

PRECISION_BITS = 22
TILE = 32
"""Columns that the transposition fills at a time: as many cache lines as stay in the first-level cache."""
ONE, TWO = np.uint64(1), np.uint64(2)


if numba.config.CACHE_DIR and not only_we_write(Path(numba.config.CACHE_DIR)):  # type: ignore[attr-defined]
    # Machine code that somebody else may have put there is not loaded: numba's other places belong to the code or to the user.
    numba.config.CACHE_DIR = ""  # type: ignore[attr-defined]


def _compiled(function: Any) -> Any:
    return numba.njit(nogil=True, cache=True, error_model="numpy")(function)


@_compiled
def cubic(x: float) -> float:
    """Return the weight of a pixel at distance x >= 0 from the centre, Keys's cubic with a = -1/2, computed in PIL's order."""
    a = -0.5
    if x < 1.0:
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    if x < 2.0:
        return (((x - 5.0) * x + 8.0) * x - 4.0) * a
    return 0.0


@_compiled
def weights(size: int, out_size: int, first: int, count: int, bicubic: bool) -> tuple[Any, Any]:
    """Return where the taps of output pixels first .. first+count-1 begin and end, [count, 2], and their weights.

    Args:
        size: Input pixels.
        out_size: Pixels that the input is resized to.
        first: First output pixel wanted.
        count: Output pixels wanted.
        bicubic: The weights are a cubic and not a triangle.
    """
    scale = size / out_size
    spread = max(scale, 1.0)
    support = 2.0 * spread if bicubic else spread  # how far the filter reaches to either side
    bounds = np.empty((count, 2), np.int64)
    taps = np.empty((count, int(np.ceil(support)) * 2 + 1), np.int32)
    row = np.empty(taps.shape[1])
    for index in range(count):
        centre = (first + index + 0.5) * scale
        start = max(0, int(centre - support + 0.5))
        stop = min(size, int(centre + support + 0.5))
        bounds[index, 0], bounds[index, 1] = start, stop
        total = 0.0
        for tap in range(stop - start):
            # The reciprocal, not a division: PIL multiplies by it, and the last bit decides some roundings.
            distance = abs((tap + start - centre + 0.5) * (1.0 / spread))
            row[tap] = cubic(distance) if bicubic else max(0.0, 1.0 - distance)
            total += row[tap]
        for tap in range(stop - start):
            weight = row[tap] / total * (1 << PRECISION_BITS)
            taps[index, tap] = int(weight + (0.5 if weight >= 0.0 else -0.5))
    return bounds, taps


@_compiled
def transpose(image: Pixels, out: Pixels) -> None:
    """Write an image [H, W, 3] column by column to `out` [W, H, 3]."""
    height, width = image.shape[:2]
    source, target = image.reshape(-1), out.reshape(-1)
    for left in range(0, width, TILE):
        for y in range(height):
            start, place = (y * width + left) * 3, (left * height + y) * 3
            for x in range(min(TILE, width - left)):
                # Unsigned, or every access would test for a negative index.
                pixel, to = np.uint64(start + 3 * x), np.uint64(place + 3 * height * x)
                target[to] = source[pixel]
                target[to + ONE] = source[pixel + ONE]
                target[to + TWO] = source[pixel + TWO]


@_compiled
def weighted_sum(lines: Pixels, offset: int, taps: Any, num_taps: int, sums: Any) -> None:
    """Set sums[j] to half a unit plus the weighted sum of lines[t, offset + j] over the taps t: what rounding needs."""
    length = len(sums)
    for j in range(length):
        sums[j] = 1 << (PRECISION_BITS - 1)
    tap = 0
    while tap + 1 < num_taps:  # two lines at a time halve the traffic of the sums
        one, two = lines[tap, offset : offset + length], lines[tap + 1, offset : offset + length]
        first, second = taps[tap], taps[tap + 1]
        for j in range(length):
            sums[j] += np.int32(first * np.int32(one[j])) + np.int32(second * np.int32(two[j]))
        tap += 2
    if tap < num_taps:
        one, first = lines[tap, offset : offset + length], taps[tap]
        for j in range(length):
            sums[j] += np.int32(first * np.int32(one[j]))


@_compiled
def byte(total: int) -> int:
    """Return a weighted sum as a byte; the negative weights of a cubic can take it out of range."""
    return min(max(total >> PRECISION_BITS, 0), 255)


@_compiled
def cut_view(columns: Pixels, plan: Ints, between: Pixels, out: Pixels) -> None:
    """Resize a rectangle of an image and keep a square of the result.

    Args:
        columns: The image, transposed, [W, H, 3].
        plan: Top, left, height and width of the rectangle; height and width to resize it to; top and left of the square; 1 for
            the bicubic filter and 0 for the bilinear one, [9].
        between: Memory for the rows between the two passes, at least height * side * 3 bytes.
        out: The square, [side, side, 3].
    """
    top, left, height, width, resized_height, resized_width, window_top, window_left, bicubic = plan
    side = out.shape[0]
    bounds, taps = weights(height, resized_height, window_top, side, bicubic != 0)
    first_row, last_row = bounds[0, 0], bounds[side - 1, 1]
    rows = between[: (last_row - first_row) * side * 3].reshape(last_row - first_row, side * 3)

    column_bounds, column_taps = weights(width, resized_width, window_left, side, bicubic != 0)
    lines = columns.reshape(columns.shape[0], columns.shape[1] * 3)
    sums = np.empty((last_row - first_row) * 3, np.int32)
    for x in range(side):
        start, stop = column_bounds[x]
        weighted_sum(lines[left + start : left + stop], (top + first_row) * 3, column_taps[x], stop - start, sums)
        for y in range(last_row - first_row):
            rows[y, 3 * x] = byte(sums[3 * y])
            rows[y, 3 * x + 1] = byte(sums[3 * y + 1])
            rows[y, 3 * x + 2] = byte(sums[3 * y + 2])

    sums = np.empty(side * 3, np.int32)
    flat = out.reshape(side, side * 3)
    for y in range(side):
        start, stop = bounds[y]
        weighted_sum(rows[start - first_row : stop - first_row], 0, taps[y], stop - start, sums)
        for j in range(side * 3):
            flat[y, j] = byte(sums[j])
