"""Charts as plotly takes them: what their traces hold, what hovering shows, their CSV files; names are never markup."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from obowlab.report import figures, result_figures
from obowlab.report.curves import Curve
from obowlab.report.figures import Family, Group, Line
from obowlab.report.model import Figure, Site, Training
from obowlab.report.pages import script_json
from obowlab.report.read import Tables, gather, read_store
from obowlab.studies.schema import StudyReport, read_study
from obowlab.tables.model import Estimate
from tests.report_store import add_run, add_study, make_table

HOSTILE = "</script><script>alert(1)</script>\"'&<b> %{y}, =1+1"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Two seeds of one recipe, a variant, and one that stopped after a quarter."""
    root = tmp_path_factory.mktemp("store")
    for seed in (0, 1):
        add_run(root, seed=seed)
    add_run(root, overrides=("method.codes=hard",))
    add_run(root, overrides=("method.kappa=500",), status="interrupted", points=40)
    return gather(read_store(root), tables=Tables())


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> StudyReport:
    return read_study(add_study(tmp_path_factory.mktemp("study"), run_id="demo-s0-1", figures=True))


def family(site: Site) -> Family:
    return figures.families(site.trainings)["demo"]


def named(figure: Figure) -> dict[str, Any]:
    """Return the traces that the legend names."""
    return {trace["name"]: trace for trace in figure.data if "name" in trace}


def rows(figure: Figure) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(figure.csv)))


def line(*values: float, label: str = "a", low: float = 0.0, base: bool = False) -> Line:
    places = tuple(range(1, len(values) + 1))
    below = tuple(value - low for value in values)
    return Line(label, ("run-1",), Curve(places, tuple(map(float, places)), values, below, values, last=values[-1]), base)


# ----------------------------------------------------------------------------------------------------------------- curves


def test_a_line_is_the_curve_and_hovering_names_value_step_and_run(site: Site) -> None:
    (loss, shots) = figures.curve_figures(family(site).groups, metrics=figures.TRAINING)
    assert (loss.title, shots.title) == ("Loss", "5-shot during training")
    lines = named(loss)
    assert list(lines) == ["demo ×2", "codes=hard", "kappa=500"]
    run = next(run for run in site.runs if run.short == "codes=hard")
    curve, trace = run.curves["loss"], lines["codes=hard"]
    assert (trace["x"], trace["y"], trace["customdata"]) == (curve.epoch, curve.mean, curve.step)
    assert trace["customdata"][-1] == pytest.approx(1500, abs=15)
    template = trace["hovertemplate"]
    assert template.startswith("<b>codes=hard</b><br>%{y:.4~g} nats<br>step %{customdata}, epoch %{x")
    assert run.run_id in template
    seeds = lines["demo ×2"]["hovertemplate"]
    assert "mean of 2 seeds: demo-s0-" in seeds
    assert "demo-s1-" in seeds
    assert (trace["mode"], named(shots)["codes=hard"]["mode"]) == ("lines", "lines+markers")
    assert named(shots)["codes=hard"]["customdata"] == (100, 200, 300, 1500)


def test_a_band_is_the_range_of_the_seeds_and_is_switched_with_its_line(site: Site) -> None:
    (loss, _) = figures.curve_figures(family(site).groups, metrics=figures.TRAINING)
    (band,) = [trace for trace in loss.data if "fill" in trace]
    seeds = [run.curves["loss"].mean for run in site.runs if run.changes == {}]
    count = len(seeds[0])
    assert band["y"][:count] == tuple(map(max, zip(*seeds, strict=True)))
    assert band["y"][count:][::-1] == tuple(map(min, zip(*seeds, strict=True)))
    assert band["x"][:count] == band["x"][count:][::-1] == named(loss)["demo ×2"]["x"]
    assert band["legendgroup"] == named(loss)["demo ×2"]["legendgroup"] == "demo ×2"
    assert (band["fillcolor"], band["hoverinfo"], band["showlegend"]) == ("--ink/33", "skip", False)


def test_the_base_has_the_colour_of_the_text_and_the_others_one_each(site: Site) -> None:
    (loss, _) = figures.curve_figures(family(site).groups, metrics=figures.TRAINING)
    assert [trace["line"]["color"] for trace in named(loss).values()] == ["--ink", "--c0", "--c1"]
    assert loss.layout["showlegend"]
    (alone, _) = figures.run_figures(site.runs[0], metrics=figures.TRAINING)
    assert not alone.layout["showlegend"]


def test_the_data_of_a_chart_are_its_points(site: Site) -> None:
    (loss, _) = figures.curve_figures(family(site).groups, metrics=figures.TRAINING)
    table = rows(loss)
    for name, trace in named(loss).items():
        mine = [row for row in table if row["curve"] == name]
        assert [int(row["step"]) for row in mine] == list(trace["customdata"])
        assert [float(row["epoch"]) for row in mine] == list(trace["x"])
        assert [float(row["value"]) for row in mine] == list(trace["y"])
        assert all(float(row["lowest"]) <= float(row["value"]) <= float(row["highest"]) for row in mine)
    assert len({row["runs"] for row in table}) == 3
    assert "Last values: demo ×2: 3.945 at step 1495; codes=hard: 3.916" in loss.description


