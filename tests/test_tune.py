"""`obowlab tune` as it is typed: one real study from command to MLflow, what is shown, what is refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from obowlab.runs.folder import RunFolder
from obowlab.studies.schema import StudyReport, StudyTrial
from obowlab.studies.trial_locks import TrialLocks
from tests.command_line import Obowlab, contents
from tests.processes import NoMirror, wait_until
from tests.studies import REAL_STUDY, Search, tuning_of

pytestmark = pytest.mark.usefixtures("workplace")


def test_a_real_study_from_the_command_to_mlflow(
    workplace: Path, data_root: Path, obowlab: Obowlab, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    log_inputs, beside = mlflow.MlflowClient.log_inputs, [1]

    def collides_once(*words: Any, **options: Any) -> Any:  # as when two runs add the same images at the same moment
        if beside:
            beside.pop()
            raise mlflow.MlflowException("UNIQUE constraint failed")
        return log_inputs(*words, **options)

    monkeypatch.setattr(mlflow.MlflowClient, "log_inputs", collides_once)
    (workplace / "small.toml").write_text(REAL_STUDY.format(trials=5, epochs=2, pruner="median"))
    searched = ("tune", "small.toml", "--scale", "demo", "--set", "optimizer.warmup_epochs=0.5")
    words = (*searched, "--trials", "1", "--data-root", str(data_root), "--loader", "torch", "--device", "cpu")
    code, out, err = obowlab(*words)
    assert code == 0, err
    assert "1 completed; budget 1" in out
    assert "trial 0: the paper's point, kappa 5" in err
    assert "Warning" not in err
    assert beside == []
    assert "epoch 1 of 2, fewshot_1shot" in err
    report = json.loads((workplace / "runs" / ".studies" / "small-demo" / "study.json").read_text())
    (trial,) = report["trials"]
    (run,) = trial["runs"]
    folder = RunFolder.find(run["run_id"], runs_root=workplace / "runs")
    (result,) = folder.results()
    assert trial["value"] == result["measurements"][0]["value"]
    assert trial["interval"] == pytest.approx(result["measurements"][0]["interval"], rel=0.2)  # Student's t, not the normal
    assert run["interval"] == result["measurements"][0]["interval"]
    assert trial["online"] == [[1, folder.metrics("online")[0].values["fewshot_1shot"]]]
    assert (folder.path / "terminal.txt").is_file()

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{workplace}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("obowlab-reports").experiment_id
    mirrored = client.get_run(run["mlflow_run_id"])
    assert mirrored.data.tags["obowlab.study"] == "small-demo"
    assert mirrored.data.tags["obowlab.trial"] == "0"
    assert mirrored.data.metrics["online/fewshot_1shot"] == trial["online"][0][1]

    shown = obowlab("tune", "--list")[1]
    assert re.search(r"small-demo +small.toml +1 completed; budget 1 +optimizer.warmup_epochs=0.5", shown)

    # Labels reach a run that was finished before, and the study's own run is renewed, not doubled.
    folder.add_labels({"obowlab.table3": "row, column"})
    code, out, err = obowlab("runs", "sync", folder.run_id)
    assert code == 0, err
    assert client.get_run(run["mlflow_run_id"]).data.tags["obowlab.table3"] == "row, column"
    code, out, err = obowlab(*searched, "--show")
    assert code == 0, err
    assert "1 completed; budget 1\nfixed by the file: " in out  # the budget of the command, not the file's
    assert "; with --set: optimizer.warmup_epochs=0.5\n" in out
    code, out, err = obowlab(*searched, "--dry-run", "--trials", "3")
    assert "1 of 3 trials completed" in out
    assert "trials: 1 completed; budget 3, 2 left" in out
    code, _, err = obowlab("tune", "small.toml", "--scale", "demo", "--show", "--name", "smal-demo")
    assert code == 2
    assert "Study 'smal-demo' (--name) is not in this storage; leave --show out to begin it. Did you mean 'small-demo'?" in err
    (summary,) = client.search_runs([experiment], filter_string="tags.`obowlab.kind` = 'study'")
    assert summary.data.tags["obowlab.study"] == "small-demo"
    assert summary.data.metrics["study/completed"] == 1.0
    assert summary.data.metrics["study/best_fewshot_1shot"] == trial["value"]
    assert "study.json" in [file.path for file in client.list_artifacts(summary.info.run_id)]


def test_a_study_is_shown_with_its_figures(workplace: Path, obowlab: Obowlab, monkeypatch: pytest.MonkeyPatch) -> None:
    from obowlab.launch import local as launching
    from obowlab.studies import summary as reporting
    from obowlab.tracking.publish import Published

    monkeypatch.setattr(launching, "Mirror", NoMirror)
    monkeypatch.setattr(reporting, "publish", lambda *_, **__: Published(warning="MLflow is away."))
    search = Search(workplace, tuning=tuning_of(workplace))
    search.work(budget=5)
    words = ("tune", "search.toml", "--scale", "demo", "--show")
    code, out, err = obowlab(*words)
    assert code == 0
    assert "Warning: MLflow is away." in err
    lines = out.splitlines()
    assert lines[0] == "Study search-demo: a search"
    assert lines[1].split()[:4] == ["trial", "status", "kappa", "fewshot_5shot"]
    assert len([line for line in lines if " completed " in line]) == 5
    assert any(line.startswith("best: ") for line in lines)
    assert any(line.startswith("best against paper: +") for line in lines)
    code, out, _ = obowlab(*words, "--json")
    shown = json.loads(out)
    assert set(shown) == set(StudyReport.__annotations__)
    assert set(shown["trials"][0]) == set(StudyTrial.__annotations__)
    assert set(shown["figures"]) == {"history", "slice", "importance"}
    assert all(figure["data"] for figure in shown["figures"].values())
    assert shown["parameters"][0]["importance"] == pytest.approx(1.0)
    best, paper = (shown["trials"][shown[name]]["runs"][0]["value"] for name in ("best", "paper"))
    assert abs(shown["best_against_paper"]["value"] - (best - paper)) < 2.0  # answers are whole numbers, the values are not


def test_looking_changes_nothing(workplace: Path, obowlab: Obowlab) -> None:
    code, out, _ = obowlab("tune", "kappa-delta", "--scale", "demo", "--dry-run")
    assert code == 0
    assert out.startswith("Would begin study kappa-delta-demo: 0 of 40 trials completed, 1 at a time\n")
    assert "  first: the paper's method.kappa = 5.0, method.delta_base = 0.1\n" in out
    assert contents(workplace) == {}
    assert not (workplace / "runs").exists()
    assert obowlab("tune", "--list")[1].splitlines()[1].startswith("kappa-delta")
    assert json.loads(obowlab("tune", "--list", "--json")[1])["kappa-delta"]["trials"] == 40
    Search(workplace, tuning=tuning_of(workplace)).open()
    before = contents(workplace)
    code, out, _ = obowlab("tune", "search.toml", "--scale", "demo", "--dry-run")
    assert out.startswith("Would continue study search-demo: 0 of 4 trials completed")
    assert contents(workplace) == before


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("", "Name a study or its TOML file"),
        ("kappa-dleta", "Did you mean 'kappa-delta'?"),
        ("kappa-delta --scale demo --show", "is not in this storage"),
        ("kappa-delta --scale demo --gpus 2 --jobs 2", "leave --device and --jobs out"),
        ("kappa-delta --scale demo --gpus 64", "GPUs, not 64"),
        ("kappa-delta --scale demo --storage mysql://me:hidden@h/d", "--storage cannot be 'mysql://h/d'"),
        ("kappa-delta --scale demo --set method.kappa=3", "is a parameter of kappa-delta.toml"),
        ("kappa-delta --scale demo --name a/b", "--name"),
        ("kappa-delta --scale paper", "obowlab data prepare imagenet"),
    ],
)
def test_mistakes_are_one_sentence(workplace: Path, obowlab: Obowlab, words: str, complaint: str) -> None:
    code, _, err = obowlab("tune", *words.split())
    assert code == 2
    assert err.startswith("Error: ")
    assert len(err.splitlines()) == 1
    assert complaint in err
    assert "hidden" not in err
    assert contents(workplace) == {}


def test_the_dashboard_shows_the_studies(workplace: Path, obowlab: Obowlab) -> None:
    pytest.importorskip("optuna_dashboard")
    code, _, err = obowlab("ui", "--studies", "--port", "18080")
    assert code == 2
    assert "There are no studies" in err
    Search(workplace, tuning=tuning_of(workplace)).open()
    port = "18731"
    code, out, _ = obowlab("ui", "--studies", "--port", port, "--dry-run")
    assert out.startswith("Would serve the studies of journal:///")
    command = [sys.executable, "-m", "obowlab.cli", "ui", "--studies", "--port", port]
    environment = {"PYTHONPATH": str(Path(__file__).parents[1])}
    server = subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address, token = server.stdout.readline().strip().split("?token=")
        assert address.endswith(f"http://127.0.0.1:{port}/dashboard")
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with pytest.raises(urllib.error.HTTPError, match="401"):
            direct.open(f"http://127.0.0.1:{port}/api/studies", timeout=20)
        request = urllib.request.Request(f"http://127.0.0.1:{port}/api/studies", headers={"Authorization": f"Bearer {token}"})
        with direct.open(request, timeout=20) as answer:
            assert [study["study_name"] for study in json.load(answer)["study_summaries"]] == ["search-demo"]
        foreign = urllib.request.Request(f"http://127.0.0.1:{port}/api/studies/1", method="DELETE", headers=dict(request.headers))
        foreign.add_header("Origin", "http://127.0.0.1:8081")
        with pytest.raises(urllib.error.HTTPError, match="403"):
            direct.open(foreign, timeout=20)
    finally:
        server.terminate()
        server.wait(20)
    wait_until(lambda: server.poll() is not None)


def test_locks_of_a_study_need_a_folder_that_can_be_made(workplace: Path) -> None:
    from obowlab.errors import UserError

    (workplace / "file").write_text("")
    with pytest.raises(UserError, match="--runs-root"):
        TrialLocks(workplace / "file" / "study")
