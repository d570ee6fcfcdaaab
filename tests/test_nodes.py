"""Two nodes on one machine: a launcher and a follower that meet in a folder, with real torchrun groups."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from obowlab.config import Loaded, Machine
from obowlab.launch import local as launching
from obowlab.launch import nodes
from obowlab.launch.compute_command import compute_command
from obowlab.launch.nodes import RENDEZVOUS_VARIABLE, Rendezvous
from obowlab.launch.system import process_tree
from obowlab.runs.folder import RunFolder
from tests.processes import wait_until
from tests.runs import complete, differing_weights, points, small_recipe

NODE = [sys.executable, "-m", "obowlab.launch.follower"]


pytestmark = pytest.mark.usefixtures("no_mirror")


def machine_of(root: Path, *, data_root: Path, nodes: int) -> Machine:
    values = {"data_root": data_root, "runs_root": root, "device": "cpu", "loader": "torch", "workers": 0, "procs": 2}
    return Machine.model_validate({**values, "nodes": nodes})


def recipe_in(folder: Path) -> Loaded:
    return small_recipe(folder, dataset="small", epochs=6, batch_size=8, overrides=("evaluation.protocols=[]",))


@contextmanager
def second_node(rendezvous: Rendezvous) -> Iterator[subprocess.Popen[bytes]]:
    follower = subprocess.Popen([*NODE, str(rendezvous.folder), "1"])
    try:
        yield follower
    finally:
        follower.kill()
        follower.wait()


@pytest.mark.long
def test_two_nodes_equal_one_though_a_process_of_each_is_killed(
    tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = recipe_in(tmp_path)
    one_node = complete(loaded, machine=machine_of(tmp_path / "one", data_root=data_root, nodes=1), seed=3)
    machine = machine_of(tmp_path / "two", data_root=data_root, nodes=2)
    rendezvous = Rendezvous(tmp_path / "rendezvous")
    monkeypatch.setenv(RENDEZVOUS_VARIABLE, str(rendezvous.folder))
    codes: list[int] = []

    def lead() -> None:
        codes.append(launching.launch(loaded, seed=3, machine=machine, fresh=False, progress=False))

    with second_node(rendezvous) as follower, rendezvous.heartbeat():
        leader = threading.Thread(target=lead)
        leader.start()
        path = machine.runs_root / one_node.run_id
        wait_until((path / "run.json").exists)
        folder = RunFolder.open(path)
        for number, node in enumerate((1, 0), start=1):
            _wait_for_steps(folder, attempt=number, leader=leader)
            of_node_1 = [pid for pid in process_tree(follower.pid) if _is_worker(pid)]
            of_both = [pid for pid in process_tree(os.getpid()) if _is_worker(pid)]
            of_node_0 = [pid for pid in of_both if pid not in of_node_1]
            if node == 1:  # the other notices nothing, as in a collective of NCCL: only the report of node 1 can tell
                os.kill(of_node_0[0], signal.SIGSTOP)
            os.kill(of_node_1[0] if node == 1 else of_node_0[0], signal.SIGKILL)
        leader.join(timeout=200)
        assert codes == [0]
        files = {path.name for path in rendezvous.folder.iterdir()}
    assert {"failed-1-1", "round.json"} <= files
    assert folder.state.status == "finished"
    assert len(folder.attempts()) == 3
    assert points(folder) == points(one_node)
    assert not differing_weights(one_node, folder)


def _is_worker(pid: int) -> bool:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return b"obowlab.training" in words and b"torch.distributed.run" not in words


def _wait_for_steps(folder: RunFolder, *, attempt: int, leader: threading.Thread) -> None:
    wait_until(lambda: len(folder.attempts()) == attempt)
    step = folder.state.step
    wait_until(lambda: folder.state.step > step or not leader.is_alive())
    assert leader.is_alive(), "the run was over too early to kill anything"


def test_the_other_nodes_end_when_all_is_over_or_node_0_falls_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rendezvous = Rendezvous(tmp_path / "rendezvous")
    with rendezvous.heartbeat():
        assert rendezvous.is_alive()
        follower = subprocess.Popen([*NODE, str(rendezvous.folder), "1"])
        time.sleep(0.5)
        assert follower.poll() is None
    assert follower.wait(timeout=240) == 0
    monkeypatch.setattr(nodes, "SILENCE_S", 0.3)
    silent = Rendezvous(tmp_path / "silent")
    assert silent.next_round(after=0) is None
    assert not silent.is_over()


def test_a_newer_call_ends_the_one_before(tmp_path: Path) -> None:
    rendezvous = Rendezvous(tmp_path)
    first = rendezvous.start_round(tmp_path / "run", token="a")
    assert rendezvous.is_current(first)
    assert not rendezvous.has_failed(first)
    rendezvous.report_failure(first, node=1)
    assert rendezvous.has_failed(first)
    second = rendezvous.start_round(tmp_path / "run", token="a")
    assert not rendezvous.is_current(first)
    assert not rendezvous.has_failed(second)
    assert rendezvous.next_round(after=1) == second
    assert rendezvous.torchrun_variables(second) != rendezvous.torchrun_variables(first)


def test_torchrun_is_told_the_share_of_a_node(tmp_path: Path) -> None:
    one = compute_command(tmp_path, Machine(procs=4))
    assert one[one.index("--nproc-per-node") + 1] == "4"
    assert "--standalone" in one
    two = compute_command(tmp_path, Machine(procs=4, nodes=2))
    assert two[two.index("--nproc-per-node") + 1] == "2"
    assert two[two.index("--nnodes") + 1] == "2"
    assert "--standalone" not in two
