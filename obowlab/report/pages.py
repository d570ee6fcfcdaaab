"""From a `Site` to a folder of pages: written beside, then renamed; the same site gives the same bytes."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from obowlab import text
from obowlab.config import project_root
from obowlab.errors import UserError
from obowlab.report import figures
from obowlab.report.model import Run, Site
from obowlab.report.studies import Study
from obowlab.report.vocabulary_health import RULES
from obowlab.tables.model import Table
from obowlab.tables.render import LEGEND, MARKS, estimate_text

TEMPLATES = "dashboards/report"
ASSETS = ("style.css", "page.js")
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
    target = out.absolute()
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    before = target.with_name(f".{target.name}.{os.getpid()}.before")
    try:
        beside.mkdir(parents=True)
        pages = _write(site, folder=beside)
        if target.exists():
            target.rename(before)
        beside.rename(target)
    except OSError as error:
        raise UserError(f"Cannot write the report to {out} (--out): {error.strerror or error}.") from None
    finally:
        if before.exists() and not target.exists():
            before.rename(target)
        for rest in (beside, before):
            shutil.rmtree(rest, ignore_errors=True)
    return pages


def refuse_foreign(out: Path) -> None:
    """Refuse to replace a folder that is not a report.

    Raises:
        UserError: names it.
    """
    if out.exists() and not (out.is_dir() and ((out / MARKER).exists() or not any(out.iterdir()))):
        raise UserError(f"{out} is there already and is not a report; choose another --out.")


def _write(site: Site, *, folder: Path) -> int:
    pages = _pages(site)
    templates = project_root() / TEMPLATES
    environment = Environment(
        loader=FileSystemLoader(templates), autoescape=True, undefined=StrictUndefined, lstrip_blocks=True, auto_reload=False
    )
    environment.filters.update(
        {
            "estimate": estimate_text,
            "signed": signed,
            "span": span_text,
            "duration": text.duration,
            "short": short_hash,
            "svg": Markup,
            "page_of": page_of_run,
            "anchor": anchor,
            "setting": setting_text,
            "table_path": table_path,
            "table_name": table_name,
        }
    )
    environment.globals.update({"MARKS": MARKS, "LEGEND": LEGEND, "RULES": RULES, "site": site, "figures": figures})
    environment.globals["menu"] = _menu(pages)
    # Runs of one recipe share these hundred rows, which are most of what a page escapes.
    environment.globals["setting_rows"] = cache(environment.get_template("macros.html").module.setting_rows)  # type: ignore[attr-defined]
    for page in pages:
        path = folder / page.path
        path.parent.mkdir(parents=True, exist_ok=True)
        up = "../" * page.path.count("/")
        content = environment.get_template(page.template).render(
            up=up, path=page.path, section=page.section, title=page.title, **page.values()
        )
        path.write_text(re.sub(r"\n\s*\n", "\n", content), encoding="utf-8")  # the lines of template statements are empty
    for name in ASSETS:
        shutil.copyfile(templates / name, folder / name)
    for run in site.runs:
        if run.gallery is not None:
            shutil.copytree(run.gallery.folder, folder / gallery_of(run), copy_function=shutil.copyfile)
    (folder / MARKER).write_text("This folder is replaced by the next `obowlab report`.\n", encoding="utf-8")
    return len(pages)


@dataclass(frozen=True)
class _Page:
    """One page.

    Attributes:
        path: in the site's folder.
        template: what it is made of.
        title: in the browser's tab.
        values: makes what the template needs, when the page is written.
        section: entry of the menu that it belongs to.
    """

    path: str
    template: str
    title: str
    values: Callable[[], dict[str, Any]]
    section: str


def _pages(site: Site) -> list[_Page]:
    recipes = figures.families(site.runs)
    galleries = [run for run in site.runs if run.gallery is not None]
    pages = [_Page("index.html", "index.html", "Overview", lambda: {"galleries": galleries, "newest": NEWEST}, "Overview")]
    pages += [_table_page(table, site=site) for table in site.tables]
    if site.runs:
        pages.append(_Page("curves.html", "curves.html", "Training curves", lambda: _curves(recipes), "Curves"))
        pages.append(_Page("vocabulary.html", "vocabulary.html", "Vocabulary", lambda: _vocabulary(site, recipes), "Vocabulary"))
    pages += [_study_page(study) for study in site.studies]
    if galleries:
        pages.append(_Page("words.html", "words.html", "Visual words", lambda: {"galleries": galleries}, "Words"))
    pages.append(_Page("runs.html", "runs.html", "Runs", dict, "Runs"))
    return pages + [_run_page(run) for run in site.runs]


def _menu(pages: list[_Page]) -> dict[str, str]:
    """Return the entries of the menu and where they lead: a section of several pages to its part of the overview."""
    menu: dict[str, str] = {}
    for page in pages:
        several = page.section in ("Tables", "Studies")
        menu.setdefault(page.section, f"index.html#{page.section.lower()}" if several else page.path)
    return menu


def _table_page(table: Table, *, site: Site) -> _Page:
    def values() -> dict[str, Any]:
        groups = figures.groups_of(table, site=site)
        curves = [
            figure
            for heading, rows in groups.items()
            for figure in figures.curve_figures(rows, metrics=("loss", "fewshot", "perplexity_image"), heading=heading)
        ]
        return {"table": table, "difference": figures.table_figure(table), "curves": curves}

    return _Page(table_path(table), "table.html", f"{table_name(table)}, {table.scale}", values, "Tables")


def _study_page(study: Study) -> _Page:
    def values() -> dict[str, Any]:
        return {"study": study, "plots": figures.study_figures(study)}

    return _Page(f"study-{anchor(study.name)}.html", "study.html", f"Study {study.name}", values, "Studies")


def _run_page(run: Run) -> _Page:
    def values() -> dict[str, Any]:
        return {
            "run": run,
            "gallery": gallery_of(run) if run.gallery is not None else "",
        }

    return _Page(page_of_run(run.run_id), "run.html", run.run_id, values, "Runs")


def _curves(recipes: dict[str, figures.Family]) -> dict[str, Any]:
    drawn = {name: figures.curve_figures(family.groups, metrics=figures.TRAINING) for name, family in recipes.items()}
    return {"recipes": recipes, "drawn": drawn}


def _vocabulary(site: Site, recipes: dict[str, figures.Family]) -> dict[str, Any]:
    drawn = {name: figures.curve_figures(family.groups, metrics=figures.VOCABULARY) for name, family in recipes.items()}
    judged = [run for run in site.runs if run.findings]
    return {"drawn": {name: found for name, found in drawn.items() if found}, "judged": judged}


# ------------------------------------------------------------------------------------------------- names, texts, filters


def table_path(table: Table) -> str:
    """Return the page of a table."""
    return f"{anchor(table.name)}-{anchor(table.scale)}.html"


def table_name(table: Table) -> str:
    """Return `Table 3` for `table3`; other names as they are."""
    return re.sub(r"^table(?=[0-9])", "Table ", table.name)


def page_of_run(run_id: str) -> str:
    """Return the page of a run, seen from the site's folder."""
    return f"runs/{anchor(run_id)}.html"


def gallery_of(run: Run) -> str:
    """Return the folder of a run's gallery in the site."""
    return f"words/{anchor(run.run_id)}"


def anchor(name: str) -> str:
    """Return a name as it may stand in a file name or behind a `#`."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip(".") or "unnamed"


def span_text(value: tuple[float, float] | None) -> str:
    """Return a value and its half-width as `8.82 ± 0.50`; a dash where there is nothing."""
    return text.estimate(*value) if value is not None else text.ABSENT


def signed(value: float | None) -> str:
    """Return a difference with its sign, a real minus; a dash where there is nothing."""
    return "–" if value is None else f"{value:+.2f}".replace("-", "−")


def setting_text(value: Any) -> str:
    """Return a searched value for people: numbers to four digits; the run's page has the whole number."""
    return text.number(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def short_hash(value: str | None) -> str:
    """Return the first twelve digits of a hash."""
    return value[:12] if value else "–"
