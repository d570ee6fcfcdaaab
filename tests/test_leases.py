"""GPU leases: real processes, names of the kernel, stand-in GPUs."""

import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from obowlab.config import Machine
from obowlab.errors import UserError
from obowlab.launch import gpu_leases
from obowlab.launch.gpu_leases import GPUS_VARIABLE, check_gpus, hold, hold_as_worker, leased, take
from tests.gpus import stand_in_gpus

HOLD = """
import sys, time
from obowlab.launch import gpu_leases
from obowlab.launch.gpu_leases import hold_as_worker, take
gpu, role = sys.argv[1:]
name = take(gpu) if role == "launcher" else hold_as_worker(local_rank=0, gpus=[gpu])
assert name is not None
print("held", flush=True)
time.sleep(60)
"""


def holder(gpu: str, role: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen([sys.executable, "-c", HOLD, gpu, role], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names = [f"GPU-{tmp_path.name}-{time.time_ns()}-{number}" for number in range(3)]
    stand_in_gpus(tmp_path / "bin", monkeypatch, gpus=names)
    return names


def machine(procs: int, device: str = "cuda") -> Machine:
    return Machine.model_validate({"device": device, "procs": procs})


def test_a_gpu_is_free_again_only_when_launcher_and_worker_are_gone(gpus: list[str]) -> None:
    launcher = holder(gpus[0], "launcher")
    worker = holder(gpus[0], "worker")
    assert take(gpus[0]) is None
    launcher.kill()
    launcher.wait()
    assert take(gpus[0]) is None  # its training process is still saving
    worker.kill()
    worker.wait()
    mine = take(gpus[0])
    assert mine is not None
    mine.close()


def test_two_commands_never_share_and_the_later_one_waits(gpus: list[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="obowlab")
    order: list[str] = []
    with leased(machine(2)) as first:
        assert first == {GPUS_VARIABLE: f"{gpus[0]},{gpus[1]}", "CUDA_VISIBLE_DEVICES": f"{gpus[0]},{gpus[1]}"}
        with leased(machine(1, "auto")) as second:
            assert second[GPUS_VARIABLE] == gpus[2]

        def wait() -> None:
            with leased(machine(2)) as later:
                order.append(later[GPUS_VARIABLE])

        waiting = threading.Thread(target=wait)
        waiting.start()
        while not caplog.messages:
            time.sleep(0.01)
        order.append("given back")
    waiting.join()
    assert order == ["given back", f"{gpus[0]},{gpus[1]}"]
    (said,) = caplog.messages
    assert said.startswith("Waiting for 2 free GPUs of 3; ")
    assert f"{gpus[0]} is held by process {os.getpid()} (" in said


def test_a_stranger_that_keeps_a_lease_is_not_waited_for(gpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_leases, "PATIENCE_S", 0.0)
    monkeypatch.setattr(gpu_leases, "POLL_S", 0.01)
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as stranger:
        stranger.bind(f"\0obowlab launcher of {gpus[1]}"[:100])
        with leased(machine(2)) as mine:  # the other two are enough
            assert mine[GPUS_VARIABLE] == f"{gpus[0]},{gpus[2]}"
        with (
            pytest.raises(UserError, match=f"The lease of {gpus[1]} has been kept .* by a process that is no run"),
            leased(machine(3)),
        ):
            pass
    assert gpu_leases.holder_of(gpus[1]) is None
    process = holder(gpus[1], "worker")
    assert f"process {process.pid} (" in str(gpu_leases.holder_of(gpus[1]))
    process.kill()
    process.wait()


def test_waiting_can_be_given_up_and_leaves_nothing_taken(gpus: list[str]) -> None:
    other = take(gpus[1])
    assert other is not None
    with leased(machine(3), given_up=lambda: True) as mine:
        assert mine == {}
    for gpu in (gpus[0], gpus[2]):
        free = take(gpu)
        assert free is not None
        free.close()
    other.close()


def test_a_worker_that_lost_its_gpu_says_so(gpus: list[str]) -> None:
    other = hold(gpus[0], role="worker")
    assert other is not None
    with pytest.raises(UserError, match=f"GPU {gpus[0]} is used by another run"):
        hold_as_worker(local_rank=0, gpus=gpus)
    other.close()
    assert hold_as_worker(local_rank=0, gpus=[]) is None


def test_no_gpu_is_taken_for_the_cpu_and_only_visible_ones_for_cuda(gpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with leased(machine(3, "cpu")) as nothing:
        assert nothing == {}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"{gpus[2]},7,{gpus[0]}")  # what follows an unknown one is hidden
    with leased(machine(1)) as mine:
        assert mine[GPUS_VARIABLE] == gpus[2]
    with pytest.raises(UserError, match="This machine has 1 GPU, not 2"):
        check_gpus(machine(2))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with leased(machine(1)) as mine:
        assert mine[GPUS_VARIABLE] == gpus[1]
