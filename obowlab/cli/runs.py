"""`obowlab runs`: what was trained, with status and results."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from obowlab import text
from obowlab.cli import Family
from obowlab.cli.options import PATH, MachineOptions, dry_run_option, json_flag, machine_options, would
from obowlab.cli.output import print_results, print_table
from obowlab.errors import UserError

if TYPE_CHECKING:
    from obowlab.runs.folder import RunFolder
    from obowlab.runs.info import State
    from obowlab.tracking.mirror import Mirror

BUNDLED = (
    "run.json",
    "state.json",
    "attempts.jsonl",
    "metrics.jsonl",
    "online.jsonl",
    "system.jsonl",
    "labels.json",
    "results",
    "words",
    "encoder.safetensors",
    "log.txt",
    "dirty.diff",
)
"""What `runs export` takes along: everything that is known about a run, and nothing that belongs to this machine."""

CHECKPOINT = "checkpoint.pt"
HEADLINES = ("fewshot_5shot", "linear_top1", "knn_top1")
"""The student's results that fit into a row of `runs list`."""


@click.group(cls=Family)
def runs() -> None:
    """List, show, sync and export runs."""


@runs.command("list")
@machine_options("runs_root", "machine_file")
@json_flag
@dry_run_option
def list_all(as_json: bool, options: MachineOptions, dry_run: bool) -> None:
    """List what was trained, newest first."""
    from obowlab.runs.folder import RunFolder, damage_of, read_runs
    from obowlab.runs.info import DAMAGED

    root = options.machine().runs_root
    if dry_run:
        return would(f"list the runs in {root}")
    rows, (found, damaged) = [], read_runs(root)
    for run in found:
        try:
            rows.append((run, RunFolder(run.path, run.info).results()))
        except DAMAGED as error:
            damaged.append(damage_of(run.path, error))
    _warn(damaged)
    if as_json:
        listed = [
            {
                "run_id": run.info.run_id,
                "name": run.info.name,
                "seed": run.info.seed,
                "fingerprint": run.info.fingerprint,
                "created_at": run.info.created_at,
                "path": str(run.path),
                "state": run.state.model_dump(mode="json"),
                "results": results,
            }
            for run, results in rows
        ]
        click.echo(json.dumps(listed, indent=1))
        return None
    if not rows:
        click.echo(f"There are no runs in {root}; `obowlab run demo` makes one.")
        return None
    lines = [
        (run.info.run_id, run.state.status, _progress(run.state), text.timestamp(run.info.created_at), *_headlines(results))
        for run, results in rows
    ]
    return print_table(("run", "status", "steps", "created", *HEADLINES), lines, right=("steps", *HEADLINES))


@runs.command("show")
@click.argument("run")
@machine_options("runs_root", "machine_file")
@json_flag
@dry_run_option
def show(run: str, as_json: bool, options: MachineOptions, dry_run: bool) -> None:
    """Show one run: its state, last metrics and results.

    RUN is a run id, a prefix of one, or a run folder.
    """
    folder = _find(run, options=options)
    if dry_run:
        return would(f"show run '{folder.run_id}'")
    state, points = folder.current_state(), folder.metrics()
    last = points[-1] if points else None
    if as_json:
        values = {
            "info": folder.info.model_dump(mode="json", by_alias=True),
            "state": state.model_dump(mode="json"),
            "attempts": folder.attempts(),
            "last_metrics": None
            if last is None
            else {
                "step": last.step,
                **{name: repr(v) if v != v or abs(v) == float("inf") else v for name, v in last.values.items()},
            },
            "results": folder.results(),
        }
        click.echo(json.dumps(values, indent=1))
        return None
    info = folder.info
    facts = [
        ("run", folder.run_id),
        ("recipe", ": ".join(text for text in (info.name, info.recipe_values.get("title", "")) if text)),
        ("seed", str(info.seed)),
        ("status", state.status + (f": {state.message}" if state.message else "")),
        ("steps", _progress(state)),
        ("created", f"{text.timestamp(info.created_at)} by obowlab {info.version}"),
        ("attempts", str(len(folder.attempts()))),
        ("folder", str(folder.path)),
        *((name.removeprefix("obowlab."), label) for name, label in folder.labels().items()),
    ]
    for name, fact in facts:
        click.echo(f"{name:<9} {fact}")
    if last is not None:
        click.echo(f"\nLast metrics, step {last.step}:")
        print_table(
            ("metric", "value", "unit"), [_metric_row(name, value) for name, value in last.values.items()], right=("value",)
        )
    click.echo("\nResults:")
    return print_results(folder)


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
    from obowlab.files import is_others
    from obowlab.runs.folder import RunFolder, read_runs
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
    if not folders:
        click.echo(f"There are no runs in {machine.runs_root}.")
    failed = False
    for folder in folders:
        mirror = Mirror(folder, tracking_uri=machine.tracking_uri)
        if dry_run:
            would(f"send {_pending(mirror)} values, results, files and facts of run '{folder.run_id}' to {shown_uri(mirror.uri)}")
            continue
        report = mirror.sync(timeout_s=timeout_s)
        failed = failed or report.error is not None
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
    write_bundle(folder, names=names, target=target)
    click.echo(f"Wrote {target} ({text.size(target.stat().st_size)}): {', '.join(names)}.")
    return None


def is_kept(path: Path) -> bool:
    """Return whether a file or folder of a run goes along: links stay, whatever they lead to."""
    return path.exists() and not path.is_symlink()


def write_bundle(folder: RunFolder, *, names: list[str], target: Path) -> None:
    """Write files of a run folder into a .tar.gz under the run's id, beside and renamed.

    Raises:
        UserError: the file cannot be written.
    """
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with tarfile.open(beside, "x:gz") as bundle:
            for name in names:
                bundle.add(
                    folder.path / name, arcname=f"{folder.run_id}/{name}", filter=lambda m: m if m.isreg() or m.isdir() else None
                )
        beside.replace(target)
    except OSError as error:
        raise UserError(f"Cannot write {target} (--out): {error.strerror or error}.") from None
    finally:
        beside.unlink(missing_ok=True)


def _find(run: str, *, options: MachineOptions) -> RunFolder:
    from obowlab.runs.folder import RunFolder

    return RunFolder.find(run, runs_root=options.machine().runs_root)


def _warn(sentences: Iterable[str]) -> None:
    for sentence in sentences:
        click.echo(f"Warning: {sentence}", err=True)


def _progress(state: State) -> str:
    return f"{state.step}/{state.total_steps}" if state.total_steps is not None else str(state.step)


def _headlines(results: list[dict[str, Any]]) -> list[str]:
    values = {
        measurement["name"]: text.measurement(measurement, digits=1)
        for result in results
        if result["subject"] == "student"
        for measurement in result["measurements"]
    }
    return [values.get(name, "") for name in HEADLINES]


def _metric_row(name: str, value: float) -> tuple[str, str, str]:
    from obowlab.runs.metrics import unit_of

    return name, f"{value:.6g}", unit_of(name)
