"""From a `Site` to a folder of pages with one `plotly.min.js`, which need no server; the same site gives the same bytes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pydantic_core
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from obowlab import text
from obowlab.config import canonical_hash
from obowlab.errors import UserError
from obowlab.files.replacing import folder_written
from obowlab.pages import environment, templates
from obowlab.pages.detection import write_detection
from obowlab.report import figures, result_figures
from obowlab.report.model import DetectionSet, Figure, Run, Site
from obowlab.report.vocabulary_health import RULES
from obowlab.report.words_page import FACTS, SCRIPT, read_sheet, read_words, render_words
from obowlab.runs.detection_facts import DetectionFacts, read_detection
from obowlab.runs.metrics import lookup, unit_of
from obowlab.studies.schema import StudyReport
from obowlab.tables.kept import identity
from obowlab.tables.model import Table
from obowlab.tables.render import MARKS, estimate_text, legend, p_text

ASSETS = ("style.css", "page.js", "charts.js")
PLOTLY = "plotly.min.js"
MARKER = ".obowlab-report"
"""Lies in every report: only a folder that has it, or an empty one, is replaced."""

NEWEST = 8
"""Runs that the overview lists, and warnings."""


def build_site(site: Site, *, out: Path) -> int:
    """Write the whole site into a folder, replacing an earlier report, and return the number of pages.

    Args:
        site: what to say.
        out: the folder; `index.html` is its first page.

    Raises:
        UserError: the folder holds something else, or the disk refuses.
    """
    refuse_foreign(out)
    try:
        with folder_written(out.absolute()) as folder:
            return _write(site, folder=folder)
    except OSError as error:
        raise UserError(f"Cannot write the report to {out} (--out): {error.strerror or error}.") from None


def refuse_foreign(out: Path) -> None:
    """Refuse to replace a folder that is not a report.

    Raises:
        UserError: something else is there.
    """
    if out.exists() and not (out.is_dir() and ((out / MARKER).exists() or not any(out.iterdir()))):
        raise UserError(f"{out} is there already and is not a report; choose another --out.")


def _write(site: Site, *, folder: Path) -> int:
    site = _with_detections(_with_galleries(site, folder=folder), folder=folder)
    pages = _pages(site)
    source = templates() / "report"
    here = environment(source, trim_blocks=False)
    here.filters.update(
        {
            "estimate": estimate_text,
            "signed": signed,
            "p_value": p_text,
            "measurement": text.measurement,
            "duration": text.duration,
            "short": short_hash,
            "page_of": page_of_run,
            "detections_of": detections_of,
            "anchor": anchor,
            "setting": setting_text,
            "metric": metric_label,
            "unit": unit_of,
            "meaning": meaning_of,
            "table_path": table_path,
            "study_path": study_path,
            "table_name": table_name,
        }
    )
    here.globals.update({"MARKS": MARKS, "legend": legend, "RULES": RULES, "site": site, "figures": figures})
    here.globals["menu"] = _menu(pages)
    # Runs of one recipe share these hundred rows, which are most of what a page escapes.
    here.globals["setting_rows"] = cache(here.get_template("macros.html").module.setting_rows)  # type: ignore[attr-defined]
    for page in pages:
        path = folder / page.path
        path.parent.mkdir(parents=True, exist_ok=True)
        up = "../" * page.path.count("/")
        charts = _charts(page.figures(), page=path)
        content = here.get_template(page.template).render(
            up=up, path=page.path, section=page.section, title=page.title, charts=charts, **page.values
        )
        path.write_text(re.sub(r"\n\s*\n", "\n", content), encoding="utf-8")  # the lines of template statements are empty
    for name in ASSETS:
        shutil.copyfile(source / name, folder / name)
    (folder / PLOTLY).write_text(get_plotlyjs(), encoding="utf-8")
    if (folder / "words").exists():
        shutil.copyfile(templates() / SCRIPT, folder / SCRIPT)
    (folder / MARKER).write_text("This folder is replaced by the next `obowlab report`.\n", encoding="utf-8")
    return len(pages)


def _with_galleries(site: Site, *, folder: Path) -> Site:
    """Write the galleries of all runs, and return the site without those that cannot be shown, but with a sentence on each."""
    runs: list[Run] = []
    problems: list[str] = []
    for run in site.runs:
        if (gallery := run.gallery) is not None:
            try:
                facts, sheets = _read_gallery(gallery.folder)
            except (OSError, UserError) as error:
                problems.append(f"The visual words of run {run.run_id} cannot be shown: {error}")
                run = replace(run, gallery=None)
            else:
                _write_gallery(facts, sheets=sheets, folder=folder / gallery_of(run))
                first = tuple(level["sheets"][0] for level in facts["levels"].values() if level["sheets"])
                run = replace(run, gallery=replace(gallery, preview=first))
        runs.append(run)
    return replace(site, runs=tuple(runs), problems=(*site.problems, *problems))


def _read_gallery(folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return the facts of a gallery and its pictures by name.

    Raises:
        OSError: a file is missing, a link, or cannot be read.
        UserError: a file is not what `obowlab words` writes.
    """
    facts = read_words(folder)
    names = {name for level in facts["levels"].values() for name in level["sheets"]}
    return facts, {name: read_sheet(folder / name) for name in sorted(names)}


