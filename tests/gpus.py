"""GPUs that are not there: a stand-in for `pynvml`, NVIDIA's management library, that lists them."""

import functools
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from obowlab.launch import system

STAND_IN = '''
"""NVML of GPUs that are not there."""

GPUS = {gpus}


class NVMLError(Exception):
    """What a reading that a GPU does not have raises."""


class _Reading:
    def __init__(self, **values):
        self.__dict__.update(values)


def nvmlInit():
    pass


def nvmlDeviceGetCount():
    return len(GPUS)


def nvmlDeviceGetHandleByIndex(index):
    return GPUS[index]


def nvmlDeviceGetUUID(gpu):
    return gpu["uuid"]


def nvmlDeviceGetUtilizationRates(gpu):
    return _Reading(gpu=gpu["utilisation"])


def nvmlDeviceGetMemoryInfo(gpu):
    return _Reading(used=gpu["memory_mib"] * 2**20)


def nvmlDeviceGetPowerUsage(gpu):
    if gpu["power_w"] is None:
        raise NVMLError("Not Supported")
    return round(gpu["power_w"] * 1000)
'''


def write_stand_in(folder: Path, *, gpus: Sequence[str], powers_w: Sequence[float | None] = ()) -> None:
    """Write a module `pynvml` of GPUs with these UUIDs; a folder before others on PYTHONPATH makes it the one that is found."""
    folder.mkdir(parents=True, exist_ok=True)
    powers = [*powers_w, *[70.5] * (len(gpus) - len(powers_w))]
    listed = [
        {"uuid": gpu, "utilisation": 35, "memory_mib": 1024 + number, "power_w": power}
        for number, (gpu, power) in enumerate(zip(gpus, powers, strict=True))
    ]
    (folder / "pynvml.py").write_text(STAND_IN.format(gpus=repr(listed)))


def stand_in_gpus(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, gpus: Sequence[str], powers_w: Sequence[float | None] = ()
) -> None:
    """Let this process and its children see GPUs of these UUIDs; give every test its own, for leases are the machine's."""
    write_stand_in(folder, gpus=gpus, powers_w=powers_w)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", importlib.import_module("pynvml"))
    monkeypatch.setattr(system, "installed_gpus", functools.cache(system.installed_gpus.__wrapped__))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
