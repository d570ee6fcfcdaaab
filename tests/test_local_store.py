"""The SQLite store of a run store: moved, copied, damaged, of another MLflow, put aside."""

import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from obowlab.config import Loaded, Machine, Recipe
from obowlab.errors import UserError
from obowlab.runs import RunFolder
from obowlab.tracking import local_store
from obowlab.tracking.local_store import make_usable, problem_of
from obowlab.tracking.mirror import Mirror
from obowlab.tracking.publish import publish
from obowlab.tracking.server import prepare_store, refusal
from tests.command_line import Obowlab

mlflow = pytest.importorskip("mlflow")


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run store with one finished run, its files, an encoder model and a table in MLflow."""
    root = tmp_path_factory.mktemp("first") / "A"
    folder = RunFolder.create(Loaded(name="demo", recipe=Recipe(title="A demo"), sources={}), seed=0, runs_root=root)
    with folder.metric_log() as log:
        log.append(1, {"loss": 0.5})
    (folder.path / "model").mkdir()
    (folder.path / "model" / "MLmodel").write_text("flavors: {}")
    folder.set_state(status="finished", step=1)
    assert Mirror(folder).sync(timeout_s=60).error is None
    assert publish("table", name="t", machine=Machine(runs_root=root), files={"table.md": "# T"}).warning is None
    return root


def uri_of(root: Path) -> str:
    return f"sqlite:///{root / 'mlflow.db'}"


def runs_of(root: Path) -> list[Any]:
    client = mlflow.MlflowClient(tracking_uri=uri_of(root), registry_uri=uri_of(root))
    return list(client.search_runs([client.get_experiment_by_name("obowlab").experiment_id]))


def the_folder(root: Path) -> RunFolder:
    return RunFolder.find("demo", runs_root=root)


def every_text(root: Path) -> str:
    with sqlite3.connect(root / "mlflow.db") as database:
        return "\n".join(database.iterdump())


@pytest.mark.parametrize("is_copy", [True, False])
def test_a_store_writes_to_where_it_is(filled: Path, tmp_path: Path, is_copy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(local_store.logger, "info", lambda text, *values: said.append(text % values))
    first, second = tmp_path / "A", tmp_path / "B x"
    shutil.copytree(filled, first)
    make_usable(uri_of(first))
    shutil.copytree(first, second) if is_copy else first.rename(second)
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")} if is_copy else {}
    said.clear()
    report = Mirror(the_folder(second)).sync(timeout_s=60)
    assert Mirror(the_folder(second)).sync(timeout_s=60).sent == 0
    assert report.error is None
    (line,) = said
    assert f"in {second / 'mlartifacts'} instead of {first / 'mlartifacts'}" in line
    assert f"{first.as_uri()}/" not in every_text(second)
    for run in runs_of(second):
        assert run.info.artifact_uri.startswith(f"{second.as_uri()}/mlartifacts/")
    (version,) = mlflow.MlflowClient(uri_of(second), uri_of(second)).search_model_versions("name = 'obowlab-demo'")
    assert version.source.startswith(f"{second.as_uri()}/mlartifacts/")
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == before


def test_a_moved_store_is_read_from_its_new_place_in_the_ui(filled: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "A", tmp_path / "B x"
    shutil.copytree(filled, first)
    make_usable(uri_of(first))
    first.rename(second)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "obowlab.cli", "ui", "--port", str(port), "--runs-root", str(second)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = urllib.parse.urlsplit(server.stdout.readline().split()[-1])
        assert (address.netloc, address.path) == (f"127.0.0.1:{port}", "/")
        assert address.fragment.startswith("/experiments/1/runs?")
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        (run,) = runs_of(second)
        ask = f"http://127.0.0.1:{port}/get-artifact?path=recipe.json&run_uuid={run.info.run_id}"
        login = {"Authorization": f"Bearer {address.query.removeprefix('token=')}"}
        with direct.open(urllib.request.Request(ask, headers=login), timeout=30) as answer:
            assert answer.read() == (second / "mlartifacts" / run.info.run_id / "artifacts" / "recipe.json").read_bytes()
    finally:
        server.terminate()
        server.wait(20)
    assert not first.exists()
    assert f"{first.as_uri()}/" not in every_text(second)


def test_files_that_an_earlier_version_wrote_to_the_old_place_are_sent_again(filled: Path, tmp_path: Path) -> None:
    root = tmp_path / "B"
    shutil.copytree(filled, root)
    Mirror(the_folder(root)).sync(timeout_s=60)
    shutil.rmtree(root / "mlartifacts")
    report = Mirror(the_folder(root)).sync(timeout_s=60)
    assert report.error is None
    assert report.sent > 0
    done = publish("table", name="t", machine=Machine(runs_root=root), files={"table.md": "# T"})
    assert done.sent == ("table.md",)
    found = {path.name for path in (root / "mlartifacts").rglob("*") if path.is_file()}
    assert found >= {"table.md", "run.json", "recipe.json", "MLmodel"}


def test_the_same_place_under_another_name_is_left_alone(filled: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(filled)
    before = every_text(filled)
    make_usable(uri_of(tmp_path / "link"))
    assert problem_of(uri_of(tmp_path / "link")) is None
    assert every_text(filled) == before


def test_places_of_others_are_left_alone(filled: Path, tmp_path: Path) -> None:
    shutil.copytree(filled, tmp_path / "B")
    with sqlite3.connect(tmp_path / "B" / "mlflow.db") as database:
        add = "INSERT INTO experiments (experiment_id, name, artifact_location, lifecycle_stage) VALUES (?, ?, ?, 'active')"
        database.executemany(add, [(7, "s3", "s3://bucket/mlartifacts/7"), (8, "own", "file:///elsewhere/8")])
    make_usable(uri_of(tmp_path / "B"))
    with sqlite3.connect(tmp_path / "B" / "mlflow.db") as database:
        kept = database.execute("SELECT artifact_location FROM experiments WHERE experiment_id > 6 ORDER BY 1").fetchall()
    assert kept == [("file:///elsewhere/8",), ("s3://bucket/mlartifacts/7",)]


def test_a_moved_store_that_may_not_be_corrected_is_one_sentence(
    filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(filled, tmp_path / "B")
    real = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda name, **options: real(name.replace("mode=rw", "mode=ro"), **options))
    with pytest.raises(UserError, match="was moved here, and its records of where its files are cannot be corrected"):
        make_usable(uri_of(tmp_path / "B"))


def test_an_older_schema_is_told_with_the_line_that_upgrades_it(filled: Path, tmp_path: Path, obowlab: Obowlab) -> None:
    root = tmp_path / "a very long name of a folder " / ("x" * 200)
    shutil.copytree(filled, root)
    with sqlite3.connect(root / "mlflow.db") as database:
        database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    line = f"mlflow db upgrade '{uri_of(root)}'"
    assert line in (problem_of(uri_of(root)) or "")
    assert line in (Mirror(the_folder(root)).sync(timeout_s=60).error or "")
    code, _, err = obowlab("ui", "--port", "5999", "--runs-root", str(root))
    assert (code, line in err) == (2, True)
    with sqlite3.connect(root / "mlflow.db") as database:
        database.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
    assert "newer MLflow" in (refusal(uri_of(root)) or "")


def test_a_database_that_does_not_answer_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow tries for two minutes to reach one, and says nothing meanwhile."""

    def waits(*_: object) -> None:
        raise AssertionError("MLflow was asked")

    monkeypatch.setattr("mlflow.store.db.utils.create_sqlalchemy_engine_with_retry", waits)
    said = refusal("postgresql://me:s3cret@127.0.0.1:1/runs") or ""
    assert said.startswith("postgresql://127.0.0.1:1/runs: ")
    assert "refused" in said
    assert "s3cret" not in said


