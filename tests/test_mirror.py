"""The mirror against real stores: what is in the folder is in MLflow exactly once, whatever happens in between."""

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from obowlab.config import Loaded, Machine, Recipe
from obowlab.errors import UserError
from obowlab.launch.local import launch
from obowlab.runs import RunFolder
from obowlab.runs.trash import put_aside, restore, trashed_runs
from obowlab.tracking.mirror import Mirror
from obowlab.tracking.server import prepare_store, runs_page, shown_uri, store_uri
from tests.command_line import Obowlab

mlflow = pytest.importorskip("mlflow")

RESULT: dict[str, Any] = {
    "subject": "student",
    "protocol": "knn",
    "version": 1,
    "protocol_hash": "a" * 64,
    "weights_hash": "w" * 64,
    "data_hash": "d" * 64,
    "measurements": [{"name": "knn_top1", "value": 12.5, "interval": 0.5, "count": 100}],
}


def create(root: Path, *, seed: int = 0, name: str = "demo") -> RunFolder:
    return RunFolder.create(Loaded(name=name, recipe=Recipe(title="A demo"), sources={}), seed=seed, runs_root=root)


def train(folder: RunFolder, *steps: int) -> None:
    """Log some steps, as the training loop does."""
    with folder.metric_log() as log:
        for step in steps:
            log.append(step, {"loss": 1.0 / (step + 3), "msd_conv5": step / 7})
    folder.set_state(status="running", step=steps[-1])


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database, created by two processes at once; creating one costs seconds, copying it nothing."""
    code = "import sys; from obowlab.tracking.server import prepare_store; prepare_store(sys.argv[1])"
    path = tmp_path_factory.mktemp("store") / "runs" / "mlflow.db"
    makers = [subprocess.Popen([sys.executable, "-c", code, f"sqlite:///{path}"]) for _ in range(2)]
    assert [maker.wait() for maker in makers] == [0, 0]
    return path


@pytest.fixture
def root(tmp_path: Path, empty_store: Path) -> Path:
    path = tmp_path / "runs"
    path.mkdir()
    (path / "mlflow.db").write_bytes(empty_store.read_bytes())
    return path


def client_of(uri: str) -> Any:
    return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)


def the_run(uri: str) -> Any:
    client = client_of(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("obowlab").experiment_id])
    return run


def history(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client_of(uri).get_metric_history(run_id, name)]


def assert_mirrored(folder: RunFolder, uri: str) -> None:
    """Compare every point of the folder with the store's, doubles included."""
    run = the_run(uri)
    for name in ("loss", "msd_conv5"):
        expected = [(point.step, point.values[name]) for point in folder.metrics() if math.isfinite(point.values[name])]
        assert sorted(history(uri, run.info.run_id, f"train/{name}")) == expected


