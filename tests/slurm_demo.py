"""`make slurm-demo`: the demo on a real two-node Slurm, disturbed in every way a cluster knows; prints what came of it.

Needs the test cluster that `start.sh DIR` of SLURM_TOOLS starts (two slurmd on one host, a partition `main` and a preempting one
called `urgent`); one that runs already is taken if SLURM_CONF leads to it. As root. Everything done is kept in the work folder:
killed and started again, the demo goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from obowlab.runs.folder import RunFolder
from tests.runs import differing_weights, points

PACKAGES = ["slurmctld", "slurmd", "slurm-client", "munge", "slurmdbd", "slurm-wlm-mysql-plugin", "mariadb-server"]
STATE = Path(tempfile.gettempdir()) / "obowlab-slurm"
MACHINE = """
data_root = "{work}/data"
runs_root = "{work}/{name}"
device = "cpu"
threads = 1
checkpoint_every_s = 15.0

[slurm]
partition = "main"
time = "1:00:00"
cpus_per_process = {cpus}
save_before_s = 40
"""
NODES = ("--nodes", "2", "--procs", "4")


class Demo:
    """The steps, in their order; what was shown so far is in `shown.json`."""

    def __init__(self, work: Path, *, epochs: int | None) -> None:
        self.work = work
        self.changes = () if epochs is None else ("--set", f"training.epochs={epochs}")
        self._file = work / "shown.json"
        self.shown: dict[str, list[str]] = json.loads(self._file.read_text()) if self._file.exists() else {}

    def step(self, name: str, action: Callable[[], list[str]]) -> None:
        if name not in self.shown:
            say(f"== {name}")
            started = time.monotonic()
            self.shown[name] = [*action(), f"{time.monotonic() - started:.0f} s"]
            self._file.write_text(json.dumps(self.shown, indent=1))

    # ------------------------------------------------------------------------------------------------ the steps

    def one_process(self) -> list[str]:
        self.obowlab("one", "run", "demo", *self.changes, "--launcher", "local", "--no-progress")
        return [f"{self.run('one').state.step} steps", f"5-shot {five_shot(self.run('one')):.2f} %"]

    def two_nodes(self) -> list[str]:
        self.obowlab("two", "run", "demo", *self.changes, *NODES, "--launcher", "slurm", "--wait")
        one, two = self.run("one"), self.run("two")
        assert two.facts()["procs"] == 4
        first, ten, late = differences(one, two)
        assert first < 2**-8, f"the first step differs by {first:.1e}, more than bfloat16 rounds"
        assert late < 0.05, f"the last epoch's loss differs by {late:.1%}"
        gained = five_shot(one) - five_shot(one, subject="random")
        apart = abs(five_shot(one) - five_shot(two))
        # Rounding grows in the violent first steps: on one process, seeds and precisions end as far apart as this.
        assert apart < 0.4 * gained, f"5-shot {five_shot(two):.2f} % is not what one process ends with, {five_shot(one):.2f} %"
        return [
            f"loss against one process, in bfloat16: {told(first, ten, late)}",
            f"5-shot {five_shot(two):.2f} %, {apart:.2f} from one process, which gained {gained:.2f} by training",
        ]

    def in_float32(self) -> list[str]:
        changes = ("training.epochs=1", "training.precision=float32", "evaluation.protocols=[]")
        words = ("run", "demo", *(word for change in changes for word in ("--set", change)))
        self.obowlab("one32", *words, "--launcher", "local", "--no-progress")
        self.obowlab("two32", *words, *NODES, "--launcher", "slurm", "--wait")
        first, ten, late = differences(self.run("one32"), self.run("two32"))
        assert first < 1e-5, f"the first step differs by {first:.1e}"
        return [f"loss against one process, in float32: {told(first, ten, late)}"]

    def disturbed(self) -> list[str]:
        self.obowlab("disturbed", "run", "demo", *self.changes, *NODES, "--launcher", "slurm")
        job = self.job_of("disturbed")
        folder = self.run("disturbed")
        events = []
        for what, disturb in (("requeue", self.requeue), ("preemption", self.preempt), ("time-out", self.time_out)):
            if folder.state.status == "finished":
                raise AssertionError(f"the run was over before the {what}: give it more --epochs")
            before = restarts(job)
            wait_for_steps(folder)
            events.append(f"{what} at step {folder.state.step}")
            disturb(job)
            wait_for_queue(job, restarted=before + 1)
        self.obowlab("disturbed", "run", "demo", *self.changes, *NODES, "--launcher", "slurm", "--wait")
        calm = self.run("two")
        assert points(folder) == points(calm), "the metrics differ from the undisturbed run"
        assert not differing_weights(folder, calm), "the weights differ"
        runs, lost, doubled = mlflow_points(folder)
        assert (runs, lost, doubled) == (1, 0, 0)
        steps = [attempt["step"] for attempt in folder.attempts()]
        return [
            *events,
            f"went on from steps {steps[1:]}; weights and metrics equal the undisturbed two-node run to the bit",
            "1 MLflow run, 0 points lost, 0 doubled",
        ]

    def table(self) -> list[str]:
        command = ("ablate", "table3", "--scale", "demo", "--jobs", "2", "--launcher", "slurm")
        self.obowlab("table", *command)
        job = wait_until(lambda: job_on("node2"), timeout_s=120)
        raw = slurm("squeue", "--noheader", "--array", "--format=%A", f"--jobs={job}").split()[0]
        folder = self.run_of(job)
        wait_until(lambda: folder.state.total_steps and folder.state.step >= folder.state.total_steps // 2, timeout_s=1800)
        step = folder.state.step
        kill_node2(raw)
        say(f"node2 is dead, with {folder.run_id} at step {step}; Slurm notices after its SlurmdTimeout")
        wait_until(lambda: restarts(raw) >= 1, timeout_s=400)
        subprocess.run(["slurmd", "-N", "node2"], check=True)
        wait_for_queue(raw, restarted=1)
        shown = self.obowlab("table", *command, "--wait")
        again = [attempt["step"] for attempt in folder.attempts()][1:]
        assert folder.state.status == "finished"
        assert again, "the run of the dead node was not resumed"
        if not self.changes:  # the base row is the demo
            (base,) = (self.work / "table").glob("demo-vanilla-s0-" + self.run("one").info.fingerprint[:8])
            assert points(RunFolder.open(base)) == points(self.run("one")), "the base row differs from the demo on one process"
        for run in (self.work / "table").glob("demo-*"):
            assert mlflow_points(RunFolder.open(run)) == (1, 0, 0)
        rows = [line.rstrip() for line in shown.splitlines() if "±" in line]
        return [f"node2 killed at step {step} of {folder.run_id}, which went on from step {again[0]}", *rows]

    # ------------------------------------------------------------------------------------------- disturbances

    def requeue(self, job: str) -> None:
        slurm("scontrol", "requeue", job)

    def preempt(self, job: str) -> None:
        slurm("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 5")

    def time_out(self, job: str) -> None:
        """Let the limit be a minute from now; Slurm announces its end 40 seconds before, give or take its own minute."""
        slurm("scontrol", "update", f"JobId={job}", f"TimeLimit={run_minutes(job) + 1}")

    # ------------------------------------------------------------------------------------------------- helpers

    def obowlab(self, name: str, *words: str) -> str:
        machine = self.work / f"{name}.toml"
        cpus = 3 if name == "table" else 1  # of the four of a node: one run of the table on each
        machine.write_text(MACHINE.format(work=self.work, name=name, cpus=cpus))
        command = [sys.executable, "-m", "obowlab.cli", *words, "--machine", str(machine)]
        say(f"$ obowlab {' '.join(words)}")
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        print(done.stdout, flush=True)
        assert done.returncode == 0, f"exit code {done.returncode}"
        return done.stdout

    def run(self, name: str) -> RunFolder:
        (path,) = (self.work / name).glob("demo-s0-*")
        return RunFolder.open(path)

    def orders(self, name: str) -> list[dict[str, Any]]:
        files = sorted((self.work / name / ".jobs").glob("*/order.json"))
        return [job for file in files for job in json.loads(file.read_text())["jobs"]]

    def job_of(self, name: str) -> str:
        return str(self.orders(name)[-1]["id"])

    def run_of(self, job: str) -> RunFolder:
        (run,) = next(order["runs"] for order in self.orders("table") if order["id"] == job)
        return RunFolder.open(self.work / "table" / run)


def differences(one: RunFolder, other: RunFolder) -> tuple[float, float, float]:
    """Return by how much, relatively, the loss differs at step 1, at most in steps 1 to 10, and in the mean of the last epoch."""
    losses = [(a[1]["loss"], b[1]["loss"]) for a, b in zip(points(one), points(other), strict=True)]
    relative = [abs(a - b) / a for a, b in losses[:10]]
    tail = losses[-(one.state.total_steps or 1) // one.info.recipe.training.epochs :]
    return relative[0], max(relative), abs(sum(a - b for a, b in tail)) / sum(a for a, _ in tail)


def told(first: float, ten: float, late: float) -> str:
    return f"step 1 differs by {first:.1e}, steps 1 to 10 by at most {ten:.1e}, the mean of the last epoch by {late:.2%}"


def five_shot(folder: RunFolder, *, subject: str = "student") -> float:
    """Return the 5-shot accuracy of a run, in percent."""
    results = [result for result in folder.results() if (result["subject"], result["protocol"]) == (subject, "fewshot")]
    return float(next(each["value"] for each in results[0]["measurements"] if each["name"] == "fewshot_5shot"))


def mlflow_points(folder: RunFolder) -> tuple[int, int, int]:
    """Return how many MLflow runs there are of a run, and of its training points how many it lacks and has twice."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder.path.parent}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, filter_string=f"tags.`obowlab.run_id` = '{folder.run_id}'")
    wanted = [(point.step, value) for point in folder.metrics() for key, value in point.values.items() if key == "loss"]
    there = [(point.step, point.value) for point in client.get_metric_history(runs[0].info.run_id, "train/loss")]
    return len(runs), len(set(wanted) - set(there)), len(there) - len(set(there))


