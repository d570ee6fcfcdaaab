"""The run folder survives what happens to it: kills, torn lines, a second starter, hundreds of neighbours."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from obowlab.config import Loaded, Machine, Recipe
from obowlab.errors import UserError
from obowlab.files.records import read_checked, with_checksum
from obowlab.files.replacing import folder_written
from obowlab.runs import METRICS, MetricLog, RunFolder, list_runs, locks, lookup, provenance
from obowlab.runs.locks import LOCK_TOKEN_VARIABLE, RunTakenError, holder_of, is_locked
from obowlab.runs.metrics import mlflow_name


def loaded(name: str = "demo") -> Loaded:
    return Loaded(name=name, recipe=Recipe(), sources={})


def create(root: Path, *, seed: int = 0) -> RunFolder:
    return RunFolder.create(loaded(), seed=seed, runs_root=root)


def run_python(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


def test_create_then_open_gives_the_same_run(tmp_path: Path) -> None:
    made = create(tmp_path)
    again = create(tmp_path)
    assert made.info == again.info
    assert made.info.recipe == Recipe()
    assert made.run_id == f"demo-s0-{Recipe().fingerprint(seed=0)[:8]}"
    assert made.state.status == "created"
    assert json.loads((made.path / "run.json").read_text())["recipe"]["method"]["kappa"] == 5.0


def test_find_by_id_prefix_and_path_and_names_the_nearest(tmp_path: Path) -> None:
    run = create(tmp_path)
    other = create(tmp_path, seed=1)
    assert RunFolder.find(run.run_id, runs_root=tmp_path).path == run.path
    assert RunFolder.find("demo-s0", runs_root=tmp_path).run_id == run.run_id
    assert RunFolder.find(str(other.path), runs_root=tmp_path / "elsewhere").run_id == other.run_id
    with pytest.raises(UserError, match=r"'demo' is the recipe of 2 runs: .* Name one of them."):
        RunFolder.find("demo", runs_root=tmp_path)
    with pytest.raises(UserError, match=f"Did you mean '{other.run_id}'"):
        RunFolder.find("dmo" + other.run_id[4:], runs_root=tmp_path)
    with pytest.raises(UserError, match="no run 'x'"):
        RunFolder.find("x", runs_root=tmp_path / "nothing")


def test_floats_come_back_exactly_and_resumed_steps_are_not_doubled(tmp_path: Path) -> None:
    run = create(tmp_path)
    values = {"loss": 0.1 + 0.2, "msd_conv5": 1e-300}
    with run.metric_log() as log:
        assert log.append(10, values)
        assert log.append(20, values)
    with run.metric_log() as log:
        assert log.last_step == 20
        assert not log.append(20, {"loss": 7.0})
        assert log.append(30, {"loss": math.nan, "kappa_conv5": -math.inf})
    points = run.metrics()
    assert [point.step for point in points] == [10, 20, 30]
    assert points[1].values == values
    assert math.isnan(points[2].values["loss"])
    assert points[2].values["kappa_conv5"] == -math.inf
    strict = [json.loads(line, parse_constant=pytest.fail) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert strict[2]["metrics"]["loss"] == "nan"


@pytest.mark.parametrize("tail", [b'{"step": 3, "ti', b'{"step": 3}garbage\n', b"\0" * 40, b"\n", b'{"step": 3,\n{"st'])
def test_a_torn_tail_is_cut_off(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricLog(path) as log:
        log.append(1, {"loss": 1.0})
        log.append(2, {"loss": 2.0})
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    with MetricLog(path) as log:
        assert log.last_step == 2
        assert path.read_bytes() == whole
        log.append(3, {"loss": 3.0})
    assert [json.loads(line)["step"] for line in path.read_bytes().splitlines()] == [1, 2, 3]


def test_appended_lines_survive_kill_9(tmp_path: Path) -> None:
    code = """
import sys
import threading
from pathlib import Path
from obowlab.runs import MetricLog
log = MetricLog(Path(sys.argv[1]))
for step in range(10**9):
    log.append(step, {"loss": step / 3})
    print(step, flush=True)
