"""The services of docker-compose.yml, run on loopback by their own commands and used as a lab uses them."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import stat
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import yaml

from dashboards.services import write_env
from tests.browser import DESKTOP, complaints
from tests.command_line import finished_run
from tests.lab import HOW, TABLE, Lab
from tests.processes import wait_until
from tests.runs import SMALL_RECIPE
from tests.services import COMPOSE, LOOPBACK, ROOT, Stack, interpolate, missing_tools
from tests.studies import REAL_STUDY

SECRETS = [name for name in write_env.values((ROOT / ".env.example").read_text()) if write_env.SECRET.fullmatch(name)]
SERVICES: dict[str, Any] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]
LONG_RUNNING = ("database", "objects", "mlflow", "studies", "web", "reporter")


@pytest.fixture(scope="module")
def lab(data_root: Path) -> Iterator[Lab]:
    """The services, and what a lab does first: a run, a row of a table, a study, a report."""
    if lacks := missing_tools():
        pytest.skip(lacks)
    root = Path(tempfile.mkdtemp(prefix="obowlab-services-"))  # pytest's own folders are closed to PostgreSQL's user
    root.chmod(0o711)
    settings = {"DATA": str(root / "data"), "BACKUPS": str(root / "backups"), "MLFLOW_WORKERS": "1", "REPORT_EVERY_S": "3600"}
    stack = Stack(root, settings=settings)
    shutil.copytree(data_root, root / "data")
    lab = Lab(stack)
    lab.place.mkdir()
    (lab.place / "small.toml").write_text(SMALL_RECIPE.format(dataset="small", epochs=2, batch_size=8))
    (lab.place / "heads.toml").write_text(TABLE)
    (lab.place / "search.toml").write_text(REAL_STUDY.format(trials=2, epochs=1, pruner="none"))
    try:
        stack.start("web")
        lab.settled("run", str(lab.place / "small.toml"), *HOW)
        lab.settled("ablate", str(lab.place / "heads.toml"), "--scale", "demo", "--seeds", "1", *HOW)
        lab.settled("tune", str(lab.place / "search.toml"), "--scale", "demo", *HOW)
        lab.obowlab("runs", "sync", "--timeout", "300")
        stack.start("reporter")
        yield lab
    finally:
        stack.stop()
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def client(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Any:
    """MLflow's client, logged in as the workers are."""
    import mlflow

    for name, value in lab.stack.environment("worker").items():
        if name.startswith("MLFLOW_"):
            monkeypatch.setenv(name, value)
    mlflow.set_tracking_uri(lab.uri)  # for models:/ addresses
    try:
        yield mlflow.MlflowClient(lab.uri, lab.uri)
    finally:
        mlflow.set_tracking_uri(None)


def test_processes_were_given_what_the_file_says(lab: Lab) -> None:
    stack = lab.stack
    plain = interpolate(SERVICES, settings=stack.settings)
    for name in LONG_RUNNING:
        process = Path(f"/proc/{leader(stack, name)}")
        words = [word for word in process.joinpath("cmdline").read_text().split("\0") if word]
        if words[0].startswith("gunicorn: "):  # it renames itself where setproctitle is installed
            words = list(map(str, stack.processes[name].args))
        described = [*plain[name].get("entrypoint", []), *plain[name]["command"]]
        extra = stack.database_extra() if name == "database" else []
        given = words[len(words) - len(described) - len(extra) :]  # behind the interpreter of a script
        assert given[len(described) :] == extra
        given[0] = described[0] if Path(given[0]).name == described[0] else given[0]
        for ours, theirs in zip(given, described, strict=False):
            assert placeless(ours, stack=stack, here=True) == placeless(theirs, stack=stack, here=False), name
        here = dict(pair.split("=", 1) for pair in process.joinpath("environ").read_text().split("\0") if "=" in pair)
        there = plain[name].get("environment", {})
        for key, value in there.items():
            assert placeless(here[key], stack=stack, here=True) == placeless(str(value), stack=stack, here=False), (name, key)
        beside = {
            "PATH",
            "HOME",
            "LANG",
            "PYTHONPATH",
            "OMP_NUM_THREADS",
            "SPT_NOENV",
            *("MAIL", "USER", "LOGNAME", "SHELL", "PWD"),
        }
        assert set(here) - set(there) <= beside, name


def leader(stack: Stack, name: str) -> int:
    """Return the process of a service, behind `runuser` where that was needed."""
    pid = stack.processes[name].pid
    if Path(f"/proc/{pid}/comm").read_text().strip() == "runuser":
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
    return pid