def slurm(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout


def restarts(job: str) -> int:
    words = slurm("scontrol", "show", "job", job).split()
    return int(next(word.removeprefix("Restarts=") for word in words if word.startswith("Restarts=")))


def run_minutes(job: str) -> int:
    """Return the minutes of the job's present start, begun ones counting."""
    words = slurm("scontrol", "show", "job", job).split()
    clock = next(word.removeprefix("RunTime=") for word in words if word.startswith("RunTime="))
    hours, minutes, seconds = (int(part) for part in clock.rpartition("-")[2].split(":"))
    return hours * 60 + minutes + (seconds > 0)


def job_on(node: str) -> str:
    lines = slurm("squeue", "--noheader", "--array", "--states=RUNNING", "--format=%i|%N").splitlines()
    return next((line.split("|")[0] for line in lines if line.split("|")[1] == node), "")


def kill_node2(job: str) -> None:
    """Kill the node's daemon and everything of the job that runs there, at once and without a word."""
    daemon = int((Path(os.environ["SLURM_CONF"]).parent / "slurmd-node2.pid").read_text())
    mine = f"SLURM_JOB_ID={job}".encode()
    doomed = [daemon]
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (
                mine in (entry / "environ").read_bytes().split(b"\0") or f"slurmstepd: [{job}." in (entry / "cmdline").read_text()
            ):
                doomed.append(int(entry.name))
        except OSError:
            continue
    for pid in doomed:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def wait_for_steps(folder: RunFolder, *, steps: int = 20) -> None:
    """Wait until a run has made so many more steps than now."""
    goal = folder.state.step + steps
    wait_until(lambda: folder.state.step >= goal, timeout_s=900)


def wait_for_queue(job: str, *, restarted: int) -> None:
    """Wait until a job is back in the queue, and let it start again now: Slurm itself would wait two minutes."""
    wait_until(
        lambda: restarts(job) >= restarted and slurm("squeue", "-h", "-j", job, "-o", "%T").strip() == "PENDING", timeout_s=400
    )
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now", "TimeLimit=60")


def wait_until(condition: Callable[[], Any], *, timeout_s: float) -> Any:
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {timeout_s:.0f} s in vain"
        time.sleep(0.5)
    return value


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


# ---------------------------------------------------------------------------------------------------------- the cluster


def ensure_cluster(tools: Path) -> None:
    """Use the cluster that SLURM_CONF leads to, or start one."""
    if "SLURM_CONF" not in os.environ and (STATE / "slurm.conf").exists():
        os.environ["SLURM_CONF"] = str(STATE / "slurm.conf")
    if "SLURM_CONF" in os.environ and is_up():
        return
    start = tools / "start.sh"
    if not start.is_file():
        sys.exit(f"There is no cluster and no {start} to start one: set SLURM_CONF, or SLURM_TOOLS=DIR.")
    if os.geteuid() != 0:
        sys.exit("Starting a cluster takes root; set SLURM_CONF to use one that runs.")
    if shutil.which("slurmctld") is None or shutil.which("mariadbd") is None:
        say(f"Installing Debian packages: {' '.join(PACKAGES)}")
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "-qq"], env=environment, check=True)
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES]
        subprocess.run(install, env=environment, stdout=subprocess.DEVNULL, check=True)
    say(f"Starting a two-node Slurm in {STATE}")
    subprocess.run(["bash", str(start), str(STATE)], check=True)
    os.environ["SLURM_CONF"] = str(STATE / "slurm.conf")
    wait_until(is_up, timeout_s=60)


