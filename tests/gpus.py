"""GPUs that are not there: a stand-in for `nvidia-smi` that lists them."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest


def stand_in_gpus(folder: Path, monkeypatch: pytest.MonkeyPatch, *, gpus: Sequence[str]) -> None:
    """Let this process and its children see GPUs of these UUIDs; give every test its own, for leases are the machine's."""
    folder.mkdir(parents=True, exist_ok=True)
    tool = folder / "nvidia-smi"
    lines = "".join(f'echo "GPU {number}: NVIDIA (UUID: {gpu})"\n' for number, gpu in enumerate(gpus))
    tool.write_text(f'#!/bin/sh\n[ "$1" = -L ] || exit 1\n{lines}')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