def test_a_damaged_store_is_rebuilt_from_the_run_folders(filled: Path, tmp_path: Path, obowlab: Obowlab) -> None:
    root = tmp_path / "B"
    shutil.copytree(filled, root)
    (root / "mlflow.db").write_bytes(bytes(40960))
    code, out, _ = obowlab("runs", "sync", "--runs-root", str(root))
    assert code == 1
    assert f"{root / 'mlflow.db'} is damaged: restore it from a copy, or `obowlab runs sync --rebuild`" in out
    code, out, _ = obowlab("runs", "sync", "--rebuild", "--runs-root", str(root))
    assert code == 0, out
    (aside,) = root.glob("mlflow.db.before-*")
    assert {path.name for path in aside.iterdir()} == {"mlflow.db", "mlartifacts"}
    (run,) = runs_of(root)
    assert run.data.metrics["train/loss"] == 0.5
    assert obowlab("runs", "sync", "demo", "--rebuild", "--runs-root", str(root))[0] == 2


def test_damage_within_the_file_is_told_too(filled: Path, tmp_path: Path) -> None:
    root = tmp_path / "B"
    shutil.copytree(filled, root)
    make_usable(uri_of(root))
    content = bytearray((root / "mlflow.db").read_bytes())
    for start in range(8 * 4096, len(content), 4096):  # the schema stays readable
        content[start : start + 4096] = b"\xff" * 4096
    (root / "mlflow.db").write_bytes(content)
    assert "--rebuild" in (Mirror(the_folder(root)).sync(timeout_s=60).error or "")


def test_an_empty_file_is_no_store_yet(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").touch()
    prepare_store(uri_of(tmp_path))
    assert problem_of(uri_of(tmp_path)) is None
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("SELECT artifact_location FROM experiments").fetchall() == [
            (f"{tmp_path.as_uri()}/mlartifacts/0",)
        ]