def placeless(text: str, *, stack: Stack, here: bool) -> str:
    """Return a text without its hosts, ports and folders: those of this machine, or those of the file."""
    hosts = "|".join(map(re.escape, (*SERVICES, LOOPBACK, "0.0.0.0")))
    text = re.sub(rf"\b(?:{hosts})(?=:\d)|(?<==)(?:0\.0\.0\.0|{re.escape(LOOPBACK)})$", "HOST", text)
    text = re.sub(rf"^(?:database|{re.escape(LOOPBACK)}|0\.0\.0\.0)$", "HOST", text)
    for inside, outside in stack.ports.items():
        text = re.sub(rf"(?<![\w.]){outside if here else inside}(?![\w.])", "PORT", text)
    mounted = {str(folder) if here else target for name in SERVICES for target, folder in stack.folders(name).items()}
    for place in sorted(mounted, key=len, reverse=True):
        text = text.replace(place, "FOLDER")
    return text


def test_nobody_comes_in_without_an_account_or_under_another_host_name(lab: Lab) -> None:
    search = "/api/2.0/mlflow/experiments/search?max_results=1"
    for port, path in ((5000, "/"), (5000, search), (8081, "/index.html"), (8082, "/api/studies")):
        assert lab.ask(path, port=port).status_code == 401
        assert lab.ask(path, port=port, account=("worker", "wrong")).status_code == 401
        assert lab.ask(path, port=port, account=lab.worker).status_code == 200
        foreign = lab.ask(path, port=port, account=lab.worker, headers={"Host": "rebound.example"})
        assert foreign.status_code in (403, 421)
        assert lab.ask(path, port=port, account=lab.worker, headers={"Host": "localhost:1"}).status_code == 200
    assert lab.ask("/../.env", port=8081, account=lab.worker).status_code == 404
    assert requests.get(f"{lab.stack.address(8333)}/mlflow", timeout=30).status_code == 403


def test_a_reader_reads_and_a_writer_writes_what_others_made(lab: Lab, client: Any) -> None:
    accounts = {}
    for name, words in (("rita", ["--reader"]), ("will", [])):
        done = lab.stack.call("setup", "user", name, *words)
        assert done.returncode == 0, done.stderr
        said = dict(line.split("=", 1) for line in done.stdout.splitlines())
        accounts[name] = (said["MLFLOW_TRACKING_USERNAME"], said["MLFLOW_TRACKING_PASSWORD"])
    run = lab.runs_in_mlflow(client, recipe="small")[0]
    for name, status in (("rita", 403), ("will", 200)):
        account = accounts[name]
        assert lab.ask(f"/api/2.0/mlflow/runs/get?run_id={run.info.run_id}", account=account).status_code == 200
        tag = {"run_id": run.info.run_id, "key": "seen_by", "value": name}
        assert lab.ask("/api/2.0/mlflow/runs/set-tag", account=account, json=tag).status_code == status
        new = {"experiment_id": run.info.experiment_id}
        assert lab.ask("/api/2.0/mlflow/runs/create", account=account, json=new).status_code == status
        version = {"name": "obowlab-small", "source": f"{run.info.artifact_uri}/model", "run_id": run.info.run_id}
        assert lab.ask("/api/2.0/mlflow/model-versions/create", account=account, json=version).status_code == status
        path = f"/api/2.0/mlflow-artifacts/artifacts/{run.info.experiment_id}/{run.info.run_id}/artifacts/note.txt"
        put = requests.put(lab.uri + path, data=b"note", auth=account, timeout=30)
        assert put.status_code == status
    for name in ("admin", "../x", "<b>", "a" * 70):
        assert lab.stack.call("setup", "user", name).returncode != 0
    assert lab.ask("/version", account=lab.admin).status_code == 200


def test_setting_up_again_changes_nothing(lab: Lab) -> None:
    done = lab.stack.call("setup")
    assert done.returncode == 0, done.stderr
    assert lab.ask("/version", account=lab.worker).status_code == 200
    done = lab.stack.call("setup", MLFLOW_TRACKING_PASSWORD="another")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("MLflow does not take MLFLOW_ADMIN_PASSWORD of .env")


def test_a_run_a_row_and_a_study_are_in_mlflow_and_postgresql(lab: Lab, client: Any) -> None:
    runs = lab.runs_in_mlflow(client, recipe="small")  # the base row is the run
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"]
    run = runs[0]
    assert run.info.artifact_uri.startswith("mlflow-artifacts:/")
    assert {"run.json", "recipe.json", "model", "results"} <= {file.path for file in client.list_artifacts(run.info.run_id)}
    (table,) = lab.runs_in_mlflow(client, kind="table")
    assert table.data.tags["obowlab.name"] == "heads demo"
    (study,) = lab.runs_in_mlflow(client, kind="study")
    assert study.data.metrics["study/completed"] == 2.0
    wait_until(lambda: lab.runs_in_mlflow(client, kind="report") != [])  # the pages are there before MLflow has them
    (report,) = lab.runs_in_mlflow(client, kind="report")
    assert report.info.status == "FINISHED"
    shown = lab.obowlab("tune", str(lab.place / "search.toml"), "--scale", "demo", "--show")
    assert "2 completed" in shown
    names = [found["study_name"] for found in lab.ask("/api/studies", port=8082, account=lab.worker).json()["study_summaries"]]
    assert names == ["search-demo"]
    assert not (lab.runs / "mlflow.db").exists()
    assert not (lab.runs / ".studies" / "studies.journal").exists()


