"""Charts as inline SVG text: lines with bands, bars, intervals; `lab.parameter_map` draws the plane of two parameters.

Pure functions from numbers to text. Colours come from the page's style sheet (classes `c0` to `c7`, `base`, `band`, `axis`,
`grid`), so that a chart follows the page into the dark and onto paper. Every text is escaped, every mark says its numbers in a
`<title>`, and nothing is told by colour alone: lines carry their names at their ends.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from obowlab import text

WIDTH, HEIGHT = 400.0, 250.0
"""Of a chart in user units: as wide as a phone, so that its text is readable there without being enlarged."""

LEFT, TOP, BOTTOM, MARGIN = 50.0, 28.0, 40.0, 12.0
LETTER = 6.1
"""Mean width of a letter of the 11-unit labels, a little generous."""

LABEL_WIDTH, LABEL_ROWS = 19, 2
"""Letters in one row of a line's name, and rows; what is longer ends in an ellipsis and is whole in the tooltip."""

ROW_HEIGHT = 12.0
NUM_COLOURS = 8


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        label: what is measured, with its unit.
        log: whether equal distances are equal ratios; all values must be positive then.
        low: where it begins, when that should not follow from the data; values beyond an end are drawn at it.
        high: where it ends, likewise.
    """

    label: str
    log: bool = False
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """One line of a line chart; numbers are finite, `x` does not decrease.

    Attributes:
        label: written at its end.
        x: positions.
        y: values.
        low: lower edge of the band around it; empty for none.
        high: upper edge.
        band: what the band is, for the tooltip: `range of 3 seeds`.
        kind: how the values are joined; `points` not at all.
        base: drawn in the colour of the text and thicker: what the others are compared with.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    band: str = ""
    kind: Literal["line", "steps", "points"] = "line"
    base: bool = False