def test_a_run_and_all_its_facts_arrive_in_the_local_store(root: Path) -> None:
    folder = create(root)
    train(folder, 1, 2, 3)
    with folder.metric_log() as log:
        log.append(4, {"loss": math.nan, "msd_conv5": math.inf})
    with folder.metric_log("system") as log:
        log.append(15, {"cpu": 50.0})
    folder.append_attempt({"commit": "c" * 40, "data_hash": "d" * 64, "device": "cpu", "versions": {"torch": "2.0"}})
    folder.write_artifact("dirty.diff", "- a\n+ b\n")
    folder.write_artifact("log.txt", "done\n")
    folder.add_result(RESULT)
    folder.add_result({**RESULT, "data_hash": "e" * 64, "details": {"dataset": "birds"}})
    mirror = Mirror(folder)
    report = mirror.sync(timeout_s=60)
    assert report.error is None
    assert report.pending == 0
    assert report.sent >= 9
    run = the_run(mirror.uri)
    assert run.info.run_name == folder.run_id
    assert run.info.status == "RUNNING"
    assert run.info.start_time == round(folder.info.created_at * 1000)
    assert run.data.params["method.kappa"] == "5.0"
    assert run.data.params["seed"] == "0"
    tags = run.data.tags
    assert tags["obowlab.run_id"] == folder.run_id
    assert tags["obowlab.data_hash"] == "d" * 64
    assert tags["obowlab.version.torch"] == "2.0"
    assert tags["mlflow.source.git.commit"] == "c" * 40
    assert tags["obowlab.nonfinite"] == "loss: 1, msd_conv5: 1"
    assert tags["obowlab.eval.student.knn"] == f"version 1, {'a' * 64}"
    assert run.data.metrics["eval/student/knn_top1"] == 12.5
    assert tags["eval/student/knn_top1"] == " 12.50 ± 0.50"  # beside the metric of this name, in the order of the values
    assert run.data.metrics["eval/student/birds/knn_top1"] == 12.5
    assert history(mirror.uri, run.info.run_id, "eval/student/knn_top1") == [(0, 12.5)]  # MLflow draws step 0 as a bar
    assert tags["mlflow.note.content"] == (
        "A demo\n\n| | student | student/birds |\n|---|---:|---:|\n| knn_top1 [%] | 12.50 ± 0.50 | 12.50 ± 0.50 |\n\n"
        f"recipe `demo`, seed 0 · data `{folder.info.recipe.data.dataset}` dddddddddddd · commit cccccccccccc"
    )
    assert run.data.metrics["system/cpu"] == 50.0
    assert run.inputs.dataset_inputs[0].dataset.digest == "d" * 32
    assert_mirrored(folder, mirror.uri)
    names = {item.path for item in client_of(mirror.uri).list_artifacts(run.info.run_id)}
    assert {"run.json", "recipe.json", "metrics.json", "dirty.diff", "attempts.jsonl", "results"} <= names
    assert "log.txt" not in names
    assert (root / "mlartifacts").is_dir()

    folder.set_state(status="finished", step=4)
    assert mirror.sync(timeout_s=60).error is None
    run = the_run(mirror.uri)
    assert run.info.status == "FINISHED"
    assert run.info.end_time == round(folder.state.updated_at * 1000)
    assert "log.txt" in {item.path for item in client_of(mirror.uri).list_artifacts(run.info.run_id)}
    idle = mirror.sync(timeout_s=60)
    assert (idle.sent, idle.pending) == (0, 0)


def test_a_run_whose_commit_is_not_known_is_sent(root: Path) -> None:
    folder = create(root)
    folder.append_attempt({"commit": None, "branch": None, "dirty": None, "data_hash": "d" * 64})
    mirror = Mirror(folder)
    report = mirror.sync(timeout_s=60)
    assert (report.error, report.pending) == (None, 0)
    note = the_run(mirror.uri).data.tags["mlflow.note.content"]
    assert note.endswith(f"recipe `demo`, seed 0 · data `{folder.info.recipe.data.dataset}` dddddddddddd")


def test_a_deleted_run_is_deleted_in_the_store_and_comes_back_with_its_tags(root: Path) -> None:
    folder = create(root)
    train(folder, 1, 2)
    folder.set_state(status="finished")
    folder.add_labels({"obowlab.tag.keep": "yes", "obowlab.tag.base": "yes"})
    mirror = Mirror(folder)
    assert mirror.sync(timeout_s=60).pending == 0
    run_id = the_run(mirror.uri).info.run_id
    folder.add_labels({}, remove=["obowlab.tag.keep"])
    assert mirror.pending() == 1
    assert mirror.sync(timeout_s=60).error is None
    assert [name for name in the_run(mirror.uri).data.tags if name.startswith("obowlab.tag.")] == ["obowlab.tag.base"]

    path = put_aside(folder, deleted=True)  # a kill here: the next sync finishes
    gone = Mirror(RunFolder.open(path))
    assert (gone.uri, gone.pending()) == (mirror.uri, 1)
    assert gone.sync(timeout_s=60).error is None
    assert gone.pending() == 0
    client = client_of(mirror.uri)
    assert client.get_run(run_id).info.lifecycle_stage == "deleted"
    assert Mirror(RunFolder.open(path)).sync(timeout_s=60).sent == 0

    (trashed,) = trashed_runs(root)
    back = Mirror(restore(trashed, runs_root=root))  # a kill here: the next sync finishes
    assert back.sync(timeout_s=60).error is None
    assert client.get_run(run_id).info.lifecycle_stage == "active"
    assert the_run(mirror.uri).data.tags["obowlab.tag.base"] == "yes"
    assert_mirrored(folder, mirror.uri)

    client.delete_run(run_id)  # by somebody else, in MLflow
    assert "was deleted; restore it there" in str(Mirror(folder).sync(timeout_s=60).error)


