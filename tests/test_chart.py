"""Charts: where marks stand, against plain arithmetic; what they say; that a name is never markup."""

from __future__ import annotations

import math
import random
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from obowlab.report import chart
from obowlab.report.chart import Axis, Bar, Interval, Line, bar_chart, interval_chart, line_chart
from obowlab.report.parameter_map import CIVIDIS, Spot, blend, convex_hull, parameter_map, step_of

HOSTILE = "</title><script>alert(1)</script>\"'&<b>"
SVG = "{http://www.w3.org/2000/svg}"


def parsed(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def marks(root: ElementTree.Element, tag: str, word: str) -> list[ElementTree.Element]:
    return [element for element in root.iter(f"{SVG}{tag}") if word in (element.get("class") or "").split()]


def points(element: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(a), float(b)) for a, b in re.findall(r"[ML](-?[\d.]+),(-?[\d.]+)", element.get("d") or "")]


def between(value: float, span: tuple[float, float], onto: tuple[float, float]) -> float:
    return onto[0] + (value - span[0]) / (span[1] - span[0]) * (onto[1] - onto[0])


def slow_path(x: list[float], y: list[float]) -> str:
    return "M" + "L".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("log", [False, True])
def test_many_values_are_placed_and_written_as_one_by_one(log: bool) -> None:
    rng = random.Random(int(log))
    x, y = sorted(rng.uniform(0, 18) for _ in range(500)), [rng.lognormvariate(0, 2) for _ in range(500)]
    up, onto = (min(y), max(y)), (210.0, 28.0)
    low, high = (math.log(up[0]), math.log(up[1])) if log else up
    slow = [onto[0] + ((math.log(v) if log else v) - low) / (high - low) * (onto[1] - onto[0]) for v in y]
    assert chart.scale_all(up, onto, log=log)(y) == slow
    assert [chart.scale(up, onto, log=log)(v) for v in y] == slow
    odd = [-0.04, 0.04, 0.05, 0.15, 0.25, -0.05, 99.95, 1e6]  # where rounding is not what one expects
    assert chart._path(odd, odd[::-1]) == slow_path(odd, odd[::-1])
    assert chart._path(x, slow) == slow_path(x, slow)
    (drawn,) = marks(
        parsed(line_chart([Line("a", x, y)], title="t", x=Axis("x"), y=Axis("y", low=0.5, high=2.0))), "path", "line"
    )
    assert all(28.0 <= height <= 210.0 for _, height in points(drawn))


def test_line_and_band_stand_where_arithmetic_puts_them() -> None:
    rng = random.Random(0)
    x = [float(i) for i in range(1, 21)]
    y = [rng.uniform(2.0, 5.0) for _ in x]
    low, high = [v - 0.5 for v in y], [v + rng.uniform(0, 1) for v in y]
    root = parsed(
        line_chart([Line("loss", x, y, low, high, band="range of 3 seeds")], title="t", x=Axis("epochs", low=0.0), y=Axis("nats"))
    )
    across, onto = (0.0, 20.0), (chart.LEFT, chart.WIDTH - chart.MARGIN)
    room = 0.04 * (max(high) - min(low))
    up, down = (min(low) - room, max(high) + room), (chart.HEIGHT - chart.BOTTOM, chart.TOP)
    expected = [(between(a, across, onto), between(b, up, down)) for a, b in zip(x, y, strict=True)]
    (line,), (band,) = marks(root, "path", "line"), marks(root, "path", "band")
    assert points(line) == [pytest.approx(point, abs=0.06) for point in expected]
    edge = points(band)
    assert len(edge) == 40
    for i, a in enumerate(x):
        assert edge[i] == pytest.approx((between(a, across, onto), between(high[i], up, down)), abs=0.06)
        assert edge[39 - i] == pytest.approx((between(a, across, onto), between(low[i], up, down)), abs=0.06)
    assert "range of 3 seeds" in (band.findtext(f"{SVG}title") or "")


