"""`obowlab tune`: search the settings of a recipe with Optuna."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
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
from obowlab.cli.output import print_table
from obowlab.errors import UserError

if TYPE_CHECKING:
    from obowlab.config import Machine
    from obowlab.studies.schema import StudyReport, StudyTrial
    from obowlab.studies.spec import Tuning

SCALES = ("paper", "tiny", "demo")


@click.command()
@click.argument("study", required=False)
@click.option("--trials", type=click.IntRange(min=1), metavar="N", help="Completed trials wanted in all. [default: the study's]")
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
    saved, and trials that a killed command left open are gone on with from their checkpoints. Several commands may work on
    one study, on several machines too, when they share --storage and --runs-root.
    """
    if list_studies:
        return _list(as_json=as_json)
    if study is None:
        raise UserError("Name a study or its TOML file; `obowlab tune --list` lists them.")
    if gpus is not None:
        if options.device not in (None, "cuda") or jobs is not None:
            raise UserError("--gpus N stands for --device cuda with N trials at a time; leave --device and --jobs out.")
        options = replace(options, device="cuda")
    from obowlab.studies.spec import plan_study

    tuning = plan_study(study, scale=scale, overrides=overrides, study_name=study_name)
    machine = options.machine()
    budget = trials or tuning.spec.trials
    if show or dry_run:
        return _look(tuning, machine=machine, storage=storage, budget=budget, show=show, as_json=as_json, jobs=gpus or jobs or 1)
    if machine.launcher == "slurm":
        words = ["tune", absolute(study), "--scale", scale, "--name", tuning.name, "--trials", str(budget)]
        words += [word for text in overrides for word in ("--set", text)]
        return _submit(tuning, words, machine=machine, options=options, storage=storage, count=gpus or jobs or 1)
    if gpus is not None:
        from obowlab.launch.gpu_leases import check_gpus

        check_gpus(machine.model_copy(update={"procs": gpus}))
    return _work(tuning, machine=machine, storage=storage, budget=budget, slots=gpus or jobs or 1)


def _list(*, as_json: bool) -> int:
    from obowlab.studies.spec import load_study, study_files

    studies = {name: load_study(name)[1] for name in study_files()}
    if as_json:
        click.echo(json.dumps({name: spec.model_dump(mode="json") for name, spec in studies.items()}, indent=1))
        return 0
    rows = [
        (name, spec.base, spec.objective, str(spec.trials), ", ".join(spec.parameters), spec.title)
        for name, spec in studies.items()
    ]
    print_table(("study", "base", "objective", "trials", "parameters", "title"), rows, right=("trials",))
    return 0


def _submit(
    tuning: Tuning,
    words: list[str],
    *,
    machine: Machine,
    options: MachineOptions,
    storage: str | None,
    count: int,
) -> int:
    """Let so many jobs of the cluster, with one trial at a time each, work on a study; those already there count."""
    import os

    from obowlab.launch.preflight import check_data
    from obowlab.launch.slurm import JobRequest, Resources, check_slurm, states, submitted_jobs
    from obowlab.studies.storage import STORAGE_VARIABLE, storage_url

    submitter = submitter_of(machine, options=options)
    check_slurm()
    url = storage_url(storage, runs_root=machine.runs_root)
    if url.startswith("sqlite"):
        raise UserError("SQLite is no storage for several nodes: use postgresql:// or, on a file system with locks, journal://.")
    check_data(tuning.base, machine=machine, dry_run=False, say=click.echo)
    what = f"tune {tuning.name}"
    mine = [job for job in submitted_jobs(machine.runs_root) if job.request.what == what]
    alive = states(mine)
    jobs = [job for job in mine if job.id in alive]
    if jobs:
        click.echo(f"{len(jobs)} jobs work on study {tuning.name} already.")
    if len(jobs) < count:
        os.environ[STORAGE_VARIABLE] = url  # Slurm hands it on; on a command line a password would be seen by everybody
        gpus = machine.device != "cpu"
        request = JobRequest(arguments=submitter.complete(words), runs=(), what=what)
        requests = [request] * (count - len(jobs))
        jobs += submitter.submit(requests, resources=Resources(gpus=gpus), name=what.replace(" ", "-"))
    return submitter.follow(jobs, hint="`obowlab tune ... --show` shows the trials.")


