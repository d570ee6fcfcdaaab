"""Publishing into a real MLflow store: one run for each thing, nothing sent twice, a store that is away costs a sentence."""

from __future__ import annotations

import socket
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import pytest

from obowlab.config import Machine
from obowlab.errors import UserError
from obowlab.tracking.publish import Published, publish
from obowlab.tracking.server import prepare_store
from tests.command_line import Obowlab
from tests.report_store import add_run


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    prepare_store(f"sqlite:///{path}")
    return path


@pytest.fixture
def machine(tmp_path: Path, empty_store: Path) -> Machine:
    root = tmp_path / "runs"
    root.mkdir()
    (root / "mlflow.db").write_bytes(empty_store.read_bytes())
    return Machine(runs_root=root)


def client_of(machine: Machine) -> Any:
    return mlflow.MlflowClient(tracking_uri=f"sqlite:///{machine.runs_root / 'mlflow.db'}")


def runs_of(machine: Machine) -> list[Any]:
    client = client_of(machine)
    assert client.get_experiment_by_name("obowlab") is None  # that of the training runs
    return list(client.search_runs([client.get_experiment_by_name("obowlab-reports").experiment_id]))


def text_of(machine: Machine, run_id: str, name: str, place: Path) -> str:
    return Path(client_of(machine).download_artifacts(run_id, name, str(place))).read_text()


def test_a_publication_is_one_run_with_its_files_tags_and_metrics(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"bytes")
    files: dict[str, str | Path] = {"table.md": "# Table", "deep/er/data.bin": tmp_path / "a.bin"}
    done = publish(
        "table", name="table1-tiny", machine=machine, files=files, tags={"obowlab.scale": "tiny"}, metrics={"table/rows": 6.0}
    )
    (run,) = runs_of(machine)
    assert done == Published(run_id=run.info.run_id, sent=("table.md", "deep/er/data.bin"))
    assert (run.info.status, run.info.run_name) == ("FINISHED", "table1-tiny")
    assert {key: run.data.tags[key] for key in ("obowlab.kind", "obowlab.name", "obowlab.scale")} == {
        "obowlab.kind": "table", "obowlab.name": "table1-tiny", "obowlab.scale": "tiny",
    }  # fmt: skip
    assert run.data.metrics == {"table/rows": 6.0}
    assert text_of(machine, run.info.run_id, "table.md", tmp_path) == "# Table"
    assert text_of(machine, run.info.run_id, "deep/er/data.bin", tmp_path) == "bytes"


def test_the_same_content_is_not_sent_again_and_a_change_alone_is(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(**changes: Any) -> Published:
        given: dict[str, Any] = {"files": {"a.txt": "a", "b.txt": "b"}, "tags": {"obowlab.x": "1"}, "metrics": {"n": 0.1}}
        return publish("study", name="κ's study", machine=machine, **{**given, **changes})

    first = again()
    with monkeypatch.context() as patch:
        for name in ("log_artifacts", "log_batch", "create_run", "set_tag"):
            patch.setattr(mlflow.MlflowClient, name, None)
        assert again() == Published(run_id=first.run_id)
    assert again(files={"a.txt": "a", "b.txt": "new"}).sent == ("b.txt",)
    assert again(metrics={"n": 0.2}, tags={"obowlab.x": "2"}).sent == ("b.txt",)  # back to what it was
    (run,) = runs_of(machine)
    assert run.data.tags["obowlab.x"] == "2"
    assert [point.value for point in client_of(machine).get_metric_history(run.info.run_id, "n")] == [0.1, 0.2]
    assert text_of(machine, run.info.run_id, "b.txt", tmp_path) == "b"


def test_what_was_not_completed_is_sent_once_more(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(*_: Any, **__: Any) -> None:
        raise OSError("the wire was cut")

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "log_batch", torn)
        done = publish("report", name="report", machine=machine, files={"a.txt": "a"})
    assert done.run_id is None
    assert done.warning is not None
    assert "the wire was cut" in done.warning
    assert publish("report", name="report", machine=machine, files={"a.txt": "a"}).sent == ("a.txt",)
    assert len(runs_of(machine)) == 1


def test_kinds_and_names_are_apart_and_a_deleted_run_is_made_anew(machine: Machine) -> None:
    ids = [
        publish(kind, name=name, machine=machine, files={"a": "a"}).run_id
        for kind, name in (("table", "x"), ("table", "y"), ("study", "x"))
    ]
    assert len(set(ids)) == 3
    client_of(machine).delete_run(ids[0])
    assert publish("table", name="x", machine=machine, files={"a": "a"}).sent == ("a",)
    assert publish("table", name="y", machine=machine, files={"a": "a"}) == Published(run_id=ids[1])


def test_two_at_once_make_one_run(machine: Machine) -> None:
    with ThreadPoolExecutor(2) as pool:
        both = list(
            pool.map(lambda text: publish("report", name="report", machine=machine, files={"a.txt": text}), ("one", "two"))
        )
    assert [done.warning for done in both] == [None, None]
    assert len(runs_of(machine)) == 1


def test_an_absent_server_is_one_sentence_without_its_password(tmp_path: Path) -> None:
    machine = Machine(runs_root=tmp_path, tracking_uri="http://someone:secret@127.0.0.1:9")
    done = publish("report", name="report", machine=machine, files={"a.txt": "a"})
    assert done.run_id is None
    assert done.warning is not None
    assert done.warning.startswith("MLflow does not have the report 'report' as it is now (http://127.0.0.1:9")
    assert done.warning.endswith("the same command sends it again.")
    assert "secret" not in done.warning
    assert "\n" not in done.warning


def test_a_silent_server_is_left_after_the_time_limit(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        machine = Machine(runs_root=tmp_path, tracking_uri=f"http://127.0.0.1:{silent.getsockname()[1]}")
        done = publish("report", name="report", machine=machine, files={}, timeout_s=0.5)
    assert done.warning is not None
    assert "did not answer within" in done.warning


def test_an_address_mlflow_cannot_write_to_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="MLflow cannot write to"):
        publish("report", name="report", machine=Machine(runs_root=tmp_path, tracking_uri="ftp://x"), files={})


# -------------------------------------------------------------------------------------------------------------- the report


def test_report_is_kept_as_one_file(
    machine: Machine, obowlab: Obowlab, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) is None)
    add_run(machine.runs_root, overrides=("training.epochs=7",))  # in no table
    command = ("report", "--out", "site", "--wait", "--runs-root", str(machine.runs_root))
    index = workplace / "site" / "index.html"
    assert obowlab(*command, "--open") == (0, f"5 pages on 1 run, 0 tables and 0 studies: {index}\n", "")
    assert opened == [index.as_uri()]
    (run,) = runs_of(machine)
    assert run.data.tags["obowlab.kind"] == "report"
    assert run.data.metrics == {"report/runs_finished": 1.0}
    archive = client_of(machine).download_artifacts(run.info.run_id, "report.zip", str(tmp_path))
    with zipfile.ZipFile(archive) as packed:
        assert packed.read("report/index.html") == index.read_bytes()
    monkeypatch.setattr(mlflow.MlflowClient, "log_artifacts", None)
    assert obowlab(*command)[::2] == (0, "")
