"""What is handed to Slurm and what a job does with its signals; `make slurm-demo` does the same on a real cluster.

The commands of Slurm are stand-ins that keep what they were given: a cluster takes root and a minute to start.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from obowlab.config import Loaded, Machine, Recipe
from obowlab.errors import UserError
from obowlab.launch.jobs import logs_of, overview, reap, stop
from obowlab.launch.slurm import JobRequest, Resources, live_runs, states, submit, submitted_jobs
from obowlab.runs.folder import RunFolder
from tests.command_line import Obowlab


class Cluster:
    """Stand-ins for every program of Slurm that is used, in a folder on the PATH; jobs themselves call srun."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        folder.mkdir()
        self._write(
            "sbatch", f'cp "$1" {folder}/script.$$\necho $$ >>{folder}/order\necho "Submitted batch job $(wc -l <{folder}/order)"'
        )
        self._write("squeue", f"cat {folder}/queue 2>/dev/null || true")
        self._write("scancel", f'echo "$@" >>{folder}/cancelled')
        self._write("scontrol", f'echo "$@" >>{folder}/requeued')
        self._write("srun", "exit 1")
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def _write(self, name: str, body: str) -> None:
        tool = self.folder / name
        tool.write_text(f"#!/bin/sh\n{body}\n")
        tool.chmod(0o755)

    def script(self, number: int) -> str:
        """Return what the so-many-th call of sbatch was given."""
        process = (self.folder / "order").read_text().split()[number - 1]
        return (self.folder / f"script.{process}").read_text()

    def queue(self, *lines: str) -> None:
        (self.folder / "queue").write_text("".join(f"{line}\n" for line in lines))

    def refuse(self) -> None:
        self._write("sbatch", 'echo "sbatch: error: invalid partition specified: nowhere" >&2\nexit 1')


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(tmp_path / "slurm", monkeypatch)


def machine_in(root: Path, **slurm: Any) -> Machine:
    return Machine.model_validate({"runs_root": root / "runs", "data_root": root / "data", "device": "cpu", "slurm": slurm})


def request(*words: str, run: str | None = None) -> JobRequest:
    return JobRequest(arguments=words, runs=(run,) if run else (), what=run or " ".join(words))