def _write_gallery(facts: Mapping[str, Any], *, sheets: Mapping[str, bytes], folder: Path) -> None:
    """Write a gallery anew from its facts: what a browser runs comes from this program, never from a run folder."""
    folder.mkdir(parents=True)
    (folder / "index.html").write_text(render_words(facts, script=f"../../{SCRIPT}"), encoding="utf-8")
    (folder / FACTS).write_bytes(pydantic_core.to_json(facts))
    for name, content in sheets.items():
        (folder / name).write_bytes(content)


def _with_detections(site: Site, *, folder: Path) -> Site:
    """Write the tests of detectors anew, and return the site without those that cannot be shown, but with a sentence on each."""
    runs: list[Run] = []
    problems: list[str] = []
    for run in site.runs:
        shown: list[DetectionSet] = []
        for each in run.detections:
            try:
                facts, pictures = read_detection(each.folder)
            except (OSError, UserError) as error:
                problems.append(f"The detections of run {run.run_id} cannot be shown: {error}")
            else:
                write_detection(facts, pictures=pictures, folder=folder / detections_of(run, each))
                shown.append(replace(each, preview=_previewed(facts)))
        runs.append(replace(run, detections=tuple(shown)))
    return replace(site, runs=tuple(runs), problems=(*site.problems, *problems))


def _previewed(facts: DetectionFacts) -> tuple[str, ...]:
    """Return the names of the best picture, the worst one and a random one, each once."""
    groups = facts.groups
    first = [place for group in (groups.best, groups.worst, groups.random) for place in group[:1]]
    return tuple(dict.fromkeys(facts.pictures[place].file for place in first))


@dataclass(frozen=True)
class _Page:
    """One page.

    Attributes:
        path: in the site's folder.
        template: its file in `dashboards/report`.
        title: in the browser's tab.
        section: entry of the menu that it belongs to.
        values: what the template needs beside its charts.
        figures: makes its charts by section, when the page is written.
    """

    path: str
    template: str
    title: str
    section: str
    values: Mapping[str, Any] = field(default_factory=dict)
    figures: Callable[[], Mapping[str, Sequence[Figure]]] = dict


@dataclass(frozen=True)
class _Chart:
    """A figure on a page: its plotly JSON, and its CSV file as seen from the page."""

    figure: Figure
    json: Markup
    csv: str


def _charts(sections: Mapping[str, Sequence[Figure]], *, page: Path) -> dict[str, list[_Chart]]:
    """Write the CSV files of a page's figures beside it, one of each kind, and return what the template needs of them."""
    tables: dict[str, list[str]] = {}
    charts: dict[str, list[_Chart]] = {}
    for section, found in sections.items():
        charts[section] = []
        for figure in found:
            name = f"{page.stem}{'-' * bool(figure.kind)}{figure.kind}.csv"
            if figure.csv not in tables.setdefault(name, []):
                tables[name].append(figure.csv)
            content = script_json({"data": figure.data, "layout": figure.layout})
            charts[section].append(_Chart(figure, content, name))
    for name, (first, *others) in tables.items():
        table = first + "".join(each.partition("\n")[2] for each in others)  # one header
        (page.parent / name).write_text(table, encoding="utf-8")
    return charts


