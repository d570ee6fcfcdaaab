"""The site of `obowlab report`: every page, every link, every name; in a real browser, from the disk."""

from __future__ import annotations

import csv
import html
import io
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from obowlab.config import Machine
from obowlab.config import validation as checking
from obowlab.errors import UserError
from obowlab.files.records import read_checked
from obowlab.report import curves, figures
from obowlab.report import pages as build
from obowlab.report import read as gather_module
from obowlab.report.model import Site
from obowlab.report.pages import build_site
from obowlab.report.publish import LOG, pack, prepare_upload, send
from obowlab.report.read import Tables, gather, read_store, tables_at
from tests.browser import PHONE, complaints, open_page, requests
from tests.command_line import Obowlab, contents
from tests.report_store import add_gallery, add_run, add_study, make_table

SCRIPTS = ("page.js", "charts.js", "plotly.min.js")
MLFLOW_PAGE = "http://127.0.0.1:5000/#/runs/f00d"
HOSTILE = "<script>alert('x')</script>\"&<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A store with two seeds of one recipe, a variant, one that failed and one that stopped, a study, a gallery and tables."""
    root = tmp_path_factory.mktemp("store")
    base = [add_run(root, seed=seed) for seed in (0, 1)]
    hard = add_run(root, overrides=("method.codes=hard",))
    add_run(root, overrides=("method.kappa=500",), status="failed", message="the loss is not finite at step 31", points=3)
    many = ("method.kappa=9", "training.epochs=30", "optimizer.learning_rate=0.0123456", "data.images_per_class=45")
    add_run(root, overrides=many, status="interrupted", points=40, alike=True)
    add_gallery(base[0])
    (hard.path / "mirror.json").write_text(json.dumps({"stores": {"sqlite:////somewhere/mlflow.db": {"run_id": "f00d"}}}))
    add_study(root, run_id=base[0].run_id, figures=True)
    return gather(read_store(root), tables=Tables((make_table(base, [hard]), make_table(base, [hard], comparable=True))))


