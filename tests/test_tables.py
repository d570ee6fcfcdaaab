"""The shipped tables, what they plan, and the table that run records make."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from obowlab.config import load_recipe, project_root, read_toml
from obowlab.config.fitted import ImagesFound, fit_recipe
from obowlab.config.scales import SCALES, recipe_for
from obowlab.errors import UserError
from obowlab.runs.records import Record, read_records, write_records
from obowlab.runs.results import pack
from obowlab.studies.schema import read_study
from obowlab.tables import render
from obowlab.tables.build import NOTICE, ONE_SEED, also_differing, build_table, finished_seeds
from obowlab.tables.plan import make_plan, without_recorded
from obowlab.tables.spec import PlannedTable, load_table, resolve_names, table_files
from tests.conftest import Obowlab

ONE_TO_FIVE = ["table1", "table2", "table3", "table4", "table5"]
PAPERS = [*ONE_TO_FIVE, "table7"]
EPISODES = 40


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", table_files())
def test_every_row_is_expressible_at_every_scale(name: str, scale: str) -> None:
    table = load_table(name, scale=scale)
    for row in table.rows:
        if name in PAPERS:
            assert row.row.paper.keys() == table.file.columns.keys(), "the paper gives every cell of its tables"
        assert row.loaded.recipe.evaluation.protocols
        # Sizes of views live in the base.
        assert not [key for key in row.row.set if key.endswith("_size")]
    of_patches = {row.loaded.recipe.views.patch_size for row in table.rows if row.loaded.recipe.views.num_patches}
    assert len(of_patches) <= 1, "patches are of one size, whatever stands beside them"


def test_a_row_is_said_to_differ_in_what_both_recipes_use() -> None:
    sentence = "At this scale the row differs from the base row in training.epochs 8 (base row 22) as well."
    found = {scale: also_differing(load_table("table4", scale=scale)) for scale in ("demo", "tiny")}
    keys = [row.row.key for row in load_table("table4", scale="demo").rows]
    assert not any(found["demo"]), "patches have another size than the base row's, which has none"
    assert dict(zip(keys, found["tiny"], strict=True))["two_crops_patches"] == (sentence,)


@pytest.mark.parametrize("scale", SCALES)
def test_thirty_rows_are_twenty_four_trainings(scale: str) -> None:
    def trainings(names: list[str]) -> int:
        plan = make_plan([load_table(name, scale=scale) for name in names], seeds=[0], rows={})
        return sum(not job.is_stage for job in plan.jobs)

    plan = make_plan([load_table(name, scale=scale) for name in ONE_TO_FIVE], seeds=[0], rows={})
    assert sum(len(table.rows) for table in plan.tables) == 30
    assert trainings(ONE_TO_FIVE) == 24
    assert trainings([*ONE_TO_FIVE, "table7"]) == 26
    vanilla = next(job for job in plan.jobs if job.places[0] == "table1/queue_local_average")
    assert {place.split("/")[0] for place in vanilla.places} == set(ONE_TO_FIVE)
    assert sum("table4/multi_scale_two_crops_patches" in job.places for job in plan.jobs) == 1


def test_bownet_is_three_stages_of_which_two_rows_share_the_first() -> None:
    plan = make_plan([load_table("table5", scale="paper")], seeds=[0, 1], rows={})
    stages = [job for job in plan.jobs if job.is_stage and job.seed == 0]
    assert len(stages) == 3
    shared = [job for job in stages if len(job.places) == 2]
    assert [job.loaded.recipe.method.name for job in shared] == ["rotnet"]
    rounds = {job.fingerprint: job for job in plan.jobs}
    last = next(job for job in plan.jobs if job.places == ("table5/bownet",) and not job.is_stage)
    first_round = rounds[last.needs or ""]
    assert first_round.needs == shared[0].fingerprint
    order = [job.fingerprint for job in plan.jobs]
    assert order.index(shared[0].fingerprint) < order.index(first_round.fingerprint) < order.index(last.fingerprint)
    rows = load_table("table5", scale="paper").rows
    assert [sum(stage.recipe.training.epochs for stage in row.loaded.stages()) for row in rows] == [200, 200, 80, 80]


def test_the_base_row_comes_along_and_other_rows_do_not() -> None:
    tables = [load_table("table2", scale="demo"), load_table("table3", scale="demo")]
    plan = make_plan(tables, seeds=[0], rows={"table3": ["hard_dynamic"]})
    assert [job.places for job in plan.jobs] == [("table2/annealed", "table3/soft_dynamic"), ("table3/hard_dynamic",)]


def test_a_jobs_command_makes_the_very_run() -> None:
    from obowlab.config import parse_override

    for job in make_plan([load_table(name, scale="tiny") for name in ONE_TO_FIVE], seeds=[1], rows={}).jobs:
        words = list(job.command)
        assert words[0] == "run"
        overrides = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
        assert all(parse_override(text) for text in overrides)
        loaded = load_recipe(words[1], overrides=overrides)
        stage = int(words[words.index("--stage") + 1]) if "--stage" in words else len(loaded.stages())
        assert loaded.stages()[stage - 1].recipe.fingerprint(seed=1) == job.fingerprint, job.command


def test_names_of_tables() -> None:
    assert set(PAPERS) <= table_files().keys()
    assert resolve_names(["table3", "all", "table3"]) == ["table3", *(name for name in table_files() if name != "table3")]
    with pytest.raises(UserError, match="Did you mean 'table2'"):
        resolve_names(["tabel2"])


VALID = """
title = "T"
base = "vanilla"
primary = "knn_top1"
[columns]
knn_top1 = "k-NN"
[[row]]
key = "base"
label = "base"
paper = { knn_top1 = 1 }
"""


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("title =", "titel ="), r"Unknown key 'titel'.*'title'"),
        (('base = "vanilla"', 'base = "vanilla"\nset = { "training.epochs" = 1 }'), r"'set' belongs to a row.*'base'"),
        (('base = "vanilla"', 'extends = "vanilla"'), r"a recipe, not a table.*experiments/"),
        (("label =", "lable ="), r"Unknown key 'row\.1\.lable'.*'label'"),
        (('primary = "knn_top1"', 'primary = "linear_top1"'), "not among the columns"),
        (("knn_top1", "knn_top"), "'knn_top' is not a metric.*knn_top1"),
        (('base = "vanilla"', 'base = "vanila"'), "vanilla"),
        (('key = "base"', 'key = "a/b"'), "row.1.key"),
        (('label = "base"', 'label = "base"\nset = { "method.kapa" = 3 }'), r"row 'base'.*method\.kappa"),
        (('label = "base"', 'label = "base"\nset = { "method.kappa" = 3.0 }'), "no row is the base recipe 'vanilla'"),
        (('label = "base"', 'label = "base"\nat.tinny.set = {}'), "scale 'tinny'.*tiny"),
        (("[[row]]", '[[row]]\nkey = "base"\nlabel = "x"\n[[row]]'), "two rows have the key 'base'"),
        (("title", "= title"), "not valid TOML"),
    ],
)
def test_a_mistake_in_a_table_file_is_one_sentence(change: tuple[str, str], complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(VALID)
    assert load_table(str(path), scale="tiny").base.row.paper == {"knn_top1": 1.0}
    path.write_text(VALID.replace(*change))
    with pytest.raises(UserError, match=complaint) as error:
        load_table(str(path), scale="tiny")
    assert "mine.toml" in str(error.value)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------- collecting


def recipe_at(base: str, *, scale: str) -> str:
    """Know `only-here` at the scale demo alone."""
    return "demo-full" if (base, scale) == ("only-here", "demo") else recipe_for(base, scale, folder=Path())


def test_a_table_of_one_scale_is_shown_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.toml"
    row = '[[row]]\nkey = "demo"\nlabel = "demo only"\nbase = "only-here"\n'
    path.write_text(VALID + row)
    monkeypatch.setattr("obowlab.tables.spec.recipe_for", lambda base, scale, folder: recipe_at(base, scale=scale))
    planned = load_table(str(path), scale="demo")
    assert [row.key for row in build_table(planned, seeds=[0], records={}).rows] == ["base", "demo"]


def record(row: Any, *, seed: int, value: float, spread: int = 2, basis: str = "p", **changes: Any) -> Record:
    """Return a finished run of a row whose every metric has the mean `value`, over episodes that all runs share."""
    fingerprint = row.loaded.recipe.fingerprint(seed=seed)
    rng = np.random.default_rng(0)
    correct = (round(value) + rng.integers(-spread, spread + 1, EPISODES) if spread else np.full(EPISODES, round(value))).tolist()
    names = ["fewshot_1shot", "fewshot_5shot", "linear_top1"]
    result = {
        "subject": "student",
        "protocol": "fewshot",
        "protocol_hash": basis,
        "data_hash": "d",
        "details": {"dataset": row.loaded.recipe.data.dataset},
        "measurements": [
            {"name": name, "value": float(np.mean(correct)), "interval": 1.0, "count": EPISODES, "samples": pack(correct, of=100)}
            for name in names
        ],
    }
    values = {
        "run_id": f"{row.row.key}-s{seed}",
        "name": row.loaded.name,
        "seed": seed,
        "fingerprint": fingerprint,
        "recipe": row.loaded.recipe.model_dump(mode="json"),
        "version": "0",
        "status": "finished",
        "step": 10,
        "total_steps": 10,
        "message": "",
        "facts": {"commit": "c" * 40, "dirty": False, "data_hash": "d" * 64},
        "results": [result],
        "mlflow_run_id": "m" * 32,
        "trained_s": 5.0,
    }
    return Record.model_validate({**values, **changes})


def records_of(*records: Record) -> dict[str, Record]:
    return {each.fingerprint: each for each in records}


def test_a_recorded_run_leaves_the_plan_with_the_stages_it_alone_needed() -> None:
    planned = load_table("table5", scale="demo")
    rows = {row.row.key: row for row in planned.rows}
    plan = make_plan([planned], seeds=[0], rows={})

    def left(*keys: str, **changes: Any) -> list[tuple[str, bool]]:
        """Return the jobs that are left when these rows are recorded: the last of their rows, and whether they are a stage."""
        made = []
        for key in keys:
            one = record(rows[key], seed=0, value=40)
            (result,) = one.results
            made.append(
                one.model_copy(update={"results": [{**result, "subject": who} for who in ("student", "random")], **changes})
            )
        jobs = without_recorded(plan, records=records_of(*made), runs={}).jobs
        return [(job.places[-1].removeprefix("table5/"), job.is_stage) for job in jobs]

    second = [("bownet_crops", True), ("bownet_crops", False)]
    assert left() == [
        *[("vanilla", False), ("bownet_crops", True), ("bownet", True), ("bownet", False)],
        *[second[0], second[1], ("full", False)],
    ]
    assert left("bownet", "vanilla") == [("bownet_crops", True), *second, ("full", False)], "RotNet serves both rows"
    assert left("bownet", "bownet_crops", "vanilla", "full") == []
    assert left("full", status="failed") == left()
    otherwise = record(rows["full"], seed=0, value=40).results[0]
    otherwise["details"]["num_ways"] = 7
    assert left("full", results=[otherwise]) == left()


@pytest.fixture
def table3() -> PlannedTable:
    return load_table("table3", scale="tiny")


def test_verdicts_follow_the_papers_direction(table3: PlannedTable) -> None:
    base, hard, fixed = table3.rows
    values = {base.row.key: 40, hard.row.key: 45, fixed.row.key: 2}
    records = records_of(*(record(row, seed=seed, value=values[row.row.key] + seed) for row in table3.rows for seed in range(3)))
    table = build_table(table3, seeds=range(3), records=records)
    assert [row.verdict for row in table.rows] == [None, "disagrees", "agrees"]
    cell = table.rows[1].cells[1]
    assert cell.ours is not None
    assert (round(cell.ours.value), cell.ours.seeds) == (46, 3)
    assert cell.against_base is not None
    assert cell.against_base.value == pytest.approx(5.0)
    assert cell.against_base.interval == pytest.approx(0.0, abs=1e-9), "paired: what episodes and seeds share cancels"
    assert cell.against_paper is None, "not at this scale"
    assert not table.comparable
    assert table.footnotes[0] == NOTICE
    lines = [line.split(" | ") for line in render.as_text([table], form="verdicts").splitlines() if line.startswith("| table3")]
    assert [(line[1], *line[4:6], line[7]) for line in lines] == [
        ("hard codes, dynamic head", "-2.46", "+5.00 ± 0.00", "✗ disagrees"),
        ("soft codes, fixed head", "-60.44", "-38.00 ± 0.00", "✓ agrees"),
    ]


def test_a_difference_within_the_noise_is_indistinguishable(table3: PlannedTable) -> None:
    base, hard, _ = table3.rows
    ours = [record(hard, seed=seed, value=40 + drift) for seed, drift in enumerate((3, -2, 0))]
    records = records_of(*(record(base, seed=seed, value=40) for seed in range(3)), *ours)
    assert build_table(table3, seeds=range(3), records=records).rows[1].verdict == "indistinguishable"


def noisy(table: PlannedTable, *, differences: dict[str, tuple[int, ...]]) -> dict[str, Record]:
    """Return the records of a base row at 40, and of other rows at so much more with each seed."""
    rows = {row.row.key: row for row in table.rows}
    made = [record(rows[key], seed=seed, value=40 + more) for key, all_ in differences.items() for seed, more in enumerate(all_)]
    return records_of(*(record(table.base, seed=seed, value=40) for seed in range(3)), *made)


def test_the_corrected_p_of_all_rows_decides(table3: PlannedTable) -> None:
    """A difference that would pass alone, beside a row that differs in nothing; all columns hold the same observations."""
    differences = {"hard_dynamic": (-5, -6, -9), "soft_fixed": (-1, 2, 0)}
    p = [stats.ttest_1samp(values, 0.0).pvalue for values in differences.values()]
    assert p[0] < 0.05 < 2 * p[0]
    both = build_table(table3, seeds=range(3), records=noisy(table3, differences=differences))
    assert [row.cells[0].p_holm for row in both.rows] == [None, pytest.approx(2 * p[0]), pytest.approx(p[1])]
    assert [row.verdict for row in both.rows] == [None, "indistinguishable", "indistinguishable"]
    del differences["soft_fixed"]
    alone = build_table(table3, seeds=range(3), records=noisy(table3, differences=differences)).rows[1]
    assert (alone.cells[0].p_holm, alone.verdict) == (pytest.approx(p[0]), "agrees")
    for number in (p[0], 2 * p[0]):
        assert f"{number:.6g}" in render.as_csv([both])
        assert f"| {number:.3g} |" in render.markdown(both)
    assert {"5-shot p", "5-shot p (Holm)", "5-shot Δ base row"} <= set(render.overview(both)[0])
    expendable = render.expendable(both)
    assert expendable.index("5-shot p") < expendable.index("5-shot paper") < expendable.index("5-shot p (Holm)")


@pytest.mark.parametrize("scale", ["tiny", "paper"])
def test_one_seed_never_has_a_direction(scale: str) -> None:
    table3 = load_table("table3", scale=scale)
    values = dict(zip((row.row.key for row in table3.rows), (40, 45, 2), strict=True))
    once = [record(row, seed=0, value=values[row.row.key], spread=0) for row in table3.rows]
    again = [record(row, seed=1, value=values[row.row.key] + 1, spread=0) for row in table3.rows[:2]]  # not of the last row
    for made, expected in ((once, ["one seed", "one seed"]), ([*once, *again], ["disagrees", "one seed"])):
        table = build_table(table3, seeds=range(2), records=records_of(*made))
        assert [row.verdict for row in table.rows[1:]] == expected
        assert [[cell.verdict for cell in row.cells] for row in table.rows[1:]] == [[word] * 3 for word in expected]
        last = table.rows[2]
        assert ONE_SEED in [table.footnotes[number - 1] for number in last.notes]
        assert [(cell.against_base and cell.against_base.p, cell.p_holm) for cell in last.cells] == [(None, None)] * 3
        assert [cell.against_base and cell.against_base.value for cell in last.cells] == pytest.approx([-38.0] * 3)
        assert render.overview(table)[1][-1][-1] == "○ one seed"
        assert render.markdown(table).count("○ one seed") == 3 * expected.count("one seed")
        assert "○ one seed" in render.legend(table)
    shown = "".join(form([build_table(table3, seeds=[0], records=records_of(*once))]) for form in (render.as_json, render.as_csv))
    assert not [word for word in ("agrees", "higher", "lower", "indistinguishable") if word in shown]
    assert "✓ as in" in render.legend(table), "the marks are explained"


def test_only_seeds_that_both_rows_have_are_compared(table3: PlannedTable) -> None:
    base, hard, fixed = table3.rows
    records = records_of(
        record(base, seed=0, value=40),
        record(base, seed=1, value=60),
        record(hard, seed=0, value=41),
        record(fixed, seed=2, value=9),
    )
    table = build_table(table3, seeds=range(3), records=records)
    against = table.rows[1].cells[0].against_base
    assert against is not None
    assert (against.value, against.seeds) == (pytest.approx(1.0), 1)
    assert ONE_SEED in [table.footnotes[number - 1] for number in table.rows[1].notes]
    assert ONE_SEED not in [table.footnotes[number - 1] for number in table.rows[0].notes]
    assert table.rows[2].cells[0].against_base is None
    assert table.rows[2].verdict is None
    assert finished_seeds(table3, records=records) == (0, 1, 2)


def test_other_protocols_and_unfinished_runs_are_not_compared(table3: PlannedTable) -> None:
    base, hard, fixed = table3.rows
    records = records_of(
        record(base, seed=0, value=40),
        record(hard, seed=0, value=50, basis="another"),
        record(fixed, seed=0, value=2, status="failed", message="The loss is not finite."),
    )
    table = build_table(table3, seeds=[0], records=records)
    assert "another protocol" in table.rows[1].cells[0].problem
    assert table.rows[1].verdict is None
    assert table.rows[2].cells[0].ours is None
    assert "soft_fixed, seed 0: failed: The loss is not finite." in render.remarks(table)


def test_at_the_papers_scale_the_difference_to_the_paper_is_shown() -> None:
    planned = load_table("table3", scale="paper")
    table = build_table(planned, seeds=[0], records=records_of(record(planned.rows[0], seed=0, value=44, spread=0)))
    assert table.comparable
    assert table.rows[0].cells[0].against_paper == pytest.approx(44 - 42.11)
    assert NOTICE not in table.footnotes


def test_what_a_small_scale_changes_beside_the_row_is_said() -> None:
    planned = load_table("table1", scale="tiny")
    table = build_table(planned, seeds=[0], records={})
    notes = {row.key: " ".join(table.footnotes[number - 1] for number in row.notes) for row in table.rows}
    assert "training.epochs 8 (base row 22)" in notes["full_local_average"]
    assert "method.levels" not in notes["full_local_average"]
    assert "At this scale the row differs" not in notes["queue_local"]


def test_the_same_records_give_the_same_bytes(table3: PlannedTable, tmp_path: Path) -> None:
    made = [record(row, seed=seed, value=30 + seed) for row in table3.rows for seed in range(2)]
    before = records_of(*made)
    assert write_records(reversed(made), folder=tmp_path) == 6
    after = read_records(tmp_path)
    tables = [build_table(table3, seeds=range(2), records=records) for records in (before, after)]
    for form in (render.as_json, render.as_csv):
        assert form([tables[0]]) == form([tables[1]])
    assert render.markdown(tables[0]) == render.markdown(tables[1])
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_records(made, folder=tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first
    for path in tmp_path.iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as some editors save
    assert read_records(tmp_path) == after


def test_damaged_records_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder of records"):
        read_records(tmp_path / "absent")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match=r"x\.json is not a run record"):
        read_records(tmp_path)


def test_every_format_holds_every_number_and_where_it_comes_from(table3: PlannedTable) -> None:
    values = zip(table3.rows, (40, 45, 2), strict=True)
    made = [record(row, seed=seed, value=value + seed) for row, value in values for seed in range(2)]
    table = build_table(table3, seeds=range(2), records=records_of(*made))
    text = render.markdown(table)
    for run in made:
        for origin in (run.run_id, run.mlflow_run_id, run.fingerprint[:12], "c" * 12, "d" * 12):
            assert origin is not None
            assert origin in text
    assert "not comparable" in text
    for row in table.rows:
        for cell in row.cells:
            assert cell.ours is not None
            assert f"{cell.ours.value:.2f} ± {cell.ours.interval:.2f}" in text
            assert f"{cell.paper:.2f}" in text
    lines = list(csv.DictReader(io.StringIO(render.as_csv([table]))))
    assert len(lines) == 9
    assert float(lines[0]["ours"]) == pytest.approx(table.rows[0].cells[0].ours.value, rel=1e-5)  # type: ignore[union-attr]
    assert lines[3]["run_ids"] == "hard_dynamic-s0 hard_dynamic-s1"
    assert json.loads(render.as_json([table]))[0]["rows"][1]["cells"][0]["verdict"] == "disagrees"
    columns, rows = render.overview(table)
    assert all(len(line) == len(columns) for line in rows)


def test_html_is_one_page_in_which_names_stay_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(VALID.replace('label = "base"', 'label = "<script>alert(1)</script>"'))
    planned = load_table(str(path), scale="tiny")
    page = render.html([build_table(planned, seeds=[0], records={})])
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "://" not in page, "nothing is fetched"
    assert "default-src 'none'; style-src 'unsafe-inline'" in page, "and no script runs"
    assert "Not comparable" in page


@pytest.mark.parametrize("form", ["md", "verdicts"])
def test_the_measured_tables_are_what_their_records_give(form: str, obowlab: Obowlab) -> None:
    measured = [path.parent for path in (project_root() / "ablations" / "results").glob("*/records")]  # of others, costs alone
    assert measured
    for folder in measured:
        code, out, err = obowlab("table", "all", "--scale", folder.name, "--records", str(folder / "records"), "--format", form)
        assert (code, err) == (0, "")
        kept = folder / {"md": "tables.md", "verdicts": "verdicts.md"}[form]
        assert out == kept.read_text(encoding="utf-8"), f"write {kept.name} again: --out {kept}"


def test_measured_tables_of_our_own_are_what_their_records_give(obowlab: Obowlab) -> None:
    files = [path for path in (project_root() / "ablations" / "results").glob("*/*.toml") if "row" in read_toml(path)]
    assert files
    for path in files:
        words = ("--scale", path.parent.name, "--records", str(path.parent / "records"), "--format", "md")
        code, out, err = obowlab("table", str(path), *words)
        assert (code, err) == (0, "")
        kept = path.with_suffix(".md")
        assert out == kept.read_text(encoding="utf-8"), f"write {kept.name} again: --out {kept}"


def test_the_page_on_the_tables_has_every_row_as_the_records_give_it() -> None:
    page = (project_root() / "docs" / "results" / "tables.md").read_text(encoding="utf-8").splitlines()
    lines = (project_root() / "ablations" / "results" / "demo" / "verdicts.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| table") and "| row |" not in line]
    assert len(rows) == 28
    for row in rows:
        assert any(line.startswith(row) for line in page), row
    cells = [[cell.strip() for cell in row.split("|")] for row in rows]
    directions = Counter(row[8] for row in cells)
    agree, disagree, unknown = (directions[each] for each in ("✓ agrees", "✗ disagrees", "≈ indistinguishable"))
    assert agree + disagree + unknown == len(rows)
    alike = sum(row[8] == "≈ indistinguishable" and row[5][0] == row[6][0] for row in cells)
    for name in ("results.md", "results/tables.md"):
        prose = " ".join((project_root() / "docs" / name).read_text(encoding="utf-8").replace("**", "").split())
        assert f"f {len(rows)} rows {agree} agree with the paper, {disagree} disagree, and {unknown} cannot be told from" in prose
        assert f", {alike} of these with the paper's sign" in prose


def test_the_base_row_on_another_processor_changes_what_the_page_says_and_no_more(obowlab: Obowlab, tmp_path: Path) -> None:
    demo = project_root() / "ablations" / "results" / "demo"
    for folder in ("records", "base-again"):
        shutil.copytree(demo / folder, tmp_path / "again", dirs_exist_ok=True)
    code, out, err = obowlab("table", "all", "--scale", "demo", "--records", str(tmp_path / "again"), "--format", "verdicts")
    assert (code, err) == (0, "")
    before = (demo / "verdicts.md").read_text(encoding="utf-8")
    first, second = ([row.split("|") for row in text.splitlines() if row.startswith("| table")] for text in (before, out))
    changed = [new[:3] for old, new in zip(first, second, strict=True) if old[8] != new[8]]
    assert changed == [["", " table1 ", " Queue-based vocabulary, multi-scale BoW (full): (c) locally averaged features "]]
    marks = Counter(row[8].strip() for row in second)
    agree, disagree, unknown = (marks[each] for each in ("✓ agrees", "✗ disagrees", "≈ indistinguishable"))
    page = " ".join((project_root() / "docs" / "results" / "tables.md").read_text(encoding="utf-8").split())
    assert f"{agree} rows agree, {disagree} disagree, and {unknown} cannot be told from the base row. The one" in page


def test_the_page_on_scaling_has_the_rules_of_init() -> None:
    page = (project_root() / "docs" / "results" / "scaling.md").read_text(encoding="utf-8")
    for side, has_gpu in ((64, False), (64, True), (256, True)):
        for number in (1_000, 10_000, 100_000, 1_000_000):
            found = ImagesFound("mine", (number // 50,) * 50, (50,) * 50, is_labelled=True, short_sides=(side,))
            recipe = tomllib.loads(fit_recipe(found, has_gpu=has_gpu).toml)
            views, method, optimizer, training = (recipe[part] for part in ("views", "method", "optimizer", "training"))
            per_epoch = number // training["batch_size"]
            cells = [
                number,
                f"{views['original_size']} / {views['crop_size']}",
                training["batch_size"],
                training["epochs"],
                training["epochs"] * per_epoch,
                *(method[key] for key in ("num_words", "delta_base", "teacher_momentum")),
                optimizer["learning_rate"],
                round(optimizer["warmup_epochs"] * per_epoch),
            ]
            assert f"| {' | '.join(map(str, cells))} |\n" in page


def test_the_page_on_the_tables_has_every_run_of_a_student_that_is_its_own_teacher() -> None:
    page = (project_root() / "docs" / "results" / "tables.md").read_text(encoding="utf-8")
    text = page[page.index("## A student that is its own teacher") : page.index("## Crops")]
    folder = project_root() / "ablations" / "results" / "demo"
    for table, columns in (("own-teacher", "5-shot"), ("own-teacher-fast", "1-shot, 5-shot, linear")):
        runs = (folder / f"{table}.md").read_text(encoding="utf-8")
        found = re.findall(r"^\| (\S+) \| (\d) \| \S+ \| finished \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", runs, re.MULTILINE)
        assert {seed for _, seed, *_ in found} == {"0", "1", "2"}
        for key in {key for key, *_ in found}:
            for number, column in enumerate(("1-shot", "5-shot", "linear")):
                cell = ", ".join(f"{float(values[number]):.1f}" for name, _, *values in found if name == key)
                assert column not in columns or cell in text, f"{table}, {key}, {column}: {cell}"


@pytest.mark.parametrize("table", ["scaling-10000", "scaling-1000", "rules-10000", "rules-1000"])
def test_the_page_on_scaling_has_every_run_of_its_tables(table: str) -> None:
    lines = (project_root() / "docs" / "results" / "scaling.md").read_text(encoding="utf-8").splitlines()
    path = project_root() / "ablations" / "results" / "tiny" / f"{table}.md"
    runs = re.findall(
        r"^\| (\S+) \| \d \| \S+ \| finished \| [\d.]+ \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", path.read_text(), re.MULTILINE
    )
    assert runs
    for row in load_table(str(path.with_suffix(".toml")), scale="tiny").rows:
        seeds = [values for key, *values in runs if key == row.row.key]
        cells = [", ".join(f"{float(value):.1f}" for value in column) for column in zip(*seeds, strict=True)]
        assert not seeds or f"| {row.row.label} | {' | '.join(cells)} |" in lines


def test_the_page_on_kappa_and_delta_has_every_trial_of_its_study_of_photos() -> None:
    page = (project_root() / "docs" / "results" / "kappa-delta.md").read_text(encoding="utf-8")
    study = read_study(project_root() / "ablations" / "results" / "tiny" / "kappa-delta.study.json")
    assert (len(study.completed), study.problems) == (12, ())
    trials = sorted(study.completed, key=lambda trial: trial.params["method.delta_base"])
    points = [(trial.params["method.delta_base"], trial.params["method.kappa"], trial.value) for trial in trials]
    shown = re.findall(r"^\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", page, re.MULTILINE)
    assert shown == [(f"{delta:.3g}", f"{kappa:.3g}", f"{value:.1f}") for delta, kappa, value in points]
    shares = {parameter.key: f"{parameter.importance:.2f}" for parameter in study.parameters}
    said = f"δ_base explains {shares['method.delta_base']} of the variance and κ {shares['method.kappa']}"
    assert said in " ".join(page.split())


def test_the_page_on_kappa_and_delta_has_every_trial_of_its_study() -> None:
    page = (project_root() / "docs" / "results" / "kappa-delta.md").read_text(encoding="utf-8")
    study = read_study(project_root() / "ablations" / "results" / "demo" / "kappa-delta.study.json")
    assert (len(study.completed), study.problems) == (40, ())
    bands = re.findall(r"^\| ([\d.]+) to ([\d.]+) \| (.*) \|$", page, re.MULTILINE)
    shown = 0
    for low, high, trials in bands:
        inside = [trial for trial in study.completed if float(low) <= trial.params["method.delta_base"] < float(high)]
        points = sorted((trial.params["method.kappa"], trial.value) for trial in inside)
        assert trials == ", ".join(f"{value:.1f} ({kappa:.1f})" for kappa, value in points)
        shown += len(inside)
    assert shown == 40
    shares = {parameter.key: f"{parameter.importance:.2f}" for parameter in study.parameters}
    said = f"it explains {shares['method.delta_base']} of the variance over the search space, κ {shares['method.kappa']}"
    assert said in " ".join(page.split())
