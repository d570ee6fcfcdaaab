"""Leases of this machine's GPUs: names that the kernel gives to one process at a time, and takes back when it is gone.

A GPU has two names in Linux's abstract socket namespace, as a run has two locks: the launcher holds one, the training process
that computes on the GPU the other. So a GPU stays taken while a training process whose launcher was killed is still saving.
There is no file that could be deleted, left behind or owned by another user. Containers with a network of their own do not see
each other's names: give each its own GPUs.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal

from obowlab.config import Machine
from obowlab.errors import UserError
from obowlab.launch.system import count_gpus, visible_gpus

POLL_S = 1.0


def check_gpus(machine: Machine) -> None:
    """Refuse a machine that asks for more GPUs than there are.

    Raises:
        UserError: says how many there are.
    """
    needed = machine.procs // machine.nodes
    if machine.device == "cpu" or (machine.device == "auto" and needed == 1):
        return
    there = count_gpus()
    if machine.device == "auto" and there == 0:
        return  # several processes on the CPU
    if there < needed:
        fewer = f"--gpus {there} or " if there else ""
        noun = "GPU" if there == 1 else "GPUs"
        raise UserError(f"This machine has {there} {noun}, not {needed}; use {fewer}--device cpu --procs N.")


@contextmanager
def leased(
    machine: Machine, *, say: Callable[[str], None], given_up: Callable[[], bool] = lambda: False
) -> Iterator[Mapping[str, str]]:
    """Keep as many free GPUs as a machine's processes on this node need, for as long as the context lasts.

    While others have them, this waits, and says so once.

    Args:
        machine: a machine that computes on the CPU needs none.
        say: prints one line.
        given_up: asked while waiting; when it says yes, nothing is taken.

    Raises:
        UserError: there are fewer.

    Yields:
        Variables for the training processes: which GPUs they see. Empty for a CPU, and when given up.
    """
    count = 0 if machine.device == "cpu" else machine.procs // machine.nodes
    if count == 0 or (machine.device == "auto" and count_gpus() == 0):
        yield {}
        return
    with ExitStack() as held:
        told = False
        while not (mine := _take(count)):
            check_gpus(machine.model_copy(update={"device": "cuda"}))  # there have to be so many, or this would never end
            if given_up():
                yield {}
                return
            if not told:
                noun = "GPU" if count == 1 else "GPUs"
                say(f"Waiting for {count} free {noun} of {len(visible_gpus())}; `obowlab jobs` shows who has them.")
                told = True
            time.sleep(POLL_S)
        for name in mine.values():
            held.enter_context(name)
        gpus = ",".join(mine)
        yield {GPUS_VARIABLE: gpus, "CUDA_VISIBLE_DEVICES": gpus}


@contextmanager
def using_gpus(machine: Machine, *, say: Callable[[str], None]) -> Iterator[None]:
    """Let this process itself compute on free GPUs, and on no others; before torch is asked for the first time.

    Args:
        machine: says how many; one that computes on the CPU needs none.
        say: prints one line.
    """
    with leased(machine, say=say) as variables:
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
        name = take(gpu)
        if name is not None:
            taken[gpu] = name
        if len(taken) == count:
            return taken
    for name in taken.values():
        name.close()
    return {}


GPUS_VARIABLE = "OBOWLAB_GPUS"
"""Set by a launcher that holds GPUs for the processes it starts: their UUIDs, in the order of local ranks."""


Role = Literal["launcher", "worker"]


def hold(gpu: str, *, role: Role) -> socket.socket | None:
    """Take a GPU in one of the two roles; None when another has it. Closing the socket, or the process's end, gives it back.

    Args:
        gpu: its UUID.
        role: whose name.
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
    """Take a GPU as a launcher; None when a launcher has it, or a training process that outlived its launcher."""
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
        raise UserError(f"GPU {gpus[local_rank]} is used by another run: type the command again, and it takes a free one.")
    return mine