@dataclass(frozen=True)
class Bar:
    """One bar: a name and a length of at least 0."""

    label: str
    value: float


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval, and what the paper has there.

    Attributes:
        label: name of the line.
        value: centre; None when there is none yet.
        half_width: of the interval.
        paper: the paper's value; None when it gives none.
    """

    label: str
    value: float | None
    half_width: float
    paper: float | None


# ------------------------------------------------------------------------------------------------------------- line chart


def line_chart(lines: Sequence[Line], *, title: str, x: Axis, y: Axis) -> str:
    """Draw lines with their bands and their names at their ends.

    Args:
        lines: at least one, each with at least one point.
        title: says what is seen, for those who do not see it.
        x: the axis of `Line.x`.
        y: the axis of `Line.y`.
    """
    assert lines
    assert all(len(line.x) == len(line.y) > 0 for line in lines)
    named = [_rows(line.label) for line in lines]
    right = MARGIN + (max(len(row) for rows in named for row in rows) * LETTER if len(lines) > 1 else 0)
    across = span([v for line in lines for v in line.x], x, padded=False)
    up = span([v for line in lines for v in (*line.y, *line.low, *line.high)], y, padded=True)
    place_x = scale(across, (LEFT, WIDTH - right), log=x.log)
    all_x, all_y = scale_all(across, (LEFT, WIDTH - right), log=x.log), scale_all(up, (HEIGHT - BOTTOM, TOP), log=y.log)

    def place_y(value: float) -> float:
        return all_y(_within([value], up))[0]

    parts = [*axes(x, y, across=across, up=up, place_x=place_x, place_y=place_y)]
    classes = _colours(lines)
    placed = [(all_x(line.x), all_y(_within(line.y, up))) for line in lines]
    for line, (xs, _), name in zip(lines, placed, classes, strict=True):
        if line.low:
            edge = [*all_y(_within(line.high, up)), *reversed(all_y(_within(line.low, up)))]
            path = _path([*xs, *reversed(xs)], edge)
            parts.append(f'<path class="band {name}" d="{path}Z">{tooltip(f"{line.label}: {line.band}")}</path>')
    for line, (xs, ys), name in zip(lines, placed, classes, strict=True):
        said = tooltip(
            f"{line.label}: {text.number(line.y[-1])} at {text.number(line.x[-1])}; from {text.number(min(line.y))} to {text.number(max(line.y))}"
        )
        if line.kind == "points" or len(xs) == 1:
            parts += [
                f'<circle class="dot {name}" cx="{a:.1f}" cy="{b:.1f}" r="3.2">'
                f"{tooltip(f'{line.label}: {text.number(value)} at {text.number(place)}')}</circle>"
                for a, b, place, value in zip(xs, ys, line.x, line.y, strict=True)
            ]
        else:
            path = _path(*_stairs(xs, ys)) if line.kind == "steps" else _path(xs, ys)
            parts.append(f'<path class="line {name}" d="{path}">{said}</path>')
    if len(lines) > 1:
        parts += _end_labels(lines, named=named, classes=classes, place_x=place_x, place_y=place_y)
    return svg(parts, title=title)


def _end_labels(
    lines: Sequence[Line],
    *,
    named: Sequence[Sequence[str]],
    classes: Sequence[str],
    place_x: Callable[[float], float],
    place_y: Callable[[float], float],
) -> list[str]:
    """Write every line's name beside its last point, pushed apart where they would overlap, with a leader to the point."""
    ends = [place_y(line.y[-1]) for line in lines]
    gap = ROW_HEIGHT * max(map(len, named)) + 1
    heights = spread(ends, gap=gap, low=TOP + 4, high=HEIGHT - BOTTOM)
    column = max(place_x(line.x[-1]) for line in lines)
    parts = []
    for line, rows, name, end, height in zip(lines, named, classes, ends, heights, strict=True):
        start = place_x(line.x[-1])
        if abs(end - height) > 2 or column - start > 2:
            parts.append(f'<path class="leader" d="M{start:.1f},{end:.1f}L{column + 4:.1f},{height:.1f}"/>')
        top = height + 3.5 - ROW_HEIGHT * (len(rows) - 1) / 2
        spans = "".join(
            f'<tspan x="{column + 6:.1f}" y="{top + i * ROW_HEIGHT:.1f}">{escape(row)}</tspan>' for i, row in enumerate(rows)
        )
        parts.append(f'<text class="name {name}">{spans}{tooltip(line.label)}</text>')
    return parts