def test_a_gallery_of_words_follows_the_run(root: Path) -> None:
    folder = create(root)
    train(folder, 1)
    folder.set_state(status="finished")
    mirror = Mirror(folder)
    assert mirror.sync(timeout_s=60).pending == 0
    folder.write_artifact("words/index.html", "page")
    folder.write_artifact("words/words.json", "{}")
    folder.write_artifact("words/conv5-000.jpg", b"sheet")
    assert mirror.pending() == 3
    report = Mirror(folder).sync(timeout_s=60)  # as `runs sync` does later
    assert (report.error, report.sent, report.pending) == (None, 3, 0)
    run_id = the_run(mirror.uri).info.run_id
    names = {item.path for item in client_of(mirror.uri).list_artifacts(run_id, "words")}
    assert names == {"words/index.html", "words/words.json", "words/conv5-000.jpg"}
    folder.write_artifact("words/conv5-000.jpg", b"another sheet")
    assert Mirror(folder).sync(timeout_s=60).sent == 1
    sent = Path(client_of(mirror.uri).download_artifacts(run_id, "words/conv5-000.jpg"))
    assert sent.read_bytes() == b"another sheet"
    assert Mirror(folder).sync(timeout_s=60).sent == 0


@pytest.mark.parametrize(("status", "shown"), [("interrupted", "KILLED"), ("failed", "FAILED")])
def test_endings_and_resumption_show_in_the_status(root: Path, status: str, shown: str) -> None:
    folder = create(root)
    train(folder, 1)
    folder.set_state(status=status)
    mirror = Mirror(folder)
    assert mirror.sync(timeout_s=60).error is None
    assert the_run(mirror.uri).info.status == shown
    train(folder, 2)
    assert mirror.sync(timeout_s=60).error is None
    assert the_run(mirror.uri).info.status == "RUNNING"


def test_a_lost_memory_doubles_nothing(root: Path) -> None:
    folder = create(root)
    train(folder, 1, 2, 3)
    folder.add_result(RESULT)
    first = Mirror(folder)
    assert first.sync(timeout_s=60).error is None
    run_id = the_run(first.uri).info.run_id
    folder.mirror_path.unlink()
    again = Mirror(folder)
    assert again.sync(timeout_s=60).error is None
    assert the_run(again.uri).info.run_id == run_id
    assert_mirrored(folder, again.uri)
    assert set(history(again.uri, run_id, "eval/student/knn_top1")) == {(0, 12.5)}


def test_a_run_that_is_measured_otherwise_is_sent_again_to_a_store_that_has_it(root: Path) -> None:
    folder = create(root)
    train(folder, 1, 2, 3)
    assert Mirror(folder).sync(timeout_s=60).error is None
    ways = folder.info.recipe.evaluation.fewshot.num_ways
    evaluation = folder.info.recipe.evaluation
    fewer = evaluation.fewshot.model_copy(update={"num_ways": ways - 1})
    folder.set_evaluation(evaluation.model_copy(update={"fewshot": fewer}))
    folder.add_result(RESULT)
    folder.mirror_path.unlink()  # as after a move, when the store has another address
    again = Mirror(folder)
    report = again.sync(timeout_s=60)
    assert (report.error, report.pending) == (None, 0)
    assert_mirrored(folder, again.uri)
    run = the_run(again.uri)
    assert run.data.params["evaluation.fewshot.num_ways"] == str(ways), "MLflow keeps what it was told first"
    assert set(history(again.uri, run.info.run_id, "eval/student/knn_top1")) == {(0, 12.5)}


