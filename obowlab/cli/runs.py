"""`obowlab runs`: what was trained, with status and results."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from obowlab import text
from obowlab.cli import Family
from obowlab.cli.options import (
    PATH,
    MachineOptions,
    confirm,
    dry_run_option,
    json_flag,
    machine_options,
    nearest_of,
    when_interrupted,
    would,
    yes_option,
)
from obowlab.cli.output import print_facts, print_json, print_results, print_table, send_to_mlflow, show_progress, terminal_width
from obowlab.errors import UserError

if TYPE_CHECKING:
    from obowlab.config import Machine
    from obowlab.runs.folder import RunFolder
    from obowlab.runs.info import State
    from obowlab.runs.selection import Entry
    from obowlab.runs.trash import Trashed
    from obowlab.tracking.mirror import Mirror

CHECKPOINT = "checkpoint.pt"
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

    def warn(problem: str) -> None:
        _warn([problem])

    statuses = tuple(status for words in statuses for status in words.split(","))
    entries = select(root, recipes=recipes, statuses=statuses, tags=tags, where=where, sort=sort, warn=warn)
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
    folder = _find(run, options=options)
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
    from obowlab.tables.comparison import compare_runs

    folders = [_find(run, options=options) for run in (first, second)]
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
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
            raise UserError(f"A tag has letters, digits and '._-' only, at most 64 of them, not '{name}'.")
    folder = _find(run, options=options)
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


@runs.command("delete")
@click.argument("names", metavar="RUN...", nargs=-1, required=True)
@yes_option
@machine_options("runs_root", "machine_file")
@dry_run_option
def delete(names: tuple[str, ...], yes: bool, options: MachineOptions, dry_run: bool) -> int:
    """Move runs to the trash of their store, after asking; MLflow shows them as deleted.

    `obowlab runs restore RUN` brings one back; `obowlab runs trash --empty` removes them for good.
    """
    from obowlab.launch.slurm import live_runs, submitted_jobs
    from obowlab.runs.folder import RunFolder
    from obowlab.runs.lineage import waiting_students
    from obowlab.runs.trash import check_deletable, find_trashed, put_aside
    from obowlab.tracking.mirror import DELETED_TAG, Mirror

    machine = options.machine()
    folders: dict[str, RunFolder] = {}
    gone = []
    waiting = live_runs(machine.runs_root) if submitted_jobs(machine.runs_root) else {}
    for name in names:
        try:
            folder = RunFolder.find(name, runs_root=machine.runs_root)
        except UserError:
            there = [run for run in find_trashed(name, runs_root=machine.runs_root) if run.was_deleted]
            if len(there) != 1:
                raise
            gone += there
            continue
        check_deletable(folder, ref=name, runs_root=machine.runs_root)
        if folder.run_id in waiting:
            job = waiting[folder.run_id]
            raise UserError(f"Job {job.id} of the cluster trains '{folder.run_id}': `obowlab jobs cancel {job.id}` first.")
        folders[folder.run_id] = folder
    if dry_run:
        for folder in folders.values():
            would(f"move run '{folder.run_id}' to the trash of {machine.runs_root}")
        return 0
    for run in gone:
        click.echo(f"{run.run_id} is in the trash already.")
    for student, teacher in waiting_students(folders.values(), runs_root=machine.runs_root):
        click.echo(f"Note: {student} is not finished and reads {teacher}, its teacher, which it would train again.", err=True)
    if folders and not confirm(f"Move {', '.join(folders)} to the trash?", yes=yes):
        click.echo("Nothing was deleted.")
        return 1
    moved = [run.path for run in gone]
    for folder in folders.values():
        moved.append(put_aside(folder, deleted=True))
        click.echo(f"{folder.run_id} is in the trash; `obowlab runs restore {folder.run_id}` brings it back.")
    send_to_mlflow([RunFolder.open(path) for path in moved], machine=machine)
    for outbox in (Mirror(RunFolder.open(path), tracking_uri=machine.tracking_uri).outbox for path in moved):
        if version := outbox.load().model_version:
            stays = f"The model version {outbox.model_name}/{version} of {outbox.folder.run_id} stays in MLflow"
            click.echo(f"{stays}, tagged {DELETED_TAG}; it can still be loaded.")
    return 0


def _still_in_mlflow(runs: list[Trashed], *, machine: Machine) -> list[Trashed]:
    """Tell MLflow which runs were deleted, and return those that it could not be told of."""
    from obowlab.tracking.mirror import Mirror

    deleted = [run for run in runs if run.was_deleted and run.is_intact()]
    send_to_mlflow([run.folder() for run in deleted], machine=machine)
    return [run for run in deleted if Mirror(run.folder(), tracking_uri=machine.tracking_uri).pending()]


@runs.command("restore")
@click.argument("run")
@machine_options("runs_root", "machine_file")
@dry_run_option
def restore(run: str, options: MachineOptions, dry_run: bool) -> None:
    """Bring a run back from the trash, in MLflow too; of several of one name the latest."""
    from obowlab.runs.trash import find_trashed, trashed_runs
    from obowlab.runs.trash import restore as bring_back

    machine = options.machine()
    found = find_trashed(run, runs_root=machine.runs_root)
    if not found:
        known = sorted({each.run_id for each in trashed_runs(machine.runs_root)})
        raise UserError(f"There is no run '{run}' in the trash of {machine.runs_root}.{nearest_of(run, known)}")
    if len({each.run_id for each in found}) > 1:
        raise UserError(f"'{run}' fits several runs in the trash: {', '.join(sorted({each.run_id for each in found}))}.")
    if dry_run:
        return would(f"bring run '{found[0].run_id}' back from the trash")
    folder = bring_back(found[0], runs_root=machine.runs_root)
    click.echo(f"{folder.run_id} is back.")
    if folder.mlflow_run_id() is not None:
        send_to_mlflow([folder], machine=machine)
    return None


@runs.command("trash")
@click.argument("names", metavar="[RUN]...", nargs=-1)
@click.option("--empty", is_flag=True, help="Remove what is in it, or the runs named, for good.")
@yes_option
@machine_options("runs_root", "machine_file")
@json_flag
@dry_run_option
def trash(names: tuple[str, ...], empty: bool, yes: bool, as_json: bool, options: MachineOptions, dry_run: bool) -> int:
    """List what is in the trash, of deleted runs and of those that --fresh put aside; or empty it."""
    from obowlab.files.sharing import is_others
    from obowlab.runs.trash import find_trashed, remove_for_good, size_of, trashed_runs

    machine = options.machine()
    root = machine.runs_root
    there = trashed_runs(root)
    for name in names:
        if not find_trashed(name, runs_root=root):
            raise UserError(
                f"There is no run '{name}' in the trash of {root}.{nearest_of(name, sorted({t.run_id for t in there}))}"
            )
    if names:
        there = [run for name in names for run in find_trashed(name, runs_root=root)]
    if empty:
        own = [run for run in there if not is_others(run.path)]
        for run in there if names else ():
            run.refuse_others("remove")
        if len(own) < len(there):
            click.echo(f"{len(there) - len(own)} run(s) of other users are left to them.")
        there = own
    sizes = [size_of(run.path) for run in there]
    if dry_run:
        would(f"{'remove' if empty else 'list'} {len(there)} run(s) in the trash of {root}, {text.size(sum(sizes))}")
        return 0
    if empty:
        if there and not confirm(f"Remove {len(there)} run(s), {text.size(sum(sizes))}, for good?", yes=yes):
            click.echo("Nothing was removed.")
            return 1
        unknown = _still_in_mlflow(there, machine=machine)
        gone = [run for run in there if run not in unknown]
        freed = sum(num_bytes for run, num_bytes in zip(there, sizes, strict=True) if run in gone)
        remove_for_good(gone, runs_root=root)
        click.echo(f"Removed {len(gone)} run(s) for good, {text.size(freed)}.")
        if unknown:
            click.echo(f"Kept {len(unknown)} that MLflow still shows: the same command removes them once it answers.")
        return int(bool(unknown))
    if as_json:
        print_json(
            [
                {"run_id": run.run_id, "path": str(run.path), "since": run.since, "deleted": run.was_deleted, "bytes": num_bytes}
                for run, num_bytes in zip(there, sizes, strict=True)
            ]
        )
        return 0
    if not there:
        click.echo(f"The trash of {root} is empty.")
        return 0
    rows = [
        (run.run_id, text.timestamp(run.since), "deleted" if run.was_deleted else "by --fresh", text.size(num_bytes))
        for run, num_bytes in zip(there, sizes, strict=True)
    ]
    print_table(("run", "since", "how", "size"), rows, right=("size",), names=("run",), prose=(), hide=("how",))
    return 0


@runs.command("sync")
@click.argument("run", nargs=-1)
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(min=1), default=60.0, show_default=True, metavar="S", help="Seconds per run."
)
@click.option("--rebuild", is_flag=True, help="Put a damaged mlflow.db and its files aside, and send everything again.")
@machine_options("runs_root", "machine_file")
@dry_run_option
def sync(run: tuple[str, ...], timeout_s: float, rebuild: bool, options: MachineOptions, dry_run: bool) -> int:
    """Send to MLflow what is not there yet, of all runs of yours or of those named.

    Nothing is sent twice, so it may be repeated at will. The exit code is 1 when something could not be sent.
    """
    from obowlab.files.sharing import is_others
    from obowlab.runs.folder import RunFolder, read_runs
    from obowlab.runs.trash import trashed_runs
    from obowlab.tracking.local_store import put_aside
    from obowlab.tracking.mirror import Mirror
    from obowlab.tracking.server import shown_uri, store_uri

    machine = options.machine()
    if rebuild:
        if run:
            raise UserError("--rebuild sends all runs of yours: name none.")
        store = store_uri(machine.tracking_uri, runs_root=machine.runs_root)
        if dry_run:
            would(f"put {shown_uri(store)} and its files aside")
        else:
            click.echo(f"What MLflow had is in {put_aside(store)}; remove it once nothing is missed.")
    if run:
        folders = [RunFolder.find(ref, runs_root=machine.runs_root) for ref in run]
    else:
        found, damaged = read_runs(machine.runs_root)
        _warn(damaged)
        folders = [RunFolder(summary.path, summary.info) for summary in found if not is_others(summary.path)]
        if len(folders) < len(found):
            others = len(found) - len(folders)
            what = "1 run of another user is" if others == 1 else f"{others} runs of other users are"
            click.echo(f"{what} left to them: each types `obowlab runs sync`.")
        deleted = [run.folder() for run in trashed_runs(machine.runs_root) if run.was_deleted and run.is_intact()]
        folders += [each for each in deleted if Mirror(each, tracking_uri=machine.tracking_uri).pending()]
    if not folders:
        click.echo(f"There are no runs in {machine.runs_root}.")
    failed = False
    when_interrupted("what was sent is kept, and the same command sends the rest.")
    for number, folder in enumerate(folders, start=1):
        if not dry_run:
            show_progress(f"{number} of {len(folders)}: {folder.run_id}")
        mirror = Mirror(folder, tracking_uri=machine.tracking_uri)
        if dry_run:
            would(f"send {_pending(mirror)} values, results, files and facts of run '{folder.run_id}' to {shown_uri(mirror.uri)}")
            continue
        report = mirror.sync(timeout_s=timeout_s)
        failed = failed or report.error is not None
        show_progress("")
        problem = f", {report.pending} pending: {report.error}" if report.error is not None else ""
        click.echo(f"{folder.run_id}: {report.sent} sent{problem}")
        if report.left_out:
            _warn([f"{folder.path} has what is never sent: {', '.join(report.left_out)}."])
    return int(failed)


def _pending(mirror: Mirror) -> str:
    from obowlab.runs.info import DAMAGED

    try:
        return str(mirror.pending())
    except DAMAGED as error:
        return f"what can be read ({error}) of the"


@runs.command("export")
@click.argument("run")
@click.option("--out", type=PATH, metavar="FILE", help="Where to write. [default: RUN_ID.tar.gz]")
@click.option("--checkpoint", is_flag=True, help="Take the checkpoint along, so that training can continue elsewhere.")
@machine_options("runs_root", "machine_file")
@dry_run_option
def export(run: str, out: Path | None, checkpoint: bool, options: MachineOptions, dry_run: bool) -> None:
    """Write a run into one .tar.gz: recipe, metrics, results, encoder.

    Unpacked into another runs folder it is a run again there: `obowlab runs show` and `obowlab runs sync` work on it.
    """
    from obowlab.runs.bundle import BUNDLED, is_kept, write_bundle

    folder = _find(run, options=options)
    target = out or Path(f"{folder.run_id}.tar.gz")
    names = [name for name in (*BUNDLED, *([CHECKPOINT] if checkpoint else [])) if is_kept(folder.path / name)]
    if checkpoint and CHECKPOINT not in names:
        raise UserError(f"Run '{folder.run_id}' has no checkpoint to take along; leave --checkpoint out.")
    if target.exists():
        raise UserError(f"{target} is there already; choose another --out.")
    if not target.absolute().parent.is_dir():
        raise UserError(f"The folder {target.absolute().parent} of --out does not exist.")
    if dry_run:
        return would(f"write {', '.join(names)} of run '{folder.run_id}' to {target}")
    when_interrupted(f"{target} was not written.")
    write_bundle(folder, names=names, target=target)
    click.echo(f"Wrote {target} ({text.size(target.stat().st_size)}): {', '.join(names)}.")
    return None


def _find(run: str, *, options: MachineOptions) -> RunFolder:
    from obowlab.runs.folder import RunFolder

    return RunFolder.find(run, runs_root=options.machine().runs_root)


def _warn(sentences: Sequence[str]) -> None:
    for sentence in sentences:
        click.echo(f"Warning: {sentence}", err=True)


def _progress(state: State) -> str:
    return f"{state.step}/{state.total_steps}" if state.total_steps is not None else str(state.step)


def _finite(values: dict[str, float]) -> dict[str, float | str]:
    """Return values as JSON takes them: those that are not finite as their names."""
    return {name: value if math.isfinite(value) else repr(value) for name, value in values.items()}


def _metric_row(name: str, value: float) -> tuple[str, str, str]:
    from obowlab.runs.metrics import unit_of

    return name, f"{value:.6g}", unit_of(name)