def spread(heights: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Move heights apart until neighbours are `gap` from each other, keeping their order, within [low, high] if they fit."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    moved: list[float] = []
    for i in order:
        moved.append(max(heights[i], moved[-1] + gap if moved else low))
    limit = high
    for k in range(len(moved) - 1, -1, -1):
        moved[k] = min(moved[k], limit)
        limit = moved[k] - gap
    return [height for _, height in sorted(zip(order, moved, strict=True))]


# ------------------------------------------------------------------------------------------------------ bars and intervals


def bar_chart(bars: Sequence[Bar], *, title: str, unit: str) -> str:
    """Draw horizontal bars from 0, each with its name before and its value behind it.

    Args:
        bars: at least one.
        title: says what is seen.
        unit: of the values; empty for plain numbers.
    """
    assert bars
    left = min(180.0, max(len(_short(bar.label, 26)) for bar in bars) * LETTER + 10)
    longest = max(bar.value for bar in bars) or 1.0
    room = WIDTH - left - 70
    parts = []
    for i, bar in enumerate(bars):
        y, length = 6 + i * 26.0, room * bar.value / longest
        value = f"{text.number(bar.value)} {unit}".strip()
        parts.append(
            f'<text class="name" x="{left - 6:.1f}" y="{y + 13:.1f}" text-anchor="end">{escape(_short(bar.label, 26))}</text>'
        )
        parts.append(
            f'<rect class="bar" x="{left:.1f}" y="{y:.1f}" width="{length:.1f}" height="18">'
            f"{tooltip(f'{bar.label}: {value}')}</rect>"
        )
        parts.append(f'<text class="tick" x="{left + length + 5:.1f}" y="{y + 13:.1f}">{escape(value)}</text>')
    return svg(parts, title=title, height=12 + 26.0 * len(bars))


def interval_chart(intervals: Sequence[Interval], *, title: str, x: Axis) -> str:
    """Draw values with their intervals on one axis that shows 0, and the paper's values as open diamonds.

    Args:
        intervals: at least one line with a value or a paper's value.
        title: says what is seen.
        x: the axis.
    """
    ends = [e for i in intervals if i.value is not None for e in (i.value - i.half_width, i.value + i.half_width)]
    ends += [i.paper for i in intervals if i.paper is not None]
    assert ends
    left = min(170.0, max(len(_short(i.label, 24)) for i in intervals) * LETTER + 10)
    across = span([0.0, *ends], x, padded=True)
    place = scale(across, (left, WIDTH - MARGIN), log=False)
    bottom = 10 + 22.0 * len(intervals)
    parts = [
        f'<path class="grid" d="M{place(t):.1f},6V{bottom:.1f}"/>'
        f'<text class="tick" x="{place(t):.1f}" y="{bottom + 14:.1f}" text-anchor="middle">{text.number(t)}</text>'
        for t in ticks(*across, count=5)
    ]
    parts.append(f'<path class="axis" d="M{place(0.0):.1f},6V{bottom:.1f}"/>')
    for i, one in enumerate(intervals):
        y = 18 + i * 22.0
        parts.append(
            f'<text class="name" x="{left - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{escape(_short(one.label, 24))}</text>'
        )
        if one.value is not None:
            said = f"{one.label}, ours: {text.number(one.value)} ± {text.number(one.half_width)}"
            start, end = place(one.value - one.half_width), place(one.value + one.half_width)
            parts.append(
                f'<g>{tooltip(said)}<path class="whisker" d="M{start:.1f},{y:.1f}H{end:.1f}"/>'
                f'<circle class="dot c0" cx="{place(one.value):.1f}" cy="{y:.1f}" r="4"/></g>'
            )
        if one.paper is not None:
            said = tooltip(f"{one.label}, paper: {text.number(one.paper)}")
            parts.append(
                f'<path class="diamond" d="M{place(one.paper):.1f},{y - 5.5:.1f}l5.5,5.5l-5.5,5.5l-5.5,-5.5Z">{said}</path>'
            )
    middle = (left + WIDTH - MARGIN) / 2
    parts.append(f'<text class="tick" x="{middle:.1f}" y="{bottom + 31:.1f}" text-anchor="middle">{escape(x.label)}</text>')
    return svg(parts, title=title, height=bottom + 38)


# ---------------------------------------------------------------------------------------------------------------- helpers


def ticks(low: float, high: float, *, count: int) -> list[float]:
    """Return about `count` round numbers within [low, high], multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * f for f in (1, 2, 5, 10) if power * f >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers within [low, high] for a logarithmic axis: 1, 2, 5 times powers of ten, or the powers alone."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [f * 10.0**p for p in powers for f in (1, 2, 5) if low * 0.999 <= f * 10.0**p <= high * 1.001]
    return found if len(found) <= 7 else [t for t in found if abs(math.log10(t) - round(math.log10(t))) < 1e-9]


def span(values: Sequence[float], axis: Axis, *, padded: bool) -> tuple[float, float]:
    """Return the ends of an axis: the data's, a little wider, or those that the axis names."""
    low, high = min(values), max(values)
    if axis.log:
        factor = (high / low) ** 0.06 if high > low else 1.5
        low, high = (low / factor, high * factor) if padded or low == high else (low, high)
    elif high == low:
        room = abs(high) * 0.1 or 1.0
        low, high = low - room, high + room
    elif padded:
        low, high = low - 0.04 * (high - low), high + 0.04 * (high - low)
    return (axis.low if axis.low is not None else low, axis.high if axis.high is not None else high)


def scale(span: tuple[float, float], onto: tuple[float, float], *, log: bool) -> Callable[[float], float]:
    """Return the map from a value to user units."""
    place = scale_all(span, onto, log=log)
    return lambda value: place([value])[0]


def scale_all(span: tuple[float, float], onto: tuple[float, float], *, log: bool) -> Callable[[Sequence[float]], list[float]]:
    """Return the map from many values to user units: the report of 200 runs draws half a million."""
    low, high = (math.log(span[0]), math.log(span[1])) if log else span
    start, end = onto
    width, room = high - low, end - start
    if log:
        return lambda values: [start + (math.log(value) - low) / width * room for value in values]
    return lambda values: [start + (value - low) / width * room for value in values]


def _within(values: Sequence[float], ends: tuple[float, float]) -> Sequence[float]:
    """Return the values, those beyond an end at it."""
    low, high = ends
    return values if low <= min(values) and max(values) <= high else [min(max(value, low), high) for value in values]


def axes(
    x: Axis,
    y: Axis,
    *,
    across: tuple[float, float],
    up: tuple[float, float],
    place_x: Callable[[float], float],
    place_y: Callable[[float], float],
) -> list[str]:
    """Return both axes with their ticks and labels, and horizontal grid lines."""
    left, right, base = place_x(across[0]), place_x(across[1]), HEIGHT - BOTTOM
    parts = []
    for tick in log_ticks(*up) if y.log else ticks(*up, count=5):
        height = place_y(tick)
        parts.append(f'<path class="grid" d="M{left:.1f},{height:.1f}H{right:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 6:.1f}" y="{height + 3.5:.1f}" text-anchor="end">{text.number(tick)}</text>')
    parts.append(f'<path class="axis" d="M{left:.1f},{base:.1f}H{right:.1f}"/>')
    for tick in log_ticks(*across) if x.log else ticks(*across, count=5):
        parts.append(f'<path class="axis" d="M{place_x(tick):.1f},{base:.1f}v4"/>')
        parts.append(
            f'<text class="tick" x="{place_x(tick):.1f}" y="{base + 16:.1f}" text-anchor="middle">{text.number(tick)}</text>'
        )
    parts.append(f'<text class="tick" x="4" y="14">{escape(y.label)}</text>')
    parts.append(
        f'<text class="tick" x="{(left + right) / 2:.1f}" y="{HEIGHT - 6:.1f}" text-anchor="middle">{escape(x.label)}</text>'
    )
    return parts


def _colours(lines: Sequence[Line]) -> list[str]:
    """Return the class of every line: `base`, or the next colour; never more than there are colours."""
    assert sum(not line.base for line in lines) <= NUM_COLOURS, "split a chart before it has more lines than colours"
    free = iter(range(NUM_COLOURS))
    return ["base" if line.base else f"c{next(free)}" for line in lines]


def _path(xs: Sequence[float], ys: Sequence[float]) -> str:
    """Join points in user units; one format for all of them takes a third of the time of one each."""
    both = [0.0] * (2 * len(xs))
    both[::2], both[1::2] = xs, ys
    return "M" + "L".join(["%.1f,%.1f"] * len(xs)) % tuple(both)


def _stairs(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return the points with a corner before each but the first: first across, then up or down."""
    across = [xs[0], *(value for value in xs[1:] for _ in range(2))]
    return across, [value for value in ys for _ in range(2)][:-1]


def _rows(label: str) -> list[str]:
    """Break a name into rows for the end of its line."""
    return textwrap.wrap(label, LABEL_WIDTH, max_lines=LABEL_ROWS, placeholder="…") or ["–"]


def _short(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "…"


def tooltip(text: str) -> str:
    """Return what a mark says when it is pointed at."""
    return f"<title>{escape(text)}</title>"


def svg(parts: Sequence[str], *, title: str, height: float = HEIGHT) -> str:
    """Return a whole chart, described by its title."""
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" aria-label="{escape(title)}">'
        + "".join(parts)
        + "</svg>"
    )