def flags(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH --")]
    return {line.partition("=")[0]: line.partition("=")[2] for line in lines}


def test_a_job_asks_for_what_its_processes_need(tmp_path: Path, cluster: Cluster) -> None:
    slurm = {
        "partition": "main",
        "account": "lab",
        "time": "2-00:00:00",
        "cpus_per_process": 6,
        "memory_per_process": "32G",
        "gpu_type": "h100",
        "save_before_s": 300,
        "container": "apptainer exec --nv obowlab.sif",
        "setup": ("module load cuda",),
        "options": ("reservation=ssl", "exclusive"),
    }
    (job,) = submit(
        [request("run", "full", run="full-s0-1")],
        machine=machine_in(tmp_path, **slurm),
        resources=Resources(nodes=2, procs=8, gpus=True),
        name="full",
    )
    asked = flags(cluster.script(1))
    wanted = {"nodes": "2", "ntasks-per-node": "1", "cpus-per-task": "24", "gpus-per-node": "h100:4", "mem": "128G"}
    wanted |= {"partition": "main", "account": "lab", "time": "2-00:00:00", "signal": "USR2@300", "reservation": "ssl"}
    assert {key: asked[key].strip('"') for key in wanted} == wanted
    assert {"exclusive", "requeue"} <= set(asked)
    script = cluster.script(1)
    assert "module load cuda" in script
    assert "apptainer exec --nv obowlab.sif python3 -u -m submitit" in script
    assert "--kill-on-bad-exit=1" in script
    assert job.id == "1"
    (known,) = submitted_jobs(tmp_path / "runs")
    assert known == job


def test_many_commands_are_an_array_with_a_limit_after_others(tmp_path: Path, cluster: Cluster) -> None:
    machine = machine_in(tmp_path)
    first = submit([request("run", "stage")], machine=machine, resources=Resources(), name="first")
    requests = [request("run", "a", run="a-s0-1"), request("run", "b", run="b-s0-1"), request("run", "c", run="c-s0-1")]
    jobs = submit(requests, machine=machine, resources=Resources(), name="table", at_a_time=2, after=first)
    assert [job.id for job in jobs] == ["2_0", "2_1", "2_2"]
    asked = flags(cluster.script(2))
    assert asked["array"] == "0-2%2"
    assert asked["dependency"] == "afterany:1"
    assert "gpus-per-node" not in asked
    cluster.queue("2_0|RUNNING|node1|None", "2_2|PENDING||JobArrayTaskLimit", "77|RUNNING|node9|None")
    assert {number: state.name for number, state in states(jobs).items()} == {"2_0": "RUNNING", "2_2": "PENDING"}
    assert set(live_runs(machine.runs_root)) == {"a-s0-1", "c-s0-1"}


def test_slurm_that_is_not_there_or_refuses_is_told_in_one_sentence(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.refuse()
    with pytest.raises(UserError, match=r"^Slurm refuses the job: error: invalid partition specified: nowhere; see \[slurm\]"):
        submit([request("run", "demo")], machine=machine_in(tmp_path), resources=Resources(), name="demo")
    assert submitted_jobs(tmp_path / "runs") == []
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="There is no Slurm here"):
        submit([request("run", "demo")], machine=machine_in(tmp_path), resources=Resources(), name="demo")


# ---------------------------------------------------------------------------------------------------------- within the job

TASK = """
import sys
from pathlib import Path
from obowlab.launch import slurm
slurm.GRACE_S = 0.5
task = slurm.NodeTask((), folder=Path(sys.argv[1]), cwd=Path(sys.argv[1]), nodes=1)
task._command = lambda: [sys.executable, "-c", sys.argv[2]]
task()
"""
COMMAND = """
import os, signal, sys, time
def stop(number, frame):
    print("told", number, flush=True)
    while not os.path.exists("saved"):
        time.sleep(0.02)
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
print("patience", os.environ["OBOWLAB_PATIENCE_S"], flush=True)
time.sleep(60)
"""


def start_task(folder: Path, command: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "SLURM_JOB_ID": "41", "SLURM_NODEID": "0", "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, "-c", TASK, str(folder), command], env=environment, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    ("signals", "requeued"),
    [
        ((signal.SIGUSR2,), True),
        ((signal.SIGUSR1,), True),
        ((signal.SIGTERM,), False),
        ((signal.SIGHUP,), False),
        ((signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR2), True),
    ],
)
def test_a_job_saves_itself_once_and_queues_again_only_when_its_time_is_up(
    tmp_path: Path, cluster: Cluster, signals: tuple[signal.Signals, ...], requeued: bool
) -> None:
    task = start_task(tmp_path, COMMAND)
    assert task.stdout is not None
    assert task.stdout.readline() == "patience 600\n"
    task.send_signal(signals[0])
    assert task.stdout.readline() == "told 15\n"
    for number in signals[1:]:
        task.send_signal(number)
    (tmp_path / "saved").touch()
    said, _ = task.communicate(timeout=240)
    assert "told" not in said
    assert task.returncode == 143
    file = cluster.folder / "requeued"
    assert (file.read_text() if file.exists() else "") == ("requeue 41\n" if requeued else "")


@pytest.mark.parametrize(
    ("ending", "code"), [("", 0), ("import sys; sys.exit(2)", 2), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_a_job_ends_as_its_command_does(tmp_path: Path, cluster: Cluster, ending: str, code: int) -> None:
    task = start_task(tmp_path, ending)
    assert task.wait(timeout=240) == code
    assert not (cluster.folder / "requeued").exists()


@pytest.mark.parametrize("others_may_write", [False, True])
def test_what_a_job_runs_lies_where_only_its_user_writes(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, others_may_write: bool
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    machine = machine_in(tmp_path)
    machine.runs_root.mkdir(parents=True, exist_ok=True)
    if others_may_write:
        machine.runs_root.chmod(0o2775)
    (job,) = submit([request("run")], machine=machine, resources=Resources(), name="t")
    (pickled,) = tmp_path.rglob("*submitted.pkl")
    assert pickled.parent == job.folder == submitted_jobs(machine.runs_root)[0].folder
    assert str(job.folder) in cluster.script(1)
    private = tmp_path / "state" / "obowlab" / "jobs"
    assert pickled.is_relative_to(private) == others_may_write
    if others_may_write:
        assert {place.stat().st_mode & 0o777 for place in (private.parent, private, job.folder)} == {0o700}
        private.chmod(0o770)
        with pytest.raises(UserError, match=f"has to be yours alone: chmod 700 {private}"):
            submit([request("run")], machine=machine, resources=Resources(), name="t")


# ----------------------------------------------------------------------------------------------------------- obowlab jobs


def run_in(root: Path, seed: int, **state: Any) -> RunFolder:
    folder = RunFolder.create(Loaded(name="demo", recipe=Recipe(), sources={}), seed=seed, runs_root=root / "runs")
    folder.set_state(**state)
    return folder


def test_jobs_of_both_launchers_are_listed_with_what_is_known(tmp_path: Path, cluster: Cluster) -> None:
    queued = run_in(tmp_path, 0, status="interrupted", step=5, total_steps=10)
    training = run_in(tmp_path, 1, status="running", step=40, total_steps=100, trained_s=20.0, pid=1, host="node1")
    run_in(tmp_path, 2, status="finished", step=10, total_steps=10)
    gone = run_in(tmp_path, 3, status="running", step=3, total_steps=10, pid=2**22 + 1)
    local = run_in(tmp_path, 4, status="running", step=50, total_steps=100, trained_s=10.0)
    machine = machine_in(tmp_path)
    requests = [request("run", run=queued.run_id), request("run", run=training.run_id)]
    submit(requests, machine=machine, resources=Resources(), name="t")
    submit([request("tune", "kappa-delta")], machine=machine, resources=Resources(), name="tune")
    cluster.queue("1_0|PENDING||BeginTime", "1_1|RUNNING|node1|None", "2|RUNNING|node2|None")
    with local.lock():
        found = {job.what: job for job in overview(tmp_path / "runs").jobs}
        assert (found[local.run_id].status, found[local.run_id].job) == ("running", f"pid {os.getpid()}")
        assert found[local.run_id].left_s == pytest.approx(10.0)
    assert (found[queued.run_id].status, found[queued.run_id].message) == ("queued", "BeginTime")
    one = found[training.run_id]
    assert (one.status, one.where, one.job, one.launcher) == ("running", "node1", "1_1", "slurm")
    assert one.left_s == pytest.approx(30.0)
    assert found["tune kappa-delta"].status == "running"
    assert found[gone.run_id].status == "interrupted"
    assert [job.status for job in overview(tmp_path / "runs").jobs][:3] == ["running", "running", "queued"]
    cluster.queue()
    later = {job.what: job.status for job in overview(tmp_path / "runs").jobs}
    assert later["tune kappa-delta"] == "over"
    assert later[queued.run_id] == "interrupted"


def test_dead_runs_are_reaped_and_live_ones_left_alone(tmp_path: Path, cluster: Cluster) -> None:
    gone = run_in(tmp_path, 0, status="running", pid=2**22 + 1)
    alive = run_in(tmp_path, 1, status="running")
    with alive.lock():
        assert [folder.run_id for folder in reap(tmp_path / "runs")] == [gone.run_id]
    assert gone.state.status == "interrupted"
    assert alive.state.status == "running"


def test_a_job_of_the_cluster_is_cancelled_and_a_run_here_is_told_to_stop(tmp_path: Path, cluster: Cluster) -> None:
    far, idle = run_in(tmp_path, 0), run_in(tmp_path, 2)
    (job,) = submit([request("run", run=far.run_id)], machine=machine_in(tmp_path), resources=Resources(), name="far")
    cluster.queue("1|RUNNING|node1|None")
    assert "Cancelled job 1" in stop(far.run_id, runs_root=tmp_path / "runs")
    assert (cluster.folder / "cancelled").read_text() == "1\n"
    with pytest.raises(UserError, match="nothing to cancel"):
        stop(idle.run_id, runs_root=tmp_path / "runs")
    with pytest.raises(UserError, match="No job 99 was submitted"):
        stop("99", runs_root=tmp_path / "runs")
    held = "import sys, time; from pathlib import Path; from obowlab.runs.folder import RunFolder\n"
    held += "with RunFolder.open(Path(sys.argv[1])).lock(): print('held', flush=True); time.sleep(60)"
    here = run_in(tmp_path, 1, status="running")
    holder = subprocess.Popen([sys.executable, "-c", held, str(here.path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    holder.stdout.readline()
    assert f"Asked process {holder.pid} to stop" in stop(here.run_id, runs_root=tmp_path / "runs")
    assert holder.wait(timeout=240) == -signal.SIGTERM
    (job.folder / "1_0_log.out").write_text("what node 0 said\n")
    assert [path.read_text() for path in logs_of(far.run_id, runs_root=tmp_path / "runs")] == ["what node 0 said\n"]
    with pytest.raises(UserError, match="has printed nothing yet"):
        logs_of(idle.run_id, runs_root=tmp_path / "runs")


# ---------------------------------------------------------------------------------------------------------- command line


def test_a_run_is_submitted_once_with_everything_said_on_the_command_line(
    obowlab: Obowlab, data_root: Path, workplace: Path, cluster: Cluster
) -> None:
    machine = workplace / "machine.toml"
    machine.write_text('launcher = "slurm"\n[slurm]\ngpus_per_node = 2\n')
    changes = ["--set", "data.dataset=small", "--set", "training.batch_size=8"]
    words = ["run", "demo", "--seed", "7", *changes, "--gpus", "4", "--machine", str(machine)]
    words += ["--data-root", str(data_root), "--runs-root", str(workplace / "runs")]
    code, out, err = obowlab(*words)
    assert (code, err) == (0, "")
    assert "as job 1 on 2 nodes, 4 GPUs each." in out
    (job,) = submitted_jobs(workplace / "runs")
    told = " ".join(job.request.arguments)
    assert told.startswith(f"run demo --seed 7 {' '.join(changes)} --procs 4 --nodes 2 --no-progress --runs-root ")
    assert told.endswith(f"--device cuda --launcher local --machine {machine}")
    (run,) = job.request.runs
    assert RunFolder.find(run, runs_root=workplace / "runs").state.status == "created"
    cluster.queue("1|PENDING||Resources")
    code, out, _ = obowlab(*words)
    assert code == 0
    assert f"Run {run} has job 1 already." in out
    assert len(submitted_jobs(workplace / "runs")) == 1
    code, _, err = obowlab(*words, "--fresh")
    assert code == 2
    assert "belongs to job 1" in err
    code, out, _ = obowlab("jobs", "--json", "--runs-root", str(workplace / "runs"))
    assert [(job["what"], job["status"]) for job in json.loads(out)] == [(run, "queued")]
    code, _, err = obowlab("run", "demo", "--nodes", "2", "--procs", "2", "--device", "cpu")
    assert code == 2
    assert "--nodes is for a cluster" in err
    code, _, err = obowlab("run", "demo", "--wait")
    assert code == 2
    assert "--wait is for jobs of a cluster" in err


def test_the_stages_of_a_table_are_submitted_before_the_rows_that_need_them(
    obowlab: Obowlab, data_root: Path, workplace: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("obowlab.launch.preflight.check_data", lambda loaded, **_: None)
    words = ["ablate", "table5", "--scale", "demo", "--launcher", "slurm", "--device", "cpu", "--jobs", "3"]
    code, out, err = obowlab(*words, "--runs-root", str(workplace / "runs"))
    assert (code, err) == (0, "")
    assert out.count("Submitted") >= 2
    jobs = submitted_jobs(workplace / "runs")
    assert len({run for job in jobs for run in job.request.runs}) == len(jobs)
    number = len({job.id.partition("_")[0] for job in jobs})
    assert all("dependency" in flags(cluster.script(later)) for later in range(2, number + 1))
    cluster.queue(*(f"{job.id}|PENDING||Priority" for job in jobs))
    code, out, _ = obowlab(*words, "--runs-root", str(workplace / "runs"))
    assert code == 0
    assert f"{len(jobs)} of {len(jobs)} trainings have a job already." in out
    assert len(submitted_jobs(workplace / "runs")) == len(jobs)


def test_workers_of_a_study_are_jobs_on_one_storage(
    obowlab: Obowlab, data_root: Path, workplace: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("obowlab.launch.preflight.check_data", lambda loaded, **_: None)
    monkeypatch.delenv("OBOWLAB_STUDY_STORAGE", raising=False)
    words = ["tune", "kappa-delta", "--scale", "demo", "--launcher", "slurm", "--device", "cpu", "--jobs", "3"]
    words += ["--runs-root", str(workplace / "runs")]
    code, _, err = obowlab(*words, "--storage", "sqlite:////tmp/studies.db")
    assert code == 2
    assert "SQLite is no storage for several nodes" in err
    code, out, err = obowlab(*words, "--storage", "postgresql://someone:secret@there/studies")
    assert (code, err) == (0, "")
    assert "secret" not in out + "".join(path.read_text() for path in (workplace / "runs" / ".jobs").glob("*/order.json"))
    assert os.environ["OBOWLAB_STUDY_STORAGE"].startswith("postgresql")
    cluster.queue("1_0|RUNNING|node1|None", "1_1|RUNNING|node1|None", "1_2|RUNNING|node2|None")
    code, out, _ = obowlab(*words)
    assert code == 0
    assert "3 jobs work on study kappa-delta-demo already." in out
    assert len(submitted_jobs(workplace / "runs")) == 3


def test_measuring_can_be_a_job(obowlab: Obowlab, finished: RunFolder, cluster: Cluster) -> None:
    code, out, err = obowlab("eval", finished.run_id, "--protocol", "knn", "--launcher", "slurm", "--device", "cpu")
    assert (code, err) == (0, "")
    (job,) = submitted_jobs(finished.path.parent)
    assert job.request.arguments[:4] == ("eval", str(finished.path), "--protocol", "knn")
    assert "Submitted eval" in out