def script_json(value: Any) -> Markup:
    """Return a value as JSON for a `<script>` element, which no text in it can end; what is not finite becomes null."""
    content = pydantic_core.to_json(value, inf_nan_mode="null").decode()
    return Markup(content.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _pages(site: Site) -> list[_Page]:
    recipes = figures.families(site.trainings)
    galleries = [run for run in site.runs if run.gallery is not None]
    pages = [_Page("index.html", "index.html", "Overview", "Overview", {"galleries": galleries, "newest": NEWEST})]
    pages += [_table_page(table, site=site) for table in site.tables]
    if site.runs:
        judged = [run for run in site.runs if run.findings]
        training, vocabulary = (partial(_recipe_charts, recipes, metrics=m) for m in (figures.TRAINING, figures.VOCABULARY))
        pages.append(_Page("curves.html", "curves.html", "Training curves", "Curves", {"recipes": recipes}, training))
        pages.append(_Page("vocabulary.html", "vocabulary.html", "Vocabulary", "Vocabulary", {"judged": judged}, vocabulary))
    pages += [_study_page(study) for study in site.studies]
    if galleries:
        pages.append(_Page("words.html", "words.html", "Visual words", "Words", {"galleries": galleries}))
    tested = [run for run in site.runs if run.detections]
    if tested:
        pages.append(_Page("detections.html", "detections.html", "Detections", "Detections", {"tested": tested}))
    pages.append(_Page("runs.html", "runs.html", "Runs", "Runs"))
    return pages + [_run_page(run) for run in site.runs]


def _menu(pages: list[_Page]) -> dict[str, str]:
    """Return the entries of the menu and where they lead: a section of several pages to its part of the overview."""
    menu: dict[str, str] = {}
    for page in pages:
        several = page.section in ("Tables", "Studies")
        menu.setdefault(page.section, f"index.html#{page.section.lower()}" if several else page.path)
    return menu


def _table_page(table: Table, *, site: Site) -> _Page:
    def charts() -> dict[str, list[Figure]]:
        groups = figures.groups_of(table, site=site)
        metrics = ("loss", "fewshot", "perplexity_image")
        curves = [f for heading, rows in groups.items() for f in figures.curve_figures(rows, metrics=metrics, heading=heading)]
        difference = result_figures.table_figure(table)
        return {"difference": [difference] if difference else [], "curves": curves}

    return _Page(table_path(table), "table.html", f"{table_name(table)}, {table.scale}", "Tables", {"table": table}, charts)


def _study_page(study: StudyReport) -> _Page:
    def charts() -> dict[str, list[Figure]]:
        return {"study": result_figures.study_figures(study)}

    return _Page(study_path(study), "study.html", f"Study {study.name}", "Studies", {"study": study}, charts)


def _run_page(run: Run) -> _Page:
    def charts() -> dict[str, list[Figure]]:
        sections = {"training": figures.TRAINING, "vocabulary": figures.VOCABULARY}
        main = {section: figures.run_figures(run, metrics=metrics) for section, metrics in sections.items()}
        return {**main, **figures.more_figures(run)}

    gallery = gallery_of(run) if run.gallery is not None else ""
    return _Page(page_of_run(run.run_id), "run.html", run.run_id, "Runs", {"run": run, "gallery": gallery}, charts)


def _recipe_charts(recipes: Mapping[str, figures.Family], *, metrics: Sequence[str]) -> dict[str, list[Figure]]:
    return {name: figures.curve_figures(family.groups, metrics=metrics) for name, family in recipes.items()}


# ------------------------------------------------------------------------------------------------- names, texts, filters


def table_path(table: Table) -> str:
    """Return the page of a table."""
    return f"{identity(table.name, scale=table.scale, changes=table.changes)}.html"


def study_path(study: StudyReport) -> str:
    """Return the page of a study; different names have different ones."""
    word = anchor(study.name)
    return f"study-{word}.html" if word == study.name else f"study-{word}-{canonical_hash(study.name)[:8]}.html"


def table_name(table: Table) -> str:
    """Return `Table 3` for `table3`, other names as they are; with what all rows change."""
    changes = f" with {', '.join(table.changes)}" if table.changes else ""
    return re.sub(r"^table(?=[0-9])", "Table ", table.name) + changes


def page_of_run(run_id: str) -> str:
    """Return the page of a run, seen from the site's folder."""
    return f"runs/{anchor(run_id)}.html"


def gallery_of(run: Run) -> str:
    """Return the folder of a run's gallery in the site."""
    return f"words/{anchor(run.run_id)}"


def detections_of(run: Run, detections: DetectionSet) -> str:
    """Return the folder of a detector's test in the site."""
    return f"detection/{anchor(run.run_id)}/{anchor(detections.folder.name)}"


def anchor(name: str) -> str:
    """Return a name as it may stand in a file name or behind a `#`."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip(".") or "unnamed"


def signed(value: float | None) -> str:
    """Return a difference with its sign, a real minus; a dash where there is nothing."""
    return "–" if value is None else f"{value:+.2f}".replace("-", "−")


def metric_label(metric: str) -> str:
    """Return the heading of a result: `5-shot`, `linear`, `k-NN`."""
    shots = re.fullmatch(r"fewshot_(\d+)shot", metric)
    return f"{shots[1]}-shot" if shots else {"linear_top1": "linear", "knn_top1": "k-NN"}.get(metric, metric)


def meaning_of(metric: str) -> str:
    """Return what a logged metric means; empty for one that this version does not know."""
    try:
        return lookup(metric).help
    except KeyError:
        return ""


def setting_text(value: Any) -> str:
    """Return a searched value for people: numbers to four digits; the run's page has the whole number."""
    return text.number(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def short_hash(value: str | None) -> str:
    """Return the first twelve digits of a hash."""
    return value[:12] if value else "–"
