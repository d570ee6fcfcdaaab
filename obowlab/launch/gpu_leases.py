"""Leases of this machine's GPUs: names that the kernel gives to one process at a time, and takes back when it ends.

A GPU has two names in Linux's abstract socket namespace, as a run has two locks: the launcher holds one, the training process
that computes on the GPU the other. So a GPU stays taken while a training process whose launcher was killed is still saving.
There is no file that could be deleted, left behind or owned by another user. Containers with a network of their own do not see
each other's names: give each its own GPUs.

Anybody on the machine could hold such a name. Who does is asked of the kernel, through a connection that nobody answers: a
lease listens, and whatever does not is no run and is not waited for.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Literal, get_args

from obowlab.config import Machine
from obowlab.errors import AbsentError, UserError
from obowlab.files.locks import process_name
from obowlab.launch.system import computes_on_cpu, count_gpus, visible_gpus

GPUS_VARIABLE = "OBOWLAB_GPUS"
"""Set by a launcher that holds GPUs for the processes it starts: their UUIDs, in the order of local ranks."""

POLL_S = 1.0
PATIENCE_S = 60.0
"""So long a name is waited for that no run holds, in seconds."""

ASK_EVERY_S = 600.0
BACKLOG = 128
"""So many questions who holds a lease are answered by the kernel."""

Role = Literal["launcher", "worker"]
ROLES: tuple[Role, ...] = get_args(Role)
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

    While other runs have them, this waits, and logs now and then who they are.

    Args:
        machine: a machine that computes on the CPU needs none.
        given_up: asked while waiting; when it returns True, nothing is leased.

    Raises:
        UserError: there are fewer, or something that is no run keeps them.

    Yields:
        Variables for the training processes: which GPUs they see. Empty for a CPU, and when given up.
    """
    count = 0 if computes_on_cpu(machine) else machine.procs // machine.nodes
    if count == 0:
        yield {}
        return
    check_gpus(machine.model_copy(update={"device": "cuda"}))  # with fewer, the waiting would never end
    with ExitStack() as held:
        began, asked = time.monotonic(), -math.inf
        while not (leases := _take(count)):
            if given_up():
                yield {}
                return
            if time.monotonic() - asked > ASK_EVERY_S:
                noun = "GPU" if count == 1 else "GPUs"
                logger.info("Waiting for %d free %s of %d; %s", count, noun, count_gpus(), _holders())
                asked = time.monotonic()
            if time.monotonic() - began > PATIENCE_S:
                _refuse_strangers(count)
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
        name.bind(_name(gpu, role))
    except OSError as error:
        name.close()
        if error.errno != errno.EADDRINUSE:
            raise
        return None
    name.listen(BACKLOG)
    return name


def holder_of(gpu: str) -> str | None:
    """Return who holds a GPU, for a sentence; None when nobody does, or something that is no run."""
    for role in ROLES:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking, suppress(ConnectionRefusedError):
            asking.setblocking(False)
            try:
                asking.connect(_name(gpu, role))
            except BlockingIOError:  # it was asked too often
                return "another process"
            pid, _, _ = struct.unpack("3i", asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
            return process_name(pid) if pid else "a process of another container"
    return None


def _holders() -> str:
    held = [f"{gpu} is held by {who}" for gpu in visible_gpus() if (who := holder_of(gpu)) is not None]
    return "; ".join([*held, "`obowlab jobs` shows the runs."])


def _refuse_strangers(count: int) -> None:
    """Refuse to wait when too many GPUs are kept by what is no run, and so may never end.

    Raises:
        UserError: names one of them.
    """
    strange = [gpu for gpu in visible_gpus() if _is_bound(gpu) and holder_of(gpu) is None]
    if count_gpus() - len(strange) < count:
        raise UserError(
            f"The lease of {strange[0]} has been kept for {PATIENCE_S:.0f} s by a process that is no run of this obowlab "
            "(`sudo ss -xap | grep obowlab` names it): end it, or choose other GPUs with CUDA_VISIBLE_DEVICES."
        )


def _is_bound(gpu: str) -> bool:
    """Return whether any process has one of a GPU's names."""
    for role in ROLES:
        mine = hold(gpu, role=role)
        if mine is None:
            return True
        mine.close()
    return False


def _name(gpu: str, role: Role) -> str:
    return f"\0obowlab {role} of {gpu}"[:100]


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