def test_a_result_measured_anew_is_the_latest_value_also_after_that_of_an_earlier_version(root: Path) -> None:
    folder = create(root)
    train(folder, 1, 2, 3)
    mirror = Mirror(folder)
    assert mirror.sync(timeout_s=60).error is None
    run_id = the_run(mirror.uri).info.run_id
    client_of(mirror.uri).log_metric(run_id, "eval/student/knn_top1", 9.0, step=3)
    folder.add_result(RESULT)
    assert mirror.sync(timeout_s=60).error is None
    run = the_run(mirror.uri)
    assert run.data.metrics["eval/student/knn_top1"] == 12.5
    assert run.data.tags["eval/student/knn_top1"] == " 12.50 ± 0.50"


def test_mlflow_takes_the_experiment_for_training_and_knows_the_columns_of_the_results(root: Path) -> None:
    uri = store_uri(None, runs_root=root)
    client = client_of(uri)
    page = runs_page(uri, runs_root=root)
    experiment = client.get_experiment_by_name("obowlab")
    assert page == f"/#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning&viewStateShareKey=results"
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    view = json.loads(experiment.tags["mlflow.sharedViewState.results"])
    assert view["selectedColumns"][0] == "tags.`eval/student/linear_top1`"
    # In a store of an earlier version, in which MLflow's pages guessed a kind; what people wrote there stays.
    client.set_experiment_tag(experiment.experiment_id, "mlflow.experimentKind", "genai_development_inferred")
    client.set_experiment_tag(experiment.experiment_id, "mlflow.note.content", "mine")
    client.set_experiment_tag(experiment.experiment_id, "mlflow.sharedViewState.results", "{}")
    assert runs_page(uri, runs_root=root) == page
    changed = client.get_experiment_by_name("obowlab").tags
    assert changed == {**experiment.tags, "mlflow.note.content": "mine"}
    client.set_experiment_tag(experiment.experiment_id, "mlflow.experimentKind", "regression")
    assert runs_page(uri, runs_root=root) == page
    assert client.get_experiment_by_name("obowlab").tags["mlflow.experimentKind"] == "regression"
    client.delete_experiment(experiment.experiment_id)
    assert runs_page(uri, runs_root=root) == "/"


def test_points_lost_in_a_power_cut_are_not_doubled_when_they_come_again(root: Path) -> None:
    folder = create(root)
    train(folder, 1, 2, 3, 4)
    mirror = Mirror(folder)
    assert mirror.sync(timeout_s=60).error is None
    path = folder.path / "metrics.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    train(folder, 3, 4, 5)
    assert mirror.sync(timeout_s=60).error is None
    assert_mirrored(folder, mirror.uri)


