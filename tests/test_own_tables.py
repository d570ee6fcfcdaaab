"""A user's own tables, and tables whose rows are all changed: remembered by the store, tested against their base row."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from obowlab import text
from obowlab.errors import UserError
from obowlab.report.pages import build_site
from obowlab.report.read import gather, read_store, tables_at
from obowlab.runs.records import store_records
from obowlab.tables import render
from obowlab.tables.build import FEWER_PAIRS, OTHER_SETTINGS, build_table
from obowlab.tables.kept import KEPT, identity, keep_table, kept_tables
from obowlab.tables.model import Table
from obowlab.tables.plan import labels_of, make_plan
from obowlab.tables.spec import PlannedTable, load_table, load_tables
from obowlab.tables.statistics import estimate
from tests.command_line import Obowlab
from tests.report_store import add_row_runs, observed, own_table

MEANS = {"base": 50, "small": 30, "large": 50}
SEEDS = (0, 1, 2)


def built(path: Path, *, runs_root: Path, seeds: tuple[int, ...] = SEEDS) -> Table:
    planned = load_table(path, scale="demo")
    return build_table(planned, seeds=seeds, records=store_records(runs_root))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table file and a store with three seeds of every row, in one folder."""
    path = own_table(tmp_path)
    add_row_runs(load_table(path, scale="demo"), runs_root=tmp_path / "runs", means=MEANS, seeds=SEEDS)
    return path


# -------------------------------------------------------------------------------------------------------------- directions


def test_without_values_of_the_paper_rows_are_tested_against_the_base_row(table: Path, tmp_path: Path) -> None:
    shown = built(table, runs_root=tmp_path / "runs")
    assert not shown.has_paper
    assert [row.verdict for row in shown.rows] == [None, "lower", "indistinguishable"]
    ours, base = (25.0 * np.array([observed(MEANS[key] + seed) for seed in SEEDS]) for key in ("small", "base"))
    assert shown.rows[1].cells[0].against_base == estimate(ours - base)
    (better,) = [row for row in built_with(tmp_path, table, {"base": 30, "large": 60}).rows if row.key == "large"]
    assert better.verdict == "higher"


def test_of_one_seed_difference_and_interval_are_shown_and_no_direction(table: Path, tmp_path: Path) -> None:
    shown = built(table, runs_root=tmp_path / "runs", seeds=(0,))
    assert [row.verdict for row in shown.rows] == [None, "one seed", "one seed"]
    cell = shown.rows[1].cells[0]
    ours, base = (25.0 * np.array(observed(MEANS[key])) for key in ("small", "base"))
    low, high = stats.ttest_rel(ours, base).confidence_interval(0.95)
    assert cell.against_base is not None
    assert cell.against_base.value == pytest.approx((ours - base).mean())
    assert cell.against_base.interval == pytest.approx((high - low) / 2)
    assert cell.against_base.p is cell.p_holm is None
    shown_texts = "".join((render.markdown(shown), render.as_csv([shown]), render.html([shown]).partition("</h1>")[2]))
    assert shown_texts.count("○ one seed") > 4
    for mark in ("↓ lower<", "| ↓", ",lower,", " ↑<", " ↓<"):
        assert mark not in shown_texts, mark
    store = read_store(tmp_path / "runs")
    site = gather(store, tables=replace(tables_at([], store=store), tables=[shown]))
    build_site(site, out=tmp_path / "site")
    for page in ("index.html", "queue-demo.html"):
        content = (tmp_path / "site" / page).read_text(encoding="utf-8").partition("</h1>")[2]
        assert '<span class="verdict one-seed">○ one seed</span>' in content
        assert 'class="lower"' not in content
        assert "verdict lower" not in content


def test_a_difference_over_fewer_seeds_than_the_row_has_says_so(table: Path, tmp_path: Path) -> None:
    planned, runs = load_table(table, scale="demo"), tmp_path / "runs"
    add_row_runs(planned, runs_root=runs, means={"large": 50}, seeds=(3,))
    shown = built(table, runs_root=runs, seeds=(*SEEDS, 3))
    notes = [[shown.footnotes[number - 1] for number in row.notes] for row in shown.rows]
    assert [FEWER_PAIRS in each for each in notes] == [False, False, True]
    line = next(line for line in csv.DictReader(io.StringIO(render.as_csv([shown]))) if line["row"] == "large")
    assert (line["seeds"], line["against_base_seeds"]) == ("4", "3")


def built_with(tmp_path: Path, table: Path, means: dict[str, int]) -> Table:
    add_row_runs(load_table(table, scale="demo"), runs_root=tmp_path / "others", means=means, seeds=SEEDS)
    return built(table, runs_root=tmp_path / "others")


