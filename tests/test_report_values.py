"""What a report reads: curves against plain loops, rules on vocabularies, study files, runs and their provenance."""

from __future__ import annotations

import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from obowlab.config import load_recipe
from obowlab.files import read_checked
from obowlab.report import curves
from obowlab.report import figure_cache as drawn
from obowlab.report import read as gather
from obowlab.report.curves import Curve, over_seeds, read_curves, reduce, with_point
from obowlab.report.model import Measured
from obowlab.report.studies import read_studies
from obowlab.report.vocabulary_health import RULES, Finding, judge
from obowlab.runs.folder import RunFolder, RunSummary
from obowlab.runs.records import Record, store_records
from tests.command_line import result
from tests.report_store import add_gallery, add_run, add_study


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text(
        "".join(json.dumps({"step": i, "time": float(i), "metrics": line}) + "\n" for i, line in enumerate(lines, start=1))
    )
    return path


def flat(value: float, *, count: int = 20) -> Curve:
    values = (value,) * count
    return Curve(tuple(float(i) for i in range(count)), values, values, values, last=value)


# ----------------------------------------------------------------------------------------------------------------- curves


def test_reduced_curve_is_mean_and_extremes_of_every_part() -> None:
    rng = random.Random(0)
    epochs = sorted(rng.uniform(0.01, 18.0) for _ in range(1400))
    values = [rng.gauss(0, 1) for _ in epochs]
    found = reduce(np.array(epochs), np.array(values), end=18.0)
    assert found is not None
    slow: dict[int, list[float]] = {}
    for epoch, value in zip(epochs, values, strict=True):
        slow.setdefault(min(99, int(epoch / 18.0 * 100)), []).append(value)
    assert len(found.epoch) == len(slow) <= curves.NUM_BINS
    for place, mean, low, high, (part, inside) in zip(
        found.epoch, found.mean, found.low, found.high, sorted(slow.items()), strict=True
    ):
        assert place == pytest.approx((part + 0.5) * 0.18)
        assert mean == pytest.approx(sum(inside) / len(inside))
        assert (low, high) == (min(inside), max(inside))
    assert (min(found.low), max(found.high)) == (min(values), max(values))
    assert found.last == values[-1]


def test_short_curve_is_kept_as_it_is_and_odd_values_are_counted(tmp_path: Path) -> None:
    lines = [{"epoch": i / 2, "loss": value} for i, value in enumerate([3.0, "nan", 2.0, "inf", 1.0])]
    lines[3].pop("epoch")  # then steps are the places
    found = read_curves(write(tmp_path / "metrics.jsonl", lines), epochs=2)["loss"]
    assert found == Curve((1.0, 3.0, 5.0), (3.0, 2.0, 1.0), (3.0, 2.0, 1.0), (3.0, 2.0, 1.0), last=1.0, omitted=2)
    assert reduce(np.array([1.0]), np.array([np.nan]), end=1.0) is None


def test_only_drawn_metrics_are_read_and_a_metric_may_begin_late(tmp_path: Path) -> None:
    lines = [{"epoch": 0.5, "loss": 1.0, "learning_rate": 0.1}, {"epoch": 1.0, "loss": 2.0, "monitor_accuracy": 7.0}]
    found = read_curves(write(tmp_path / "metrics.jsonl", lines), epochs=1)
    assert set(found) == {"loss", "monitor_accuracy"}
    assert found["monitor_accuracy"].epoch == (1.0,)
    assert read_curves(tmp_path / "nothing.jsonl", epochs=1) == {}


@pytest.mark.parametrize("tail", [b'{"step": 3, "ti', b"\0\0\0\0\n", b'{"step": 3, "ti\n{"step": 4'])
def test_torn_tail_is_left_out(tmp_path: Path, tail: bytes) -> None:
    path = write(tmp_path / "metrics.jsonl", [{"epoch": 1, "loss": 1.0}, {"epoch": 2, "loss": 2.0}])
    path.write_bytes(path.read_bytes() + tail)
    assert read_curves(path, epochs=2)["loss"].mean == (1.0, 2.0)


def test_whole_seeds_are_averaged_point_by_point() -> None:
    rng = random.Random(1)
    seeds = [Curve(tuple(range(50)), tuple(rng.random() for _ in range(50)), (), (), last=float(s)) for s in range(3)]
    slow = [[seed.mean[i] for seed in seeds] for i in range(50)]
    found = over_seeds(seeds)
    assert found.mean == tuple(sum(each) / 3 for each in slow)
    assert (found.low, found.high) == (tuple(map(min, slow)), tuple(map(max, slow)))
    twice = Curve((1.0, 1.0), (4.0, 6.0), (), (), last=6.0)  # two values of one moment: the later one counts
    assert over_seeds([twice, twice]).mean == (6.0,)


