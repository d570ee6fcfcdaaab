"""GPU leases whose holders die: no GPU is ever computed on by two runs, and none stays taken."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import random
import signal
import sys
import time
from pathlib import Path

from obowlab.config import Machine
from obowlab.errors import UserError
from obowlab.launch.gpu_leases import GPUS_VARIABLE, hold_as_worker, leased, take
from obowlab.launch.processes import tied_to_this_process
from obowlab.launch.system import installed_gpus
from tests.chaos import forks
from tests.chaos.forks import Child
from tests.chaos.judge import BrokenError
from tests.chaos.ledger import Case, Kind
from tests.gpus import write_stand_in

NUM_GPUS = 3
CONTENDERS = 5
SAVING_S = 0.3
"""How long a training process goes on computing after its launcher is dead."""


def leases(case: Case) -> None:
    """Kill -9 launchers and training processes that contend for three GPUs."""
    gpus = [f"GPU-chaos-{os.getpid()}-{case.seed}-{number}" for number in range(NUM_GPUS)]
    write_stand_in(case.place / "nvml", gpus=gpus)
    environment = {"CUDA_VISIBLE_DEVICES": ""}
    contenders: list[Child] = []
    while case.injected < case.num_faults:
        contenders = [one for one in contenders if one.poll() is None]
        while len(contenders) < CONTENDERS:
            seed = case.dice.random()
            work = functools.partial(_launcher, case.place, seed)
            contenders.append(forks.fork(work, place=case.place, name=f"launcher-{seed}", environment=environment))
        time.sleep(case.dice.random() * 0.25)
        victim = case.dice.choice(contenders)
        below = victim.family()[1:]
        if not below:  # still waiting for a GPU
            continue
        pid = case.dice.choice((victim.pid, victim.pid, below[-1]))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            case.fault(f"{'launcher' if pid == victim.pid else 'training process'} killed")
    for one in contenders:
        one.kill_family()
    shared = list(case.place.glob("shared-*"))
    case.doubled += len(shared)
    end = time.monotonic() + 20
    for gpu in gpus:
        while (mine := take(gpu)) is None:
            if time.monotonic() > end:
                raise BrokenError(f"{gpu} stays taken although everybody is dead")
            time.sleep(0.05)
        mine.close()


def _launcher(place: Path, seed: float) -> int:
    """Lease one GPU, let a training process compute on it, and wait for that."""
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    sys.path.insert(0, str(place / "nvml"))
    sys.modules.pop("pynvml", None)
    installed_gpus.cache_clear()
    die_with_parent = tied_to_this_process()
    with leased(Machine(device="cuda")) as variables:
        pid = os.fork()
        if pid == 0:
            os.environ.update(variables)
            stopped: list[int] = []
            signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
            die_with_parent()
            os._exit(_compute(place, random.Random(seed), stopped))
        os.waitpid(pid, 0)
    return 0


def _compute(place: Path, dice: random.Random, stopped: list[int]) -> int:
    """Compute on the leased GPU: hold a lock of our own on it, which tells whether anybody else does so too."""
    gpu = os.environ[GPUS_VARIABLE]
    try:
        mine = hold_as_worker(local_rank=0)
    except UserError:
        return 2
    with (place / f"truth-{gpu}").open("w") as truth:
        try:
            fcntl.flock(truth, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            (place / f"shared-{gpu}-{os.getpid()}").touch()
            return 1
        end = time.monotonic() + dice.uniform(0.1, 1.0)
        while time.monotonic() < end and not stopped:
            time.sleep(0.01)
        time.sleep(SAVING_S if stopped else 0.0)
    assert mine is not None
    return 0


def not_linux() -> str | None:
    """Return why leases cannot be tried here, or None."""
    return None if Path("/proc/self").exists() else "leases are names of Linux's kernel"


KINDS = {"gpus": Kind("lost GPU leases", leases, share=40, per_case=10, lacking=not_linux)}