def test_levels_of_a_run_share_a_chart(site: Site) -> None:
    curves = site.runs[0].curves
    both = replace(site.runs[0], curves={**curves, "distance_conv4": curves["distance_conv5"]})
    titles = {figure.title: figure for figure in figures.run_figures(both, metrics=figures.VOCABULARY)}
    assert set(named(titles["Distance to the nearest word"])) == {"conv4", "conv5"}
    assert set(titles) == {
        "Distance to the nearest word",
        "Words in one image's bag (perplexity), conv5",
        "Words used in a batch, conv5",
    }


def test_positive_distances_have_a_logarithmic_axis_with_round_numbers(site: Site) -> None:
    run = site.runs[0]
    found = {figure.title: figure for figure in figures.run_figures(run, metrics=figures.VOCABULARY)}
    axis = found["Words in one image's bag (perplexity), conv5"].layout["yaxis"]
    assert (axis["type"], axis["title"]["text"]) == ("log", "words, logarithmic")
    assert {"20", "50", "100", "200"} <= set(axis["ticktext"])
    curve = run.curves["distance_conv5"]
    zero = replace(run, curves={"distance_conv5": replace(curve, low=(0.0, *curve.low[1:]))})
    (figure,) = figures.run_figures(zero, metrics=figures.VOCABULARY)
    assert "type" not in figure.layout["yaxis"]
    for low, high in ((13.0, 33.0), (0.3, 40.0), (1e-3, 1e4)):
        ticks = figures._log_ticks(low, high)
        inside = [tick for tick in ticks if low <= tick <= high]
        assert ticks == sorted(ticks)
        assert 3 <= len(inside) <= 9
        assert all(math.isclose(float(f"{tick:.2g}"), tick) for tick in ticks)


def test_first_steps_do_not_hide_the_rest_of_the_loss(site: Site) -> None:
    epochs, steps = tuple(i / 10 for i in range(100)), tuple(range(100))
    mean = (40.0, *(5.0 - i / 100 for i in range(99)))
    start = Curve(steps, epochs, mean, (0.5, *mean[1:]), (60.0, *mean[1:]), last=4.0)
    (loss,) = figures.run_figures(replace(site.runs[0], curves={"loss": start}), metrics=figures.TRAINING)
    assert "from 0.5 to 60" in loss.caption
    low, high = loss.layout["yaxis"]["range"]
    assert (low, high) == pytest.approx((4.02 - 0.24, 4.98 + 0.24), abs=0.02)
    assert named(loss)["Loss"]["y"][0] == 40.0, "zooming out shows them"
    calm = replace(start, mean=(5.1, *mean[1:]), low=(5.1, *mean[1:]), high=(5.1, *mean[1:]))
    (loss,) = figures.run_figures(replace(site.runs[0], curves={"loss": calm}), metrics=figures.TRAINING)
    assert (loss.caption, "range" in loss.layout["yaxis"]) == ("", False)


def test_a_chart_of_many_lines_is_split_each_part_with_the_base(site: Site) -> None:
    run = site.runs[0]
    groups = [Group("base", (run,), base=True), *(Group(f"row {i}", (run,)) for i in range(13))]
    found = figures.curve_figures(groups, metrics=("loss",), heading="codes")
    assert [figure.title for figure in found] == [f"Loss, codes, part {i} of 3" for i in (1, 2, 3)]
    assert [list(named(figure)) for figure in found] == [
        ["base", *(f"row {i}" for i in range(0, 6))],
        ["base", *(f"row {i}" for i in range(6, 12))],
        ["base", "row 12"],
    ]


def test_many_seeds_are_not_all_named() -> None:
    many = replace(line(1.0, 2.0), runs=tuple(f"run-{i}" for i in range(10)))
    (trace,) = figures._traces(many, unit="", colour="--c0")
    assert trace["hovertemplate"].endswith("mean of 10 seeds: run-0<br>run-1<br>run-2<br>and 7 more<extra></extra>")


def test_flat_means_that_no_line_moves_in_its_later_half() -> None:
    assert figures.is_flat([line(*(5.0,) * 10, *(1.0,) * 10)])
    assert not figures.is_flat([line(*(5.0,) * 10, *(1.0,) * 9, 1.1)])
    assert not figures.is_flat([line(*(1.0,) * 20), line(*(2.0,) * 20)])
    assert not figures.is_flat([line(*(1.0,) * 19)])


# ------------------------------------------------------------------------------------------------------ tables and studies


