"""What the machine does while a run trains: processor, memory, disk, processes (psutil) and NVIDIA GPUs (NVML)."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from obowlab.config import Machine

MIB = 2**20


class SystemSampler:
    """Reads the system metrics of one run; processor use is the mean since the sample before."""

    def __init__(self, pid: int, *, path: Path, gpus: bool) -> None:
        """Watch a process and its descendants; call `sample` from the thread that makes the sampler.

        Args:
            pid: of the process that was started.
            path: the run folder, whose disk is watched.
            gpus: whether to read the GPUs.
        """
        self._pid = pid
        self._path = path
        self._gpus = gpus
        psutil.cpu_percent()  # the next call looks back to this one

    def sample(self) -> dict[str, float]:
        """Return the system metrics by name, without those that the machine does not know."""
        memory = psutil.virtual_memory()
        used = memory.total - memory.available
        values = {
            "disk_free": psutil.disk_usage(str(self._path)).free / MIB,
            "cpu": psutil.cpu_percent(),
            "memory_used": used / MIB,
            "memory_percent": 100.0 * used / memory.total,
        }
        resident = []
        for process in _family(self._pid):
            with suppress(psutil.Error):  # it has just ended
                resident.append(process.memory_info().rss)
        if resident:
            values |= {"run_processes": float(len(resident)), "run_memory": sum(resident) / MIB}
        return values | (_gpu_values() if self._gpus else {})


def process_tree(pid: int) -> list[int]:
    """Return a process and all its descendants, parents first; empty when it has ended."""
    return [process.pid for process in _family(pid)]


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def computes_on_cpu(machine: Machine) -> bool:
    """Return whether a run here computes on the CPU, as `auto` does where this process sees no GPU."""
    return machine.device == "cpu" or (machine.device == "auto" and count_gpus() == 0)


def count_gpus() -> int:
    """Return how many NVIDIA GPUs this process may use, without importing torch."""
    return len(visible_gpus())


def visible_gpus() -> list[str]:
    """Return the UUIDs of the NVIDIA GPUs this process may use, without importing torch; CUDA_VISIBLE_DEVICES takes them."""
    present = list(installed_gpus())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not present:
        return present
    gpus: list[str] = []
    for name in (name.strip() for name in visible.split(",")):
        if name.isdigit():
            found = present[int(name) : int(name) + 1]
        else:
            found = [name] if name.startswith("MIG-") else [gpu for gpu in present if name and gpu.startswith(name)][:1]
        if not found:
            break  # CUDA's rule: what follows an invalid name is hidden
        gpus += found
    return gpus


def computes_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether the processor has instructions for bfloat16; True also where that is not known, without x86 or Linux.

    Without them PyTorch still computes in bfloat16, but slower than in float32 (docs/training.md, "What a training costs").
    """
    with suppress(OSError):
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("flags"):
                return not {"avx512_bf16", "amx_bf16"}.isdisjoint(line.split())
    return True


@functools.cache
def installed_gpus() -> tuple[str, ...]:
    """Return the UUIDs of this machine's NVIDIA GPUs in NVML's order, asked once per process; none without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()  # stays open for `_gpu_values`: opening the driver takes up to a second
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return tuple(pynvml.nvmlDeviceGetUUID(handle) for handle in handles)
    except pynvml.NVMLError:
        return ()


def _gpu_values() -> dict[str, float]:
    import pynvml

    readings: dict[str, Callable[[Any], float]] = {
        "gpu_utilisation": lambda gpu: pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
        "gpu_memory": lambda gpu: pynvml.nvmlDeviceGetMemoryInfo(gpu).used / MIB,
        "gpu_power": lambda gpu: pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000,  # from mW
    }
    values = {}
    for index in range(len(installed_gpus())):
        for name, read in readings.items():
            with suppress(pynvml.NVMLError):  # not every GPU has every reading
                values[f"{name}_{index}"] = float(read(pynvml.nvmlDeviceGetHandleByIndex(index)))
    return values