def test_many_points_go_in_whole_lines(root: Path) -> None:
    folder = create(root)
    with folder.metric_log() as log:
        for step in range(300):
            log.append(step, {f"m{index}": float(step * index) for index in range(9)})
    with (folder.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 300, "time": 1.0, "metr')  # being written right now
    mirror = Mirror(folder)
    report = mirror.sync(timeout_s=60)
    assert (report.error, report.pending) == (None, 0)
    run_id = the_run(mirror.uri).info.run_id
    assert history(mirror.uri, run_id, "train/m8") == [(step, 8.0 * step) for step in range(300)]


def test_a_fresh_run_is_another_mlflow_run_and_marks_the_old(root: Path) -> None:
    folder = create(root)
    train(folder, 1)
    uri = Mirror(folder).uri
    assert Mirror(folder).sync(timeout_s=60).error is None
    old = the_run(uri).info.run_id
    put_aside(folder)
    again = create(root)
    train(again, 1)
    assert Mirror(again).sync(timeout_s=60).error is None
    client = client_of(uri)
    runs = client.search_runs([client.get_experiment_by_name("obowlab").experiment_id])
    new = next(run.info.run_id for run in runs if run.info.run_id != old)
    assert len(runs) == 2
    assert client.get_run(old).data.tags["obowlab.superseded_by"] == new


def test_a_store_that_is_away_for_a_moment_loses_and_doubles_nothing(root: Path, tmp_path: Path) -> None:
    folder = create(root)
    train(folder, 1, 2)
    elsewhere = f"sqlite:///{tmp_path}/tracking/mlflow.db"
    (tmp_path / "tracking").mkdir()
    (tmp_path / "tracking" / "mlflow.db").write_bytes((root / "mlflow.db").read_bytes())
    mirrors = Mirror(folder), Mirror(folder, tracking_uri=elsewhere)
    for mirror in mirrors:
        assert mirror.sync(timeout_s=60).error is None
    train(folder, 3, 4)
    for place in (root, tmp_path / "tracking"):
        place.rename(tmp_path / "away")
        for mirror in mirrors:
            mirror.sync(timeout_s=60)  # says what it can, and leaves the place free
        (tmp_path / "away").rename(place)
        train(folder, *((5, 6) if place == root else (7, 8)))
    for mirror in mirrors:
        report = mirror.sync(timeout_s=60)
        assert (report.error, report.pending) == (None, 0)
        assert_mirrored(folder, mirror.uri)


def test_a_run_deleted_in_mlflow_is_not_brought_back_silently(root: Path) -> None:
    folder = create(root)
    mirror = Mirror(folder)
    assert mirror.sync(timeout_s=60).error is None
    client_of(mirror.uri).delete_run(the_run(mirror.uri).info.run_id)
    report = Mirror(folder).sync(timeout_s=60)
    assert report.error is not None
    assert "was deleted" in report.error


def test_the_store_is_created_once_by_many(empty_store: Path) -> None:
    assert sorted(path.name for path in empty_store.parent.iterdir()) == [".mlflow.db.lock", "mlartifacts", "mlflow.db"]
    prepare_store(f"sqlite:///{empty_store}")
    assert [found.name for found in client_of(f"sqlite:///{empty_store}").search_experiments()] == ["Default"]


def test_after_failures_the_mirror_waits_but_a_sync_does_not(tmp_path: Path) -> None:
    mirror = Mirror(create(tmp_path), tracking_uri="http://127.0.0.1:9")
    mirror._failures = 2000  # an outage of a day
    assert mirror.sync(timeout_s=30).error is not None
    assert mirror.sync_when_due(timeout_s=30) is None
    assert 50 < mirror._wait_until - time.monotonic() <= 60
    assert mirror.sync(timeout_s=30).error is not None


def test_addresses(tmp_path: Path) -> None:
    assert store_uri(None, runs_root=tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    assert store_uri("postgresql+psycopg://h/d", runs_root=tmp_path).startswith("postgresql")
    assert shown_uri("https://me:secret@host/x") == "https://host/x"
    for wrong in ("./mlruns", "file:///tmp/x", "/tmp/mlruns", "databricks"):
        with pytest.raises(UserError, match="MLflow cannot write to"):
            store_uri(wrong, runs_root=tmp_path)


@contextlib.contextmanager
def silent_server() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_store_that_never_answers_costs_no_more_than_the_time_limit(tmp_path: Path) -> None:
    folder = create(tmp_path)
    train(folder, 1, 2)
    with silent_server() as uri:
        mirror = Mirror(folder, tracking_uri=uri)
        started = time.monotonic()
        report = mirror.sync(timeout_s=1.0)
        assert time.monotonic() - started < 20.0  # it would wait for minutes
        assert report.error is not None
        assert report.pending >= 4
        assert mirror.sync_when_due(timeout_s=1.0) is None
    report = Mirror(folder, tracking_uri=uri.replace("//", "//me:secret@")).sync(timeout_s=5.0)
    assert report.error is not None
    assert "secret" not in report.error


class Server:
    """A real MLflow server on loopback, in a process group of its own."""

    def __init__(self, folder: Path, port: int) -> None:
        self.uri = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
        command += [
            "--artifacts-destination",
            str(folder / "artifacts"),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--workers",
            "1",
        ]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def wait(self) -> None:
        end = time.monotonic() + 240
        while time.monotonic() < end:
            assert self.process.poll() is None, "the server ended"
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                return
            time.sleep(0.2)
        raise AssertionError("the server did not start")

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_server_killed_and_restarted_misses_and_doubles_nothing(tmp_path: Path, empty_store: Path) -> None:
    (tmp_path / "server.db").write_bytes(empty_store.read_bytes())
    port = free_port()
    folder = create(tmp_path / "runs")
    train(folder, 1)
    server = Server(tmp_path, port)
    try:
        mirror = Mirror(folder, tracking_uri=server.uri)
        report = mirror.sync(timeout_s=5)  # it is still starting: down at the start
        assert report.error is not None
        assert report.pending > 0
        server.wait()
        assert mirror.sync(timeout_s=30).error is None
        assert_mirrored(folder, server.uri)

        # Training goes on without a pause while syncs run and the server dies under them.
        training = threading.Thread(target=lambda: [train(folder, step) or time.sleep(0.002) for step in range(2, 400)])
        training.start()
        killer = threading.Timer(0.5, server.kill)
        killer.start()
        errors = 0
        while training.is_alive():
            errors += mirror.sync(timeout_s=5).error is not None
            time.sleep(0.05)
        killer.join()
        train(folder, 400)
        assert errors > 0
        report = mirror.sync(timeout_s=5)
        assert report.error is not None
        assert report.pending >= 2
        memory = folder.mirror_path.read_bytes()

        server = Server(tmp_path, port)
        server.wait()
        (folder.path / "model").mkdir()
        (folder.path / "model" / "MLmodel").write_text("flavors: {}\nmodel_uuid: 0\n")
        folder.add_result(RESULT)
        folder.set_state(status="finished", step=400)
        report = Mirror(folder, tracking_uri=server.uri).sync(timeout_s=60)
        assert (report.error, report.pending) == (None, 0)
        assert_mirrored(folder, server.uri)

        folder.mirror_path.write_bytes(memory)  # killed between sending and remembering: everything goes out again
        report = Mirror(folder, tracking_uri=server.uri).sync(timeout_s=60)
        assert (report.error, report.pending) == (None, 0)
        assert_mirrored(folder, server.uri)
        run = the_run(server.uri)
        assert run.info.status == "FINISHED"
        (version,) = client_of(server.uri).search_model_versions("name = 'obowlab-demo'")
        assert version.run_id == run.info.run_id
        assert version.tags["obowlab.run_id"] == folder.run_id
    finally:
        server.kill()


def test_the_encoder_is_a_model_version_that_loads_without_this_package(root: Path) -> None:
    torch = pytest.importorskip("torch")
    import numpy as np

    from obowlab.tracking.model import save_encoder_model

    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1)]
    encoder = torch.nn.Sequential(*layers, torch.nn.Flatten())
    layers[1].running_mean.uniform_(-1, 1)
    encoder.eval()
    folder = create(root, name="tiny")
    train(folder, 1)
    save_encoder_model(encoder, path=folder.path / "model", example=torch.zeros(2, 3, 96, 96))
    folder.set_state(status="finished")
    mirror = Mirror(folder)
    assert mirror.sync(timeout_s=60).error is None
    folder.mirror_path.unlink()
    assert Mirror(folder).sync(timeout_s=60).error is None

    code = """
import sys
import mlflow, numpy
mlflow.set_tracking_uri(sys.argv[1])
images = numpy.load(sys.argv[2])
numpy.save(sys.argv[3], mlflow.pyfunc.load_model("models:/obowlab-tiny/1").predict(images))
module = mlflow.pytorch.load_model("models:/obowlab-tiny/1")
import torch
numpy.save(sys.argv[4], module(torch.from_numpy(images[:1])).detach().numpy())
assert "obowlab" not in sys.modules
assert len(mlflow.MlflowClient().search_model_versions("name = 'obowlab-tiny'")) == 1
"""
    images = np.random.default_rng(0).standard_normal((3, 3, 80, 72), dtype=np.float32)
    files = [root / f"{name}.npy" for name in ("images", "predicted", "called")]
    np.save(files[0], images)
    subprocess.run([sys.executable, "-c", code, mirror.uri, *map(str, files)], check=True)
    with torch.no_grad():
        expected = encoder.eval()(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(np.load(files[1]), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.load(files[2]), expected[:1], rtol=1e-5, atol=1e-5)


def test_every_run_has_one_model_version_however_often_it_is_sent(root: Path) -> None:
    folders = [create(root, seed=seed) for seed in (0, 1)]
    for folder in folders:
        train(folder, 1)
        (folder.path / "model").mkdir()
        (folder.path / "model" / "MLmodel").write_text("flavors: {}\nmodel_uuid: 0\n")
        folder.set_state(status="finished")
        assert Mirror(folder).sync(timeout_s=60).error is None
    folders[0].mirror_path.unlink()  # sent, and the memory of it lost
    assert Mirror(folders[0]).sync(timeout_s=60).error is None
    versions = client_of(Mirror(folders[0]).uri).search_model_versions("name = 'obowlab-demo'")
    assert sorted(version.tags["obowlab.run_id"] for version in versions) == sorted(folder.run_id for folder in folders)


def test_the_model_version_of_a_deleted_run_stays_and_says_so(root: Path, obowlab: Obowlab) -> None:
    folder = create(root)
    train(folder, 1)
    (folder.path / "model").mkdir()
    (folder.path / "model" / "MLmodel").write_text("flavors: {}\nmodel_uuid: 0\n")
    folder.set_state(status="finished")
    mirror = Mirror(folder)
    assert mirror.sync(timeout_s=60).error is None

    def tag() -> str | None:
        """Return what the version says of its run."""
        return client_of(mirror.uri).get_model_version("obowlab-demo", "1").tags.get("obowlab.deleted")

    assert tag() is None
    code, out, _ = obowlab("runs", "delete", folder.run_id, "--yes", "--runs-root", str(root))
    assert (code, tag()) == (0, folder.run_id)
    assert f"The model version obowlab-demo/1 of {folder.run_id} stays in MLflow, tagged obowlab.deleted" in out
    assert obowlab("runs", "restore", folder.run_id, "--runs-root", str(root))[0] == 0
    assert tag() is None
    client_of(mirror.uri).delete_model_version("obowlab-demo", "1")  # by somebody, in MLflow
    assert obowlab("runs", "delete", folder.run_id, "--yes", "--runs-root", str(root))[::2] == (0, "")
    assert obowlab("runs", "restore", folder.run_id, "--runs-root", str(root))[::2] == (0, "")


def test_a_launched_run_is_mirrored_while_it_trains_and_after(root: Path) -> None:
    script = root.parent / "compute.py"
    script.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from obowlab.runs import RunFolder\n"
        "folder = RunFolder.open(Path(sys.argv[1]))\n"
        "log = folder.metric_log()\n"
        "for step in range(50):\n"
        "    log.append(step, {'loss': step / 3, 'msd_conv5': 1.0})\n"
        "    folder.set_state(status='running', step=step)\n"
        "    time.sleep(0.02)\n"
        "folder.set_state(status='finished', step=50)\n"
    )
    code = launch(
        Loaded(name="demo", recipe=Recipe(), sources={}),
        seed=0,
        machine=Machine(runs_root=root, device="cpu"),
        fresh=False,
        progress=False,
        command=lambda path, machine: [sys.executable, str(script), str(path)],
    )
    folder = RunFolder.find("demo", runs_root=root)
    assert code == 0
    uri = Mirror(folder).uri
    assert_mirrored(folder, uri)
    assert the_run(uri).info.status == "FINISHED"
    assert json.loads(folder.mirror_path.read_text())["stores"][uri]["status"] == "FINISHED"
