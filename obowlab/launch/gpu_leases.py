"""Leases of this machine's GPUs: names that the kernel gives to one process at a time, and takes back when it ends.

A GPU has two names in Linux's abstract socket namespace, as a run has two locks: the launcher holds one, the training process
that computes on the GPU the other. So a GPU stays taken while a training process whose launcher was killed is still saving.
There is no file that could be deleted, left behind or owned by another user. Containers with a network of their own do not see
each other's names: give each its own GPUs.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal

from obowlab.config import Machine
from obowlab.errors import AbsentError, UserError
from obowlab.launch.system import count_gpus, visible_gpus

GPUS_VARIABLE = "OBOWLAB_GPUS"
"""Set by a launcher that holds GPUs for the processes it starts: their UUIDs, in the order of local ranks."""

POLL_S = 1.0
Role = Literal["launcher", "worker"]
logger = logging.getLogger(__name__)


def check_gpus(machine: Machine) -> None:
    """Refuse a machine that asks for more GPUs than there are.

    Raises:
        AbsentError: says how many there are.
    """
    needed = machine.procs // machine.nodes
    if machine.device == "cpu" or (machine.device == "auto" and needed == 1):
        return
    present = count_gpus()
    if machine.device == "auto" and present == 0:
        return  # several processes on the CPU
    if present < needed:
        fewer = f"--gpus {present} or " if present else ""
        noun = "GPU" if present == 1 else "GPUs"
        raise AbsentError(f"This machine has {present} {noun}, not {needed}; use {fewer}--device cpu --procs N.")


@contextmanager
def leased(machine: Machine, *, given_up: Callable[[], bool] = lambda: False) -> Iterator[Mapping[str, str]]:
    """Lease as many free GPUs as a machine's processes on this node need, for as long as the context lasts.

    While other runs have them, this waits, and logs so once.

    Args:
        machine: a machine that computes on the CPU needs none.
        given_up: asked while waiting; when it returns True, nothing is leased.

    Raises:
        UserError: there are fewer.

    Yields:
        Variables for the training processes: which GPUs they see. Empty for a CPU, and when given up.
    """
    count = 0 if machine.device == "cpu" else machine.procs // machine.nodes
    if count == 0 or (machine.device == "auto" and count_gpus() == 0):
        yield {}
        return
    check_gpus(machine.model_copy(update={"device": "cuda"}))  # with fewer, the waiting would never end
    with ExitStack() as held:
        waiting = False
        while not (leases := _take(count)):
            if given_up():
                yield {}
                return
            if not waiting:
                noun = "GPU" if count == 1 else "GPUs"
                logger.info("Waiting for %d free %s of %d; `obowlab jobs` shows who has them.", count, noun, count_gpus())
                waiting = True
            time.sleep(POLL_S)
        for lease in leases.values():
            held.enter_context(lease)
        gpus = ",".join(leases)
        yield {GPUS_VARIABLE: gpus, "CUDA_VISIBLE_DEVICES": gpus}


@contextmanager
def using_gpus(machine: Machine) -> Iterator[None]:
    """Let this process itself compute on free GPUs, and on no others; enter it before torch is asked for a GPU.

    Args:
        machine: says how many; one that computes on the CPU needs none.
    """
    with leased(machine) as variables:
        before = os.environ.get("CUDA_VISIBLE_DEVICES")
        if variables:
            os.environ["CUDA_VISIBLE_DEVICES"] = variables["CUDA_VISIBLE_DEVICES"]
        try:
            yield
        finally:
            if variables and before is None:
                del os.environ["CUDA_VISIBLE_DEVICES"]
            elif before is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = before


def _take(count: int) -> dict[str, socket.socket]:
    """Take so many GPUs; none at all when there are not enough free ones."""
    taken: dict[str, socket.socket] = {}
    for gpu in visible_gpus():
        lease = take(gpu)
        if lease is not None:
            taken[gpu] = lease
        if len(taken) == count:
            return taken
    for lease in taken.values():
        lease.close()
    return {}


def hold(gpu: str, *, role: Role) -> socket.socket | None:
    """Hold a GPU in one of the two roles; None when another process does. Closing the socket, or the process's end, frees it.

    Args:
        gpu: its UUID.
        role: which of its two names.
    """
    name = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    if sys.platform != "linux":  # no such names there, and no NVIDIA GPUs
        return name
    try:
        name.bind(f"\0obowlab {role} of {gpu}"[:100])
    except OSError as error:
        name.close()
        if error.errno != errno.EADDRINUSE:
            raise
        return None
    return name


def take(gpu: str) -> socket.socket | None:
    """Hold a GPU as a launcher; None when another launcher does, or a training process that outlived its launcher."""
    mine = hold(gpu, role="launcher")
    if mine is None:
        return None
    worker = hold(gpu, role="worker")
    if worker is None:
        mine.close()
        return None
    worker.close()
    return mine


def hold_as_worker(*, local_rank: int, gpus: Sequence[str] | None = None) -> socket.socket | None:
    """Hold the GPU of this training process beside its launcher; None when no launcher gave it one.

    Args:
        local_rank: which of the launcher's GPUs is ours.
        gpus: their UUIDs; those of `GPUS_VARIABLE` if absent.

    Raises:
        UserError: another run has it; this one lost its lease.
    """
    if gpus is None:
        gpus = [gpu for gpu in os.environ.get(GPUS_VARIABLE, "").split(",") if gpu]
    if not gpus:
        return None
    mine = hold(gpus[local_rank], role="worker")
    if mine is None:
        raise UserError(f"GPU {gpus[local_rank]} is used by another run: run the command again to get a free one.")
    return mine