def test_logarithmic_axis_makes_equal_ratios_equal_distances() -> None:
    root = parsed(line_chart([Line("a", [0, 1, 2], [1.0, 10.0, 100.0])], title="t", x=Axis("x"), y=Axis("y", log=True)))
    heights = [b for _, b in points(marks(root, "path", "line")[0])]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)


def test_values_beyond_a_named_end_are_drawn_at_it_and_told_truly() -> None:
    axis = Axis("y", low=1.0, high=3.0)
    root = parsed(line_chart([Line("a", [0, 1, 2, 3], [9.0, 3.0, 1.0, -4.0])], title="t", x=Axis("x"), y=axis))
    (line,) = marks(root, "path", "line")
    assert [b for _, b in points(line)] == [chart.TOP, chart.TOP, chart.HEIGHT - chart.BOTTOM, chart.HEIGHT - chart.BOTTOM]
    assert "from −4 to 9" in (line.findtext(f"{SVG}title") or "")


def test_steps_turn_at_right_angles_and_single_points_are_dots() -> None:
    root = parsed(line_chart([Line("best", [0, 1, 2], [1.0, 1.0, 3.0], kind="steps")], title="t", x=Axis("x"), y=Axis("y")))
    corners = points(marks(root, "path", "line")[0])
    assert all(a[0] == b[0] or a[1] == b[1] for a, b in pairwise(corners))
    alone = parsed(line_chart([Line("one", [3.0], [4.0])], title="t", x=Axis("x"), y=Axis("y")))
    assert len(marks(alone, "circle", "dot")) == 1


def test_lines_carry_their_names_apart_and_within_the_chart() -> None:
    lines = [Line(f"row number {i} with a rather long label that goes on", [0, 1], [0.0, 1.0 + i / 1000]) for i in range(6)]
    root = parsed(line_chart(lines, title="t", x=Axis("x"), y=Axis("y")))
    names = marks(root, "text", "name")
    assert [name.get("class") for name in names] == [f"name c{i}" for i in range(6)]
    tops = sorted(float(name[0].get("y") or 0) for name in names)
    assert all(b - a >= 2 * chart.ROW_HEIGHT for a, b in pairwise(tops))
    assert tops[0] > 0
    assert tops[-1] < chart.HEIGHT
    assert all(len(span.text or "") <= chart.LABEL_WIDTH for name in names for span in name.iter(f"{SVG}tspan"))
    assert names[3].findtext(f"{SVG}title") == lines[3].label


def test_base_line_has_the_colour_of_the_text() -> None:
    root = parsed(
        line_chart([Line("a", [0, 1], [0, 1]), Line("b", [0, 1], [1, 0], base=True)], title="t", x=Axis("x"), y=Axis("y"))
    )
    assert [line.get("class") for line in marks(root, "path", "line")] == ["line c0", "line base"]


@pytest.mark.parametrize("seed", range(20))
def test_spread_keeps_order_and_gaps_and_moves_nothing_without_need(seed: int) -> None:
    rng = random.Random(seed)
    heights = [rng.uniform(0, 100) for _ in range(rng.randint(1, 7))]
    moved = chart.spread(heights, gap=13, low=0, high=100)
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    assert all(moved[b] - moved[a] >= 13 - 1e-9 for a, b in pairwise(order))
    assert max(moved) <= 100
    assert chart.spread([10, 40, 80], gap=13, low=0, high=100) == [10, 40, 80]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (3.2, 3.9), (-7, 12), (0, 12345), (1e-5, 3e-5)])
def test_ticks_are_round_and_within(low: float, high: float) -> None:
    found = chart.ticks(low, high, count=5)
    assert 2 <= len(found) <= 11
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)
    steps = {round((b - a) / 10 ** math.floor(math.log10(b - a) + 1e-9), 6) for a, b in pairwise(found)}
    assert steps <= {1.0, 2.0, 5.0}
    assert len(steps) == 1