@pytest.fixture(scope="module")
def site(store: Site, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "site"
    build_site(store, out=out)
    return out


class Page(HTMLParser):
    """Collects links, names of places, tags and texts of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.tags: list[str] = []
        self.scripts: list[dict[str, str | None]] = []
        self.titles: list[str] = []
        self.texts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if dict(attrs).get("class") == "data":
            self.titles.append(str(dict(attrs)["aria-label"]).removeprefix("data of ").removesuffix(", CSV"))
        if tag == "script":
            self.scripts.append(dict(attrs))
        for name, value in attrs:
            assert not name.startswith("on"), (tag, name)
            if name in ("href", "src") and value is not None:
                self.links.append(value)
            if name == "id" and value is not None:
                assert value not in self.ids, f"two places are called {value}"
                self.ids.add(value)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def pages(site: Path) -> list[Path]:
    return [path for path in sorted(site.rglob("*.html")) if not {"words", "detection"} & set(path.relative_to(site).parts)]


def wait_for_lines(path: Path, *, count: int) -> list[str]:
    """Return the lines of a file once it has so many."""
    for _ in range(600):
        lines = path.read_text().splitlines() if path.exists() else []
        if len(lines) >= count:
            return lines
        time.sleep(0.1)
    raise AssertionError(f"{path} has only {lines}")


# ---------------------------------------------------------------------------------------------------------------- content


def test_every_link_leads_somewhere_inside_the_site(site: Path) -> None:
    found = {path: Page(path) for path in pages(site)}
    assert len(found) == 13
    for path, page in found.items():
        for link in page.links:
            if link.startswith("data:") or link == MLFLOW_PAGE:
                continue
            assert "://" not in link, (path, link)
            assert not link.startswith("/"), (path, link)
            target, _, place = link.partition("#")
            there = (path.parent / target).resolve() if target else path
            assert there.is_file(), (path, link)
            if place:
                assert place in found[there].ids, (path, link)


def test_every_page_can_be_reached_from_the_first(site: Path) -> None:
    reached, todo = set(), [site / "index.html"]
    while todo:
        path = todo.pop()
        if path in reached or path.suffix != ".html":
            continue
        reached.add(path)
        todo += [(path.parent / link.partition("#")[0]).resolve() for link in Page(path).links if link.partition("#")[0]]
    assert {path.resolve() for path in site.rglob("*.html")} == {path.resolve() for path in reached}


def test_table_says_paper_ours_intervals_verdicts_and_what_is_missing(site: Path) -> None:
    page = Page(site / "table3-tiny.html")
    for part in (
        "not comparable with the paper’s values",
        "62.44",
        "13.00 ± 0.80",
        "untrained 6.00 ± 0.50",
        "−1.00 ± 0.40",
        "p 0.0123, Holm 0.0246",
        "✓ agrees",
        "2 of 2 seeds",
        "0 of 2 seeds",
        "failed",
        "the loss is not finite; hard codes",
        "missing",
        "First footnote.",
        "method.codes=hard",
    ):
        assert part in page.text, part
    assert page.links.count("#note-2") == 3
    comparable = Page(site / "table3-paper.html").text
    assert "not comparable" not in comparable
    assert "Δ paper" in comparable


def test_every_value_of_a_table_leads_to_its_runs(site: Path, store: Site) -> None:
    page = Page(site / "table3-tiny.html")
    for row in store.tables[0].rows[:2]:
        for run in row.runs:
            assert page.links.count(build.page_of_run(run.run_id)) >= 2, run.run_id
            there = Page(site / build.page_of_run(run.run_id)).text
            assert run.fingerprint in there
            assert "c0ffee" * 6 + "c0ff" in there
            assert "da7a" * 16 in there


def test_run_page_says_where_a_result_comes_from(site: Path, store: Site) -> None:
    changed = next(run for run in store.runs if run.short == "codes=hard")
    text = Page(site / build.page_of_run(changed.run_id)).text
    for part in (
        "--set method.codes=hard",
        "torch 2.14.1",
        "75 s in 1 start, 1500 of 1500 steps",
        "12.50 ± 0.50",
        f"All {len(changed.settings)} settings",
        "at http://127.0.0.1:5000, while obowlab ui runs",
        "word_age_conv5 3.5 3.5 3.5 steps Mean steps since a word was put into the vocabulary.",
    ):
        assert part in text, part
    assert MLFLOW_PAGE in Page(site / build.page_of_run(changed.run_id)).links
    assert "never sent" in Page(site / build.page_of_run(store.runs[-1].run_id)).text
    seed_1 = next(run for run in store.runs if run.seed == 1)
    assert "with uncommitted changes" in Page(site / build.page_of_run(seed_1.run_id)).text
    failed = next(run for run in store.runs if run.status == "failed")
    assert "the loss is not finite at step 31" in Page(site / build.page_of_run(failed.run_id)).text


def test_study_page_shows_best_paper_and_every_trial(site: Path) -> None:
    page = Page(site / "study-kappa-delta.html")
    assert "7 of 8 trials completed, 8 wanted" in page.text
    assert (
        "The paper’s point reached 12.00 ± 0.50 % here. Best minus paper, on the same episodes or images: +2.00 ± 0.60."
        in page.text
    )
    assert page.tags.count("figure") == 4


def test_curves_have_a_line_for_each_variant(store: Site) -> None:
    family = figures.families(store.trainings)["demo"]
    groups = family.groups
    assert family.shared == ""
    assert [(group.label, len(group.runs), group.base) for group in groups] == [
        ("demo", 2, True),
        ("codes=hard", 1, False),
        ("images_per_class=45, kappa=9, learning_rate=0.01235, epochs=30", 1, False),
        ("kappa=500", 1, False),
    ]
    (loss, _) = figures.curve_figures(groups, metrics=figures.TRAINING)
    assert max(len(trace["x"]) for trace in loss.data) <= 2 * 100


def test_lines_are_named_after_what_distinguishes_them(tmp_path: Path) -> None:
    for kappa in (3, 7):
        add_run(tmp_path, overrides=("training.epochs=7", f"method.kappa={kappa}"), points=5)
    family = figures.families(gather(read_store(tmp_path), tables=Tables()).trainings)["demo"]
    assert family.shared == "training.epochs=7"
    assert [group.label for group in family.groups] == ["kappa=3", "kappa=7"]


def test_flat_curves_are_described_in_words(store: Site, site: Path) -> None:
    titles = [figure.title for figure in figures.run_figures(store.runs[0], metrics=figures.VOCABULARY)]
    assert "Mean age of the words, conv5" not in titles
    assert "Distance to the nearest word, conv5" in titles
    assert "3.5 steps old on average" in Page(site / "vocabulary.html").text


def test_every_chart_has_its_data_beside_the_page_and_one_plotly_serves_all(site: Site) -> None:
    linked: set[Path] = set()
    for path in pages(site):
        page = Page(path)
        data = [path.parent / link for link in page.links if link.endswith(".csv")]
        assert len(data) == page.tags.count("figure") == sum("type" in script for script in page.scripts)
        sources = [script["src"] for script in page.scripts if "src" in script]
        assert sources.count(os.path.relpath(site / "plotly.min.js", path.parent)) == bool(data), path
        for file, title in zip(data, page.titles, strict=True):
            table = list(csv.DictReader(io.StringIO(file.read_text(encoding="utf-8"))))
            assert table, file
            assert "chart" not in table[0] or title in {row["chart"] for row in table}, (file, title)
        linked |= set(data)
    assert linked == set(site.rglob("*.csv"))
    assert [path.relative_to(site).as_posix() for path in site.rglob("plotly*")] == ["plotly.min.js"]
    assert "Licensed under the MIT license" in (site / "plotly.min.js").read_text(encoding="utf-8")[:500]


def test_empty_store_gives_a_site_that_says_so(tmp_path: Path) -> None:
    build_site(gather(read_store(tmp_path / "nothing"), tables=Tables()), out=tmp_path / "site")
    assert "There are no runs yet" in Page(tmp_path / "site" / "index.html").text
    assert [path.name for path in pages(tmp_path / "site")] == ["index.html", "runs.html"]


def test_no_name_becomes_markup(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    run = add_run(root, status="failed", message=HOSTILE)
    values = read_checked(run.path / "run.json")
    values["name"], values["recipe"]["title"], values["recipe"]["data"]["dataset"] = "mine", HOSTILE, HOSTILE
    (run.path / "run.json").write_text(json.dumps(values))
    add_study(root, name=HOSTILE, title=HOSTILE, run_id=HOSTILE, figures=True)
    (damaged := add_run(root, seed=1)).set_state(message=HOSTILE)
    (damaged.path / "results" / f"{HOSTILE.replace('/', '')}.json").write_text(HOSTILE)
    build_site(
        gather(read_store(root), tables=Tables((make_table([run], [run], label=HOSTILE),), (HOSTILE,))), out=tmp_path / "site"
    )
    for path in pages(tmp_path / "site"):
        page = Page(path)
        for script in page.scripts:
            assert script.get("type") == "application/json" or str(script.get("src")).split("/")[-1] in SCRIPTS, (path, script)
        assert "img" not in page.tags, path
        assert "<script>alert" not in path.read_text()
    assert HOSTILE.split('"')[0] in Page(tmp_path / "site" / "index.html").text


ATTACK = "document.documentElement.dataset.attacked = 'yes'"


def words_json(place: Path, change: Callable[[Any], Any]) -> None:
    facts = json.loads((place / "words.json").read_text())
    change(facts)
    (place / "words.json").write_text(json.dumps(facts))


def _linked(place: Path, name: str, *, secret: Path) -> None:
    (place / name).unlink()
    (place / name).symlink_to(secret)


def test_nothing_in_a_run_folder_is_run_by_who_reads_the_report(tmp_path: Path) -> None:
    folder = add_run(tmp_path / "runs")
    add_gallery(folder)
    place = folder.path / "words"
    (place / "index.html").write_text(f"<script>{ATTACK}</script>")
    (place / "more.html").write_text(f"<script>{ATTACK}</script>")
    (place / "drawing.svg").write_text(f"<svg xmlns='http://www.w3.org/2000/svg'><script>{ATTACK}</script></svg>")
    (place / "words.js").write_text(ATTACK)
    words_json(place, lambda facts: facts.update(title=HOSTILE, dataset=HOSTILE, version=HOSTILE, network=HOSTILE))
    site = tmp_path / "site"
    build_site(gather(read_store(tmp_path / "runs"), tables=Tables()), out=site)
    gallery = site / "words" / folder.run_id
    assert sorted(path.name for path in gallery.iterdir()) == ["conv5-0.png", "conv5-1.png", "index.html", "words.json"]
    assert not [path for path in site.rglob("*") if path.is_file() and ATTACK.encode() in path.read_bytes()]
    page = Page(gallery / "index.html")
    assert [script.get("src") or script.get("type") for script in page.scripts] == ["application/json", "../../words.js"]
    assert "img" not in page.tags
    assert HOSTILE.split('"')[0] in page.text


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        (lambda place, secret: _linked(place, "conv5-1.png", secret=secret), "Too many levels of symbolic links"),
        (lambda place, secret: _linked(place, "words.json", secret=secret), "Too many levels of symbolic links"),
        (lambda place, secret: (place / "conv5-1.png").write_text("<html>"), "is not a picture of the kind"),
        (lambda place, secret: ((place / "conv5-1.png").unlink(), os.mkfifo(place / "conv5-1.png")), "is no file"),
        (lambda place, secret: (place / "conv5-1.png").unlink(), "No such file"),
        (lambda place, secret: (place / "words.json").write_text("[" * 100_000), "(no JSON)"),
        (lambda place, secret: (place / "words.json").unlink(), "No such file"),
        (lambda place, secret: words_json(place, lambda f: f.update(patches_per_word="8);x")), "(patches_per_word)"),
        (lambda place, secret: words_json(place, lambda f: f["view"].update(size="`+alert(1)+`")), "(view.size)"),
        (lambda place, secret: words_json(place, lambda f: f["levels"].update({"<b>": {}})), "(levels.<b>"),
        (lambda place, secret: words_json(place, lambda f: f.update(format=2)), "(format)"),
        *(
            (lambda place, secret, n=name: words_json(place, lambda f: f["levels"]["conv5"].update(sheets=[n])), "conv5.sheets")
            for name in ("../../run.json", "x.svg", "x.html", "/etc/passwd.png", "a.png\n", ".png", "conv5-0.png")
        ),
    ],
)
def test_a_gallery_that_is_none_is_left_out_and_named(tmp_path: Path, attack: Callable[[Path, Path], object], said: str) -> None:
    (secret := tmp_path / "secret").write_text("of somebody else")
    folder = add_run(tmp_path / "runs")
    add_gallery(folder)
    attack(folder.path / "words", secret)
    site = tmp_path / "site"
    build_site(gather(read_store(tmp_path / "runs"), tables=Tables()), out=site)
    text = Page(site / "index.html").text
    assert f"The visual words of run {folder.run_id} cannot be shown: " in text
    assert said in text
    assert not (site / "words").exists()
    assert (site / "runs" / f"{folder.run_id}.html").is_file()
    assert not [path for path in site.rglob("*") if path.is_file() and path.read_bytes() == secret.read_bytes()]


def test_a_page_runs_no_script_but_its_own(browser: Any, site: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(site, tmp_path / "site"))
    (gallery,) = copy.glob("words/*/index.html")
    for path in (*pages(copy), gallery):
        whole = path.read_text()
        assert "default-src 'none'; script-src 'self' file:; style-src " in html.unescape(whole), path
        attack = f'<script>{ATTACK}</script><img src=x onerror="{ATTACK}"><a id=lure href="javascript:{ATTACK}">x</a>'
        path.write_text(whole.replace("</main>", attack + "</main>"))
    for path in (copy / "index.html", copy / "curves.html", gallery):
        open_page(browser, path)
        browser.execute_script("document.getElementById('lure').click()")
        assert browser.execute_script("return document.documentElement.dataset.attacked") is None, path
        assert sum("violates the following" in said for said in complaints(browser)) >= 3, path


# -------------------------------------------------------------------------------------------------------------- the folder


def test_the_same_store_gives_the_same_bytes(store: Site, site: Path, tmp_path: Path) -> None:
    build_site(store, out=tmp_path / "again")
    first = {name: content for name, (_, content) in contents(site).items()}
    assert first == {name: content for name, (_, content) in contents(tmp_path / "again").items()}
    for number in (1, 2):
        pack(tmp_path / "again", target=tmp_path / f"{number}.zip")
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "1.zip") as archive:
        assert archive.read("report/index.html") == first["index.html"]


def slow_csv(lines: Sequence[figures.Line], *, title: str) -> str:
    """Write the points of some curves with `csv` alone."""
    target = io.StringIO(newline="")
    writer = csv.writer(target, lineterminator="\n")
    writer.writerow(figures.CURVE_COLUMNS)
    for line in lines:
        curve = line.curve
        for point in zip(curve.step, curve.epoch, curve.mean, curve.low, curve.high, strict=True):
            writer.writerow([title, line.label, " ".join(line.runs), *point])
    return target.getvalue()


def test_pages_are_the_same_from_the_cache_from_the_files_and_from_slow_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "runs"
    for seed in (0, 1):
        add_run(root, seed=seed)
    add_run(root, overrides=("method.kappa=7",), status="interrupted", points=40)

    def build_all(name: str) -> dict[str, bytes]:
        read = read_store(root)
        build_site(gather(read, tables=tables_at(["demo"], store=read)), out=tmp_path / name)
        return {name: content for name, (_, content) in contents(tmp_path / name).items()}

    first, cached = build_all("first"), build_all("cached")
    assert first["table3-demo.html"].count(b"<figure") == 3
    assert cached == first
    shutil.rmtree(root / curves.CACHE)
    monkeypatch.setattr(figures, "_curve_csv", slow_csv)
    monkeypatch.setattr(gather_module, "describe", gather_module.describe.__wrapped__)
    monkeypatch.setattr(build, "cache", lambda rows: rows)
    monkeypatch.setattr(checking, "_parsed", checking._parsed.__wrapped__)
    assert build_all("slow") == first


def test_a_report_is_replaced_whole_and_nothing_else_is(store: Site, tmp_path: Path) -> None:
    out = tmp_path / "site"
    build_site(store, out=out)
    (out / "stale.html").write_text("old")
    build_site(Site(as_of="", version="0"), out=out)
    assert not (out / "stale.html").exists()
    assert not (out / "runs").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["site"]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    for place in (mine, mine / "thesis.tex"):
        with pytest.raises(UserError, match="is not a report; choose another --out"):
            build_site(store, out=place)
    assert (mine / "thesis.tex").read_text() == "years of work"


def test_a_failed_build_leaves_the_earlier_report(store: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "site"
    build_site(store, out=out)
    before = contents(out)
    monkeypatch.setattr(build, "ASSETS", ("nothing.css",))
    with pytest.raises(UserError, match="Cannot write the report"):
        build_site(store, out=out)
    assert contents(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


# ------------------------------------------------------------------------------------------------------------- the command


@pytest.mark.usefixtures("workplace")
def test_command_without_runs_or_server_says_so(obowlab: Obowlab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert obowlab("report")[0] == 0
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["report"]
    add_run(tmp_path / "work" / "runs", overrides=("training.epochs=7",))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://someone:secret@127.0.0.1:9")
    code, _, err = obowlab("report", "--wait")
    assert code == 0
    before = (tmp_path / "work" / "report" / "index.html").read_bytes()
    code, _, refusal = obowlab("report", "--runs-root", "rnus")
    assert code == 2
    assert "rnus (--runs-root): the report in report is left as it is." in refusal
    assert (tmp_path / "work" / "report" / "index.html").read_bytes() == before
    assert err.startswith("Warning: MLflow does not have the report 'report' as it is now (http://127.0.0.1:9")
    assert err.count("\n") == 1
    assert "secret" not in err


@pytest.mark.usefixtures("workplace")
def test_mlflow_gets_the_report_in_the_background(obowlab: Obowlab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = tmp_path / "work" / "runs"
    add_run(runs)
    assert obowlab("report")[0] == 0
    (sent,) = wait_for_lines(runs / LOG, count=1)
    assert f"{tmp_path / 'work' / 'report'} is in sqlite:///" in sent
    assert "nothing was new" not in sent
    archive = next(runs.glob("mlartifacts/*/artifacts/report.zip"))
    with zipfile.ZipFile(archive) as packed:
        assert packed.read("report/index.html") == (tmp_path / "work" / "report" / "index.html").read_bytes()
    assert obowlab("report", "--wait")[2] == ""
    with sqlite3.connect(runs / "mlflow.db") as store:
        assert store.execute("SELECT count(*) FROM tags WHERE key = 'obowlab.kind' AND value = 'report'").fetchone() == (1,)
        assert store.execute("SELECT value FROM latest_metrics WHERE key = 'report/runs_finished'").fetchone() == (1.0,)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://someone:secret@127.0.0.1:9")
    code, _, err = obowlab("report")
    assert (code, err.count("\n")) == (0, 1)
    (_, failed) = wait_for_lines(runs / LOG, count=2)
    assert "Warning: MLflow does not have the report 'report' as it is now (http://127.0.0.1:9" in failed
    assert "secret" not in failed


def test_a_report_that_was_replaced_is_not_sent(store: Site, tmp_path: Path) -> None:
    machine = Machine(runs_root=tmp_path)
    build_site(store, out=tmp_path / "site")
    upload = prepare_upload(store, folder=tmp_path / "site", machine=machine)
    build_site(Site(as_of="", version="0"), out=tmp_path / "site")
    assert send(upload) is None
    shutil.rmtree(tmp_path / "site")
    assert send(upload) is None
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.usefixtures("workplace")
def test_a_store_without_room_for_a_log_is_said(obowlab: Obowlab, tmp_path: Path) -> None:
    add_run(tmp_path / "work" / "runs")
    (tmp_path / "work" / "runs" / ".logs").write_text("")
    code, out, err = obowlab("report")
    assert (code, out.count("index.html")) == (0, 1)
    assert err.startswith("Warning: MLflow does not get it (")
    assert err.count("\n") == 1


@pytest.mark.usefixtures("workplace")
def test_command_refuses_what_is_not_a_report(obowlab: Obowlab, tmp_path: Path) -> None:
    (tmp_path / "work" / "notes").mkdir()
    (tmp_path / "work" / "notes" / "a.txt").write_text("a")
    code, out, err = obowlab("report", "--out", "notes")
    assert (code, out) == (2, "")
    assert "notes is there already and is not a report" in err
    assert obowlab("report", "--scale", "huge")[0] == 2


def test_report_does_not_import_torch_or_mlflow(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from obowlab.report.read import gather, read_store, tables_at\n"
        "from obowlab.report.pages import build_site\n"
        f"root = Path({str(tmp_path)!r})\n"
        "build_site(gather(read_store(root), tables=tables_at([], store=read_store(root))), out=root / 'site')\n"
        "assert not {'torch', 'mlflow', 'optuna', 'plotly.graph_objs', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=240, env={**os.environ})


def test_scales_are_those_of_the_code() -> None:
    from obowlab.cli.report import SCALES
    from obowlab.config import scales

    assert tuple(scales.SCALES) == SCALES


# -------------------------------------------------------------------------------------------------------------- a browser


def test_pages_work_in_a_browser_from_the_disk(browser: Any, site: Path) -> None:
    for path in pages(site):
        for size in (PHONE, (375, 800), (1280, 900)):
            open_page(browser, path, size=size)
            wide = browser.execute_script("return document.documentElement.scrollWidth")
            assert wide <= size[0], (path.name, size, wide)
        assert complaints(browser) == [], path.name
        asked = requests(browser)
        assert asked, path.name
        assert all(address.startswith("file://") for address in asked), path.name
        pictures = "Promise.all([...document.images].map(image => { image.loading = 'eager'; return image.decode(); }))"
        assert browser.execute_async_script(f"const done = arguments[0]; {pictures}.then(() => done(true), () => done(false))")
    (gallery,) = site.glob("words/*/index.html")
    open_page(browser, gallery)
    assert browser.execute_script("return document.querySelectorAll('#words li').length") == 2
    assert complaints(browser) == []


def test_theme_follows_the_system_and_a_choice_is_remembered(browser: Any, site: Path) -> None:
    def background() -> str:
        return str(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))

    open_page(browser, site / "index.html")
    light = background()
    open_page(browser, site / "index.html", dark=True)
    dark = background()
    assert light == "rgb(255, 255, 255)" != dark
    button = browser.find_element("id", "theme")
    assert button.text == "Light"
    button.click()
    assert (background(), browser.find_element("id", "theme").text) == (light, "Dark")
    open_page(browser, site / "runs.html", dark=True)
    assert background() == light
    browser.find_element("id", "theme").click()
    assert background() == dark
    browser.execute_script("localStorage.clear()")


def test_runs_can_be_searched_and_reached_by_keyboard(browser: Any, site: Path) -> None:
    open_page(browser, site / "runs.html")
    visible = "[...document.querySelectorAll('#runs tbody tr')].filter(row => !row.hidden)"
    for words, count in (("codes=hard", 1), ("DEMO finished", 3), ("5-shot>13", 1), ("5-shot>=12.5 seed<1", 2), ("nothing", 0)):
        search = browser.find_element("id", "search-runs")
        search.clear()
        search.send_keys(words)
        assert browser.execute_script(f"return {visible}.length") == count, words
        assert browser.find_element("css selector", "[data-list=runs] output").text == f"{count} of 5"
    browser.find_element("id", "search-trainings").send_keys("kappa")
    assert (
        browser.execute_script("return [...document.querySelectorAll('#trainings tbody tr')].filter(r => !r.hidden).length") == 2
    )
    browser.execute_script("document.activeElement.blur()")
    open_page(browser, site / "table3-tiny.html")
    order = browser.execute_script(
        "return [...document.querySelectorAll('a[href], button, input, summary, [tabindex]')].map(e => e.tabIndex)"
    )
    assert set(order) == {0}
    assert browser.execute_script("return [...document.querySelectorAll('.scroll')].every(box => box.getAttribute('aria-label'))")


def test_run_lists_are_sorted_by_any_column_with_absent_values_last(browser: Any, site: Path, store: Site) -> None:
    open_page(browser, site / "runs.html")

    def column(name: str) -> list[str]:
        place = [heading.text for heading in browser.find_elements("css selector", "#runs thead th")].index(name)
        cells = f"[...document.querySelectorAll('#runs tbody tr')].map(row => row.cells[{place}].textContent.trim())"
        button = browser.find_elements("css selector", "#runs thead button")[place]
        button.send_keys("\n")  # by keyboard as well
        return [str(text) for text in browser.execute_script(f"return {cells}")]

    def numbers(texts: list[str]) -> list[float]:
        return [float(text.split()[0]) for text in texts if text != "–"]

    up, down = column("5-shot, %"), column("5-shot, %")
    assert numbers(up) == sorted(numbers(up)) == numbers(down)[::-1]
    assert len(numbers(up)) == 3
    assert up[3:] == down[3:] == ["–", "–"]
    assert browser.find_element("css selector", "#runs [aria-sort]").get_dom_attribute("aria-sort") == "descending"
    assert column("created") == sorted(run.created for run in store.runs)
    assert browser.execute_script("return document.querySelectorAll('#runs [aria-sort]').length") == 1
    assert complaints(browser) == []


def test_colours_can_be_read(browser: Any, site: Path) -> None:
    program = """
    const numbers = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255);
    const linear = (v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const luminance = (colour) => numbers(colour).map(linear).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = (element) => {
        for (; element; element = element.parentElement) {
            const colour = getComputedStyle(element).backgroundColor;
            if (!/, 0\\)$/.test(colour)) return colour;
        }
        return "rgb(255, 255, 255)";
    };
    const contrast = (a, b) => {
        const [more, less] = [luminance(a), luminance(b)].sort((p, q) => q - p);
        return (more + 0.05) / (less + 0.05);
    };
    const hasText = (element) => [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    const ink = (element) => getComputedStyle(element)[element.closest("svg") ? "fill" : "color"];
    return [...document.querySelectorAll("body *")]
        .filter(element => hasText(element) && element.getClientRects().length)
        .map(element => [contrast(ink(element), behind(element)), element.textContent.trim().slice(0, 30)])
        .filter(([value]) => value < 4.5);
    """
    for dark in (False, True):
        for name in ("index.html", "table3-tiny.html", "vocabulary.html", "curves.html"):
            open_page(browser, site / name, dark=dark)
            assert browser.execute_script(program) == [], (name, dark)


def wait_for(browser: Any, condition: str) -> Any:
    """Return the first value of a JavaScript expression that is true."""
    for _ in range(300):
        if value := browser.execute_script(f"return {condition}"):
            return value
        time.sleep(0.1)
    raise AssertionError(f"not so within 30 s: {condition}")


FIRST = "document.querySelector('.chart')"


def hover(browser: Any, *, trace: str, point: int) -> str:
    """Move the mouse over a point of a curve of the first chart and return what is shown there."""
    wait_for(browser, f"{FIRST}.dataset.drawn === ''")
    place = browser.execute_script(
        f"""const chart = {FIRST}, trace = chart.data.find((each) => each.name === arguments[0]);
        chart.scrollIntoView({{block: "center"}});
        const {{ xaxis, yaxis }} = chart._fullLayout, box = chart.getBoundingClientRect();
        const x = xaxis._offset + xaxis.d2p(trace.x[arguments[1]]), y = yaxis._offset + yaxis.d2p(trace.y[arguments[1]]);
        return [box.left + x, box.top + y];
        """,
        trace,
        point,
    )
    for offset in (3, 0):
        move = {"type": "mouseMoved", "x": place[0] + offset, "y": place[1]}
        browser.execute_cdp_cmd("Input.dispatchMouseEvent", move)
        time.sleep(0.2)
    return str(wait_for(browser, f"{FIRST}.querySelector('.hoverlayer').textContent"))


def test_hovering_a_curve_shows_value_step_and_run(browser: Any, site: Path, store: Site) -> None:
    run = next(run for run in store.runs if run.short == "codes=hard")
    curve = run.curves["loss"]
    for page, trace in ((site / build.page_of_run(run.run_id), "Loss"), (site / "curves.html", "codes=hard")):
        open_page(browser, page)
        shown = hover(browser, trace=trace, point=60)
        for part in (f"{curve.mean[60]:.4g}", "nats", f"step {curve.step[60]}", run.run_id):
            assert part in shown, (page.name, shown)
    assert complaints(browser) == []


def test_a_curve_can_be_hidden_and_stays_so_when_the_theme_changes(browser: Any, site: Path) -> None:
    open_page(browser, site / "curves.html")
    wait_for(browser, f"{FIRST}.dataset.drawn === ''")
    shown = f"{FIRST}._fullData.filter((trace) => trace.visible === true).length"
    colour = f"{FIRST}._fullLayout.font.color"
    before, light = browser.execute_script(f"return [{shown}, {colour}]")
    browser.find_element("css selector", ".chart .legendtoggle").click()
    wait_for(browser, f"{shown} === {before - 2}")  # the base with its band
    scheme = {"name": "prefers-color-scheme", "value": "dark"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    wait_for(browser, f"{colour} !== '{light}'")
    assert browser.execute_script(f"return {shown}") == before - 2
    assert complaints(browser) == []


def test_the_data_of_a_chart_can_be_saved(browser: Any, site: Path, tmp_path: Path) -> None:
    open_page(browser, site / "curves.html")
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    link = browser.find_element("css selector", "figcaption .data")
    there = site / str(link.get_dom_attribute("href"))
    link.click()
    for _ in range(300):
        if (tmp_path / there.name).exists():
            break
        time.sleep(0.1)
    assert (tmp_path / there.name).read_bytes() == there.read_bytes()
    assert complaints(browser) == []


def test_charts_fit_a_phone_and_a_wide_window(browser: Any, site: Path) -> None:
    for name in ("curves.html", "table3-tiny.html", "study-kappa-delta.html"):
        for width in (390, 1400):
            for dark in (False, True):
                open_page(browser, site / name, size=(width, 900), dark=dark)
                browser.execute_script("for (const chart of document.querySelectorAll('.chart')) chart.scrollIntoView();")
                charts = "[...document.querySelectorAll('.chart')]"
                wait_for(browser, f"{charts}.some((chart) => 'drawn' in chart.dataset)")
                assert browser.execute_script("return document.documentElement.scrollWidth") <= width, (name, width)
                too_wide = (
                    f"{charts}.some((chart) => 'drawn' in chart.dataset && "
                    "chart.querySelector('.main-svg').getBoundingClientRect().width > chart.clientWidth + 1)"
                )
                assert not browser.execute_script(f"return {too_wide}"), (name, width)
                assert complaints(browser) == [], (name, width, dark)


def test_hostile_names_are_shown_to_the_letter(browser: Any, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    for seed, kappa in ((0, 3), (1, 7)):
        run = add_run(root, seed=seed, overrides=(f"method.kappa={kappa}",), points=40)
        values = read_checked(run.path / "run.json")
        values["name"], values["recipe"]["title"] = "mine", HOSTILE  # names themselves are checked when a run is read
        (run.path / "run.json").write_text(json.dumps(values))
    add_study(root, name=HOSTILE, figures=True)
    table = make_table([run], [run], label=HOSTILE)
    build_site(gather(read_store(root), tables=Tables((table,))), out=tmp_path / "site")
    for page in pages(tmp_path / "site"):
        open_page(browser, page)
        assert complaints(browser) == [], page.name
        assert all(address.startswith("file://") for address in requests(browser))
    open_page(browser, tmp_path / "site" / "table3-tiny.html")
    wait_for(browser, "document.querySelector('.chart .legendtext')?.textContent")
    names = browser.execute_script("return [...document.querySelectorAll('.chart .legendtext')].map((each) => each.textContent)")
    assert any(name.startswith("<script>alert('x')</script>") for name in names), names
