"""What a report reads: curves against plain loops, rules on vocabularies, study files, runs and their provenance."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from obowlab import text
from obowlab.config import load_recipe
from obowlab.files.records import read_checked
from obowlab.report import curves, figures
from obowlab.report import read as gather
from obowlab.report.curves import CACHE, Curve, cached_curves, over_seeds, read_curves, reduce, with_point
from obowlab.report.labels import in_short
from obowlab.report.model import Gallery, Setting
from obowlab.report.pages import build_site
from obowlab.report.vocabulary_health import RULES, Finding, judge
from obowlab.runs.folder import TAG, RunFolder
from obowlab.runs.listing import RunSummary, list_runs
from obowlab.runs.records import Record, store_records
from obowlab.runs.results import Measured, tabulate
from obowlab.studies.schema import FORMAT, StudyReport, read_studies, read_study
from obowlab.tables.build import build_table
from obowlab.tables.kept import keep_table
from obowlab.tables.spec import load_table
from tests.command_line import result
from tests.report_store import add_gallery, add_row_runs, add_run, add_study, own_table

GOLDEN = Path(__file__).parent / "golden" / "curves.json"


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text(
        "".join(json.dumps({"step": i, "time": float(i), "metrics": line}) + "\n" for i, line in enumerate(lines, start=1))
    )
    return path


def flat(value: float, *, count: int = 20) -> Curve:
    values = (value,) * count
    return curve(range(count), values)


def curve(epochs: Iterable[float], values: Iterable[float], *, last: float | None = None) -> Curve:
    """Return a curve without a band, of ten steps an epoch."""
    places, mean = tuple(map(float, epochs)), tuple(map(float, values))
    steps = tuple(round(10 * place) for place in places)
    return Curve(steps, places, mean, mean, mean, last=mean[-1] if last is None else last)


# ----------------------------------------------------------------------------------------------------------------- curves


def test_reduced_curve_is_mean_and_extremes_of_every_part() -> None:
    rng = random.Random(0)
    epochs = sorted(rng.uniform(0.01, 18.0) for _ in range(1400))
    values = [rng.gauss(0, 1) for _ in epochs]
    steps = [round(10 * epoch) for epoch in epochs]
    found = reduce(np.array(epochs), np.array(values), steps=np.array(steps, dtype=float), end=18.0)
    assert found is not None
    slow: dict[int, list[tuple[float, int]]] = {}
    for epoch, value, step in zip(epochs, values, steps, strict=True):
        slow.setdefault(min(99, int(epoch / 18.0 * 100)), []).append((value, step))
    assert len(found.epoch) == len(slow) <= curves.NUM_BINS
    exact = {"rel": 10 ** (1 - curves.DIGITS)}
    for i, (part, points) in enumerate(sorted(slow.items())):
        inside = [value for value, _ in points]
        assert found.epoch[i] == pytest.approx((part + 0.5) * 0.18, **exact)
        assert found.mean[i] == pytest.approx(sum(inside) / len(inside), **exact)
        assert (found.low[i], found.high[i]) == (pytest.approx(min(inside), **exact), pytest.approx(max(inside), **exact))
        assert found.step[i] == pytest.approx(sum(step for _, step in points) / len(points), abs=0.5)
    assert (min(found.low), max(found.high)) == (pytest.approx(min(values), **exact), pytest.approx(max(values), **exact))
    assert found.last == values[-1]


def test_short_curve_is_kept_as_it_is_and_odd_values_are_counted(tmp_path: Path) -> None:
    lines = [{"epoch": i / 2, "loss": value} for i, value in enumerate([3.0, "nan", 2.0, "inf", 1.0])]
    lines[3].pop("epoch")  # then steps are the places
    found = read_curves(write(tmp_path / "metrics.jsonl", lines), epochs=2)["loss"]
    assert found == replace(curve((1, 3, 5), (3, 2, 1)), step=(1, 3, 5), omitted=2)
    assert reduce(np.array([1.0]), np.array([np.nan]), steps=np.array([1.0]), end=1.0) is None


def test_all_metrics_are_read_and_a_metric_may_begin_late(tmp_path: Path) -> None:
    lines = [{"epoch": 0.5, "loss": 1.0, "learning_rate": 0.1}, {"epoch": 1.0, "loss": 2.0, "monitor_accuracy": 7.0}]
    found = read_curves(write(tmp_path / "metrics.jsonl", lines), epochs=1)
    assert set(found) == {"loss", "learning_rate", "monitor_accuracy"}
    assert found["monitor_accuracy"].epoch == (1.0,)
    assert read_curves(tmp_path / "nothing.jsonl", epochs=1) == {}


@pytest.mark.parametrize("tail", [b'{"step": 3, "ti', b"\0\0\0\0\n", b'{"step": 3, "ti\n{"step": 4'])
def test_torn_tail_is_left_out(tmp_path: Path, tail: bytes) -> None:
    path = write(tmp_path / "metrics.jsonl", [{"epoch": 1, "loss": 1.0}, {"epoch": 2, "loss": 2.0}])
    path.write_bytes(path.read_bytes() + tail)
    assert read_curves(path, epochs=2)["loss"].mean == (1.0, 2.0)


def test_whole_seeds_are_averaged_point_by_point() -> None:
    rng = random.Random(1)
    seeds = [curve(range(50), (rng.random() for _ in range(50))) for _ in range(3)]
    slow = [[seed.mean[i] for seed in seeds] for i in range(50)]
    found = over_seeds(seeds)
    assert found.mean == pytest.approx([sum(each) / 3 for each in slow], rel=1e-4)
    assert found.step == seeds[0].step
    assert (found.low, found.high) == (tuple(map(min, slow)), tuple(map(max, slow)))
    twice = curve((1, 1), (4, 6))  # two values of one moment: the later one counts
    assert over_seeds([twice, twice]).mean == (6.0,)


def test_seeds_are_averaged_where_all_have_come() -> None:
    long, short = curve((1, 2, 3), (4, 6, 8)), curve((1, 2), (2, 3))
    expected = Curve((10, 20), (1.0, 2.0), (3.0, 4.5), (2.0, 3.0), (4.0, 6.0), last=5.5)
    assert over_seeds([long, short]) == over_seeds([short, long]) == expected
    longer = with_point(short, step=50, epoch=5.0, value=1.0)
    assert longer == curve((1, 2, 5), (2, 3, 1))


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
    falling = replace(curve((1, 2, 3), (100, 10, 0.9)), high=(120.0, 12.0, 1.0))
    (spread, _) = judge({"distance_conv4": falling}, recipe=RECIPE)
    assert spread == Finding("spread", "conv4", False, "squared distance 0.9, at most 120 during training")


def test_age_is_no_trouble_for_means_and_odd_numbers_are() -> None:
    recipe = {**RECIPE, "method": {"num_words": 1000, "vocabulary": "kmeans_replace"}}
    assert not any(f.rule == "fresh" for f in judge({"word_age_conv5": flat(900.0)}, recipe=recipe))
    odd = replace(curve((1,), (1,)), omitted=3)
    assert [f.detail for f in judge({"loss": odd}, recipe=RECIPE)] == ["3 values are not finite"]
    assert judge({"loss": flat(1.0)}, recipe={}) == ()


# ---------------------------------------------------------------------------------------------------------------- studies


def test_study_file_is_read(tmp_path: Path) -> None:
    add_study(tmp_path, run_id="demo-s0-1")
    (study,) = read_studies(tmp_path)
    assert len(study.trials) == 8
    assert [trial.number for trial in study.completed] == [0, 1, 2, 3, 4, 6, 7]
    assert study.trials[5].final_value is None
    assert [parameter.key for parameter in study.ranked] == ["method.kappa", "method.delta_base"]
    assert study.best_trial is study.trials[2]
    assert study.paper_trial is study.trials[1]
    assert [run.run_id for run in study.trials[0].runs] == ["demo-s0-1"]


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    path = add_study(tmp_path, run_id="demo-s0-1", figures=True)
    study = read_study(path)
    path.write_text(study.model_dump_json(indent=1))
    assert read_study(path) == study
    assert study.figures["contour"].data
    later = {**json.loads(path.read_text()), "format": 2, "unheard_of": 1}
    path.write_text(json.dumps(later))
    assert read_study(path) == study.model_copy(update={"format": 2})
    path.write_text(json.dumps({**later, "trials": {"of": "another shape"}}))
    assert "newer version of obowlab: update obowlab" in read_study(path).problems[0]
    assert read_study(path).format > FORMAT


def test_sparse_and_damaged_study_files_do_not_stop_a_report(tmp_path: Path) -> None:
    path = add_study(tmp_path)
    path.write_text(
        '{"name": "x", "trials": [{"number": 0, "status": "failed"}, {"number": 1, "status": "completed", "value": 2}]}'
    )
    (study,) = read_studies(tmp_path)
    assert (study.name, study.best_trial, study.paper_trial, len(study.completed)) == ("x", None, None, 1)
    for content in ("{", "[]", '{"name": "x", "trials": [{}]}', '{"name": "x", "trials": [{"number": 1, "value": "x"}]}'):
        path.write_text(content)
        (study,) = read_studies(tmp_path)
        assert study.name == "kappa-delta"
        assert "cannot be read" in study.problems[0], content


# ------------------------------------------------------------------------------------------------------------------ cache


@pytest.fixture
def metrics_run(tmp_path: Path) -> Path:
    run = tmp_path / "runs" / "demo-s0-00000000"
    run.mkdir(parents=True)
    write(run / "metrics.jsonl", [{"epoch": i / 10, "loss": 1 + i / 3, "distance_conv5": 2.0 + i % 7} for i in range(300)])
    write(run / "online.jsonl", [{"epoch": 1, "fewshot_5shot": 6.25}])
    return run


def read_files(run: Path) -> dict[str, Curve]:
    return {name: found for file in curves.FILES for name, found in read_curves(run / file, epochs=30).items()}


def test_cached_curves_are_those_of_the_files_and_are_used_until_anything_changes(
    metrics_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, path = metrics_run, metrics_run.parent / CACHE / f"{metrics_run.name}.json"
    first = cached_curves(run, epochs=30)
    assert first == read_files(run)
    assert set(first) == {"loss", "distance_conv5", "fewshot_5shot"}
    with monkeypatch.context() as patch:
        patch.setattr(curves, "read_curves", None)
        assert cached_curves(run, epochs=30) == first
        with pytest.raises(TypeError):
            cached_curves(run, epochs=31)
    size = path.stat().st_size
    for content in ("damaged", "[]", "{}", json.dumps({"stamp": json.loads(path.read_text())["stamp"]})):
        path.write_text(content)
        assert cached_curves(run, epochs=30) == first, content
    assert path.stat().st_size == size
    with monkeypatch.context() as patch:
        patch.setattr(curves, "CURVES_VERSION", curves.CURVES_VERSION + 1)
        patch.setattr(curves, "NUM_BINS", 1)
        patch.setattr(curves, "read_curves", lambda path, *, epochs: {})
        assert cached_curves(run, epochs=30) == {}
    write(run / "metrics.jsonl", [{"epoch": 1, "loss": 5.0}])
    assert cached_curves(run, epochs=30)["loss"].mean == (5.0,)
    (run / "online.jsonl").unlink()
    assert set(cached_curves(run, epochs=30)) == {"loss"}


def test_other_curves_need_another_version(metrics_run: Path) -> None:
    values = {name: asdict(found) for name, found in read_files(metrics_run).items()}
    text = json.dumps({"version": curves.CURVES_VERSION, "curves": values}) + "\n"
    if os.environ.get("OBOWLAB_WRITE_GOLDEN"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8"), "other curves of the same files: raise CURVES_VERSION, `make golden`"


def test_infinities_survive_the_cache(metrics_run: Path) -> None:
    write(metrics_run / "metrics.jsonl", [{"epoch": 1, "loss": 5.0}, {"epoch": 2, "loss": "nan"}, {"epoch": 3, "loss": 1e300}])
    assert cached_curves(metrics_run, epochs=30) == cached_curves(metrics_run, epochs=30) == read_files(metrics_run)
    assert cached_curves(metrics_run, epochs=30)["loss"].omitted == 1


def test_a_store_that_cannot_be_written_is_read_all_the_same(metrics_run: Path) -> None:
    (metrics_run.parent / CACHE).write_text("")
    assert cached_curves(metrics_run, epochs=30)["loss"].last == 1 + 299 / 3


def test_several_processes_may_cache_one_run_at_once(metrics_run: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: cached_curves(metrics_run, epochs=30), range(24)))
    assert all(each == found[0] for each in found)
    assert [path.name for path in (metrics_run.parent / CACHE).iterdir()] == [f"{metrics_run.name}.json"]


def test_curves_of_a_finished_run_are_cached_and_those_of_a_damaged_one_left_to_the_report(tmp_path: Path) -> None:
    good, damaged = add_run(tmp_path), add_run(tmp_path, seed=1)
    metrics = damaged.path / "metrics.jsonl"
    metrics.write_text("{\n" + metrics.read_text())  # with whole lines behind it: none that is still being written
    for folder in (good, damaged):
        gather.cache_curves(folder)
    assert [path.name for path in (tmp_path / CACHE).iterdir()] == [f"{good.run_id}.json"]
    site = gather.gather(gather.read_store(tmp_path), tables=gather.Tables())
    assert [run.run_id for run in site.runs] == [good.run_id]


def test_a_final_result_ends_the_curve_of_results_during_training() -> None:
    during = {"fewshot_5shot": curve((1, 2), (6.25, 7)), "loss": curve((1, 2), (3, 2))}
    measured = [Measured("fewshot_5shot", "%", "synthetic", "fewshot v1", {"value": 9.0, "interval": 0.5}, None, 200)]
    found = gather.final_curves(during, measured=measured, step=300, epochs=30)
    assert found == {"fewshot_5shot": curve((1, 2, 30), (6.25, 7, 9)), "loss": during["loss"]}
    there = gather.final_curves(found, measured=measured, step=300, epochs=30)
    assert there == found, "a result during training at the last epoch is the last point"


# ------------------------------------------------------------------------------------------------------------------- runs


def read(folder: RunFolder) -> Any:
    summary = RunSummary(folder.path, folder.info, folder.state)
    return gather.read_run(summary, record=Record.of(summary))


def test_run_is_read_with_its_provenance(tmp_path: Path) -> None:
    folder = add_run(tmp_path, seed=1, overrides=("method.codes=hard",))
    folder.append_attempt({"host": "elsewhere"})
    add_gallery(folder)
    (folder.path / "mirror.json").write_text(json.dumps({"stores": {"sqlite:///x": {"experiment": "3", "run_id": "f00d"}}}))
    run = read(folder)
    assert run.changes == {"method.codes": "hard"}
    assert (run.short, run.label, run.base) == ("codes=hard", "demo: codes=hard", "the recipe demo of this version")
    page = "http://127.0.0.1:5000/#/experiments/3/runs/f00d?workflowType=machine_learning"
    assert (run.mlflow_page, run.mlflow_local) == (page, True)
    assert [s for s in run.settings if s.shipped is not None] == [
        Setting("method.codes", "hard", "--set method.codes=hard", "soft")
    ]
    assert (run.mlflow_run_id, run.dirty, run.data_hash, run.starts, run.elapsed_s) == ("f00d", True, "da7a" * 16, 2, 75.0)
    assert run.machine["host"] == "elsewhere"
    assert run.versions == {"obowlab": folder.info.version, "torch": "2.14.1"}
    assert run.measurement("fewshot_5shot") == {"value": 13.5, "interval": 0.5}
    assert run.gallery == Gallery(folder.path / "words")
    online = run.curves["fewshot_5shot"]
    assert (online.epoch[-1], online.mean) == (float(run.epochs), (7.0, 8.0, 9.0, 13.5))
    assert run.warnings == ()


def test_seeds_are_one_family_and_other_protocols_do_not_part_them(tmp_path: Path) -> None:
    runs = [read(add_run(tmp_path, seed=seed)) for seed in (0, 1)]
    measured_otherwise = read(add_run(tmp_path, seed=2, overrides=("evaluation.knn.num_neighbours=5",)))
    other = read(add_run(tmp_path, overrides=("method.kappa=7",)))
    assert len({run.family for run in (*runs, measured_otherwise)}) == 1
    assert measured_otherwise.short == ""
    assert other.family != runs[0].family


def test_newest_measurement_counts_and_own_data_come_first() -> None:
    elsewhere = {**result("fewshot", "student", 50.0), "details": {"dataset": "other"}}
    rows = tabulate([elsewhere, result("fewshot", "student", 1.0), result("fewshot", "student", 2.0)], dataset="synthetic")
    assert [(row.dataset, row.student and row.student["value"]) for row in rows] == [("synthetic", 2.0), ("other", 50.0)]


def test_an_interval_that_is_not_symmetric_keeps_its_ends() -> None:
    wilson = {"name": "linear_top1", "value": 97.25, "interval": 0.93, "low": 96.17, "high": 98.03, "count": 1200}
    (row,) = tabulate([{**result("linear", "student", 0.0), "measurements": [wilson]}], dataset="synthetic")
    assert text.measurement(row.student) == "97.25 [96.17, 98.03]"


def test_run_of_another_version_is_shown_and_a_damaged_one_named(tmp_path: Path) -> None:
    old, damaged = add_run(tmp_path), add_run(tmp_path, seed=1)
    values = read_checked(old.path / "run.json")
    values["recipe"]["method"]["unheard_of"] = 3
    values["name"], values["sources"] = "gone", {}
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
    duplicate = RunFolder.create(
        replace(load_recipe("demo"), name="duplicate"), seed=0, runs_root=tmp_path
    )  # the same run, not trained
    store = gather.read_store(tmp_path)
    assert duplicate.run_id in {record.run_id for _, record in store.runs}
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


def test_timestamps_do_not_depend_on_the_time_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        assert text.timestamp(1_795_000_000.0, utc=True) == "2026-11-18 11:06 UTC"
    finally:
        monkeypatch.undo()
        time.tzset()


# -------------------------------------------------------------------------------------------------------------- trainings


def own(folder: Path, name: str, text: str) -> str:
    path = folder / f"{name}.toml"
    path.write_text(text)
    return str(path)


def trainings(runs_root: Path) -> list[tuple[str, str, list[str]]]:
    site = gather.gather(gather.read_store(runs_root), tables=gather.Tables())
    return [(each.base_recipe, each.label, [run.run_id for run in each.runs]) for each in site.trainings]


def test_seeds_of_one_training_are_together_whatever_its_recipe_is_called(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    titled = own(tmp_path, "short", 'extends = "demo-vanilla"\ntitle = "Two epochs"\n\n[training]\nepochs = 2\n')
    plain = own(tmp_path, "again", 'extends = "short"\n')
    loaded = [
        *((load_recipe("demo"), seed) for seed in (1, 0)),
        *((load_recipe("demo-vanilla"), seed) for seed in (0, 2)),  # demo under another name
        (load_recipe(titled), 0),
        (load_recipe(plain), 1),
        (load_recipe("demo", overrides=["training.epochs=2", "evaluation.knn.num_neighbours=5"]), 2),
        (load_recipe(titled, overrides=["method.kappa=9"]), 0),
        (load_recipe("demo", overrides=["method.kappa=9"]), 0),
    ]
    runs = [RunFolder.create(each, seed=seed, runs_root=root).run_id for each, seed in loaded]
    assert trainings(root) == [
        ("demo", "demo", [runs[1], runs[2], runs[0], runs[3]]),
        ("demo", "Two epochs", [runs[4], runs[5], runs[6]]),
        ("demo", "Two epochs, kappa=9", [runs[7]]),
        ("demo", "kappa=9", [runs[8]]),
    ]


def test_a_recipe_of_ones_own_is_compared_with_what_it_starts_from(tmp_path: Path) -> None:
    name = own(tmp_path, "mine", 'extends = "tiny-full"\n\n[method]\nkappa = 3.5\n')
    run = read(RunFolder.create(load_recipe(name, overrides=["training.epochs=3"]), seed=0, runs_root=tmp_path / "runs"))
    assert run.changes == {"method.kappa": "3.5", "training.epochs": "3"}
    assert (run.short, run.base_recipe, run.base) == ("kappa=3.5, epochs=3", "tiny-full", "the recipe tiny-full of this version")
    alone = own(tmp_path, "alone", "[training]\nepochs = 3\n")
    run = read(RunFolder.create(load_recipe(alone), seed=0, runs_root=tmp_path / "runs"))
    assert (run.base_recipe, run.base) == ("alone", "the defaults of this version, which has no such recipe")
    assert run.changes == {"training.epochs": "3"}


def test_trainings_of_one_title_are_told_apart(tmp_path: Path) -> None:
    for name, kappa in (("a", 3.0), ("b", 4.0)):
        file = own(tmp_path, name, f'extends = "demo"\ntitle = "Mine"\n\n[training]\nepochs = 3\n\n[method]\nkappa = {kappa}\n')
        RunFolder.create(load_recipe(file), seed=0, runs_root=tmp_path / "runs")
    assert [label for _, label, _ in trainings(tmp_path / "runs")] == ["Mine, kappa=3", "Mine, kappa=4"]


def test_changes_in_short() -> None:
    many = {f"section.key_{i}": str(i) for i in range(6)}
    assert in_short(many) == "key_0=0, key_1=1, key_2=2, key_3=3 and 2 more"
    assert in_short({"method.kappa": "3", "teacher.method.kappa": "4"}) == "method.kappa=3, teacher.method.kappa=4"
    assert in_short({}) == ""


def test_means_of_a_training_are_those_of_a_table(tmp_path: Path) -> None:
    planned = load_table(own_table(tmp_path), scale="demo")
    add_row_runs(planned, runs_root=tmp_path / "runs", means={"base": 50, "small": 20}, seeds=(0, 1, 2))
    table = build_table(planned, seeds=(0, 1, 2), records=store_records(tmp_path / "runs"))
    site = gather.gather(gather.read_store(tmp_path / "runs"), tables=gather.Tables())
    means = {each.label: each.means["fewshot_5shot"] for each in site.trainings}
    assert means == {"Two epochs": table.rows[0].cells[0].ours, "Two epochs, num_words=64": table.rows[1].cells[0].ours}
    assert site.metrics == ("fewshot_5shot", "linear_top1", "knn_top1")


@pytest.mark.parametrize(
    ("store", "page"),
    [
        ("sqlite:////runs/mlflow.db", "http://127.0.0.1:5000/#/runs/abc1"),
        ("postgresql://user:secret@db/x", "http://127.0.0.1:5000/#/runs/abc1"),
        ("http://host:5000", "http://host:5000/#/runs/abc1"),
        ("https://user:secret@host/team/?token=secret#x", "https://host/team/#/runs/abc1"),
    ],
)
def test_a_page_in_mlflow_has_an_address_without_a_login(store: str, page: str) -> None:
    assert gather.mlflow_page("abc1", experiment=None, store=store) == page
    assert gather.mlflow_page("abc1", experiment="../7", store=store) == page
    among_trainings = page.replace("runs/abc1", "experiments/7/runs/abc1?workflowType=machine_learning")
    assert gather.mlflow_page("abc1", experiment="7", store=store) == among_trainings
    assert gather.mlflow_page(None, experiment="7", store=store) is None
    assert gather.mlflow_page("../x", experiment="7", store=store) is None


def test_everything_logged_is_shown_by_group(tmp_path: Path) -> None:
    folder = add_run(tmp_path)
    with folder.metric_log() as log:
        log.append(9000, {"epoch": 12, "loss": 4.0, "grad_norm": 2.0, "images_per_s": 500.0, "mine": 7.0}, time_s=1.0)
    with folder.metric_log("system") as log:
        log.append(15, {"gpu_memory_0": 100.0, "cpu": "nan"})
    run = read(folder)
    groups = figures.logged_groups(run)
    logged = {name for curves in groups.values() for name in curves}
    assert logged == set(run.curves) >= {"grad_norm", "images_per_s", "mine", "gpu_memory_0"}
    assert {heading: list(curves) for heading, curves in groups.items() if heading != figures.MAIN} == {
        "Optimiser": ["grad_norm"],
        "Speed": ["images_per_s"],
        "Machine": ["gpu_memory_0"],
        "Others": ["mine"],
    }
    more = figures.more_figures(run)
    assert [figure.title for figure in more["Machine"]] == ["Gpu memory 0"]
    assert more["Machine"][0].layout["xaxis"]["title"]["text"] == "seconds"
    assert [finding.healthy for finding in run.findings if finding.rule == "finite"] == [True], "of the training alone"


def test_runs_of_a_table_that_the_store_does_not_know_are_said(tmp_path: Path) -> None:
    table = load_table(own_table(tmp_path), scale="demo")
    add_row_runs(table, runs_root=tmp_path / "runs", means={"base": 50})
    (run,) = list_runs(tmp_path / "runs")
    labels = {"obowlab.queue": "base", "obowlab.table3": "soft_dynamic", "obowlab.scale": "demo", "obowlab.study": "x"}
    RunFolder.open(run.path).add_labels(labels)
    (problem,) = gather.tables_at([], store=gather.read_store(tmp_path / "runs")).problems
    assert problem.startswith("There are runs of a table 'queue', which this store does not know: `obowlab table FILE`")
    keep_table(table, runs_root=tmp_path / "runs")
    assert gather.tables_at([], store=gather.read_store(tmp_path / "runs")).problems == ()


def test_tags_are_shown_and_studies_have_pages_of_their_own(tmp_path: Path) -> None:
    folder = add_run(tmp_path / "runs")
    folder.add_labels({f"{TAG}for the paper": ""})
    assert read(folder).tags == ("for the paper",)
    site = gather.gather(gather.read_store(tmp_path / "runs"), tables=gather.Tables())
    studies = tuple(StudyReport(name=name) for name in ("a b", "a-b", "a.b", "größe"))
    build_site(replace(site, studies=studies), out=tmp_path / "site")
    assert len(list((tmp_path / "site").glob("study-*.html"))) == len(studies)
    assert ">for the paper</span>" in (tmp_path / "site" / "runs.html").read_text(encoding="utf-8")
