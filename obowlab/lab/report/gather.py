"""From the run store to a `Site`: small files only, and of the large metric files just what is drawn."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from obowlab import __version__
from obowlab.config import Recipe, canonical_hash, flatten, load_recipe, recipe_files
from obowlab.config.checking import flat_pairs
from obowlab.errors import UserError
from obowlab.lab.collect import build_table, finished_seeds
from obowlab.lab.records import store_records
from obowlab.lab.report.curves import Curve, read_run_curves, with_point
from obowlab.lab.report.health import judge
from obowlab.lab.report.site import Gallery, Measured, Run, Setting, Site
from obowlab.lab.report.studies import read_studies
from obowlab.lab.scales import SCALES
from obowlab.lab.table import Table
from obowlab.lab.tablefile import load_table, table_files
from obowlab.track.folder import RunFolder, RunSummary, list_runs
from obowlab.track.info import RunInfo
from obowlab.track.metrics import lookup

NOT_TRAINED_WITH = re.compile(r"(teacher\.)*(title$|evaluation\.)")
"""Settings that do not make another training."""

MACHINE_FACTS = {
    "host": "host",
    "cpu_model": "processor",
    "cpus": "cores",
    "memory_mib": "memory, MiB",
    "device": "device",
    "procs": "processes",
    "threads": "threads",
    "loader": "loader",
    "python": "Python",
    "platform": "system",
}
"""Fact of an attempt -> its name in a report."""

CACHE = ".curves"
"""Folder of the run store for what was drawn of each run."""

PICTURES = (".jpg", ".png", ".webp")


@dataclass(frozen=True)
class Tables:
    """The tables of some scales, and what is wrong with those that could not be read."""

    tables: tuple[Table, ...] = ()
    problems: tuple[str, ...] = ()


def gather(runs_root: Path, *, tables: Tables) -> Site:
    """Read everything a report shows; writes nothing but `CACHE`.

    Args:
        runs_root: the run store.
        tables: as `tables_at` builds them.
    """
    runs, problems, newest = [], list(tables.problems), 0.0
    for summary in list_runs(runs_root):
        newest = max(newest, summary.info.created_at, summary.state.updated_at)
        try:
            runs.append(read_run(summary))
        except (UserError, OSError, ValueError, KeyError, TypeError) as error:  # of another version, or damaged
            problems.append(f"Run {summary.info.run_id} cannot be shown: {type(error).__name__}: {error}")
    return Site(
        as_of=moment(newest) if newest else "",
        version=__version__,
        tables=tables.tables,
        runs=tuple(runs),
        studies=read_studies(runs_root),
        problems=tuple(problems),
    )


def tables_at(scales: Iterable[str], *, runs_root: Path) -> Tables:
    """Return every shipped table at some scales, of the runs there are.

    Args:
        scales: names; when there are none, every scale at which the store has a run of some table.
        runs_root: the run store.
    """
    asked, records = list(scales), store_records(runs_root)
    tables: list[Table] = []
    problems: list[str] = []
    for scale in asked or SCALES:
        found, wrong = [], []
        for name in table_files():
            try:
                planned = load_table(name, scale=scale)
                found.append(build_table(planned, seeds=finished_seeds(planned, records=records), records=records))
            except UserError as error:
                wrong.append(f"{name} at scale {scale} cannot be shown: {error}")
        if asked or any(run.status != "missing" for table in found for row in table.rows for run in row.runs):
            tables += found
            problems += wrong
    return Tables(tuple(tables), tuple(problems))


def read_run(summary: RunSummary) -> Run:
    """Read one run.

    Raises:
        UserError: one of its files is damaged.
    """
    folder, info, state = RunFolder(summary.path, summary.info), summary.info, summary.state
    attempts, facts, results = folder.attempts(), folder.facts(), folder.results()
    settings, base = compare(settings_of(info), name=info.name, sources=info.sources)
    epochs = int(info.recipe_values.get("training", {}).get("epochs", 1))
    measured = tabulate(results, dataset=str(info.recipe_values.get("data", {}).get("dataset", "")))
    cache = summary.path.parent / CACHE / f"{info.run_id}.json"
    curves = _with_results(read_run_curves(summary.path, epochs=epochs, cache=cache), epochs=epochs, measured=measured)
    changed = [s for s in settings if s.shipped is not None and not NOT_TRAINED_WITH.match(s.key)]
    trained = {key: value for key, value in info.recipe_values.items() if key not in ("title", "evaluation")}
    return Run(
        run_id=info.run_id,
        recipe=info.name,
        title=str(info.recipe_values.get("title", "")),
        seed=info.seed,
        changes={setting.key: brief(setting.value) for setting in changed},
        family=canonical_hash([info.name, trained]),
        status=state.status,
        message=state.message,
        step=state.step,
        total_steps=state.total_steps,
        epochs=epochs,
        created=moment(info.created_at),
        elapsed_s=folder.trained_s(),
        fingerprint=info.fingerprint,
        commit=facts.get("commit"),
        dirty=facts.get("dirty"),
        data_hash=facts.get("data_hash"),
        mlflow_run_id=folder.mlflow_run_id(),
        starts=len(attempts),
        machine={label: str(facts[key]) for key, label in MACHINE_FACTS.items() if facts.get(key) is not None},
        versions={"obowlab": info.version, **{str(k): str(v) for k, v in facts.get("versions", {}).items()}},
        settings=settings,
        base=base,
        measured=measured,
        curves=curves,
        findings=judge(curves, recipe=info.recipe_values),
        gallery=find_gallery(summary.path / "words"),
    )


def compare(values: Mapping[str, Any], *, name: str, sources: Mapping[str, str]) -> tuple[tuple[Setting, ...], str]:
    """Return a run's settings beside the shipped recipe of its name, and what they were compared with in words.

    Args:
        values: of the run, by dotted key.
        name: of its recipe.
        sources: dotted key to the file or option that set it.
    """
    shipped, base = _shipped(name)
    settings = []
    for key, value in values.items():
        own = as_text(value)
        other = as_text(shipped[key]) if key in shipped else None
        settings.append(Setting(key, own, sources.get(key, "default"), other if other != own else None))
    return tuple(settings), base


def settings_of(info: RunInfo) -> dict[str, Any]:
    """Return a run's settings by dotted key; of a run of another version just as they were written."""
    try:
        return flatten(info.recipe)
    except UserError:
        return dict(flat_pairs(info.recipe_values))


