"""The launcher with a stand-in for the compute process: real processes, real signals, no torch."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from obowlab.config import Loaded, Machine, Recipe
from obowlab.errors import UserError
from obowlab.files.locks import file_lock
from obowlab.launch import gpu_leases as leases
from obowlab.launch import system
from obowlab.launch.compute_command import compute_command
from obowlab.launch.jobs import stop
from obowlab.launch.local import SAMPLE_EVERY_S, launch, plan, sample_interval_s
from obowlab.launch.preflight import check_compiler
from obowlab.runs import RunFolder
from tests.gpus import stand_in_gpus
from tests.processes import wait_until

COMPUTE = """
import os, signal, sys, time
from pathlib import Path
from obowlab.runs import RunFolder

folder = RunFolder.open(Path(sys.argv[1]))
behaviour = sys.argv[2]
stopped = []
if behaviour != "deaf":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stopped.append(number))
else:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
while os.environ.get("RANK", "0") != "0" and not stopped:
    time.sleep(0.05)
if stopped:
    sys.exit()
with folder.lock(), folder.metric_log() as log:
    folder.append_attempt({"threads": os.environ["OMP_NUM_THREADS"], "quiet": os.environ.get("OBOWLAB_NO_PROGRESS")})
    steps = 10**6 if behaviour in ("slow", "deaf") else 20
    for step in range(log.last_step + 1, steps):
        if stopped:
            folder.set_state(status="interrupted", message="asked to")
            sys.exit(0 if "RANK" in os.environ else 128 + stopped[0])
        log.append(step, {"loss": 1 / (step + 1)})
        folder.set_state(status="running", step=step, total_steps=steps)
        if steps > 20:
            time.sleep(0.02)
    if behaviour == "user_error":
        folder.set_state(status="failed", message="fix it")
        sys.exit(2)
    if behaviour == "crash":
        sys.exit(1)
    if behaviour == "unrecorded":
        sys.exit(0)
    if behaviour == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    folder.set_state(status="finished", step=steps)