def test_the_model_comes_back_from_the_registry(lab: Lab, client: Any) -> None:
    import mlflow
    import torch

    (version, *_) = client.search_model_versions("name = 'obowlab-small'", order_by=["version_number ASC"])
    images = np.random.default_rng(0).standard_normal((3, 3, 24, 24), dtype=np.float32)
    found = mlflow.pyfunc.load_model(f"models:/obowlab-small/{version.version}").predict(images)
    local = mlflow.pytorch.load_model((lab.runs / version.tags["obowlab.run_id"] / "model").as_uri())
    with torch.no_grad():
        expected = local(torch.from_numpy(images)).numpy()
    assert found.shape == (3, 32)
    assert np.array_equal(found, expected)
    assert any(key.endswith(f"/{version.run_id}/artifacts/model/MLmodel") for key in lab.objects())


def test_no_password_is_left_behind(lab: Lab, client: Any) -> None:
    secrets = [lab.stack.settings[name] for name in SECRETS]
    folders = (lab.runs, lab.stack.root / "volumes" / "site", lab.stack.root / "logs")
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 40
    for path in files:
        content = path.read_bytes()
        found = [name for name, secret in zip(SECRETS, secrets, strict=True) if secret.encode() in content]
        assert found == [], path
    for run in client.search_runs([client.get_experiment_by_name("obowlab").experiment_id]):
        told = json.dumps(run.to_dictionary())
        assert not any(secret in told for secret in secrets)
    for name in LONG_RUNNING:
        words = Path(f"/proc/{leader(lab.stack, name)}/cmdline").read_text()
        assert not any(secret in words for secret in secrets)


def test_a_wrong_login_is_one_sentence_and_loses_nothing(lab: Lab, client: Any) -> None:
    folder = finished_run(lab.runs)
    hint = "does not take the login (MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or ~/.mlflow/credentials)"
    nobody = {"MLFLOW_TRACKING_USERNAME": "", "MLFLOW_TRACKING_PASSWORD": ""}
    for wrong in ({"MLFLOW_TRACKING_PASSWORD": "not this one"}, nobody):
        said = lab.obowlab("runs", "sync", folder.run_id, code=1, **wrong)
        assert re.fullmatch(rf"{folder.run_id}: 0 sent, \d+ pending: {re.escape(f'{lab.inner_uri} {hint}')}\n", said)
    said = lab.obowlab("report", "--wait", "--out", str(lab.place / "site"), MLFLOW_TRACKING_PASSWORD="not this one")
    assert [line for line in said.splitlines() if line.startswith("Warning: MLflow")] == [
        "Warning: MLflow does not have the report 'report' as it is now "
        f"({lab.inner_uri} {hint}); the same command sends it again."
    ]
    assert lab.runs_in_mlflow(client, recipe="demo") == []
    credentials = lab.stack.root / "home" / "worker" / ".mlflow" / "credentials"
    credentials.parent.mkdir()
    credentials.write_text(f"[mlflow]\nmlflow_tracking_username = worker\nmlflow_tracking_password = {lab.worker[1]}\n")
    assert "pending" not in lab.obowlab("runs", "sync", folder.run_id, **nobody)
    credentials.unlink()
    (run,) = lab.runs_in_mlflow(client, recipe="demo")
    assert run.info.status == "FINISHED"


@pytest.mark.long
def test_pages_show_the_run_the_study_and_the_report(lab: Lab, client: Any, browser: Any) -> None:
    run = lab.runs_in_mlflow(client, recipe="small", seed="0")[0]
    experiment, reports = (client.get_experiment_by_name(name).experiment_id for name in ("obowlab", "obowlab-reports"))
    metrics = {"width": DESKTOP[0], "height": DESKTOP[1], "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Network.enable", {})
    token = base64.b64encode(":".join(lab.worker).encode()).decode()
    browser.execute_cdp_cmd("Network.setExtraHTTPHeaders", {"headers": {"Authorization": f"Basic {token}"}})
    name = run.info.run_name
    pages = (
        (5000, f"/#/experiments/{experiment}/runs", [name]),
        (5000, f"/#/experiments/{reports}/runs", ["report", "study"]),
        (5000, f"/#/experiments/{experiment}/runs/{run.info.run_id}", [name, "fewshot_1shot"]),
        (5000, "/#/models/obowlab-small", ["Version 1"]),
        (8082, "/dashboard", ["search-demo"]),
        (8081, "/index.html", [name]),
    )
    for port, path, texts in pages:
        browser.get_log("browser")
        browser.get("about:blank")
        browser.get(lab.stack.address(port) + path)
        for text in texts:
            wait_until(lambda text=text: text in browser.execute_script("return document.body.innerText"))  # type: ignore[misc]
        ours = [line for line in complaints(browser) if "SEVERE" in line or "Refused" in line or " 5" in line or port != 5000]
        assert [line for line in ours if lab.stack.address(port) in line] == [], (port, path)