"""
    path = tmp_path / "metrics.jsonl"
    child = run_python(code, path)
    assert child.stdout is not None
    said = -1
    while said < 50:
        said = int(child.stdout.readline())
    child.send_signal(signal.SIGKILL)
    rest = child.stdout.read().split()
    child.wait()
    said = int(rest[-2]) if len(rest) > 1 else said
    with MetricLog(path) as log:
        assert log.last_step >= said
    steps = [json.loads(line)["step"] for line in path.read_bytes().splitlines()]
    assert steps == list(range(len(steps)))


HOLD = """
import os, sys, time
from pathlib import Path
from obowlab.runs import RunFolder
with RunFolder.open(Path(sys.argv[1])).lock() as lock:
    print(lock.token, flush=True)
    if "fork" in sys.argv and (child := os.fork()):
        print(child, flush=True)
    time.sleep(60)
"""


def test_lock_names_its_holder_and_ends_with_it(tmp_path: Path) -> None:
    run = create(tmp_path)
    with run.lock(), pytest.raises(UserError, match=f"process {os.getpid()} on {socket.gethostname()}"), run.lock():
        pass
    child = run_python(HOLD, run.path, "fork")
    assert child.stdout is not None
    assert child.stdout.readline()
    forked = int(child.stdout.readline())
    with pytest.raises(UserError, match=f"process {child.pid} on {socket.gethostname()}"), run.lock():
        pass
    child.kill()  # its forked child lives on, as a loader's worker might
    child.wait()
    with run.lock():
        pass
    os.kill(forked, signal.SIGKILL)


def test_lock_lets_in_whom_the_holder_started_and_stays_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = create(tmp_path)
    with run.lock() as lock:
        assert run.current_state().status == "created"
        monkeypatch.setenv(LOCK_TOKEN_VARIABLE, "0123")
        refused = run_python(HOLD, run.path)
        assert refused.wait() == 1
        monkeypatch.setenv(LOCK_TOKEN_VARIABLE, lock.token)
        worker = run_python(HOLD, run.path)
        assert worker.stdout is not None
        assert worker.stdout.readline().strip() == lock.token
        monkeypatch.delenv(LOCK_TOKEN_VARIABLE)
    with pytest.raises(UserError, match="being trained"), run.lock():
        pass
    worker.kill()
    worker.wait()
    with run.lock() as again:
        assert again.token != lock.token


def test_looking_at_a_lock_makes_no_file_and_needs_no_right_to_write(tmp_path: Path) -> None:
    run = create(tmp_path)
    assert not is_locked(run.path)
    assert not (run.path / "lock").exists()
    with run.lock():
        (run.path / "lock").chmod(0o444)
        assert is_locked(run.path)
    assert not is_locked(run.path)


def test_a_lock_of_an_earlier_version_is_no_obstacle(tmp_path: Path) -> None:
    run = create(tmp_path)
    (run.path / "lock").write_text(json.dumps({"pid": 1, "host": "elsewhere", "token": "0123456789abcdef"}))
    assert not is_locked(run.path)
    with run.lock() as lock:
        assert holder_of(run.path) == {"pid": os.getpid(), "host": socket.gethostname(), "token": lock.token}


def test_a_worker_whose_launcher_was_replaced_gets_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = create(tmp_path)
    with run.lock() as lock:
        tokens = [lock.token, "new", "new"]  # while it waits for its lock, another launcher takes the run
        monkeypatch.setenv(LOCK_TOKEN_VARIABLE, lock.token)
        monkeypatch.setattr(locks, "holder_of", lambda path: {"token": tokens.pop(0)})
        with pytest.raises(RunTakenError, match="being trained"), run.lock():
            pass
    assert not is_locked(run.path)


def test_a_folder_that_was_moved_away_is_not_made_again(tmp_path: Path) -> None:
    run = create(tmp_path)
    run.path.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="Cannot lock the run folder"), run.lock():
        pass
    assert not run.path.exists()


def test_a_running_state_without_a_process_reads_as_interrupted(tmp_path: Path) -> None:
    run = create(tmp_path)
    child = run_python("")
    child.wait()
    run.set_state(status="running", step=7)
    assert run.state.pid == os.getpid()
    assert run.current_state().status == "running"
    run.set_state(status="running", pid=child.pid, host=socket.gethostname())
    assert run.state.status == "running"
    assert run.current_state().status == "interrupted"
    assert list_runs(tmp_path)[0].state.status == "interrupted"
    with run.lock():
        assert run.current_state().status == "running"
        assert run_python(HOLD, run.path).wait() == 1  # looking at the state must not give the lock away
    run.set_state(status="running", pid=child.pid, host="elsewhere")
    assert run.current_state().status == "running"
    assert run.state.step == 7


def test_state_is_replaced_atomically_and_leaves_nothing_beside(tmp_path: Path) -> None:
    run = create(tmp_path)
    for step in range(5):
        run.set_state(step=step)
    assert run.state.step == 4
    assert sorted(path.name for path in run.path.iterdir()) == ["run.json", "state.json"]


def test_results_replace_only_their_own_kind(tmp_path: Path) -> None:
    run = create(tmp_path)
    result = {
        "subject": "student",
        "protocol": "knn",
        "version": 1,
        "protocol_hash": "a" * 64,
        "weights_hash": "w",
        "data_hash": "d",
    }
    first = run.add_result({**result, "measurements": [{"name": "knn_top1", "value": 1.0}]})
    assert run.add_result({**result, "measurements": [{"name": "knn_top1", "value": 2.0}]}) == first
    assert first.name.startswith("student-knn-")
    run.add_result({**result, "subject": "random"})
    run.add_result({**result, "data_hash": "other"})
    assert len(run.results()) == 3
    assert [item["measurements"][0]["value"] for item in run.results() if item.get("measurements")] == [2.0]


def test_attempts_are_numbered(tmp_path: Path) -> None:
    run = create(tmp_path)
    assert run.append_attempt({"host": "a"}) == 1
    with (run.path / "attempts.jsonl").open("ab") as file:
        file.write(b'{"attempt": 2, "ho')
    assert run.append_attempt({"host": "b"}) == 2
    assert [attempt["host"] for attempt in run.attempts()] == ["a", "b"]


def test_machine_is_kept_without_the_trackers_password(tmp_path: Path) -> None:
    run = create(tmp_path)
    run.write_machine(Machine(procs=2, tracking_uri="http://me:secret@host"))
    assert "secret" not in (run.path / "machine.json").read_text()
    assert run.machine == Machine(procs=2)


def test_listing_many_runs_is_quick(tmp_path: Path) -> None:
    template = create(tmp_path)
    info = read_checked(template.path / "run.json")
    for index in range(300):
        path = tmp_path / f"demo-s{index}-copy"
        path.mkdir()
        (path / "run.json").write_text(json.dumps({**info, "run_id": path.name, "created_at": float(index)}))
        (path / "state.json").write_text((template.path / "state.json").read_text())
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    runs = list_runs(tmp_path)
    assert len(runs) == 301
    assert runs[0].info.run_id == template.run_id
    assert runs[1].info.run_id == "demo-s299-copy"


def test_damaged_files_are_named(tmp_path: Path) -> None:
    run = create(tmp_path)
    (run.path / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"state\.json is damaged"):
        _ = run.state
    (run.path / "run.json").write_text("[]")
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        RunFolder.open(run.path)
    with pytest.raises(UserError, match="not a run folder"):
        RunFolder.open(tmp_path)


def test_files_of_a_newer_version_are_told_from_damaged_ones_and_left(tmp_path: Path) -> None:
    run = create(tmp_path)
    result = run.add_result({"subject": "student", "protocol": "knn", "protocol_hash": "a", "measurements": [], "format": 2})
    info = read_checked(run.path / "run.json")
    newer = {"state.json": {"status": "running", "step": 3, "format": 2}, "run.json": {**info, "format": 2}}
    with pytest.raises(UserError, match=f"{result.name} was written by a newer version of obowlab; .*: update obowlab"):
        run.results()
    for name, read in (("state.json", lambda: run.state), ("run.json", lambda: RunFolder.open(run.path))):
        content = with_checksum(json.dumps(newer[name]))
        (run.path / name).write_text(content)
        with pytest.raises(UserError, match=f"{name} was written by a newer version of obowlab; .*: update obowlab"):
            read()
        assert (run.path / name).read_text() == content
    for name, values in (
        ("machine.json", {"procs": 1, "warp": 9}),
        ("machine.json", {"version": "99.0", "procs": {"of": "node"}}),
        ("machine.json", {"format": 2, "procs": 1}),
        ("labels.json", {"format": 2, "obowlab.table": ["table3"]}),
    ):
        (run.path / name).write_text(json.dumps(values))
        with pytest.raises(UserError, match=rf"{name} was written by .*; this is .*: update obowlab") as refused:
            _ = run.machine if name == "machine.json" else run.labels()
        assert "remove" not in str(refused.value)
    (run.path / "machine.json").write_text('{"procs": "two"}')
    with pytest.raises(UserError, match=r"machine\.json is damaged; start the run again"):
        _ = run.machine
    (run.path / "run.json").write_text(with_checksum(json.dumps({**info, "version": "99.0", "recipe": {"warp": 9}})))
    with pytest.raises(UserError, match=r"created by obowlab 99\.0, .*: update obowlab, and leave the run as it is"):
        _ = RunFolder.open(run.path).info.recipe


def test_every_metric_is_described() -> None:
    assert lookup("perplexity_image_conv4") is METRICS["perplexity_image"]
    assert lookup("fewshot_5shot").direction == "max"
    assert lookup("gpu_memory_3").unit == "MiB"
    assert mlflow_name("loss", source="metrics") == "train/loss"
    assert mlflow_name("knn_top1", source="random") == "eval/random/knn_top1"
    assert mlflow_name("knn_top1", source="student/birds") == "eval/student/birds/knn_top1"
    assert mlflow_name("cpu", source="system") == "system/cpu"
    for name in ("perplexity_image", "los", "fewshot", "gpu_memory", "loss_conv4"):
        with pytest.raises(KeyError):
            lookup(name)


def test_provenance_knows_versions_without_importing_them() -> None:
    code = """