"""

LAUNCH = """
import sys
from pathlib import Path
from tests.processes import NoMirror
from tests.test_launch import loaded, machine_of, stand_in
from obowlab.launch import local as launching
launching.Mirror = NoMirror
root = Path(sys.argv[1])
command = stand_in(root, sys.argv[2])
sys.exit(launching.launch(loaded(), seed=0, machine=machine_of(root), fresh=False, progress=True, command=command))
"""


pytestmark = pytest.mark.usefixtures("no_mirror")


def loaded() -> Loaded:
    return Loaded(name="demo", recipe=Recipe(), sources={})


def machine_of(root: Path) -> Machine:
    return Machine(runs_root=root / "runs", device="cpu")


def stand_in(root: Path, behaviour: str) -> Callable[[Path, Machine], list[str]]:
    script = root / "compute.py"
    script.write_text(COMPUTE)
    group, _, behaviour = behaviour.rpartition(" ")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if group else []
    return lambda path, machine: [sys.executable, *torchrun, str(script), str(path), behaviour]


def run(root: Path, behaviour: str, *, fresh: bool = False, progress: bool = True) -> tuple[int, RunFolder]:
    code = launch(loaded(), seed=0, machine=machine_of(root), fresh=fresh, progress=progress, command=stand_in(root, behaviour))
    return code, RunFolder.find("demo", runs_root=root / "runs")


def start(root: Path, behaviour: str) -> tuple["subprocess.Popen[str]", RunFolder]:
    """Start a launcher process and wait until its compute process trains."""
    stand_in(root, behaviour)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(root), behaviour], env=environment, stdout=subprocess.PIPE, text=True
    )
    path = root / "runs"
    wait_until(lambda: any(folder.joinpath("metrics.jsonl").exists() for folder in path.glob("demo-*")))
    folder = RunFolder.find("demo", runs_root=path)
    wait_until(lambda: folder.state.step >= 3 and folder.state.pid != launcher.pid)
    return launcher, folder


def is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_a_run_ends_well_and_is_not_trained_twice(tmp_path: Path) -> None:
    code, folder = run(tmp_path, "quick", progress=False)
    assert code == 0
    assert folder.state.status == "finished"
    assert folder.attempts()[0]["quiet"] == "1"
    assert folder.attempts()[0]["threads"] == str(folder.machine.threads)
    assert run(tmp_path, "quick")[0] == 0
    assert len(folder.attempts()) == 1


def test_fresh_puts_the_old_folder_aside(tmp_path: Path) -> None:
    _, before = run(tmp_path, "quick")
    code, after = run(tmp_path, "quick", fresh=True)
    assert code == 0
    assert after.info.created_at > before.info.created_at
    (aside,) = (tmp_path / "runs" / ".trash").iterdir()
    assert json.loads((aside / "run.json").read_text())["created_at"] == before.info.created_at
    assert len((aside / "metrics.jsonl").read_text().splitlines()) == 20


@pytest.mark.parametrize(
    ("behaviour", "code", "status", "message"),
    [
        ("user_error", 2, "failed", "fix it"),
        ("crash", 1, "failed", "exit code 1"),
        ("killed", 137, "failed", "SIGKILL"),
        ("unrecorded", 2, "failed", "before it was done"),
    ],
)
def test_endings_are_told(tmp_path: Path, behaviour: str, code: int, status: str, message: str) -> None:
    got, folder = run(tmp_path, behaviour)
    assert got == code
    assert folder.state.status == status
    assert message in folder.state.message
    assert run(tmp_path, "quick")[0] == 0
    assert folder.state.status == "finished"
    assert folder.state.message == ""
    assert [point.step for point in folder.metrics()] == list(range(20))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_passed_on_once(tmp_path: Path, number: int, code: int) -> None:
    launcher, folder = start(tmp_path, "slow")
    with pytest.raises(UserError, match=f"process {launcher.pid} on"):
        run(tmp_path, "quick")
    with pytest.raises(UserError, match="being trained"):
        run(tmp_path, "quick", fresh=True)
    launcher.send_signal(number)
    assert launcher.wait(timeout=240) == code
    assert folder.state.status == "interrupted"
    assert folder.state.message == "asked to"


def test_a_signal_reaches_the_workers_of_torchrun(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    launcher, folder = start(tmp_path, "group slow")
    child = folder.state.pid
    assert child is not None
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(timeout=240) == 130
    assert folder.state.status == "interrupted"
    assert folder.state.message == "asked to"
    assert not is_alive(child)


def test_a_second_signal_kills(tmp_path: Path) -> None:
    launcher, folder = start(tmp_path, "deaf")
    child = folder.state.pid
    assert child is not None
    launcher.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert is_alive(child)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=240) == 143
    assert not is_alive(child)
    assert folder.state.status == "interrupted"


def test_the_compute_process_follows_a_killed_launcher(tmp_path: Path) -> None:
    launcher, folder = start(tmp_path, "slow")
    child = folder.state.pid
    assert child is not None
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not is_alive(child))
    assert folder.state.status == "interrupted"
    with folder.lock():
        pass


def test_cancelling_a_run_whose_launcher_was_killed_says_that_it_is_saving(tmp_path: Path) -> None:
    folder = RunFolder.create(loaded(), seed=0, runs_root=tmp_path)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (folder.path / "lock").write_text(json.dumps({"pid": gone.pid, "host": socket.gethostname(), "token": "0"}))
    with file_lock(folder.path / "worker.lock"), pytest.raises(UserError, match="is saving itself"):
        stop(folder.run_id, runs_root=tmp_path)


def test_the_plan_says_what_would_happen_and_touches_nothing(tmp_path: Path) -> None:
    machine = Machine(runs_root=tmp_path / "runs", device="cpu", procs=2, threads=3, tracking_uri="https://me:secret@host")
    planned = plan(loaded(), seed=4, machine=machine, fresh=False)
    assert planned.action == "new"
    assert planned.command == tuple(compute_command(planned.path, machine))
    assert "--nproc-per-node 2" in " ".join(planned.command)
    assert planned.threads == 3
    assert "secret" not in "\n".join(planned.lines())
    assert list(tmp_path.iterdir()) == []
    RunFolder.create(loaded(), seed=4, runs_root=machine.runs_root).set_state(status="interrupted", step=7, total_steps=9)
    assert plan(loaded(), seed=4, machine=machine, fresh=False).lines()[2] == "action: resume (interrupted, step 7 of 9)"
    assert plan(loaded(), seed=4, machine=machine, fresh=True).action == "fresh"


def test_too_few_gpus_are_told_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(runs_root=tmp_path, device="cuda", procs=4)
    monkeypatch.setattr(leases, "count_gpus", lambda: 0)
    with pytest.raises(UserError, match=r"has 0 GPUs, not 4; use --device cpu --procs N\."):
        launch(loaded(), seed=0, machine=machine, fresh=False, progress=False)
    monkeypatch.setattr(leases, "count_gpus", lambda: 1)
    with pytest.raises(UserError, match=r"has 1 GPU, not 4; use --gpus 1 or --device cpu"):
        launch(loaded(), seed=0, machine=machine.model_copy(update={"device": "auto"}), fresh=False, progress=False)
    assert plan(loaded(), seed=0, machine=machine, fresh=False).action == "new", "a plan is for any machine"
    assert list(tmp_path.iterdir()) == []


def test_a_machine_without_a_compiler_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(data_root=tmp_path, runs_root=tmp_path / "runs", compile=True)
    (tmp_path / "g++").touch(mode=0o755)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    check_compiler(machine)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler"):
        check_compiler(machine)
    check_compiler(machine.model_copy(update={"compile": False}))


def test_a_store_mlflow_cannot_write_to_is_refused_before_anything_starts(tmp_path: Path) -> None:
    machine = Machine(runs_root=tmp_path / "runs", device="cpu", tracking_uri="./mlruns")
    with pytest.raises(UserError, match=r"cannot write to './mlruns' \(MLFLOW_TRACKING_URI"):
        launch(loaded(), seed=0, machine=machine, fresh=False, progress=False)
    assert not (tmp_path / "runs").exists()


def test_gpus_are_counted_and_read_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_gpus(tmp_path / "nvml", monkeypatch, gpus=("GPU-a", "GPU-b"), powers_w=(70.5, None))
    assert system.count_gpus() == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert system.count_gpus() == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert system.count_gpus() == 0
    sampler = system.SystemSampler(os.getpid(), path=tmp_path, gpus=True)
    time.sleep(0.05)
    values = sampler.sample()
    assert values["gpu_power_0"] == 70.5
    assert "gpu_power_1" not in values
    assert values["gpu_memory_1"] == 1025.0
    assert values["gpu_utilisation_0"] == 35.0
    assert values["run_memory"] > 1.0
    assert values["disk_free"] > 0.0
    assert 0.0 <= values["cpu"] <= 100.0


def test_the_process_tree_holds_grandchildren(tmp_path: Path) -> None:
    child = subprocess.Popen(["sh", "-c", "sleep 30 & echo started; wait"], stdout=subprocess.PIPE, start_new_session=True)
    assert child.stdout is not None
    child.stdout.readline()
    family = system.process_tree(child.pid)
    assert family[0] == child.pid
    assert len(family) == 2
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert system.process_tree(child.pid) == []


def test_a_fortnight_has_few_system_points() -> None:
    elapsed_s, points, shortest = 0.0, 0, SAMPLE_EVERY_S
    while elapsed_s < 14 * 24 * 3600:
        interval_s = sample_interval_s(elapsed_s)
        assert interval_s >= shortest
        elapsed_s, points, shortest = elapsed_s + interval_s, points + 1, interval_s
    assert 1500 < points < 2600