def test_seeds_are_averaged_where_all_have_come() -> None:
    long = Curve((1.0, 2.0, 3.0), (4.0, 6.0, 8.0), (0.0,) * 3, (9.0,) * 3, last=8.0)
    short = Curve((1.0, 2.0), (2.0, 3.0), (0.0,) * 2, (9.0,) * 2, last=3.0)
    assert over_seeds([long, short]) == Curve((1.0, 2.0), (3.0, 4.5), (2.0, 3.0), (4.0, 6.0), last=5.5)
    assert with_point(short, epoch=5.0, value=1.0).mean == (2.0, 3.0, 1.0)


# ----------------------------------------------------------------------------------------------------------------- health

RECIPE = {"method": {"num_words": 1000, "vocabulary": "queue"}, "training": {"batch_size": 100}}
HEALTHY = {
    "perplexity_image_conv5": 20.0,
    "perplexity_batch_conv5": 600.0,
    "words_used_conv5": 70.0,
    "word_age_conv5": 5.0,
    "distance_conv5": 30.0,
}


def test_healthy_vocabulary_breaks_no_rule() -> None:
    found = judge({name: flat(value) for name, value in HEALTHY.items()}, recipe=RECIPE)
    assert {finding.rule for finding in found} == set(RULES)
    assert [finding for finding in found if not finding.healthy] == []


@pytest.mark.parametrize(
    ("metric", "value", "broken"),
    [
        ("perplexity_image_conv5", 350.0, "distinct"),
        ("perplexity_image_conv5", 1.2, "bag"),
        ("perplexity_batch_conv5", 45.0, "breadth"),
        ("words_used_conv5", 4.0, "breadth"),
        ("word_age_conv5", 21.0, "fresh"),
    ],
)
def test_every_trouble_is_found(metric: str, value: float, broken: str) -> None:
    found = judge({name: flat(level) for name, level in {**HEALTHY, metric: value}.items()}, recipe=RECIPE)
    assert [finding.rule for finding in found if not finding.healthy] == [broken]
    assert all(finding.level == "conv5" for finding in found if not finding.healthy)


def test_collapse_is_measured_against_the_highest_distance() -> None:
    falling = Curve((1.0, 2.0, 3.0), (100.0, 10.0, 0.9), (90.0, 9.0, 0.5), (120.0, 12.0, 1.0), last=0.9)
    (spread, _) = judge({"distance_conv4": falling}, recipe=RECIPE)
    assert spread == Finding("spread", "conv4", False, "squared distance 0.9, at most 120 during training")


def test_age_is_no_trouble_for_means_and_odd_numbers_are() -> None:
    recipe = {**RECIPE, "method": {"num_words": 1000, "vocabulary": "kmeans_replace"}}
    assert not any(f.rule == "fresh" for f in judge({"word_age_conv5": flat(900.0)}, recipe=recipe))
    odd = Curve((1.0,), (1.0,), (1.0,), (1.0,), last=1.0, omitted=3)
    assert [f.said for f in judge({"loss": odd}, recipe=RECIPE)] == ["3 values are not finite"]
    assert judge({"loss": flat(1.0)}, recipe={}) == ()


# ---------------------------------------------------------------------------------------------------------------- studies


def test_study_file_is_read(tmp_path: Path) -> None:
    add_study(tmp_path, run_id="demo-s0-1")
    (study,) = read_studies(tmp_path)
    assert len(study.trials) == 8
    assert [trial.number for trial in study.completed] == [0, 1, 2, 3, 4, 6, 7]
    assert study.trials[5].reached is None
    assert [parameter.key for parameter in study.ranked] == ["method.kappa", "method.delta_base"]
    assert study.best_trial is study.trials[2]
    assert study.paper_trial is study.trials[1]
    assert [run.run_id for run in study.trials[0].runs] == ["demo-s0-1"]


def test_sparse_and_damaged_study_files_do_not_stop_a_report(tmp_path: Path) -> None:
    path = add_study(tmp_path)
    path.write_text(
        '{"name": "x", "trials": [{"number": 0, "status": "failed"}, {"number": 1, "status": "completed", "value": 2}]}'
    )
    (study,) = read_studies(tmp_path)
    assert (study.name, study.best_trial, study.paper_trial, len(study.completed)) == ("x", None, None, 1)
    for text in ("{", "[]", '{"name": "x", "trials": [{}]}', '{"name": "x", "trials": [{"number": 1, "value": "x"}]}'):
        path.write_text(text)
        (study,) = read_studies(tmp_path)
        assert study.name == "kappa-delta"
        assert "cannot be read" in study.problems[0], text


