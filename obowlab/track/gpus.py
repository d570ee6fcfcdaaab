"""Who has which GPU of this machine: names that the kernel gives to one process at a time, and takes back when it is gone.

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
from collections.abc import Sequence
from typing import Literal

from obowlab.errors import UserError

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
