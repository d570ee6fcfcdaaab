"""What the machine does while a run works: processor, memory, disk and GPUs, read from Linux's /proc and nvidia-smi."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

PROC = Path("/proc")
MIB = 2**20
NVIDIA_SMI_TIMEOUT_S = 10.0
_GPU_FIELDS = {"utilization.gpu": "gpu_utilisation", "memory.used": "gpu_memory", "power.draw": "gpu_power"}


class SystemSampler:
    """Reads the system metrics of one run; each call of `sample` looks back to the one before."""

    def __init__(self, pid: int, *, path: Path, gpus: bool) -> None:
        """Watch a process and its descendants.

        Args:
            pid: of the process that was started.
            path: the run folder, whose disk is watched.
            gpus: whether to ask nvidia-smi.
        """
        self._pid = pid
        self._path = path
        self._gpus = gpus
        self._ticks = _cpu_ticks()

    def sample(self) -> dict[str, float]:
        """Return the system metrics by name; those the machine does not tell are left out."""
        values = {"disk_free": shutil.disk_usage(self._path).free / MIB}
        before, self._ticks = self._ticks, _cpu_ticks()
        if before and self._ticks and self._ticks[1] > before[1]:
            values["cpu"] = 100.0 * (self._ticks[0] - before[0]) / (self._ticks[1] - before[1])
        memory = _memory_kib()
        if memory:
            used = memory["MemTotal"] - memory["MemAvailable"]
            values |= {"memory_used": used / 1024, "memory_percent": 100.0 * used / memory["MemTotal"]}
        family = process_tree(self._pid)
        if family:
            values |= {"run_processes": float(len(family)), "run_memory": sum(map(_resident_bytes, family)) / MIB}
        if self._gpus:
            values |= _gpu_values()
        return values


def process_tree(pid: int) -> list[int]:
    """Return a process and all its descendants, parents first; empty when it is gone or there is no /proc."""
    if not (PROC / str(pid)).is_dir():
        return []
    children: dict[int, list[int]] = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            children.setdefault(_parent(entry), []).append(int(entry.name))
    family = [pid]
    for member in family:  # grows while it is walked
        family.extend(children.get(member, []))
    return family


def count_gpus() -> int:
    """Return how many NVIDIA GPUs this machine shows to this process, without importing torch."""
    return len(visible_gpus())


def visible_gpus() -> list[str]:
    """Return the UUIDs of the NVIDIA GPUs this process may use, without importing torch; CUDA_VISIBLE_DEVICES takes them."""
    there = _listed_gpus()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not there:
        return there
    gpus: list[str] = []
    for name in (name.strip() for name in visible.split(",")):
        if name.isdigit():
            found = there[int(name) : int(name) + 1]
        else:
            found = [name] if name.startswith("MIG-") else [gpu for gpu in there if name and gpu.startswith(name)][:1]
        if not found:
            break  # CUDA's rule: what follows an invalid name is hidden
        gpus += found
    return gpus


def _listed_gpus() -> list[str]:
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return re.findall(r"^GPU .*\(UUID: (\S+)\)", done.stdout, flags=re.MULTILINE) if done.returncode == 0 else []


def _gpu_values() -> dict[str, float]:
    command = ["nvidia-smi", f"--query-gpu=index,{','.join(_GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = {}
    for line in done.stdout.splitlines() if done.returncode == 0 else []:
        index, *numbers = (part.strip() for part in line.split(","))
        for name, number in zip(_GPU_FIELDS.values(), numbers, strict=False):
            try:
                values[f"{name}_{index}"] = float(number)
            except ValueError:  # '[N/A]': this GPU does not tell
                continue
    return values


def _cpu_ticks() -> tuple[int, int] | None:
    """Return the clock ticks all cores were busy, and their total."""
    try:
        fields = [int(field) for field in (PROC / "stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return None
    idle = fields[3] + fields[4]
    return sum(fields) - idle, sum(fields)


def _memory_kib() -> dict[str, int]:
    try:
        lines = (PROC / "meminfo").read_text().splitlines()
    except OSError:
        return {}
    return {name: int(value.split()[0]) for name, value in (line.split(":", 1) for line in lines)}


def _parent(entry: Path) -> int:
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):  # it has just ended
        return 0


def _resident_bytes(pid: int) -> int:
    try:
        return int((PROC / str(pid) / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
