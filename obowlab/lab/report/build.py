"""From a `Site` to a folder of pages: written beside, then renamed; the same site gives the same bytes."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from obowlab.config import project_root
from obowlab.errors import UserError
from obowlab.lab.render import LEGEND, MARKS
from obowlab.lab.report import figures
from obowlab.lab.report.health import RULES
from obowlab.lab.report.site import Run, Site
from obowlab.lab.report.studies import Study
from obowlab.lab.table import Estimate, Table

TEMPLATES = "dashboards/report"
ASSETS = ("style.css", "page.js")
MARKER = ".obowlab-report"
"""Lies in every report: only a folder that has it, or an empty one, is replaced."""

NEWEST = 8
"""Runs that the overview lists."""


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
    environment = Environment(loader=FileSystemLoader(templates), autoescape=True, undefined=StrictUndefined, lstrip_blocks=True)
    environment.filters.update(
        {
            "estimate": estimate_text,
            "signed": signed,
            "span": span_text,
            "duration": duration_text,
            "short": short_hash,
            "svg": Markup,
            "page_of": page_of_run,
            "anchor": anchor,
        }
    )
    environment.globals.update({"MARKS": MARKS, "LEGEND": LEGEND, "RULES": RULES, "site": site, "figures": figures})
    environment.globals["menu"] = [(page.path, page.menu) for page in pages if page.menu]
    for page in pages:
        path = folder / page.path
        path.parent.mkdir(parents=True, exist_ok=True)
        up = "../" * page.path.count("/")
        text = environment.get_template(page.template).render(up=up, here=page.path, title=page.title, **page.values())
        path.write_text(re.sub(r"\n\s*\n", "\n", text), encoding="utf-8")  # the lines of template statements are empty
    for name in ASSETS:
        shutil.copyfile(templates / name, folder / name)
    for run in site.runs:
        if run.gallery is not None:
            shutil.copytree(run.gallery.folder, folder / gallery_of(run), copy_function=shutil.copyfile)
    (folder / MARKER).write_text("This folder is replaced by the next `obowlab report`.\n", encoding="utf-8")
    return len(pages)


class _Page:
    """One page: where it goes, its template, and the values it needs, made when it is written."""

    def __init__(self, path: str, template: str, title: str, values: Callable[[], dict[str, Any]], *, menu: str = "") -> None:
        self.path = path
        self.template = template
        self.title = title
        self.values = values
        self.menu = menu


def _pages(site: Site) -> list[_Page]:
    recipes = figures.families(site.runs)
    galleries = [run for run in site.runs if run.gallery is not None]
    pages = [_Page("index.html", "index.html", "Overview", lambda: {"galleries": galleries, "newest": NEWEST}, menu="Overview")]
    for table in site.tables:
        pages.append(_table_page(table, site=site))
    if site.runs:
        pages.append(_Page("curves.html", "curves.html", "Training curves", lambda: _curves(recipes), menu="Curves"))
        pages.append(
            _Page("vocabulary.html", "vocabulary.html", "Vocabulary", lambda: _vocabulary(site, recipes), menu="Vocabulary")
        )
    for study in site.studies:
        pages.append(_study_page(study))
    if galleries:
        pages.append(_Page("words.html", "words.html", "Visual words", lambda: {"galleries": galleries}, menu="Words"))
    pages.append(_Page("runs.html", "runs.html", "Runs", dict, menu="Runs"))
    return pages + [_run_page(run) for run in site.runs]


def _table_page(table: Table, *, site: Site) -> _Page:
    def values() -> dict[str, Any]:
        groups = figures.groups_of(table, site=site)
        curves = [
            figure
            for heading, rows in groups.items()
            for figure in figures.curve_figures(rows, metrics=("loss", "fewshot", "perplexity_image"), heading=heading)
        ]
        return {"table": table, "difference": figures.table_figure(table), "curves": curves}

    name = f"{re.sub(r'^table(?=[0-9])', 'Table ', table.name)}, {table.scale}"
    return _Page(table_path(table), "table.html", name, values, menu=name)


def _study_page(study: Study) -> _Page:
    path = f"study-{anchor(study.name)}.html"
    return _Page(
        path,
        "study.html",
        f"Study {study.name}",
        lambda: {"study": study, "plots": figures.study_figures(study)},
        menu=study.name,
    )


def _run_page(run: Run) -> _Page:
    def values() -> dict[str, Any]:
        return {
            "run": run,
            "training": figures.run_figures(run, metrics=figures.TRAINING),
            "vocabulary": figures.run_figures(run, metrics=figures.VOCABULARY),
            "gallery": gallery_of(run) if run.gallery is not None else "",
        }

    return _Page(page_of_run(run.run_id), "run.html", run.run_id, values)


def _curves(recipes: dict[str, tuple[figures.Group, ...]]) -> dict[str, Any]:
    drawn = {name: figures.curve_figures(groups, metrics=figures.TRAINING) for name, groups in recipes.items()}
    return {"recipes": recipes, "drawn": drawn}


def _vocabulary(site: Site, recipes: dict[str, tuple[figures.Group, ...]]) -> dict[str, Any]:
    drawn = {name: figures.curve_figures(groups, metrics=figures.VOCABULARY) for name, groups in recipes.items()}
    judged = [run for run in site.runs if run.findings]
    return {"drawn": {name: found for name, found in drawn.items() if found}, "judged": judged}


# ------------------------------------------------------------------------------------------------- names, texts, filters


def table_path(table: Table) -> str:
    """Return the page of a table."""
    return f"{anchor(table.name)}-{anchor(table.scale)}.html"


def page_of_run(run_id: str) -> str:
    """Return the page of a run, seen from the site's folder."""
    return f"runs/{anchor(run_id)}.html"


def gallery_of(run: Run) -> str:
    """Return the folder of a run's gallery in the site."""
    return f"words/{anchor(run.run_id)}"


def anchor(name: str) -> str:
    """Return a name as it may stand in a file name or behind a `#`."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip(".") or "unnamed"


def estimate_text(value: Estimate | None) -> str:
    """Return `8.82 ± 0.50`; a dash where there is nothing."""
    return "–" if value is None else f"{value.value:.2f} ± {value.interval:.2f}"


def span_text(value: tuple[float, float] | None) -> str:
    """Return a value and its half-width as `8.82 ± 0.50`; a dash where there is nothing."""
    return "–" if value is None else f"{value[0]:.2f} ± {value[1]:.2f}"


def signed(value: float | None) -> str:
    """Return a difference with its sign, a real minus; a dash where there is nothing."""
    return "–" if value is None else f"{value:+.2f}".replace("-", "−")


def duration_text(seconds: float | None) -> str:
    """Return a time for people: `45 s`, `12 min`, `3 h 20 min`."""
    if seconds is None:
        return "–"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def short_hash(value: str | None) -> str:
    """Return the first twelve digits of a hash."""
    return value[:12] if value else "–"
