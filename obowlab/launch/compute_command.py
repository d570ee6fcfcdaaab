"""The command and the environment of a compute process, which trains and evaluates a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from obowlab.config import Machine
from obowlab.files.sharing import private_folder
from obowlab.launch.system import computes_on_cpu
from obowlab.runs.locks import LOCK_TOKEN_VARIABLE
from obowlab.runs.provenance import num_cores

CommandFactory = Callable[[Path, Machine], list[str]]

NO_PROGRESS_VARIABLE = "OBOWLAB_NO_PROGRESS"
PATIENCE_VARIABLE = "OBOWLAB_PATIENCE_S"
"""Seconds to wait for a locked run before giving up; set for jobs of a cluster, where the holder is often the previous start of
the same job, still shutting down."""


def compute_command(path: Path, machine: Machine, *, module: str = "obowlab.training") -> list[str]:
    """Return the command that trains and evaluates the run of a folder on this node, through torchrun for several processes.

    Another module is started in the same way, with a path of its own.

    torchrun's own restarts are not used: the launcher starts a group that died anew, without leftovers of the dead processes.
    """
    launcher: list[str] = []
    if machine.procs > 1:
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(machine.procs // machine.nodes), "--max-restarts", "0"]
        if machine.nodes == 1:
            launcher += ["--standalone"]  # finds a free port itself, without a race
        else:
            launcher += ["--nnodes", str(machine.nodes), "--rdzv-backend", "c10d", "--rdzv-conf", "store_type=file"]
    return [sys.executable, *launcher, "-m", module, str(path)]


def environment_of(machine: Machine, *, token: str, progress: bool) -> dict[str, str]:
    """Return the variables of a compute process.

    Args:
        machine: says how many processes and threads, and on which device.
        token: of the run's lock.
        progress: whether it shows its progress on the terminal.
    """
    environment = {
        **os.environ,
        LOCK_TOKEN_VARIABLE: token,
        "OMP_NUM_THREADS": str(threads_of(machine)),
    }
    if machine.compile:  # what PyTorch compiles is loaded as code, and its own place in /tmp has a name that anybody may take
        environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(private_folder("compiled")))
    if machine.deterministic:
        environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses deterministic work without it
    if machine.device != "cuda" and machine.procs > 1:  # gloo would warn of a setting that is intended
        environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not progress:
        environment[NO_PROGRESS_VARIABLE] = "1"
    return environment


def threads_of(machine: Machine) -> int:
    """Return the CPU threads of one process: as set, as OMP_NUM_THREADS says, or the default.

    Beside a GPU that is the process's share of the cores. On the CPU it is 1: two threads that wait for each other within every
    operation fall to a hundredth of their speed as soon as anything else runs on the machine, and with one thread the bits of a
    result do not depend on the number of cores.
    """
    if machine.threads is not None:
        return machine.threads
    inherited = os.environ.get("OMP_NUM_THREADS", "")
    if inherited.isdigit() and int(inherited) > 0:
        return int(inherited)
    if computes_on_cpu(machine):
        return 1
    return max(1, num_cores() // (machine.procs // machine.nodes))