# -------------------------------------------------------------------------------------------------------- what is kept


def draw(run: Path, *, final: float | None = None) -> drawn.Drawn:
    """Draw a run of 30 epochs with a final 5-shot result."""
    measured = [] if final is None else [Measured("fewshot_5shot", "%", "synthetic", "fewshot v1", (final, 0.5), None, 200)]
    return drawn.drawn(run, epochs=30, measured=measured)


@pytest.fixture
def metrics_run(tmp_path: Path) -> Path:
    run = tmp_path / "runs" / "demo-s0-00000000"
    run.mkdir(parents=True)
    write(run / "metrics.jsonl", [{"epoch": i / 10, "loss": 1 + i / 3, "distance_conv5": 2.0 + i % 7} for i in range(300)])
    write(run / "online.jsonl", [{"epoch": 1, "fewshot_5shot": 6.25}])
    return run


def test_what_is_kept_of_a_run_is_what_was_drawn_and_is_used_until_anything_changes(
    metrics_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, kept = metrics_run, metrics_run.parent / drawn.FOLDER / f"{metrics_run.name}.json"
    first = draw(run)
    assert first == drawn.draw(run, epochs=30, final={})
    assert set(first.curves) == {"loss", "distance_conv5", "fewshot_5shot"}
    assert [figure.title for figure in (*first.training, *first.vocabulary)] == [
        "Loss",
        "5-shot during training",
        "Distance to the nearest word, conv5",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(drawn, "draw", None)
        assert draw(run) == first
        with pytest.raises(TypeError):
            draw(run, final=9.0)
    assert draw(run, final=9.0).curves["fewshot_5shot"].mean == (6.25, 9.0)
    assert draw(run) == first
    facts = kept.stat()
    for content in ("damaged", "[]", "{}", json.dumps({"stamp": json.loads(kept.read_text())["stamp"]})):
        kept.write_text(content)
        assert draw(run) == first, content
    assert kept.stat().st_size == facts.st_size
    monkeypatch.setattr(drawn, "code_hash", lambda: "of tomorrow")
    monkeypatch.setattr(drawn, "TRAINING", ("loss",))
    assert [figure.title for figure in draw(run).training] == ["Loss"]
    write(run / "metrics.jsonl", [{"epoch": 1, "loss": 5.0}])
    assert draw(run).curves["loss"].mean == (5.0,)
    (run / "online.jsonl").unlink()
    assert set(draw(run).curves) == {"loss"}


def test_infinities_survive_being_kept(metrics_run: Path) -> None:
    write(metrics_run / "metrics.jsonl", [{"epoch": 1, "loss": 5.0}, {"epoch": 2, "loss": "nan"}, {"epoch": 3, "loss": 1e300}])
    assert draw(metrics_run) == draw(metrics_run) == drawn.draw(metrics_run, epochs=30, final={})
    assert draw(metrics_run).curves["loss"].omitted == 1


def test_a_store_that_cannot_be_written_is_read_all_the_same(metrics_run: Path) -> None:
    (metrics_run.parent / drawn.FOLDER).write_text("")
    assert draw(metrics_run).curves["loss"].last == 1 + 299 / 3


def test_several_may_draw_one_run_at_once(metrics_run: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: draw(metrics_run), range(24)))
    assert all(each == found[0] for each in found)
    assert [path.name for path in (metrics_run.parent / drawn.FOLDER).iterdir()] == [f"{metrics_run.name}.json"]


def test_a_run_is_drawn_ahead_and_one_that_cannot_be_read_does_not_matter(tmp_path: Path) -> None:
    good, damaged = add_run(tmp_path), add_run(tmp_path, seed=1)
    attempts = damaged.path / "attempts.jsonl"
    attempts.write_text("{\n" + attempts.read_text())  # with whole lines behind it: none that is still being written
    for folder in (good, damaged):
        gather.draw_ahead(folder)
    assert [path.name for path in (tmp_path / drawn.FOLDER).iterdir()] == [f"{good.run_id}.json"]
    site = gather.gather(gather.read_store(tmp_path), tables=gather.Tables())
    assert [run.run_id for run in site.runs] == [good.run_id]


# ------------------------------------------------------------------------------------------------------------------- runs


def read(folder: RunFolder) -> Any:
    summary = RunSummary(folder.path, folder.info, folder.state)
    return gather.read_run(summary, record=Record.of(summary))


def test_run_is_read_with_its_provenance(tmp_path: Path) -> None:
    folder = add_run(tmp_path, seed=1, overrides=("method.codes=hard",))
    folder.append_attempt({"host": "elsewhere"})
    add_gallery(folder)
    (folder.path / "mirror.json").write_text(json.dumps({"stores": {"sqlite:///x": {"run_id": "f00d"}}}))
    run = read(folder)
    assert (run.variant, run.label, run.base) == (
        "method.codes=hard",
        "demo: method.codes=hard",
        "the recipe demo of this version",
    )
    assert [s for s in run.settings if s.shipped is not None] == [
        gather.Setting("method.codes", "hard", "--set method.codes=hard", "soft")
    ]
    assert (run.mlflow_run_id, run.dirty, run.data_hash, run.starts, run.elapsed_s) == ("f00d", True, "da7a" * 16, 2, 75.0)
    assert run.machine["host"] == "elsewhere"
    assert run.versions == {"obowlab": folder.info.version, "torch": "2.14.1"}
    assert run.value("fewshot_5shot") == (13.5, 0.5)
    assert run.gallery is not None
    assert run.gallery.preview == ("conv5-0.png",)
    online = run.curves["fewshot_5shot"]
    assert (online.epoch[-1], online.mean) == (float(run.epochs), (7.0, 8.0, 9.0, 13.5))
    assert run.warnings == ()


def test_seeds_are_one_family_and_other_protocols_do_not_part_them(tmp_path: Path) -> None:
    runs = [read(add_run(tmp_path, seed=seed)) for seed in (0, 1)]
    measured_otherwise = read(add_run(tmp_path, seed=2, overrides=("evaluation.knn.num_neighbours=5",)))
    other = read(add_run(tmp_path, overrides=("method.kappa=7",)))
    assert len({run.family for run in (*runs, measured_otherwise)}) == 1
    assert measured_otherwise.variant == ""
    assert other.family != runs[0].family


def test_newest_measurement_counts_and_own_data_come_first() -> None:
    elsewhere = {**result("fewshot", "student", 50.0), "details": {"dataset": "other"}}
    rows = gather.tabulate([elsewhere, result("fewshot", "student", 1.0), result("fewshot", "student", 2.0)], dataset="synthetic")
    assert [(row.dataset, row.student) for row in rows] == [("synthetic", (2.0, 0.5)), ("other", (50.0, 0.5))]


def test_run_of_another_version_is_shown_and_a_damaged_one_named(tmp_path: Path) -> None:
    old, damaged = add_run(tmp_path), add_run(tmp_path, seed=1)
    values = read_checked(old.path / "run.json")
    values["recipe"]["method"]["unheard_of"] = 3
    values["name"] = "gone"
    (old.path / "run.json").write_text(json.dumps(values))
    (next((damaged.path / "results").glob("*.json"))).write_text("{")
    site = gather.gather(gather.read_store(tmp_path), tables=gather.Tables())
    (run,) = site.runs
    assert "method.unheard_of" in {setting.key for setting in run.settings}
    assert run.base.startswith("the defaults")
    assert len(site.problems) == 1
    assert damaged.run_id in site.problems[0]


def test_a_store_is_read_once_and_gives_the_records_of_tables(tmp_path: Path) -> None:
    for seed in (0, 1):
        add_run(tmp_path, seed=seed)
    add_run(tmp_path, seed=2, status="failed", message="it broke")
    twin = RunFolder.create(replace(load_recipe("demo"), name="twin"), seed=0, runs_root=tmp_path)  # the same run, not trained
    store = gather.read_store(tmp_path)
    assert twin.run_id in {record.run_id for _, record in store.runs}
    assert store.records == store_records(tmp_path)
    assert len(store.records) == 3


def test_tables_come_from_the_store_at_the_scales_it_has(tmp_path: Path) -> None:
    assert gather.tables_at([], store=gather.read_store(tmp_path)).tables == ()
    loaded = load_recipe("tiny-vanilla")
    RunFolder.create(loaded, seed=0, runs_root=tmp_path)
    found = gather.tables_at([], store=gather.read_store(tmp_path))
    assert {table.scale for table in found.tables} == {"tiny"}
    assert "table3" in {table.name for table in found.tables}
    assert {table.scale for table in gather.tables_at(["paper"], store=gather.read_store(tmp_path)).tables} == {"paper"}


def test_moments_do_not_depend_on_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        assert gather.moment(1_795_000_000.0) == "2026-11-18 11:06 UTC"
    finally:
        monkeypatch.undo()
        time.tzset()