def _work(tuning: Tuning, *, machine: Machine, storage: str | None, budget: int, slots: int) -> int:
    from obowlab.launch.preflight import check_data
    from obowlab.studies.storage import open_storage, quiet, storage_url
    from obowlab.studies.summary import Reporter
    from obowlab.studies.trial_locks import Claims
    from obowlab.studies.worker import MAX_FAILURES, Worker, open_study, study_folder

    url = storage_url(storage, runs_root=machine.runs_root)
    stages = tuning.base.stages()
    for number, stage in enumerate(stages):
        if stage.recipe.data not in [before.recipe.data for before in stages[:number]]:
            check_data(stage, machine=machine, dry_run=False, say=click.echo)
    with quiet():
        claims = Claims(study_folder(tuning, machine=machine))
        with claims.alone():  # two workers must not make the tables at once
            opened = open_storage(url)
        study = open_study(tuning, storage=opened, claims=claims)
        reporter = Reporter(study, tuning=tuning, machine=machine, claims=claims, budget=budget, storage=url)
        report = reporter.write()
        _say(f"study {tuning.name} in {report.storage}: {report.counts['completed']} of {budget} trials completed")
        _say_cost(tuning, machine=machine, left=budget - report.counts["completed"], slots=slots)
        worker = Worker(
            tuning,
            study=study,
            claims=claims,
            machine=machine,
            slots=slots,
            budget=budget,
            say=_say,
            after_trial=reporter.write,
        )
        ended = worker.work()
        # Who stopped it waits for the prompt: study.json is of the last trial's end, and MLflow hears from the next command.
        report, problem = (reporter.look(), None) if ended.signum else reporter.send()
    print_study(report)
    if problem is not None:
        click.echo(f"Warning: {problem}", err=True)
    if ended.signum:
        click.echo("Stopped; every run is saved, and the same command goes on.", err=True)
        return 128 + ended.signum
    if ended.failures >= MAX_FAILURES:
        click.echo(f"{MAX_FAILURES} trials in a row failed; mend what their messages say, then type the command again.", err=True)
        return 1
    return 0


def _say_cost(tuning: Tuning, *, machine: Machine, left: int, slots: int) -> None:
    """Say what the trials that are left will take, as far as earlier runs of the base recipe tell."""
    from obowlab.launch.cost import CostBook
    from obowlab.runs.records import store_runs

    if left <= 0:
        return
    recipe = tuning.base.recipe
    cost = CostBook(machine, runs=store_runs(machine.runs_root).values()).cost(recipe)
    if cost.seconds is not None:
        trial_s = cost.seconds * len(tuning.spec.seeds)
        together = text.duration(left * trial_s / slots)
        _say(f"{left} trials of about {text.duration(trial_s)} are left: {together} with {slots} at a time, less what is pruned")


def _look(tuning: Tuning, *, machine: Machine, storage: str | None, budget: int, show: bool, as_json: bool, jobs: int) -> int:
    """Print what there is, or what would be done; make no storage."""
    from obowlab.studies.storage import exists, open_storage, quiet, storage_url
    from obowlab.studies.summary import Reporter, collect
    from obowlab.studies.trial_locks import Claims
    from obowlab.studies.worker import find_study, study_folder

    url = storage_url(storage, runs_root=machine.runs_root)
    folder = study_folder(tuning, machine=machine)
    with quiet():
        study = find_study(tuning, storage=open_storage(url, make=False)) if exists(url) else None
        if dry_run_only := not show:
            claims = Claims(folder) if study is not None and folder.is_dir() else None
            report = (
                collect(study, tuning=tuning, machine=machine, claims=claims, budget=budget, storage=url, analyse=False)
                if study is not None and claims is not None
                else None
            )
            _print_plan(tuning, machine=machine, url=url, budget=budget, report=report, jobs=jobs)
            return 0
        assert not dry_run_only
        if study is None:
            raise UserError(f"Study '{tuning.name}' was not begun in this storage; leave --show out to begin it.")
        reporter = Reporter(study, tuning=tuning, machine=machine, claims=Claims(folder), budget=budget, storage=url)
        report, problem = reporter.send()
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=1))
    else:
        print_study(report)
    if problem is not None:
        click.echo(f"Warning: {problem}", err=True)
    return 0


