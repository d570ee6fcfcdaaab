"""`obowlab runs`: what was trained, with status and results."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from obowlab import text
from obowlab.cli import Family
from obowlab.cli.options import (
    MachineOptions,
    dry_run_option,
    json_flag,
    machine_options,
    nearest_of,
    would,
)
from obowlab.cli.output import print_facts, print_json, print_results, print_table, send_to_mlflow, terminal_width, warn
from obowlab.cli.runs_out import export, sync
from obowlab.cli.runs_trash import delete, restore, trash
from obowlab.errors import UserError

if TYPE_CHECKING:
    from obowlab.runs.info import State
    from obowlab.runs.selection import Entry

TAG = "obowlab.tag."
"""How the labels begin that `runs tag` gives; as in `runs.folder`, which is imported late."""

WIDE = 120
"""Columns of a terminal from which `runs list` shows intervals; `runs show` always does."""

HEADLINES = ("fewshot_5shot", "linear_top1", "knn_top1")
"""The student's results that fit into a row of `runs list`."""


@click.group(cls=Family)
def runs() -> None:
    """List, show, compare, tag, delete, sync and export runs."""


@runs.command("list")
@click.option("--recipe", "recipes", multiple=True, metavar="NAME", help="Only runs of this recipe; repeatable.")
@click.option("--status", "statuses", multiple=True, metavar="STATUS,...", help="Only runs with one of these; repeatable.")
@click.option(
    "--where",
    multiple=True,
    metavar="COMPARISON",
    help="Only runs with such a result or setting: 'linear_top1>40', 'method.kappa=8'; all of several.",
)
@click.option("--tag", "tags", multiple=True, metavar="NAME", help="Only runs with this tag; all of several.")
@click.option(
    "--sort",
    default="created",
    show_default=True,
    metavar="NAME",
    help="Order by a result or setting, the best or smallest first; -NAME reverses.",
)
@machine_options("runs_root", "machine_file")
@json_flag
@dry_run_option
def list_all(
    recipes: tuple[str, ...],
    statuses: tuple[str, ...],
    where: tuple[str, ...],
    tags: tuple[str, ...],
    sort: str,
    as_json: bool,
    options: MachineOptions,
    dry_run: bool,
) -> None:
    """List what was trained, newest first."""
    from obowlab.runs.selection import select

    root = options.machine().runs_root
    if dry_run:
        return would(f"list the runs in {root}")

    statuses = tuple(status for listed in statuses for status in listed.split(","))
    entries = select(
        root, recipes=recipes, statuses=statuses, tags=tags, where=where, sort=sort, warn=lambda problem: warn([problem])
    )
    if as_json:
        return print_json([_listed(entry) for entry in entries])
    if not entries:
        some = any((recipes, statuses, tags, where))
        click.echo(f"No run in {root} is like this." if some else f"There are no runs in {root}; `obowlab run demo` makes one.")
        return None
    columns = ["run", "status", "steps", "created", *HEADLINES]
    named = [name for name in dict.fromkeys(_names_in(where, sort)) if name not in (*columns, "step")]
    short = sys.stdout.isatty() and terminal_width() < WIDE
    lines = [_line(entry, named=named, short=short) for entry in entries]
    if any(entry.tags for entry in entries):
        columns.append("tags")
        lines = [[*line, ", ".join(entry.tags)] for line, entry in zip(lines, entries, strict=True)]
    return print_table(
        [*columns[:4], *named, *columns[4:]],
        lines,
        right=("steps", *named, *HEADLINES),
        names=("run",),
        prose=("tags",),
        hide=("created", "tags", "steps", *[name for name in reversed(HEADLINES) if name not in named]),
    )


def _names_in(where: tuple[str, ...], sort: str) -> list[str]:
    """Return what comparisons and order are about, which the list shows."""
    from obowlab.runs.selection import Comparison

    return [*(Comparison.parse(typed).name for typed in where), sort.removeprefix("-")]


def _line(entry: Entry, *, named: list[str], short: bool) -> list[str]:
    info, state = entry.summary.info, entry.summary.state
    headlines = [_shown(entry, name, short=short) for name in HEADLINES]
    return [
        info.run_id,
        state.status,
        _progress(state),
        text.timestamp(info.created_at),
        *(_shown(entry, name, short=short) for name in named),
        *headlines,
    ]


def _shown(entry: Entry, name: str, *, short: bool) -> str:
    if name in entry.measured:
        measured = entry.measured[name]
        return text.estimate(measured["value"], digits=1) if short else text.measurement(measured, digits=1)
    return text.override(entry.values[name]) if name in entry.values else ""


def _listed(entry: Entry) -> dict[str, Any]:
    info = entry.summary.info
    return {
        "run_id": info.run_id,
        "name": info.name,
        "seed": info.seed,
        "fingerprint": info.fingerprint,
        "created_at": info.created_at,
        "path": str(entry.summary.path),
        "state": entry.summary.state.model_dump(mode="json"),
        "tags": entry.tags,
        "results": entry.results,
    }