def test_no_column_of_the_paper_is_shown_where_there_is_none(table: Path, tmp_path: Path) -> None:
    shown = built(table, runs_root=tmp_path / "runs")
    for form in (render.markdown(shown), render.html([shown]).partition("<main>")[2], "\n".join(render.overview(shown)[0])):
        assert "paper" not in form.lower(), form
    assert "↓ lower" in render.markdown(shown)
    assert render.legend(shown) == (
        "direction against the base row: ↑ higher, ↓ lower, ≈ not distinguishable (paired test, 5 % after Holm's correction over "
        "the rows)"
    )
    assert not [note for note in shown.footnotes if "paper" in note]
    columns, rows = render.overview(shown)
    assert columns[:6] == ["row", "seeds", "5-shot", "5-shot Δ base row", "5-shot p", "5-shot p (Holm)"]
    assert columns[6:] == ["linear", "linear Δ base row", "direction"]
    assert all(len(row) == len(columns) for row in rows)


def test_a_row_without_a_value_of_the_paper_beside_rows_with_one(table: Path, tmp_path: Path) -> None:
    content = table.read_text().replace(
        'label = "as in the recipe"', 'label = "as in the recipe"\npaper = { fewshot_5shot = 60.0 }'
    )
    table.write_text(content.replace('label = "64 words"', 'label = "64 words"\npaper = { fewshot_5shot = 70.0 }'))
    add_row_runs(load_table(table, scale="demo"), runs_root=tmp_path / "more", means={**MEANS, "large": 70}, seeds=SEEDS)
    shown = built(table, runs_root=tmp_path / "more")
    assert [row.verdict for row in shown.rows] == [None, "disagrees", "higher"]
    assert "↑ higher, ↓ lower (no value in the paper)" in render.legend(shown)


def test_results_with_the_settings_of_the_table_count_before_newer_ones(table: Path, tmp_path: Path) -> None:
    before = built(table, runs_root=tmp_path / "runs")
    planned = load_table(table, scale="demo", changes={"evaluation.fewshot.num_episodes": 77})
    add_row_runs(planned, runs_root=tmp_path / "runs", means={"base": 90, "small": 90})
    after = built(table, runs_root=tmp_path / "runs")
    assert [row.cells[0] for row in after.rows] == [row.cells[0] for row in before.rows]
    assert after.rows[0].runs[0].values["fewshot_5shot"] == before.rows[0].runs[0].values["fewshot_5shot"]
    otherwise = build_table(planned, seeds=[0], records=store_records(tmp_path / "runs"))
    assert otherwise.rows[0].cells[0].ours != before.rows[0].cells[0].ours
    notes = [[otherwise.footnotes[number - 1] for number in row.notes] for row in otherwise.rows]
    assert [OTHER_SETTINGS in each for each in notes] == [False, False, True]


# ------------------------------------------------------------------------------------------------------------ remembering


def test_a_remembered_table_is_the_table(table: Path, tmp_path: Path) -> None:
    planned = load_table(table, scale="demo")
    assert keep_table(planned, runs_root=tmp_path / "runs") is None
    ((kept,), problems) = kept_tables(tmp_path / "runs")
    assert problems == []
    assert kept == replace(planned, path=None, rows=tuple(replace(row, base_recipe="short.toml") for row in planned.rows))
    records = store_records(tmp_path / "runs")
    assert build_table(kept, seeds=[0], records=records) == build_table(planned, seeds=[0], records=records)
    assert str(tmp_path) not in next((tmp_path / "runs" / KEPT).iterdir()).read_text()


def test_what_a_scale_changes_is_remembered_too(tmp_path: Path) -> None:
    planned = load_table("table1", scale="tiny", changes={"training.batch_size": 64})
    keep_table(planned, runs_root=tmp_path)
    ((kept,), _) = kept_tables(tmp_path)
    expected = build_table(planned, seeds=[0], records={})
    assert any("At this scale the row differs" in note for note in expected.footnotes)
    assert build_table(kept, seeds=[0], records={}) == expected