# ------------------------------------------------------------------------------------------------------ backup and restore


@pytest.mark.long
def test_what_was_lost_is_there_again_after_a_restore(lab: Lab, client: Any) -> None:
    stack = lab.stack
    backups = stack.root / "backups"
    before = {run.info.run_id: run.data.to_dictionary() for run in lab.runs_in_mlflow(client)}
    assert len(before) >= 6
    said = stack.call("backup", "save", str(backups), "--runs", "/lab/runs")
    assert said.returncode == 0, said.stderr
    (backup,) = backups.iterdir()
    assert "3 databases" in said.stdout
    assert stat.S_IMODE(backup.stat().st_mode) == 0o700
    assert stack.call("backup", "check", str(backup)).returncode == 0

    # Wiped: the volumes of the database and of the object store are new and empty.
    stack.stop()
    for name in ("database", "objects"):
        shutil.rmtree(stack.root / "volumes" / name)
    shutil.rmtree(lab.runs)
    stack.completed.clear()
    stack.start("database", "objects")
    restored = stack.call("restore", "restore", str(backup), "--runs", "/lab/runs")
    assert restored.returncode == 0, restored.stderr
    stack.start("web")
    assert {run.info.run_id: run.data.to_dictionary() for run in lab.runs_in_mlflow(client)} == before
    test_the_model_comes_back_from_the_registry(lab, client)
    assert "2 completed" in lab.obowlab("tune", str(lab.place / "search.toml"), "--scale", "demo", "--show")

    # A later run is gone when the backup is put back over it, and so is its file.
    extra = client.create_run(client.get_experiment_by_name("obowlab").experiment_id)
    client.log_text(extra.info.run_id, "later", "later.txt")
    stack.stop("web", "studies", "mlflow")
    assert any(f"/{extra.info.run_id}/" in key for key in lab.objects())
    assert stack.call("restore", "restore", str(backup)).returncode == 0
    assert not any(f"/{extra.info.run_id}/" in key for key in lab.objects())
    stack.start("web")
    assert {run.info.run_id for run in lab.runs_in_mlflow(client)} == set(before)


@pytest.mark.long
def test_a_backup_that_was_touched_is_refused(lab: Lab) -> None:
    stack = lab.stack
    (backup,) = (stack.root / "backups").iterdir()
    before = lab.objects()

    def refusal(change: str) -> str:
        done = stack.call("restore", "restore", str(stack.root / change), "--runs", "/lab/runs")
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1
        return done.stderr

    def copy(change: str) -> Path:
        return Path(shutil.copytree(backup, stack.root / change))

    with (copy("longer") / "objects.tar").open("ab") as file:
        file.write(b"more")
    assert "objects.tar is missing or not what manifest.json says. Nothing was changed." in refusal("longer")
    (copy("shorter") / "optuna.dump").unlink()
    assert "optuna.dump is missing" in refusal("shorter")
    assert "is no backup: it has no manifest.json" in refusal("work")
    with tarfile.open(copy("stray") / "runs.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("../../stray.txt"), io.BytesIO())
    _sign(stack.root / "stray", "runs.tar")
    assert "Nothing was changed." in refusal("stray")
    assert lab.objects() == before
    assert not list(stack.root.glob("**/stray.txt"))


@pytest.mark.long
def test_an_object_never_becomes_a_path(lab: Lab) -> None:
    stack = lab.stack
    (backup,) = (stack.root / "backups").iterdir()
    hostile = Path(shutil.copytree(backup, stack.root / "hostile"))
    with tarfile.open(hostile / "objects.tar", "a") as archive:
        member = tarfile.TarInfo("1/../../../evil.txt")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"evil"))
    _sign(hostile, "objects.tar")
    stack.stop("mlflow")
    stack.call("restore", "restore", str(hostile))
    assert not list(stack.root.glob("**/evil.txt"))
    assert not list(Path(tempfile.gettempdir()).glob("evil.txt"))


def _sign(backup: Path, name: str) -> None:
    """Put the hash of a changed file into the manifest, as someone would who means harm."""
    manifest = json.loads((backup / "manifest.json").read_text())
    content = (backup / name).read_bytes()
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (backup / "manifest.json").write_text(json.dumps(manifest))
