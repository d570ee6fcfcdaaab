"""A map of two parameters as inline SVG: what was measured at points of their plane, with colours between them.

Unlike other charts it brings its own colours, which mean values and are the same on a light and on a dark page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from obowlab import text
from obowlab.report.chart import BOTTOM, HEIGHT, LEFT, MARGIN, TOP, WIDTH, Axis, axes, scale, span, svg, tooltip

CIVIDIS = ("#00224e", "#2a3f6d", "#575d6d", "#7d7c78", "#a59c74", "#d2c060", "#fee838")
"""Seven steps of the cividis map, which people with and without colour blindness read alike."""

Mark = Literal["trial", "best", "paper"]

GRID = 40
"""Cells of the map along each side."""


@dataclass(frozen=True)
class Spot:
    """One point of a map.

    Attributes:
        x: first parameter.
        y: second parameter.
        value: what was reached there; None when nothing was measured.
        label: for the tooltip.
        mark: `trial`, `best` (ringed) or `paper` (a diamond).
    """

    x: float
    y: float
    value: float | None
    label: str
    mark: Mark = "trial"


def parameter_map(spots: Sequence[Spot], *, title: str, x: Axis, y: Axis, value: str) -> str:
    """Draw what was measured at points of a plane, with colours between them as a guide for the eye.

    Between the points stands a mean of all values weighted by inverse distance (`blend`), in seven steps, only within the
    convex hull of the points and only from four points on.

    Args:
        spots: at least one.
        title: says what is seen.
        x: first parameter.
        y: second parameter.
        value: name and unit of the values.
    """
    assert spots
    right = MARGIN + 58
    across, up = span([s.x for s in spots], x, padded=True), span([s.y for s in spots], y, padded=True)
    place_x, place_y = scale(across, (LEFT, WIDTH - right), log=x.log), scale(up, (HEIGHT - BOTTOM, TOP), log=y.log)
    known = [(place_x(s.x), place_y(s.y), s.value) for s in spots if s.value is not None]
    parts = []
    values = [v for _, _, v in known]
    low, high = (min(values), max(values)) if values else (0.0, 0.0)
    hull = convex_hull([(a, b) for a, b, _ in known])
    parts += axes(x, y, across=across, up=up, place_x=place_x, place_y=place_y)
    if len(known) >= 4 and len(hull) >= 3 and high > low:
        parts += _cells(known, hull=hull, low=low, high=high, right=right)
    for spot in sorted(spots, key=lambda s: (s.value is not None, s.mark != "trial")):
        a, b = place_x(spot.x), place_y(spot.y)
        reached = f"{text.number(spot.value)}" if spot.value is not None else "no value"
        said = tooltip(f"{spot.label}: {reached}; {x.label} {text.number(spot.x)}, {y.label} {text.number(spot.y)}")
        if spot.value is None and spot.mark == "trial":
            parts.append(f'<path class="cross" d="M{a - 3:.1f},{b - 3:.1f}l6,6m0,-6l-6,6">{said}</path>')
            continue
        fill = CIVIDIS[step_of(spot.value, low=low, high=high)] if spot.value is not None else "none"
        if spot.mark == "paper":
            parts.append(f'<path class="spot" fill="{fill}" d="M{a:.1f},{b - 7:.1f}l7,7l-7,7l-7,-7Z">{said}</path>')
        else:
            parts.append(f'<circle class="spot" fill="{fill}" cx="{a:.1f}" cy="{b:.1f}" r="4.5">{said}</circle>')
        if spot.mark == "best":
            parts.append(f'<circle class="ring" cx="{a:.1f}" cy="{b:.1f}" r="8.5"/>')
    if values:
        parts += _key(value, low=low, high=high)
    return svg(parts, title=title)


def blend(a: float, b: float, points: Sequence[tuple[float, float, float]]) -> float:
    """Return the mean of the points' values at (a, b), weighted by the inverse cube of the distance; exact on a point."""
    total = weights = 0.0
    for x, y, value in points:
        squared = (x - a) ** 2 + (y - b) ** 2
        if squared < 1e-12:
            return value
        weight = squared**-1.5
        total, weights = total + weight * value, weights + weight
    return total / weights


def step_of(value: float, *, low: float, high: float) -> int:
    """Return which of the seven colours stands for a value; the middle one when all values are equal."""
    if high <= low:
        return len(CIVIDIS) // 2
    return min(len(CIVIDIS) - 1, max(0, int((value - low) / (high - low) * len(CIVIDIS))))


def convex_hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the corners of the convex hull, counter-clockwise in a plane whose second axis points up."""
    ordered = sorted(set(points))
    if len(ordered) < 3:
        return ordered

    def half(sequence: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        corners: list[tuple[float, float]] = []
        for point in sequence:
            while len(corners) >= 2 and _turn(corners[-2], corners[-1], point) <= 0:
                corners.pop()
            corners.append(point)
        return corners[:-1]

    return half(ordered) + half(ordered[::-1])


def _turn(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> float:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def _cells(
    known: Sequence[tuple[float, float, float]], *, hull: Sequence[tuple[float, float]], low: float, high: float, right: float
) -> list[str]:
    """Return the coloured cells; neighbours of one colour in a row are one rectangle."""
    wide, tall = (WIDTH - right - LEFT) / GRID, (HEIGHT - BOTTOM - TOP) / GRID
    edges = list(zip(hull, [*hull[1:], hull[0]], strict=True))
    parts = []
    for j in range(GRID):
        b = TOP + (j + 0.5) * tall
        runs: list[list[int]] = []  # [first cell, cells, colour]
        for i in range(GRID):
            a = LEFT + (i + 0.5) * wide
            if any(_turn(start, end, (a, b)) < 0 for start, end in edges):
                continue
            colour = step_of(blend(a, b, known), low=low, high=high)
            if runs and runs[-1][0] + runs[-1][1] == i and runs[-1][2] == colour:
                runs[-1][1] += 1
            else:
                runs.append([i, 1, colour])
        for first, count, colour in runs:
            parts.append(
                f'<rect x="{LEFT + first * wide:.1f}" y="{TOP + j * tall:.1f}" width="{count * wide + 0.3:.1f}" '
                f'height="{tall + 0.3:.1f}" fill="{CIVIDIS[colour]}"/>'
            )
    return parts


def _key(value: str, *, low: float, high: float) -> list[str]:
    """Return the colour scale at the right edge with its ends in numbers."""
    left, tall = WIDTH - 56.0, (HEIGHT - BOTTOM - TOP) / len(CIVIDIS)
    parts = [f'<text class="tick" x="{WIDTH - 4:.0f}" y="14" text-anchor="end">{escape(value)}</text>']
    for i, colour in enumerate(CIVIDIS):
        y = HEIGHT - BOTTOM - (i + 1) * tall
        parts.append(f'<rect x="{left:.0f}" y="{y:.1f}" width="12" height="{tall + 0.3:.1f}" fill="{colour}"/>')
    for y, edge in ((HEIGHT - BOTTOM, low), (TOP + 8, high)):
        parts.append(f'<text class="tick" x="{left + 16:.0f}" y="{y:.1f}">{text.number(edge)}</text>')
    return parts