def test_differences_of_a_table_have_their_intervals_and_the_papers_marks(tmp_path: Path) -> None:
    base, hard = add_run(tmp_path), add_run(tmp_path, overrides=("method.codes=hard",))
    table = make_table([base], [hard], comparable=True)
    assert result_figures.table_figure(table) is None, "one difference needs no chart"
    lost = table.rows[2]
    cell = replace(lost.cells[0], against_base=Estimate(0.5, 0.25, 1))
    table = replace(table, rows=(*table.rows[:2], replace(lost, cells=(cell,))))
    figure = result_figures.table_figure(table)
    assert figure is not None
    ours, paper = figure.data
    assert (ours["x"], ours["error_x"]["array"], ours["y"]) == ([-1.0, 0.5], [0.4, 0.25], [0, 1])
    assert ours["marker"]["symbol"] == ["circle", "circle-open"]
    assert "Open dots have one seed" in figure.caption
    assert paper["x"] == [pytest.approx(60.0 - 62.44), None]
    assert paper["marker"]["symbol"] == "diamond-open"
    assert [custom[0] for custom in ours["customdata"]] == ["hard codes", "lost row"]
    assert hard.run_id in ours["customdata"][0][2]
    assert figure.layout["yaxis"]["ticktext"] == ["hard codes", "lost row"]
    assert figure.layout["xaxis"]["zeroline"]
    assert rows(figure)[0] == {
        **{"row": "hard codes", "difference": "-1.0", "interval": "0.4"},
        **{"paper": str(60.0 - 62.44), "runs": hard.run_id},
    }
    at_scale = result_figures.table_figure(replace(table, comparable=False))
    assert at_scale is not None
    assert len(at_scale.data) == 1
    assert "another scale" in at_scale.caption


def test_figures_of_a_study_are_optunas_with_the_papers_and_the_best_point(study: StudyReport) -> None:
    contour, history, importance, sliced = result_figures.study_figures(study)
    assert [figure.title for figure in (contour, history, importance, sliced)] == [
        "Objective over two parameters",
        "History",
        "Importance",
        "Objective over each parameter",
    ]
    assert (contour.layout["xaxis"]["title"]["text"], contour.layout["xaxis"]["type"]) == ("method.delta_base", "log")
    marks = contour.data[-1]
    assert (marks["x"], marks["y"]) == ([0.02, 0.04], [5.0, 6.0])
    assert marks["marker"]["symbol"] == ["diamond-open", "circle-open"]
    assert marks["text"] == ["the paper's point: trial 1, 12.00", "the best trial: trial 2, 14.00"]
    points = next(trace for trace in contour.data if trace["type"] == "scatter")
    by_number = {trial.number: trial for trial in study.completed}
    for x, y, text in zip(points["x"], points["y"], points["text"], strict=True):
        trial = by_number[int(text.removeprefix("trial ").partition(":")[0])]
        assert (x, y) == (trial.params["method.delta_base"], trial.params["method.kappa"])
        assert text.endswith(f"{trial.value:.2f}")
    trials = history.data[0]
    assert trials["y"] == [trial.value for trial in study.completed]
    assert trials["error_y"]["array"] == [0.5] * 7
    assert importance.data[0]["type"] == "bar"
    assert [trace["xaxis"] for trace in sliced.data] == ["x", "x2"]
    assert not any({"title", "template", "width"} & set(figure.layout) for figure in result_figures.study_figures(study))


def test_the_data_of_a_study_are_its_trials(study: StudyReport) -> None:
    contour, _, importance, _ = result_figures.study_figures(study)
    table = rows(contour)
    assert [row["trial"] for row in table] == [str(trial.number) for trial in study.trials]
    assert table[5] == {
        **{"trial": "5", "status": "pruned", "method.delta_base": "0.02", "method.kappa": "9.0", "fewshot_5shot": "4.0"},
        **{"interval": "", "paper": "", "runs": ""},
    }
    assert (table[0]["runs"], table[1]["paper"]) == ("demo-s0-1", "paper")
    assert rows(importance)[0] == {"parameter": "method.kappa", "importance": "0.7"}


def test_a_study_without_figures_has_no_charts(study: StudyReport) -> None:
    assert result_figures.study_figures(study.model_copy(update={"figures": {}})) == []


# -------------------------------------------------------------------------------------------------------------- hostility


def test_no_name_ends_a_script_or_becomes_markup(site: Site) -> None:
    run = replace(site.runs[0], run_id=HOSTILE, recipe=HOSTILE)
    trainings = [Training(HOSTILE, HOSTILE, changes, (run,)) for changes in ({HOSTILE: HOSTILE}, {})]
    found = figures.curve_figures(figures.families(trainings)[HOSTILE].groups, metrics=figures.TRAINING)
    content = script_json({"data": found[0].data, "layout": found[0].layout})
    assert not set("<>&") & set(content)
    parsed = json.loads(content)
    for trace in parsed["data"]:
        shown = trace.get("name", "") + trace["legendgroup"] + trace.get("hovertemplate", "").removeprefix("<b>")
        assert "<script" not in shown
        assert "%{y}," not in shown
    assert {row["runs"] for row in rows(found[0])} == {HOSTILE}


def test_what_is_not_finite_is_null_in_a_page() -> None:
    assert json.loads(script_json({"y": [1.5, math.nan, math.inf]})) == {"y": [1.5, None, None]}