def is_up() -> bool:
    done = subprocess.run(["sinfo", "--noheader", "--format=%t"], capture_output=True, text=True, timeout=240, check=False)
    return done.returncode == 0 and bool(done.stdout.split())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("slurm-demo"), help="where everything is kept")
    parser.add_argument("--tools", type=Path, default=Path("../shared/tools/slurm"), help="the folder of start.sh")
    parser.add_argument("--epochs", type=int, help="of the runs; the demo's own if absent")
    words = parser.parse_args()
    words.work.mkdir(parents=True, exist_ok=True)
    ensure_cluster(words.tools.absolute())
    for variable in ("OBOWLAB_MACHINE", "OBOWLAB_RUNS_ROOT", "OBOWLAB_DATA_ROOT", "MLFLOW_TRACKING_URI"):
        os.environ.pop(variable, None)
    demo = Demo(words.work.absolute(), epochs=words.epochs)
    demo.step("the demo on one process, without Slurm", demo.one_process)
    demo.step("the demo on 2 nodes x 2 processes", demo.two_nodes)
    demo.step("one epoch in float32, on one process and on 2 nodes x 2 processes", demo.in_float32)
    demo.step("the demo on 2 nodes x 2 processes, requeued, preempted and out of time", demo.disturbed)
    demo.step("table 3 as an array, one node killed half-way", demo.table)
    print()
    for name, lines in demo.shown.items():
        print(name, *(f"    {line}" for line in lines), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