@runs.command("show")
@click.argument("run")
@machine_options("runs_root", "machine_file")
@json_flag
@dry_run_option
def show(run: str, as_json: bool, options: MachineOptions, dry_run: bool) -> None:
    """Show one run: its state, last metrics and results.

    RUN is a recipe that has one run, a run's name or its beginning, the 8 digits at its end, or a run folder.
    """
    from obowlab.runs.folder import RunFolder

    folder = RunFolder.find(run, runs_root=options.machine().runs_root)
    if dry_run:
        return would(f"show run '{folder.run_id}'")
    state, points = folder.current_state(), folder.metrics()
    last = points[-1] if points else None
    if as_json:
        return print_json(
            {
                "info": folder.info.model_dump(mode="json", by_alias=True),
                "state": state.model_dump(mode="json"),
                "attempts": folder.attempts(),
                "last_metrics": None if last is None else {"step": last.step, **_finite(last.values)},
                "tags": folder.tags(),
                "results": folder.results(),
            }
        )
    info = folder.info
    labels = {name.removeprefix("obowlab."): label for name, label in folder.labels().items() if not name.startswith(TAG)}
    print_facts(
        [
            ("run", folder.run_id),
            ("recipe", ": ".join(text for text in (info.name, info.recipe_values.get("title", "")) if text)),
            ("seed", str(info.seed)),
            ("status", state.status + (f": {state.message}" if state.message else "")),
            ("steps", _progress(state)),
            ("created", f"{text.timestamp(info.created_at)} by obowlab {info.version}"),
            ("attempts", str(len(folder.attempts()))),
            ("folder", str(folder.path)),
            *([("tags", ", ".join(folder.tags()))] if folder.tags() else []),
            *labels.items(),
        ]
    )
    if last is not None:
        click.echo(f"\nLast metrics, step {last.step}:")
        print_table(
            ("metric", "value", "unit"), [_metric_row(name, value) for name, value in last.values.items()], right=("value",)
        )
    click.echo("\nResults:")
    return print_results(folder)


@runs.command("compare")
@click.argument("first")
@click.argument("second")
@machine_options("runs_root", "machine_file")
@json_flag
@dry_run_option
def compare(first: str, second: str, as_json: bool, options: MachineOptions, dry_run: bool) -> None:
    """Show two runs side by side: what differs, results with their difference, last metrics.

    A difference is SECOND minus FIRST. Where both answered the same episodes or images, its 95 % interval is the paired one.
    """
    from obowlab.runs.folder import RunFolder
    from obowlab.tables.comparison import compare_runs

    folders = [RunFolder.find(run, runs_root=options.machine().runs_root) for run in (first, second)]
    if dry_run:
        return would(f"compare '{folders[0].run_id}' with '{folders[1].run_id}'")
    comparison = compare_runs(*folders)
    if as_json:
        return print_json(comparison.to_json())
    a, b = (folder.run_id for folder in folders)
    click.echo(f"A  {a}\nB  {b}")
    _print_heading("Settings that differ", comparison.settings)
    print_table(("setting", "A", "B"), comparison.settings, names=("setting",), prose=("A", "B"))
    _print_heading("Results", comparison.results)
    columns = ("metric", "of", "data set", "A", "B", "B - A")
    print_table(columns, comparison.result_rows(), right=columns[3:], names=columns[:3:2], prose=(), hide=("data set", "of"))
    for note in comparison.notes:
        click.echo(note)
    _print_heading("Last metrics", comparison.metrics)
    print_table(("metric", "A", "B", "unit"), comparison.metric_rows(), right=("A", "B"), names=("metric",), hide=("unit",))
    _print_heading("Where they come from", comparison.facts)
    return print_table(("fact", "A", "B"), comparison.fact_rows(), prose=("A", "B"))


def _print_heading(title: str, rows: Sequence[object]) -> None:
    click.echo(f"\n{title}:" if rows else f"\n{title}: none.")


@runs.command("tag")
@click.argument("run")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option("--remove", is_flag=True, help="Take these tags off the run.")
@machine_options("runs_root", "machine_file")
@dry_run_option
def tag(run: str, names: tuple[str, ...], remove: bool, options: MachineOptions, dry_run: bool) -> None:
    """Give a run names of your own, or take them off; they change nothing of what it is.

    `obowlab runs list --tag NAME` finds it, and MLflow has them as tags `obowlab.tag.NAME`.
    """
    from obowlab.runs.folder import RunFolder

    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
            raise UserError(f"A tag has letters, digits and '._-' only, at most 64 of them, not '{name}'.")
    folder = RunFolder.find(run, runs_root=options.machine().runs_root)
    if remove and (unknown := [name for name in names if name not in folder.tags()]):
        raise UserError(f"Run '{folder.run_id}' has no tag '{unknown[0]}'.{nearest_of(unknown[0], folder.tags())}")
    if dry_run:
        return would(f"{'take' if remove else 'give'} run '{folder.run_id}' the tags {', '.join(names)}{' away' * remove}")
    labels = [f"{TAG}{name}" for name in names]
    changed = folder.add_labels({} if remove else dict.fromkeys(labels, "yes"), remove=labels if remove else ())
    click.echo(f"{folder.run_id}: {', '.join(folder.tags()) or 'no tags'}")
    if changed and folder.mlflow_run_id() is not None:
        send_to_mlflow([folder], machine=options.machine())
    return None


def _progress(state: State) -> str:
    return f"{state.step}/{state.total_steps}" if state.total_steps is not None else str(state.step)


def _finite(values: dict[str, float]) -> dict[str, float | str]:
    """Return values as JSON takes them: those that are not finite as their names."""
    return {name: value if math.isfinite(value) else repr(value) for name, value in values.items()}


def _metric_row(name: str, value: float) -> tuple[str, str, str]:
    from obowlab.runs.metrics import unit_of

    return name, f"{value:.6g}", unit_of(name)


for command in (delete, restore, trash, sync, export):
    runs.add_command(command)