def test_shipped_tables_are_not_copied(tmp_path: Path) -> None:
    keep_table(load_table("table3", scale="demo"), runs_root=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_report_shows_a_table_whose_file_and_store_have_moved(table: Path, tmp_path: Path) -> None:
    keep_table(load_table(table, scale="demo"), runs_root=tmp_path / "runs")
    before = built(table, runs_root=tmp_path / "runs")
    table.unlink()
    (tmp_path / "short.toml").unlink()
    shutil.move(tmp_path / "runs", tmp_path / "elsewhere")
    store = read_store(tmp_path / "elsewhere")
    found = tables_at([], store=store)
    assert (found.tables[-1], found.problems) == (before, ())
    build_site(gather(store, tables=found), out=tmp_path / "site")
    page = (tmp_path / "site" / "queue-demo.html").read_text(encoding="utf-8")
    for part in ("Size of the queue", "1024 words", "↓ lower", "Images drawn by obowlab.", "Δ base row"):
        assert part in page, part
    assert "paper" not in page.partition("<main")[2].partition("</main>")[0].lower()
    assert "queue-demo.html" in (tmp_path / "site" / "index.html").read_text()


def test_a_damaged_copy_is_named(table: Path, tmp_path: Path) -> None:
    keep_table(load_table(table, scale="demo"), runs_root=tmp_path / "runs")
    path = tmp_path / "runs" / KEPT / "queue-demo.json"
    values = json.loads(path.read_text())
    file = values["file"]
    odd = (
        json.dumps({**values, "scale": "../../elsewhere"}),
        json.dumps({**values, "file": {**file, "primary": "loss"}}),
        json.dumps({**values, "file": {**file, "columns": {**file["columns"], "unheard_of": "x"}}}),
    )
    for content in ("{", "[]", json.dumps({**values, "rows": values["rows"][1:]}), json.dumps({**values, "file": {}}), *odd):
        path.write_text(content)
        found = tables_at([], store=read_store(tmp_path / "runs"))
        (problem,) = found.problems
        assert problem.startswith(".tables/queue-demo.json cannot be read: `obowlab table FILE` writes it again")


def test_a_store_that_cannot_be_written_is_said(table: Path, tmp_path: Path) -> None:
    (tmp_path / "runs" / KEPT).write_text("")
    said = keep_table(load_table(table, scale="demo"), runs_root=tmp_path / "runs")
    assert said is not None
    assert said.startswith("`obowlab report` will not show queue as it is now: cannot write")


def test_names_that_look_alike_have_pages_of_their_own() -> None:
    names = ("my-table", "my table", "my.table", "größe", "gr-ße", "...", "table3")
    words = [identity(name, scale="demo", changes=()) for name in names]
    assert len(set(words)) == len(names)
    assert words[0] == "my-table-demo"
    assert all(word.isascii() and "/" not in word and not word.startswith(".") for word in words)
    assert identity("table3", scale="demo", changes=("a=1",)) != identity("table3", scale="demo", changes=("a=2",))


# ------------------------------------------------------------------------------------------------------------------- --set


def test_changes_of_all_rows_make_runs_of_their_own_that_say_so(table: Path) -> None:
    plain, changed = (load_table(table, scale="demo", changes=each) for each in ({}, {"training.epochs": 3}))
    plans = [make_plan([each], seeds=[0], rows={}) for each in (plain, changed)]
    assert not plans[0].fingerprints & plans[1].fingerprints
    assert [row.is_base for row in changed.rows] == [True, False, False]
    assert all(row.loaded.recipe.training.epochs == 3 for row in changed.rows)
    job = plans[1].jobs[1]
    assert job.command[2:] == ("--set", "method.num_words=64", "--set", "training.epochs=3", "--seed", "0")
    assert labels_of(job, plan=plans[1])["obowlab.queue"] == "small (--set training.epochs=3)"
    assert labels_of(plans[0].jobs[1], plan=plans[0])["obowlab.queue"] == "small"
    assert "all rows with training.epochs=3" in render.heading(build_table(changed, seeds=[0], records={}))


def test_what_a_row_sets_cannot_be_set_for_all(table: Path) -> None:
    for change, complaint in (
        ("method.num_words=9", r"row 'small' sets 'method.num_words' itself, so --set method.num_words cannot hold for all rows"),
        ("training.epoch=3", r"'training.epoch' \(--set training.epoch=3\).*Did you mean 'training.epochs'"),
        ("training.epochs=zero", r"training.epochs"),
        ("training.epochs", r"--set needs key=value"),
    ):
        with pytest.raises(UserError, match=complaint) as error:
            load_tables([str(table)], scale="demo", overrides=[change])
        assert "\n" not in str(error.value)
    table.write_text(f'{table.read_text()}at.demo.set = {{ "training.epochs" = 4 }}\n')
    with pytest.raises(UserError, match=r"row 'large' sets 'training.epochs' itself"):
        load_tables([str(table)], scale="demo", overrides=["training.epochs=3"])
    assert load_tables([str(table)], scale="tiny", overrides=["training.epochs=3"])


def test_two_tables_of_one_name_are_refused(table: Path, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match=r"there is another table 'queue' .*: rename the file"):
        load_tables([str(table), str(own_table(tmp_path / "b"))], scale="demo")
    with pytest.raises(UserError, match="there is another table 'table3'"):
        load_tables([str(own_table(tmp_path, name="table3"))], scale="demo")


# ------------------------------------------------------------------------------------------------------------- the commands


@pytest.mark.usefixtures("workplace")
def test_commands_remember_own_tables(obowlab: Obowlab, tmp_path: Path) -> None:
    work = tmp_path / "work"
    path = own_table(work)
    add_row_runs(load_table(path, scale="demo"), runs_root=work / "runs", means=MEANS)
    assert obowlab("table", "queue.toml", "--scale", "demo", "--dry-run")[0] == 0
    assert not (work / "runs" / KEPT).exists()
    code, out, err = obowlab("table", "queue.toml", "--scale", "demo")
    assert (code, err) == (0, "")
    assert "↓ lower" in out
    assert obowlab("table", "queue.toml", "--scale", "demo", "--set", "training.epochs=7")[0] == 0
    assert [each.name for each in (work / "runs" / KEPT).iterdir()] == ["queue-demo.json"], "nothing was trained of the other"
    code, out, _ = obowlab("report")
    assert (code, "1 table " in out) == (0, True), out
    assert (work / "report" / "queue-demo.html").is_file()


@pytest.mark.usefixtures("workplace")
def test_the_report_shows_shipped_tables_with_changes_beside_them(obowlab: Obowlab, tmp_path: Path) -> None:
    work = tmp_path / "work"
    for changes in ({}, {"training.epochs": 3}):
        add_row_runs(load_table("table3", scale="demo", changes=changes), runs_root=work / "runs", means={"soft_dynamic": 40})
    assert obowlab("table", "table3", "--scale", "demo", "--set", "training.epochs=3")[0] == 0
    assert obowlab("report")[0] == 0
    (other,) = (path for path in (work / "report").glob("table3-demo-*.html"))
    assert "<code>training.epochs=3</code>" in other.read_text()
    assert other.name in (work / "report" / "index.html").read_text()
    assert other.name in (work / "report" / "table3-demo.html").read_text()


# --------------------------------------------------------------------------------------------------------------- terminals

WIDE = """
title = "Many metrics of rows with long names, each of which says in words what was changed and why"
base = "short.toml"
primary = "fewshot_5shot"
footnotes = ["A footnote that is longer than eighty columns, with numbers in it such as 0.0123456 and 1,281,167, to be wrapped."]

[columns]
fewshot_1shot = "1-shot"
fewshot_5shot = "5-shot"
linear_top1 = "linear classifier, top-1"
knn_top1 = "k-NN, top-1"

[[row]]
key = "base"
label = "as in the recipe that this table starts from, without any change"
{paper}

[[row]]
key = "a-row-with-a-key-that-is-long-as-well"
label = "64 words in the vocabulary of conv5, and nothing else is changed"
set = {{ "method.num_words" = 64 }}
{paper}
"""
PAPER = "paper = { fewshot_1shot = 42.11, fewshot_5shot = 62.44, linear_top1 = 45.86, knn_top1 = 40.5 }"


@pytest.mark.parametrize("columns", [80, 200])
@pytest.mark.parametrize("scale", ["demo", "paper"])
@pytest.mark.parametrize("paper", ["", PAPER])
@pytest.mark.parametrize("words", ["table", "table --runs", "ablate --seeds 2 --dry-run"])
def test_a_wide_table_fits_the_terminal_and_no_number_is_broken(
    words: str, paper: str, scale: str, columns: int, workplace: Path, obowlab: Obowlab, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_table(workplace)
    (workplace / "wide.toml").write_text(WIDE.format(paper=paper))
    planned = load_table(workplace / "wide.toml", scale=scale)
    add_row_runs(planned, runs_root=workplace / "runs", means={row.row.key: 40 for row in planned.rows})
    command = words.split()
    command = [command[0], "wide.toml", "--scale", scale, *command[1:]]
    plain = obowlab(*command)[1]
    monkeypatch.setenv("COLUMNS", str(columns))
    with monkeypatch.context() as patch:
        patch.setattr(sys.stdout, "isatty", lambda: True)
        _, out, _ = obowlab(*command)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", out).splitlines()
    fitted = [line for line in lines if not line.startswith("Would draw")]  # a path is left whole
    assert max(map(text.width, fitted)) <= columns, max(fitted, key=text.width)

    def numbers(lines: str) -> set[str]:
        return {number.strip(".,") for number in re.findall(r"[\d.,]*\d[\d.,]*", lines)}

    shown = "\n".join(lines)
    assert numbers(shown) - {"80", "200"} <= numbers(plain)
    assert ("Not shown in 80 columns: " in shown) == (columns == 80 and command[0] == "table")
    if command[0] == "table":
        value = built_row(planned, runs_root=workplace / "runs")
        assert shown.count(value) >= 2, "the primary metric of both rows"
        assert "as in the" in shown, "the row's name"
        assert "0.0123456" in shown
        assert "1,281,167" in shown


def built_row(planned: PlannedTable, *, runs_root: Path) -> str:
    shown = build_table(planned, seeds=(0,), records=store_records(runs_root))
    return render.estimate_text(shown.rows[0].cells[1].ours)