def tabulate(results: Iterable[Mapping[str, Any]], *, dataset: str) -> tuple[Measured, ...]:
    """Return a run's results, one entry per metric, data set and protocol; of several measurements the newest counts.

    Args:
        results: as the run folder has them, the oldest first.
        dataset: the run's own, which comes first.
    """
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for result in results:
        where = str(result.get("details", {}).get("dataset", ""))
        protocol = f"{result['protocol']} v{result['version']}, {str(result['protocol_hash'])[:8]}"
        for measurement in result["measurements"]:
            entry = found.setdefault((measurement["name"], where, protocol), {})
            entry[result["subject"]] = (float(measurement["value"]), float(measurement["interval"]))
            entry["count"] = int(measurement["count"])
    rows = [
        Measured(
            metric=metric,
            unit=unit_of(metric),
            dataset=where,
            protocol=protocol,
            student=entry.get("student"),
            random=entry.get("random"),
            count=entry["count"],
        )
        for (metric, where, protocol), entry in found.items()
    ]
    return tuple(sorted(rows, key=lambda row: (row.dataset != dataset, row.dataset)))


def find_gallery(folder: Path) -> Gallery | None:
    """Return a run's gallery of visual words, with the first sheet of each level (`conv5-000.jpg`); None when there is none."""
    if not (folder / "index.html").is_file():
        return None
    first: dict[str, str] = {}
    for path in sorted(path for path in folder.iterdir() if path.suffix in PICTURES):
        first.setdefault(path.stem.rpartition("-")[0], path.name)
    return Gallery(folder=folder, preview=tuple(first.values()))


def unit_of(metric: str) -> str:
    """Return a metric's unit; empty for one that this version does not know."""
    try:
        return lookup(metric).unit
    except KeyError:
        return ""


def as_text(value: Any) -> str:
    """Return a setting as `--set` takes it: words without quotes, lists as TOML writes them."""
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z_][\w.-]*", value):
        return value
    return "all" if value is None else json.dumps(value, ensure_ascii=False)


def brief(value: str) -> str:
    """Return a setting for a label: numbers to four digits, anything else as it is."""
    try:
        return f"{float(value):.4g}"
    except ValueError:
        return value


def moment(timestamp: float) -> str:
    """Return day and time to the minute in UTC: the same report on every machine."""
    return datetime.fromtimestamp(timestamp, tz=UTC).strftime("%Y-%m-%d %H:%M UTC")


@cache
def _shipped(name: str) -> tuple[Mapping[str, Any], str]:
    """Return the values of the shipped recipe of this name, or the defaults, and which of them it was."""
    if name in recipe_files():
        return flatten(load_recipe(name).recipe), f"the recipe {name} of this version"
    return flatten(Recipe()), "the defaults of this version, which has no such recipe"


def _with_results(curves: Mapping[str, Curve], *, epochs: int, measured: Sequence[Measured]) -> dict[str, Curve]:
    """Return the curves, those of results during training with the final result at their end."""
    final = {m.metric: m.student[0] for m in reversed(measured) if m.student is not None}
    return {
        name: with_point(curve, epoch=float(epochs), value=final[name]) if name in final and curve.epoch[-1] < epochs else curve
        for name, curve in curves.items()
    }
