"""The peak memory of this process: on its GPU, or else its resident memory as Linux counts it."""

from __future__ import annotations

from pathlib import Path

import torch

MIB = 2**20


def peak_mib(device: torch.device) -> float:
    """Return the peak since the process began or `forget_peak`, in MiB; 0 where it is not known."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_reserved(device)) / MIB
    return _resident_mib("VmHWM:")


def present_mib(device: torch.device) -> float:
    """Return what is in use now, in MiB; 0 where it is not known."""
    if device.type == "cuda":
        return float(torch.cuda.memory_reserved(device)) / MIB
    return _resident_mib("VmRSS:")


def forget_peak(device: torch.device) -> None:
    """Begin a new peak at the present use."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # an earlier peak then counts as well


def _resident_mib(field: str) -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(field)), 0.0)