def test_log_ticks() -> None:
    assert chart.log_ticks(0.004, 0.12) == pytest.approx([0.005, 0.01, 0.02, 0.05, 0.1])
    assert chart.log_ticks(1, 1e6) == pytest.approx([1, 10, 100, 1e3, 1e4, 1e5, 1e6])


def test_bars_are_as_long_as_their_values() -> None:
    root = parsed(bar_chart([Bar("a", 80.0), Bar("b", 20.0), Bar("c", 0.0)], title="t", unit="%"))
    first, second, third = (float(bar.get("width") or 0) for bar in marks(root, "rect", "bar"))
    assert second / first == pytest.approx(0.25, abs=0.01)
    assert third == 0
    assert "80 %" in ElementTree.tostring(root, "unicode")


def test_intervals_reach_as_far_as_their_half_widths() -> None:
    root = parsed(
        interval_chart(
            [Interval("a", -2.0, 1.0, -3.0), Interval("b", 1.0, 0.5, None), Interval("c", None, 0.0, 2.0)],
            title="t",
            x=Axis("points"),
        )
    )
    whiskers = [re.match(r"M([\d.]+),[\d.]+H([\d.]+)", w.get("d") or "") for w in marks(root, "path", "whisker")]
    (a0, a1), (b0, b1) = ((float(w[1]), float(w[2])) for w in whiskers if w is not None)
    assert (a1 - a0) / (b1 - b0) == pytest.approx(2.0, abs=0.01)
    centres = [float(c.get("cx") or 0) for c in marks(root, "circle", "dot")]
    assert centres == pytest.approx([(a0 + a1) / 2, (b0 + b1) / 2], abs=0.1)
    assert len(marks(root, "path", "diamond")) == 2


# -------------------------------------------------------------------------------------------------------------------- map


def inside(point: tuple[float, float], corners: list[tuple[float, float]]) -> bool:
    """Count crossings of a ray to the right."""
    crossings = 0
    for (ax, ay), (bx, by) in zip(corners, [*corners[1:], corners[0]], strict=True):
        if (ay > point[1]) != (by > point[1]) and point[0] < ax + (point[1] - ay) / (by - ay) * (bx - ax):
            crossings += 1
    return crossings % 2 == 1


def test_hull_holds_every_point_and_has_no_more_corners_than_needed() -> None:
    rng = random.Random(1)
    cloud = [(rng.gauss(0, 1), rng.gauss(0, 1)) for _ in range(60)]
    hull = convex_hull(cloud)
    assert set(hull) <= set(cloud)
    assert all(inside(point, hull) for point in cloud if point not in hull)
    for i in range(len(hull)):
        fewer = hull[:i] + hull[i + 1 :]
        assert not inside(hull[i], fewer)
    assert convex_hull([(0, 0), (1, 1), (2, 2)]) == [(0, 0), (2, 2)]


def test_blend_is_exact_on_points_and_stays_between_the_values() -> None:
    known = [(0.0, 0.0, 1.0), (10.0, 0.0, 5.0), (0.0, 10.0, 3.0)]
    assert [blend(a, b, known) for a, b, _ in known] == [1.0, 5.0, 3.0]
    assert 1.0 < blend(3.0, 3.0, known) < 5.0
    assert blend(5.0, 0.0, known[:2]) == pytest.approx(3.0)


