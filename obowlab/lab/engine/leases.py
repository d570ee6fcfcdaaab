"""Choosing free GPUs of this machine and keeping them while a command works; see `obowlab.track.gpus` for how."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from obowlab.config import Machine
from obowlab.errors import UserError
from obowlab.lab.system import count_gpus, visible_gpus
from obowlab.track.gpus import GPUS_VARIABLE, take

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