import sys
import threading
from obowlab.runs.provenance import environment
print(environment()["versions"]["torch"], "torch" in sys.modules)
"""
    child = run_python(code)
    version, imported = child.communicate()[0].split()
    assert version[0].isdigit()
    assert imported == "False"
    facts = provenance.code()
    if facts.commit is not None:
        assert len(facts.commit) == 40
        assert facts.dirty == bool(facts.diff)


def test_provenance_of_an_image_is_the_commit_it_was_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "obowlab" / "track" / "provenance.py"))
    commit = "0123456789" * 4
    for text, expected in ((commit, (commit, False)), (f"{commit}-dirty", (commit, True)), ("", (None, None))):
        monkeypatch.setenv("OBOWLAB_COMMIT", text)
        facts = provenance.code()
        assert (facts.commit, facts.dirty) == expected


def test_the_run_folder_imports_nothing_heavy() -> None:
    code = "import sys, obowlab.runs; print(sorted({'torch', 'mlflow', 'numpy', 'click'} & set(sys.modules)))"
    assert run_python(code).communicate()[0].strip() == "[]"


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "out"
    for content in ("first", "second"):
        with folder_written(place) as beside:
            assert beside.parent == place.parent
            (beside / content).write_text(content)
        assert [path.name for path in place.iterdir()] == [content]

    def give_up(problem: type[BaseException]) -> None:
        with folder_written(place) as beside:
            (beside / "half").write_text("half")
            raise problem

    for problem in (KeyboardInterrupt, OSError, ValueError):
        with pytest.raises(problem):
            give_up(problem)
        assert [path.name for path in place.iterdir()] == ["second"]
    with pytest.raises(FileNotFoundError), folder_written(place) as beside:
        beside.rename(tmp_path / "gone")  # so that it cannot take its place
    assert [path.name for path in place.iterdir()] == ["second"], "what was put aside is put back"
    assert [path.name for path in place.parent.iterdir()] == ["out"]


def test_only_one_thread_of_a_process_gets_a_run(tmp_path: Path) -> None:
    folder = RunFolder.create(Loaded(name="demo", recipe=Recipe(), sources={}), seed=0, runs_root=tmp_path)
    start, taken, held = threading.Barrier(8), [], []
    release = threading.Event()

    def grab() -> None:
        start.wait()
        try:
            with RunFolder.open(folder.path).lock():
                held.append(1)
                release.wait(10)
        except RunTakenError:
            taken.append(1)

    threads = [threading.Thread(target=grab) for _ in range(8)]
    for thread in threads:
        thread.start()
    while len(taken) < 7 and any(thread.is_alive() for thread in threads):
        was_held = bool(held)
        assert is_locked(folder.path) or not was_held
        time.sleep(0.001)
    release.set()
    for thread in threads:
        thread.join()
    assert (len(held), len(taken)) == (1, 7)
    assert not is_locked(folder.path)
    with folder.lock():
        pass


def test_labels_are_merged_whoever_adds_them(tmp_path: Path) -> None:
    folder = RunFolder.create(Loaded(name="demo", recipe=Recipe(), sources={}), seed=0, runs_root=tmp_path)
    assert folder.labels() == {}
    threads = [threading.Thread(target=folder.add_labels, args=({f"obowlab.t{i}": str(i)},)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folder.labels() == {f"obowlab.t{i}": str(i) for i in range(8)}
    folder.add_labels({"obowlab.t3": "other"})
    assert folder.labels()["obowlab.t3"] == "other"
    (folder.path / "labels.json").write_text("{")
    with pytest.raises(UserError, match="remove it; only labels are lost"):
        folder.labels()
