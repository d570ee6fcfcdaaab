"""`obowlab tune`: search the settings of a recipe with Optuna."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from obowlab import text
from obowlab.cli.options import (
    CLUSTER,
    HARDWARE,
    ROOTS,
    MachineOptions,
    absolute,
    dry_run_option,
    json_flag,
    machine_options,
    set_option,
    submitter_of,
    would,
)
from obowlab.cli.output import print_json, print_lines, print_obstacles, print_table
from obowlab.errors import UserError

if TYPE_CHECKING:
    from obowlab.config import Machine
    from obowlab.studies.schema import StudyReport
    from obowlab.studies.spec import Tuning

SCALES = ("paper", "tiny", "demo")


@click.command()
@click.argument("study", required=False)
@click.option(
    "--trials", type=click.IntRange(min=1), metavar="N", help="Completed trials wanted in all. [default: as last, or the file's]"
)
@click.option("--scale", type=click.Choice(SCALES), default="paper", show_default=True, help="Which base recipe.")
@click.option("--gpus", type=click.IntRange(min=1), metavar="N", help="N trials at a time, each on a GPU of its own.")
@click.option("--jobs", type=click.IntRange(min=1), metavar="N", help="N trials at a time. [default: 1]")
@click.option(
    "--storage",
    metavar="URL",
    envvar="OBOWLAB_STUDY_STORAGE",
    help="postgresql://..., sqlite:////FILE or journal:////FILE. [default: a journal in the run store]",
)
@click.option("--name", "study_name", metavar="NAME", help="Name in the storage. [default: STUDY-SCALE]")
@set_option
@click.option("--show", is_flag=True, help="Train nothing; print the trials and what is best, and renew study.json.")
@click.option("--list", "list_studies", is_flag=True, help="List the studies.")
@json_flag
@machine_options(*CLUSTER, *HARDWARE, *ROOTS)
@dry_run_option
def tune(
    study: str | None,
    trials: int | None,
    scale: str,
    gpus: int | None,
    jobs: int | None,
    storage: str | None,
    study_name: str | None,
    overrides: tuple[str, ...],
    show: bool,
    list_studies: bool,
    as_json: bool,
    options: MachineOptions,
    dry_run: bool,
) -> int:
    """Search the settings of a recipe with Optuna; the same command again continues.

    STUDY is a study (`obowlab tune --list`) or a TOML file. Every trial trains one run per seed; Ctrl-C stops with everything
    saved, and trials left unfinished by a killed command resume from their checkpoints. Several commands may work on one
    study, on several machines too, when they share --storage and --runs-root.
    """
    if list_studies:
        return _list(options.machine(), as_json=as_json)
    if study is None:
        raise UserError("Name a study or its TOML file; `obowlab tune --list` lists them.")
    if gpus is not None:
        if options.device not in (None, "cuda") or jobs is not None:
            raise UserError("--gpus N stands for --device cuda with N trials at a time; leave --device and --jobs out.")
        options = replace(options, device="cuda")
    from obowlab.studies.spec import plan_study

    tuning = plan_study(study, scale=scale, overrides=overrides, study_name=study_name)
    machine = options.machine()
    slots = gpus or jobs or 1
    if show:
        return _show(tuning, machine=machine, storage=storage, asked=trials, as_json=as_json)
    if dry_run:
        return _dry_run(tuning, machine=machine, storage=storage, asked=trials, slots=slots, gpus=gpus)
    if machine.launcher == "slurm":
        from obowlab.studies.storage import storage_url
        from obowlab.studies.submit import submit_workers

        url = storage_url(storage, runs_root=machine.runs_root)
        submitter = submitter_of(machine, options=options)
        arguments = text.arguments("tune", absolute(study), scale=scale, name=tuning.name, trials=trials, set=overrides)
        return submit_workers(arguments, tuning=tuning, url=url, count=slots, submitter=submitter)
    if gpus is not None:
        from obowlab.launch.gpu_leases import check_gpus

        check_gpus(machine.model_copy(update={"procs": gpus}))
    return _work(tuning, machine=machine, storage=storage, asked=trials, slots=slots)


def _list(machine: Machine, *, as_json: bool) -> int:
    """Print the study files, and the studies that were begun in the run store with what they fixed and how far they are."""
    from obowlab.studies.overview import counts
    from obowlab.studies.schema import read_studies
    from obowlab.studies.spec import load_study, study_files

    studies = {name: load_study(name)[1] for name in study_files()}
    if as_json:
        print_json({name: spec.model_dump(mode="json") for name, spec in studies.items()})
        return 0
    rows = [
        (name, spec.base, spec.objective, str(spec.trials), ", ".join(spec.parameters), spec.title)
        for name, spec in studies.items()
    ]
    columns = ("study", "base", "objective", "trials", "parameters", "title")
    print_table(columns, rows, right=("trials",), prose=("parameters", "title"), hide=("base",))
    begun = read_studies(machine.runs_root)
    if begun:
        lines = [(s.name, s.study, counts(s) if s.counts else "", ", ".join(s.fixed), *s.problems[:1]) for s in begun]
        heads = ("begun", "file", "trials", "fixed", "remark")
        print_table(heads, [(*line, "")[:5] for line in lines], prose=("trials", "fixed", "remark"), hide=("file",))
    return 0


def _work(tuning: Tuning, *, machine: Machine, storage: str | None, asked: int | None, slots: int) -> int:
    from obowlab.launch.preflight import data_checks
    from obowlab.studies.overview import expected_time
    from obowlab.studies.storage import open_storage, quiet, storage_url
    from obowlab.studies.summary import Reporter
    from obowlab.studies.trial_locks import TrialLocks
    from obowlab.studies.worker import BUDGET, MAX_FAILURES, Worker, budget_of, open_study, study_folder

    url = storage_url(storage, runs_root=machine.runs_root)
    for check in data_checks(tuning.base.stages(), machine=machine, dry_run=False, say=click.echo, required=tuning.protocol):
        check()
    with quiet():
        locks = TrialLocks(study_folder(tuning, machine=machine))
        with locks.alone():  # two workers must not make the tables at once
            opened = open_storage(url)
        study = open_study(tuning, storage=opened, locks=locks)
        budget = budget_of(study, tuning=tuning, asked=asked)
        if study.user_attrs.get(BUDGET) != budget:
            study.set_user_attr(BUDGET, budget)
        reporter = Reporter(study, tuning=tuning, machine=machine, locks=locks, budget=budget, storage=url)
        report = reporter.write()
        _say(f"study {tuning.name} in {report.storage}: {report.counts['completed']} of {budget} trials completed")
        if report.fixed:
            _say(f"fixed: {', '.join(report.fixed)}")
        cost = expected_time(tuning, machine=machine, left=budget - report.counts["completed"], slots=slots)
        if cost:
            _say(cost)
        worker = Worker(
            tuning,
            study=study,
            locks=locks,
            machine=machine,
            slots=slots,
            budget=budget,
            say=_say,
            after_trial=reporter.write,
        )
        ended = worker.work()
        # After Ctrl-C the prompt should come back at once: study.json is of the last trial's end, and the next command sends it.
        report, problem = (reporter.look(), None) if ended.signum else reporter.send()
    print_study(report, problem=problem)
    if ended.signum:
        click.echo("Stopped; every run is saved, and the same command continues.", err=True)
        return 128 + ended.signum
    if ended.failures >= MAX_FAILURES:
        click.echo(f"{MAX_FAILURES} trials in a row failed; fix what their messages say, then type the command again.", err=True)
        return 1
    return 0


def _show(tuning: Tuning, *, machine: Machine, storage: str | None, asked: int | None, as_json: bool) -> int:
    from obowlab.config import nearest
    from obowlab.studies.storage import open_existing, quiet, storage_url, study_names
    from obowlab.studies.summary import Reporter
    from obowlab.studies.trial_locks import TrialLocks
    from obowlab.studies.worker import budget_of, check_own, study_folder

    url = storage_url(storage, runs_root=machine.runs_root)
    with quiet():
        study = open_existing(tuning.name, url=url)
        if study is None:
            hint = nearest(tuning.name, study_names(url))
            raise UserError(f"Study '{tuning.name}' (--name) is not in this storage; leave --show out to begin it.{hint}")
        check_own(study, tuning=tuning)
        budget = budget_of(study, tuning=tuning, asked=asked)
        locks = TrialLocks(study_folder(tuning, machine=machine))
        reporter = Reporter(study, tuning=tuning, machine=machine, locks=locks, budget=budget, storage=url)
        report, problem = reporter.send()
    if as_json:
        print_json(report.to_json())
        _warn([problem])
    else:
        print_study(report, problem=problem)
    return 0


def _dry_run(tuning: Tuning, *, machine: Machine, storage: str | None, asked: int | None, slots: int, gpus: int | None) -> int:
    from obowlab.launch.stages import find_obstacles
    from obowlab.studies.overview import plan_lines
    from obowlab.studies.storage import open_existing, quiet, storage_url
    from obowlab.studies.summary import collect
    from obowlab.studies.trial_locks import TrialLocks
    from obowlab.studies.worker import budget_of, check_own, study_folder

    url = storage_url(storage, runs_root=machine.runs_root)
    folder = study_folder(tuning, machine=machine)
    report = None
    with quiet():
        study = open_existing(tuning.name, url=url)
        if study is not None:
            check_own(study, tuning=tuning)
        budget = budget_of(study, tuning=tuning, asked=asked)
        if study is not None and folder.is_dir():
            locks = TrialLocks(folder)
            report = collect(study, tuning=tuning, machine=machine, locks=locks, budget=budget, storage=url, analyse=False)
    completed = report.counts["completed"] if report else 0
    would(f"{'continue' if report else 'begin'} study {tuning.name}: {completed} of {budget} trials completed, {slots} at a time")
    for line in plan_lines(tuning, machine=machine, url=url, report=report):
        click.echo(f"  {line}")
    due = tuning.base.stages()
    return print_obstacles(find_obstacles(due, machine=machine, say=click.echo, at_a_time=gpus or 1, required=tuning.protocol))


def print_study(report: StudyReport, *, problem: str | None = None) -> None:
    """Print the trials of a study, then the best one beside the paper's, and warnings."""
    from obowlab.studies.overview import findings, trials_overview

    columns, rows = trials_overview(report)
    numbers = [column for column in columns if column not in ("status", "remark", "runs")]
    title = f"Study {report.name}: {report.title}"
    print_table(columns, rows, right=numbers, title=title, names=("runs",), prose=("remark",), hide=("time", "runs"))
    print_lines(findings(report))
    _warn([*report.problems, problem])


def _warn(problems: Iterable[str | None]) -> None:
    for problem in problems:
        if problem is not None:
            click.echo(f"Warning: {problem}", err=True)


def _say(line: str) -> None:
    click.echo(f"{time.strftime('%H:%M:%S')} {line}", err=True)