def _print_plan(tuning: Tuning, *, machine: Machine, url: str, budget: int, report: StudyReport | None, jobs: int) -> None:
    from obowlab.tracking.server import shown_uri

    spec, epochs = tuning.spec, tuning.base.recipe.training.epochs
    completed = report.counts["completed"] if report else 0
    would(f"{'continue' if report else 'begin'} study {tuning.name}: {completed} of {budget} trials completed, {jobs} at a time")
    facts = [
        f"storage: {shown_uri(url)}",
        f"recipe: {tuning.base.name}{''.join(f', {text}' for text in tuning.overrides)}",
        f"objective: {spec.objective}, {'more' if tuning.maximize else 'less'} is better, mean over seeds {list(spec.seeds)}",
        *(f"parameter: {key} {_range(parameter.model_dump())}" for key, parameter in spec.parameters.items()),
        *([f"first: the paper's {', '.join(f'{key} = {value}' for key, value in spec.paper.items())}"] if spec.paper else []),
        f"pruning: {spec.pruner.kind}"
        + (f", {tuning.online_metric} every {tuning.every_epochs(epochs)} of {epochs} epochs" if tuning.online_metric else ""),
        f"runs: {machine.runs_root}",
    ]
    for fact in facts:
        click.echo(f"  {fact}")
    if report is not None:
        click.echo("  trials: " + _counts(report))


def print_study(report: StudyReport) -> None:
    """Print the trials of a study, then the best one beside the paper's."""
    keys = [parameter.key for parameter in report.parameters]
    short = [key.rsplit(".", 1)[-1] for key in keys]
    heads = short if len(set(short)) == len(short) else keys
    rows = [
        (
            str(trial.number),
            trial.status,
            *(_number(trial.params.get(key)) for key in keys),
            text.estimate(trial.value, trial.interval),
            text.duration(trial.finished_at - trial.started_at) if trial.finished_at and trial.started_at else "",
            _remark(trial),
            ", ".join(run.run_id for run in trial.runs),
        )
        for trial in report.trials
    ]
    columns = ("trial", "status", *heads, f"{report.metric} {report.unit}".strip(), "time", "remark", "runs")
    print_table(columns, rows, right=("trial", *heads, columns[-4], "time"), title=f"Study {report.name}: {report.title}")
    click.echo(_counts(report))
    by_number = {trial.number: trial for trial in report.trials}
    for word, number in (("best", report.best), ("paper", report.paper)):
        if number is not None:
            trial = by_number[number]
            point = ", ".join(f"{head} {_number(trial.params[key])}" for head, key in zip(heads, keys, strict=True))
            click.echo(f"{word}: {text.estimate(trial.value, trial.interval)} {report.unit} at {point} (trial {number})")
    gain = report.best_against_paper
    if gain is not None and report.best != report.paper:
        click.echo(
            f"best against paper: {gain.value:+.2f} ± {gain.interval:.2f} {report.unit} on the same episodes or images; "
            f"the best of {report.counts['completed']} is partly luck: confirm it with other seeds."
        )
    importances = {p.key: p.importance for p in report.parameters if p.importance is not None}
    if importances:
        click.echo("importance: " + ", ".join(f"{key} {value:.2f}" for key, value in importances.items()))
    for problem in report.problems:
        click.echo(f"Warning: {problem}", err=True)


def _counts(report: StudyReport) -> str:
    there = {status: number for status, number in report.counts.items() if number or status == "completed"}
    return f"{', '.join(f'{number} {status}' for status, number in there.items())}; budget {report.budget}"


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def _range(parameter: Mapping[str, object]) -> str:
    if "choices" in parameter:
        return f"one of {parameter['choices']}"
    return f"from {parameter['low']} to {parameter['high']}" + (" by its logarithm" if parameter["log"] else "")


def _remark(trial: StudyTrial) -> str:
    words = ["paper"] if trial.is_paper else []
    if trial.resumed:
        words.append(f"resumed {trial.resumed}×" if trial.resumed > 1 else "resumed")
    if isinstance(trial.repeat_of, int):
        words.append(f"repeats trial {trial.repeat_of}")
    elif trial.message:
        words.append(trial.message)
    return "; ".join(words)


def _say(text: str) -> None:
    click.echo(f"{time.strftime('%H:%M:%S')} {text}", err=True)
