"""Studies with a stand-in for the compute process: real storages, processes, signals and locks, no torch."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import sqlite3
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError
from optuna.importance import FanovaImportanceEvaluator
from optuna.trial import TrialState, create_trial

from obowlab.errors import UserError
from obowlab.launch import local as launching
from obowlab.runs.folder import RunFolder
from obowlab.runs.listing import list_runs
from obowlab.runs.results import unpack
from obowlab.studies import storage as storages
from obowlab.studies import summary as summaries
from obowlab.studies import trial as trials
from obowlab.studies import worker as workers
from obowlab.studies.overview import findings, trials_overview
from obowlab.studies.schema import STUDY_FILE, StudyReport, StudyTrial, read_study
from obowlab.studies.storage import open_storage, quiet, storage_url
from obowlab.studies.summary import Reporter
from obowlab.studies.trial_locks import TrialLocks
from obowlab.studies.worker import distributions
from obowlab.tables.statistics import estimate
from tests.gpus import stand_in_gpus
from tests.processes import NoMirror, wait_until
from tests.report_store import add_study, optuna_figures
from tests.studies import STUDY, Search, stand_in, start_worker, tuning_of

SECRET = "s3cret-pass"
LEVELS = '[parameters."method.levels"]\nkind = "categorical"\nchoices = [["conv5"], ["conv4", "conv5"]]\n'


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "Mirror", NoMirror)
    for module, name, seconds in ((trials, "POLL_S", 0.03), (trials, "WAIT_S", 0.1), (workers, "POLL_S", 0.1)):
        monkeypatch.setattr(module, name, seconds)


def attempts(root: Path) -> dict[str, int]:
    """Return how often each run was started."""
    return {run.info.run_id: len(RunFolder(run.path, run.info).attempts()) for run in list_runs(root / "runs")}


def test_a_study_is_worked_to_its_budget_and_says_who_is_who(tmp_path: Path) -> None:
    search = Search(tmp_path)
    assert search.work(budget=3).signum == 0
    report = search.report(budget=3)
    assert report.counts["completed"] == 3
    first = report.trials[0]
    assert first.is_paper
    assert first.params == {"method.kappa": 5.0}
    assert report.paper == 0
    for trial in report.trials:
        (run,) = trial.runs
        folder = RunFolder.find(run.run_id, runs_root=tmp_path / "runs")
        expected = 60 - 10 * abs(math.log(trial.params["method.kappa"] / 8))
        assert folder.info.recipe.method.kappa == trial.params["method.kappa"]
        assert trial.value == pytest.approx(expected, abs=1e-12)
        assert folder.labels()["obowlab.study"] == "search-demo"
        assert folder.labels()["obowlab.trial"] == str(trial.number)
    best = max(report.trials, key=lambda trial: trial.value or 0.0)
    assert report.best == best.number
    search.work(budget=3)
    assert len(search.open().trials) == 3
    assert search.work(budget=4).signum == 0
    assert len(search.open().trials) == 4
    assert set(attempts(tmp_path).values()) == {1}


def test_the_recipes_own_point_comes_after_the_papers(tmp_path: Path) -> None:
    other = tuning_of(tmp_path, text=STUDY.replace('"method.kappa" = 5.0', '"method.kappa" = 7.0'), pruner="median")
    search = Search(tmp_path, tuning=other)
    search.work(budget=3, delay=0.01)
    report = search.report(budget=5)
    assert [(trial.is_paper, trial.is_recipe) for trial in report.trials[:3]] == [(True, False), (False, True), (False, False)]
    assert [trial.params["method.kappa"] for trial in report.trials[:2]] == [7.0, 5.0]
    lines = findings(report)
    assert lines[0].endswith("; budget 5, 2 left")
    assert lines[1] == 'fixed by the file: training.epochs=6, evaluation.protocols=["fewshot"]'
    assert any(line.startswith("recipe: ") and line.endswith("at kappa 5 (trial 1)") for line in lines)
    assert any("trial 1: the recipe's point, kappa 5" in line for line in search.said)

    both = Search(tmp_path / "both")
    both.work(budget=2)
    first, second = both.report().trials
    assert (first.is_paper, first.is_recipe, second.is_recipe) == (True, True, False)

    # A study that an earlier version began goes on as it is; a point outside of the search space is no trial.
    begun = Search(tmp_path / "begun", tuning=tuning_of(tmp_path / "begun", text=STUDY.replace("= 5.0", "= 7.0")))
    study = begun.open()
    study.enqueue_trial({"method.kappa": 9.0})
    for _ in range(2):
        study.ask(workers.distributions(begun.tuning))
    assert len(begun.open().trials) == 3
    narrow = tuning_of(tmp_path / "narrow", text=STUDY.replace("low = 1.0", "low = 5.5").replace("= 5.0", "= 7.0"))
    assert narrow.recipe_point() is None
    assert [trial.user_attrs for trial in Search(tmp_path / "narrow", tuning=narrow).open().trials] == [{"paper": True}]


def test_a_study_keeps_its_budget(tmp_path: Path) -> None:
    search = Search(tmp_path)
    assert workers.budget_of(None, tuning=search.tuning, asked=None) == 4
    study = search.open()
    assert workers.budget_of(study, tuning=search.tuning, asked=None) == 4
    study.set_user_attr("budget", 7)
    assert workers.budget_of(search.open(), tuning=search.tuning, asked=None) == 7
    assert workers.budget_of(search.open(), tuning=search.tuning, asked=2) == 2


def test_importances_are_computed_once_a_report_and_again_when_a_study_has_grown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated: list[int] = []
    evaluate = FanovaImportanceEvaluator.evaluate

    def counted(self: FanovaImportanceEvaluator, study: optuna.Study, **options: Any) -> dict[str, float]:
        evaluated.append(len(study.get_trials(deepcopy=False)))
        return evaluate(self, study, **options)

    monkeypatch.setattr(FanovaImportanceEvaluator, "evaluate", counted)
    search = Search(tmp_path)
    search.open()

    def grow(*values: float) -> StudyReport:
        for kappa in values:
            point = {"method.kappa": kappa}
            search.open().add_trial(create_trial(params=point, distributions=distributions(search.tuning), value=kappa**0.5))
        written = search.report(budget=30)
        assert read_study(search.locks.folder / STUDY_FILE) == written
        return written

    first = grow(*range(2, 22))
    assert len(evaluated) == 1
    assert first.analysed == 20
    assert first.figures["importance"].data[0]["x"] == [first.parameters[0].importance] == [1.0]
    second = grow(22)
    assert len(evaluated) == 1
    assert (second.counts["completed"], second.analysed, second.best) == (21, 20, second.trials[-1].number)
    assert (second.figures, second.parameters) == (first.figures, first.parameters)
    third = grow(23)
    assert len(evaluated) == 2
    assert third.analysed == 22
    assert third.figures != first.figures
    (search.locks.folder / STUDY_FILE).write_text("{")
    assert grow().analysed == 22
    assert len(evaluated) == 3


def test_a_report_never_replaces_a_later_one(tmp_path: Path) -> None:
    search = Search(tmp_path)
    path = search.locks.folder / STUDY_FILE
    search.work(budget=1)
    early = search.report()
    search.work(budget=2)
    reporter = Reporter(
        search.open(), tuning=search.tuning, machine=search.machine, locks=search.locks, budget=2, storage=search.url
    )
    collect, late = reporter._collect, [early]

    def overtaken(**options: Any) -> StudyReport:
        """Return what was so before another process wrote a later report, and then what is so."""
        search.report()
        return late.pop() if late else collect(**options)

    reporter._collect = overtaken
    assert len(reporter.write().completed) == 2
    assert len(read_study(path).completed) == 2
    reporter._collect = lambda **_: early
    reporter.write()  # a storage that was put back to what it was
    assert len(read_study(path).completed) == 1
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    content = path.read_bytes()
    reporter.write()
    assert path.read_bytes() == content


def test_the_same_study_chooses_the_same_points_however_often_it_is_stopped(tmp_path: Path) -> None:
    once, often = (
        Search(tmp_path / "once", tuning=tuning_of(tmp_path / "once")),
        Search(tmp_path / "often", tuning=tuning_of(tmp_path / "often")),
    )
    once.work(budget=4)
    for budget in (1, 3, 4):
        often.work(budget=budget)
    points = [[trial.params for trial in search.open().trials] for search in (once, often)]
    assert points[0] == points[1]
    assert len({str(point) for point in points[0]}) == 4


def test_bad_trials_are_pruned_and_the_paper_never(tmp_path: Path) -> None:
    search = Search(tmp_path, tuning=tuning_of(tmp_path, pruner="median"))
    study = search.open()
    for kappa in (64.0, 1.0, 63.0, 8.5):
        study.enqueue_trial({"method.kappa": kappa})
    search.work(budget=3, delay=0.15)
    report = search.report()
    status = {trial.params["method.kappa"]: trial.status for trial in report.trials}
    assert status == {5.0: "completed", 64.0: "pruned", 1.0: "pruned", 63.0: "pruned", 8.5: "completed"} | {
        k: v for k, v in status.items() if k not in (5.0, 64.0, 1.0, 63.0, 8.5)
    }
    pruned = next(trial for trial in report.trials if trial.params["method.kappa"] == 64.0)
    folder = RunFolder.find(pruned.runs[0].run_id, runs_root=tmp_path / "runs")
    assert folder.state.status == "interrupted"
    assert folder.state.message.startswith(f"pruned by trial {pruned.number} of study search-demo")
    assert folder.state.step < 6
    assert "search-demo" in folder.labels()["obowlab.pruned"]
    assert dict(pruned.online) == pytest.approx({p.step: p.values["fewshot_5shot"] for p in folder.metrics("online")})
    assert report.counts["completed"] == 3
    # The same point again is pruned at once, not trained on.
    study.enqueue_trial({"method.kappa": 64.0})
    search.work(budget=4)
    again = next(trial for trial in search.report().trials if trial.repeat_of == pruned.number)
    assert again.status == "pruned"
    assert again.online == pruned.online
    assert attempts(tmp_path)[folder.run_id] == 1


def test_the_papers_point_is_completed_however_bad_it_is(tmp_path: Path) -> None:
    search = Search(tmp_path, tuning=tuning_of(tmp_path, pruner="median"))
    online = dict.fromkeys(range(1, 6), 99.0)
    better = create_trial(
        params={"method.kappa": 8.0}, distributions=distributions(search.tuning), value=99.0, intermediate_values=online
    )
    search.open().add_trial(better)
    search.work(budget=2, delay=0.1)
    assert [(trial.status, trial.is_paper) for trial in search.report().trials] == [("completed", True), ("completed", False)]


def test_repeated_points_are_not_trained_again(tmp_path: Path) -> None:
    tuning_of(tmp_path)
    text = (tmp_path / "search.toml").read_text()
    start, end = text.index("[parameters"), text.index("[sampler]")
    search = Search(tmp_path, tuning=tuning_of(tmp_path, text=text[:start] + LEVELS + text[end:]))
    search.work(budget=4, slots=2, delay=0.05)
    report = search.report()
    assert report.counts["completed"] == 4
    assert report.counts["repeated"] == 2
    assert {str(trial.params["method.levels"]) for trial in report.trials} == {"('conv5',)", "('conv4', 'conv5')"}
    assert attempts(tmp_path) == dict.fromkeys(attempts(tmp_path), 1)
    assert len(attempts(tmp_path)) == 2


def test_a_run_that_was_finished_under_another_name_is_the_trials_run(tmp_path: Path) -> None:
    search = Search(tmp_path)
    recipe = search.tuning.recipe({"method.kappa": 5.0})
    other = replace(recipe, name="mine")
    folder = RunFolder.create(other, seed=0, runs_root=tmp_path / "runs")
    assert (
        launching.launch(
            other, seed=0, machine=search.machine, fresh=False, progress=False, command=stand_in(tmp_path), quiet=True
        )
        == 0
    )
    search.work(budget=1)
    (trial,) = search.report().trials
    assert trial.runs[0].run_id == folder.run_id
    assert trial.repeat_of == "finished runs"
    assert len(folder.attempts()) == 1


def test_several_seeds_are_averaged(tmp_path: Path) -> None:
    search = Search(tmp_path, tuning=tuning_of(tmp_path, seeds=(0, 1, 2)))
    search.work(budget=1)
    (trial,) = search.report().trials
    base = 60 - 10 * abs(math.log(5 / 8))
    assert trial.value == pytest.approx(base + 1)
    assert [run.value for run in trial.runs] == pytest.approx([base, base + 1, base + 2])
    samples = [RunFolder.find(run.run_id, runs_root=tmp_path / "runs").results()[0] for run in trial.runs]
    observations = np.stack([unpack(result["measurements"][0]["samples"]) for result in samples])
    assert trial.interval == estimate(observations).interval


def test_a_run_killed_from_outside_goes_on_and_failures_end_a_worker(tmp_path: Path) -> None:
    search = Search(tmp_path / "a")
    (tmp_path / "a").mkdir(exist_ok=True)
    search.work(budget=1, behaviour="killed")
    (trial,) = search.report().trials
    assert trial.status == "completed"
    folder = RunFolder.find(trial.runs[0].run_id, runs_root=tmp_path / "a" / "runs")
    assert [attempt["step"] for attempt in folder.attempts()] == [0, 3]
    broken = Search(tmp_path / "b")
    ended = broken.work(budget=9, behaviour="broken")
    assert ended.failures == workers.MAX_FAILURES
    report = broken.report()
    assert [trial.status for trial in report.trials] == ["failed"] * 3
    assert "the loss is not finite" in report.trials[0].message


@pytest.mark.skipif(os.geteuid() != 0, reason="a run of another user needs tests that run as root")
def test_the_trial_that_another_user_left_stops_nobody(tmp_path: Path) -> None:
    search = Search(tmp_path)
    study = search.open()
    trial = study.ask(distributions(search.tuning))
    loaded = search.tuning.recipe(trial.params)
    folder = RunFolder.create(loaded, seed=0, runs_root=search.machine.runs_root)
    folder.set_state(status="interrupted", step=1)
    trial.set_user_attr("run_folders", {"0": folder.run_id})
    os.chown(folder.path, 50001, -1)
    search.work(budget=1)
    assert [one.state for one in study.get_trials()] == [TrialState.RUNNING, TrialState.COMPLETE]
    said = "trial 0: left by user 50001, who continues it with the same command; another takes its place"
    assert [line for line in search.said if "trial 0" in line] == [said]
    os.chown(folder.path, os.geteuid(), -1)  # its owner
    search.work(budget=2)
    assert [one.state for one in study.get_trials()] == [TrialState.COMPLETE] * 2


def test_jobs_work_side_by_side_each_on_its_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_gpus(tmp_path, monkeypatch, gpus=("GPU-study-4", "GPU-study-7"))
    search = Search(tmp_path)
    search.machine = search.machine.model_copy(update={"device": "cuda"})
    search.work(budget=3, slots=2, delay=0.1)
    seen = [RunFolder(run.path, run.info).attempts()[0]["gpu"] for run in list_runs(tmp_path / "runs")]
    assert sorted(set(seen)) == ["GPU-study-4", "GPU-study-7"]
    assert len(seen) == 3


@pytest.mark.parametrize("kind", ["journal", "sqlite", "postgresql"])
def test_the_trial_of_a_killed_worker_is_gone_on_with(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue("postgresql") if kind == "postgresql" else f"{kind}:///{tmp_path}/studies.{kind}"
    tuning = tuning_of(tmp_path, study_name=f"killed-{kind}")
    search = Search(tmp_path, tuning=tuning, storage=url)
    search.open()
    process = start_worker(tmp_path, storage=url, budget=2, delay=0.4, name=tuning.name)
    runs = tmp_path / "runs"
    wait_until(lambda: any(run.state.step >= 2 for run in list_runs(runs)))
    process.kill()
    process.wait()
    (trial,) = search.open().trials
    assert trial.state == TrialState.RUNNING
    assert trial.user_attrs["run_folders"] == trial.user_attrs["runs"]
    assert trial.user_attrs["worker"]["pid"] == process.pid
    search.work(budget=2)
    report = search.report()
    assert [(t.status, t.resumed) for t in report.trials] == [("completed", 1), ("completed", 0)]
    assert report.counts["resumed"] == 1
    folder = RunFolder.find(report.trials[0].runs[0].run_id, runs_root=runs)
    assert [attempt["step"] > 0 for attempt in folder.attempts()] == [False, True]
    assert [point.step for point in folder.metrics()] == list(range(1, 7))
    assert sorted(attempts(tmp_path).values()) == [1, 2]


def test_two_workers_on_one_postgresql_stop_together_at_the_budget(tmp_path: Path, postgresql: str) -> None:
    pair = [start_worker(tmp_path, storage=postgresql, budget=5, delay=0.03, name="pair") for _ in range(2)]
    said = [worker.communicate(timeout=120)[0] for worker in pair]
    assert [worker.returncode for worker in pair] == [0, 0]
    search = Search(tmp_path, tuning=tuning_of(tmp_path, study_name="pair"), storage=postgresql)
    report = search.report(budget=5)
    assert report.counts["completed"] == 5
    assert len(report.trials) == 5
    assert attempts(tmp_path) == dict.fromkeys(attempts(tmp_path), 1)
    assert all("completed" in text for text in said)
    assert SECRET not in "".join(said) + json.dumps(report.to_json())
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert kept == []


def test_ctrl_c_stops_within_seconds_and_the_same_command_goes_on(tmp_path: Path) -> None:
    url = f"journal:///{tmp_path}/studies.journal"
    process = start_worker(tmp_path, storage=url, budget=2, delay=0.4, name="search-demo")
    runs = tmp_path / "runs"
    wait_until(lambda: any(run.state.step >= 2 for run in list_runs(runs)))
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=240) == 130
    (run,) = list_runs(runs)
    assert run.state.status == "interrupted"
    search = Search(tmp_path, storage=url)
    assert [trial.status for trial in search.report().trials] == ["stopped"]
    search.work(budget=2)
    assert [trial.status for trial in search.report().trials] == ["completed", "completed"]
    assert [attempt["step"] > 0 for attempt in RunFolder(run.path, run.info).attempts()] == [False, True]


@pytest.mark.parametrize(
    ("directions", "trials", "attributes", "message"),
    [
        (["minimize"], 3, {}, r"it minimizes, with 3 trials over lr\) and is left as it is: give yours another --name"),
        (["maximize"], 1, {}, "it maximizes, with 1 trials over lr"),
        (["maximize", "minimize"], 0, {}, "it maximizes and minimizes"),
        (["minimize"], 0, {}, "it minimizes"),
        (["maximize"], 0, {"owner": "somebody"}, "was not made by obowlab"),
        (["maximize"], 0, {"definition": "theirs"}, "was not made by obowlab"),
    ],
)
def test_a_study_of_somebody_else_is_not_written_to(
    tmp_path: Path, directions: list[str], trials: int, attributes: dict[str, str], message: str
) -> None:
    search = Search(tmp_path, storage=f"sqlite:///{tmp_path / 'shared.db'}")
    theirs = optuna.create_study(study_name=search.tuning.name, storage=search.url, directions=directions)
    for name, value in attributes.items():
        theirs.set_user_attr(name, value)
    for number in range(trials):
        lr = {"lr": optuna.distributions.FloatDistribution(0, 1)}
        theirs.add_trial(create_trial(value=number, params={"lr": number / 5}, distributions=lr))

    def content() -> list[str]:
        with contextlib.closing(sqlite3.connect(tmp_path / "shared.db")) as database:
            return list(database.iterdump())

    before = content()
    with pytest.raises(UserError, match=message):
        search.open()
    assert content() == before


def test_a_study_that_a_killed_command_left_empty_is_begun(tmp_path: Path) -> None:
    search = Search(tmp_path)
    search.machine.runs_root.mkdir(exist_ok=True)
    with quiet():
        optuna.create_study(study_name=search.tuning.name, storage=open_storage(search.url), direction="maximize")
    assert "definition" in search.open().user_attrs


def test_another_recipe_under_the_same_name_is_refused(tmp_path: Path) -> None:
    Search(tmp_path).open()
    changed = Search(tmp_path, tuning=tuning_of(tmp_path, overrides=("optimizer.learning_rate=0.5",)))
    with pytest.raises(UserError, match=r"created with optimizer.learning_rate = 0.1, now it is 0.5.*--name"):
        changed.open()
    Search(tmp_path, tuning=tuning_of(tmp_path, overrides=("optimizer.learning_rate=0.5",), study_name="other")).open()
    Search(tmp_path, tuning=tuning_of(tmp_path, pruner="median")).open()


def test_a_finished_run_without_the_objective_is_an_error_that_loses_nothing(tmp_path: Path) -> None:
    search = Search(tmp_path)
    folder = RunFolder.create(search.tuning.recipe({"method.kappa": 5.0}), seed=0, runs_root=tmp_path / "runs")
    folder.set_state(status="finished", step=6, total_steps=6)
    with pytest.raises(UserError, match=rf"obowlab eval {folder.run_id} --protocol fewshot"):
        search.work(budget=1)
    assert [trial.status for trial in search.report().trials] == ["stopped"]


def test_storages_are_named_in_full_and_without_passwords(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert storage_url(None, runs_root=tmp_path) == f"journal:///{tmp_path}/.studies/studies.journal"
    assert storage_url("postgres://a:b@h/d", runs_root=tmp_path) == "postgresql+psycopg://a:b@h/d"
    assert storage_url(f"sqlite:///{tmp_path}/s.db", runs_root=tmp_path) == f"sqlite:///{tmp_path}/s.db"
    for bad in ("mysql://me:hidden@host/x", "studies.db", "sqlite://"):
        with pytest.raises(UserError, match="--storage") as caught:
            storage_url(bad, runs_root=tmp_path)
        assert "hidden" not in str(caught.value)
    monkeypatch.setattr(storages, "file_system", lambda path: "nfs4")
    with pytest.raises(UserError, match="network file system"):
        storage_url(f"sqlite:///{tmp_path}/s.db", runs_root=tmp_path)
    storage_url(f"journal:///{tmp_path}/s.journal", runs_root=tmp_path)


def test_a_database_that_does_not_answer_is_one_sentence_without_its_password(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = storage_url(f"postgresql://me:{SECRET}@127.0.0.1:{probe.getsockname()[1]}/x", runs_root=tmp_path)
        with pytest.raises(UserError, match="Cannot use postgresql") as caught:
            open_storage(url)
    assert SECRET not in str(caught.value)


def test_file_systems_are_read_from_the_mount_table(monkeypatch: pytest.MonkeyPatch) -> None:
    table = "1 0 0:1 / / rw - ext4 /dev/a rw\n2 1 0:2 / /home\\040x rw - nfs4 server:/h rw\n"
    monkeypatch.setattr(Path, "read_text", lambda self, **_: table)
    assert storages.file_system(Path("/home x/me/studies.db")) == "nfs4"
    assert storages.file_system(Path("/var/studies.db")) == "ext4"


def test_a_claim_has_one_holder_and_ends_with_its_process(tmp_path: Path) -> None:
    mine, other = TrialLocks(tmp_path), TrialLocks(tmp_path)
    assert mine.take(3)
    assert not mine.take(3)
    assert not other.take(3)
    assert other.is_held(3)
    assert mine.is_held(3)
    assert not other.is_held(4)
    mine.release(3)
    assert not other.is_held(3)
    assert other.take(3)
    holder = subprocess.Popen(
        [
            "python3",
            "-c",
            "import fcntl,sys,time; f=open(sys.argv[1],'a'); fcntl.flock(f,2); print(1,flush=True); time.sleep(60)",
            str(tmp_path / "trial-5.lock"),
        ],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    assert not mine.take(5)
    holder.kill()
    holder.wait()
    assert mine.take(5)


def test_the_stages_of_a_recipe_are_trained_first_and_once(tmp_path: Path) -> None:
    tuning_of(tmp_path)
    text = (tmp_path / "search.toml").read_text()
    changes = {
        'base = "vanilla"': 'base = "bownet"',
        "method.kappa": "method.kmeans_points",
        'kind = "float"\nlow = 1.0\nhigh = 64.0': 'kind = "int"\nlow = 1\nhigh = 64',
        "= 5.0": "= 5",
    }
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    search = Search(tmp_path, tuning=tuning_of(tmp_path, text=text))
    search.work(budget=2)
    assert search.report().counts["completed"] == 2
    names = [run.info.name for run in reversed(list_runs(tmp_path / "runs"))]
    stage1, stage2, last = (stage.name for stage in search.tuning.base.stages())
    assert sorted(names) == sorted([stage1, stage2, stage2, last, last]), "the first stage does not depend on the parameter"
    assert attempts(tmp_path) == dict.fromkeys(attempts(tmp_path), 1)


def test_a_storage_that_is_away_for_a_moment_costs_no_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search, tell, away = Search(tmp_path), optuna.Study.tell, [1, 1, 1]

    def sometimes(study: optuna.Study, *words: Any, **options: Any) -> Any:
        if away:
            away.pop()
            raise StorageInternalError("gone")
        return tell(study, *words, **options)

    monkeypatch.setattr(optuna.Study, "tell", sometimes)
    monkeypatch.setattr(workers, "RETRY_S", 0.05)
    search.work(budget=1)
    assert [trial.status for trial in search.report().trials] == ["completed"]
    assert sum("does not answer (gone)" in line for line in search.said) == 1
    assert set(attempts(tmp_path).values()) == {1}


# ------------------------------------------------------------------------------------------------------------ the landscape


def measured_study(value: Callable[[float, float], float], *, count: int = 60) -> optuna.Study:
    """Return a study of trials anywhere in a space of two parameters; `value` is given where a point lies, from -1 to 1."""
    study, rng = optuna.create_study(direction="maximize"), np.random.default_rng(0)
    space = {"kappa": FloatDistribution(1.0, 25.0, log=True), "delta": FloatDistribution(0.005, 0.5, log=True)}
    for places in rng.uniform(-1, 1, size=(count, 2)):
        ends = [(math.log(range_.low), math.log(range_.high)) for range_ in space.values()]
        point = [math.exp((low + high + place * (high - low)) / 2) for place, (low, high) in zip(places, ends, strict=True)]
        study.add_trial(
            create_trial(params=dict(zip(space, point, strict=True)), distributions=dict(space), value=value(*places))
        )
    return study


@pytest.mark.parametrize(
    ("value", "kappa", "delta"),
    [
        (lambda kappa, delta: kappa + delta, (0.35, 0.6), (0.35, 0.6)),
        (
            lambda kappa, delta: float(delta > -0.5),
            (0.0, 0.1),
            (0.8, 1.0),
        ),  # below 0.016: taken evenly, the first 2 % of the range
        (lambda kappa, delta: float(kappa * delta > 0), (0.0, 0.3), (0.0, 0.3)),  # only both together tell
    ],
)
def test_importance_is_on_the_scale_that_is_searched_and_what_both_explain_is_nobodys(
    value: Callable[[float, float], float], kappa: tuple[float, float], delta: tuple[float, float]
) -> None:
    found = summaries._importances(measured_study(value), num_completed=60)
    assert kappa[0] <= found["kappa"] <= kappa[1]
    assert delta[0] <= found["delta"] <= delta[1]
    assert sum(found.values()) <= 1.0


def test_the_figure_of_importances_has_them_as_they_are(tmp_path: Path) -> None:
    content = json.loads(add_study(tmp_path).read_text())
    for parameter, share in zip(content["parameters"], (0.1, 0.6), strict=True):
        parameter["importance"] = share
    (bars,) = optuna_figures(content)["importance"]["data"]
    assert (bars["x"], bars["text"]) == ([0.1, 0.6], ["0.10", "0.60"]), "what both explain together is nobody's"


def test_a_choice_and_a_pruned_trial_do_not_disturb_importances() -> None:
    study, rng = optuna.create_study(direction="maximize"), np.random.default_rng(0)
    space = {
        "words": IntDistribution(64, 4096, log=True),
        "rate": FloatDistribution(0.0, 1.0),
        "level": CategoricalDistribution(["conv4", "conv5"]),
    }
    for number in range(60):
        params = {"words": int(2 ** rng.uniform(6, 12)), "rate": rng.uniform(), "level": ["conv4", "conv5"][number % 2]}
        pruned = number % 3 == 0
        kind = {"value": None, "state": TrialState.PRUNED} if pruned else {"value": math.log(params["words"])}
        study.add_trial(create_trial(params=params, distributions=dict(space), **kind))
    found = summaries._importances(study, num_completed=40)
    assert max(found, key=found.__getitem__) == "words"
    assert found["words"] > 0.8


def test_colours_span_the_better_half_and_as_much_again() -> None:
    trials = [StudyTrial(number=number, status="completed", value=value) for number, value in enumerate([97.0, 95, 93, 60, 5])]
    colours = summaries._colours(trials, maximize=True)
    assert (colours["zmin"], colours["zmax"]) == (89.0, 97.0)
    assert summaries._colours(trials, maximize=False)["zmax"] == 2 * 93 - 5
    assert summaries._colours(trials[:1] * 3, maximize=True) == {}, "nothing to tell apart"


def test_the_points_of_the_file_come_after_the_papers_and_the_recipes_and_are_not_pruned(tmp_path: Path) -> None:
    points = '[[points]]\n"method.kappa" = 9.0\n\n[[points]]\n"method.kappa" = 5.0\n\n'
    text = STUDY.replace('"method.kappa" = 5.0', '"method.kappa" = 7.0').replace("[sampler]", f"{points}[sampler]")
    search = Search(tmp_path, tuning=tuning_of(tmp_path, text=text, pruner="median"))
    search.work(budget=4, delay=0.01)
    report = search.report()
    assert [trial.params["method.kappa"] for trial in report.trials[:3]] == [7.0, 5.0, 9.0], "the recipe's own point once"
    assert [trial.is_given for trial in report.trials[:4]] == [False, False, True, False]
    assert any("trial 2: the file's point, kappa 9" in line for line in search.said)
    assert [row[-2] for row in trials_overview(report)[1]][:3] == ["paper", "recipe", "the file's"]
    assert len(search.open().trials) == len(report.trials), "typed again, nothing comes on top"


def test_known_points_of_a_command_killed_among_them_are_enqueued_by_the_next(tmp_path: Path) -> None:
    text = STUDY.replace('"method.kappa" = 5.0', '"method.kappa" = 7.0').replace(
        "[sampler]", '[[points]]\n"method.kappa" = 9.0\n[sampler]'
    )
    search, enqueue = Search(tmp_path, tuning=tuning_of(tmp_path, text=text)), optuna.Study.enqueue_trial

    def killed(self: optuna.Study, params: dict[str, Any], **options: Any) -> None:
        if params["method.kappa"] == 9.0:
            raise KeyboardInterrupt
        enqueue(self, params, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optuna.Study, "enqueue_trial", killed)
        with pytest.raises(KeyboardInterrupt):
            search.open()
    assert [trial.user_attrs for trial in search.open().trials] == [{"paper": True}, {"recipe": True}, {"given": True}]
    assert len(search.open().trials) == 3