def test_map_marks_trials_the_best_the_paper_and_what_failed() -> None:
    spots = [
        Spot(1.0, 1.0, 3.0, "trial 0"),
        Spot(2.0, 1.0, 9.0, "trial 1", "best"),
        Spot(2.0, 2.0, 5.0, "trial 2", "paper"),
        Spot(1.0, 2.0, 4.0, "trial 3"),
        Spot(1.5, 1.5, None, "trial 4"),
    ]
    root = parsed(parameter_map(spots, title="t", x=Axis("kappa"), y=Axis("delta"), value="5-shot, %"))
    assert len(marks(root, "circle", "spot")) == 3
    assert len(marks(root, "path", "spot")) == len(marks(root, "circle", "ring")) == len(marks(root, "path", "cross")) == 1
    fills = {spot.findtext(f"{SVG}title", "").partition(":")[0]: spot.get("fill") for spot in marks(root, "circle", "spot")}
    assert fills["trial 0"] == CIVIDIS[0]
    assert fills["trial 1"] == CIVIDIS[-1]
    few = parsed(parameter_map(spots[:3], title="t", x=Axis("kappa"), y=Axis("delta"), value="v"))
    assert len(list(root.iter(f"{SVG}rect"))) > len(CIVIDIS) == len(list(few.iter(f"{SVG}rect")))  # the key alone


def test_cells_have_the_colour_of_the_blended_value() -> None:
    spots = [Spot(a, b, v, "") for a, b, v in ((0, 0, 0.0), (1, 0, 1.0), (0, 1, 2.0), (1, 1, 7.0))]
    root = parsed(parameter_map(spots, title="t", x=Axis("a"), y=Axis("b"), value="v"))
    known = [
        (float(s.get("cx") or 0), float(s.get("cy") or 0), spot.value or 0.0)
        for s, spot in zip(marks(root, "circle", "spot"), spots, strict=True)
    ]
    tall = (chart.HEIGHT - chart.BOTTOM - chart.TOP) / 40
    checked = 0
    for cell in root.iter(f"{SVG}rect"):
        if float(cell.get("width") or 0) == 12:
            continue
        x, y = float(cell.get("x") or 0), float(cell.get("y") or 0)
        wide = (chart.WIDTH - chart.MARGIN - 58 - chart.LEFT) / 40
        value = blend(x + wide / 2, y + tall / 2, known)
        if 0.1 < value % 1 < 0.9:  # not at the border of two colours, where coordinates are rounded
            assert cell.get("fill") == CIVIDIS[step_of(value, low=0, high=7)]
            checked += 1
    assert checked > 20


# -------------------------------------------------------------------------------------------------------------- hostility


def test_no_name_becomes_markup() -> None:
    axis = Axis(HOSTILE)
    charts = [
        line_chart(
            [Line(HOSTILE, [0, 1], [0, 1], [0, 0], [1, 1], band=HOSTILE), Line("b", [0], [1])], title=HOSTILE, x=axis, y=axis
        ),
        bar_chart([Bar(HOSTILE, 1.0)], title=HOSTILE, unit=HOSTILE),
        interval_chart([Interval(HOSTILE, 1.0, 1.0, 1.0)], title=HOSTILE, x=axis),
        parameter_map([Spot(0, 0, 1.0, HOSTILE), Spot(1, 1, None, HOSTILE)], title=HOSTILE, x=axis, y=axis, value=HOSTILE),
    ]
    for text in charts:
        tags = {element.tag.removeprefix(SVG) for element in parsed(text).iter()}
        assert tags <= {"svg", "path", "text", "tspan", "title", "circle", "rect", "g"}
        assert "<script" not in text


def test_charts_do_not_depend_on_anything_but_their_arguments() -> None:
    line = Line("a", [0, 1, 2], [1.0, 2.0, 1.5])
    assert line_chart([line], title="t", x=Axis("x"), y=Axis("y")) == line_chart([line], title="t", x=Axis("x"), y=Axis("y"))


@pytest.mark.parametrize("value", [5.0, 0.0, -2.0])
def test_constant_lines_can_be_drawn(value: float) -> None:
    root = parsed(line_chart([Line("a", [0, 1], [value, value])], title="t", x=Axis("x"), y=Axis("y")))
    assert all(chart.TOP < b < chart.HEIGHT - chart.BOTTOM for _, b in points(marks(root, "path", "line")[0]))
