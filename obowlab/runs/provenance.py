"""Where a result comes from: the code's commit and changes, the software, the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from obowlab.text import shown_uri

PACKAGES = (
    "obowlab",
    "torch",
    "torchvision",
    "numpy",
    "pillow",
    "mlflow",
    "optuna",
    "faiss-cpu",
    "ffcv",
    "numba",
    "scikit-learn",
    "safetensors",
    "pydantic",
)

COMMIT_VARIABLE = "OBOWLAB_COMMIT"
"""Set by the Dockerfile, as `git describe --always --abbrev=40 --dirty` prints it: an image has no .git."""


@dataclass(frozen=True)
class Code:
    """The state of the checkout that holds this package; all None when it was installed from a wheel without `COMMIT_VARIABLE`.

    Attributes:
        commit: full hash of HEAD.
        branch: its branch; None on a detached head.
        dirty: whether tracked files differ from HEAD or new files lie in the package.
        diff: `git diff HEAD` and the list of new files; empty when clean.
    """

    commit: str | None = None
    branch: str | None = None
    dirty: bool | None = None
    diff: str = ""


def code() -> Code:
    """Describe the checkout that this package is imported from, or the one that its image was made of (`COMMIT_VARIABLE`)."""
    root = Path(__file__).resolve().parents[2]
    # A wheel below some other project's checkout must not be mistaken for that project's commit.
    if not (root / ".git").exists() or not (root / "pyproject.toml").is_file():
        made_of = os.environ.get(COMMIT_VARIABLE, "")
        return Code(commit=made_of.removesuffix("-dirty"), dirty=made_of.endswith("-dirty")) if made_of else Code()
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return Code()
    diff = _git(root, "diff", "HEAD", "--no-color", "--no-ext-diff") or ""
    new = _git(root, "ls-files", "--others", "--exclude-standard", "--", "obowlab", "experiments", "ablations") or ""
    text = "".join(f"{part}\n" for part in (diff, *(f"new file, not in git: {name}" for name in new.splitlines())) if part)
    return Code(commit=commit, branch=_git(root, "symbolic-ref", "--short", "-q", "HEAD"), dirty=bool(text), diff=text)


def versions() -> dict[str, str]:
    """Return the version of every installed package that can influence a result, without importing it."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, Any]:
    """Return the facts of this attempt: software, machine, command line; JSON values."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions(),
        "host": socket.gethostname(),
        "cpus": num_cores(),
        "cpu_model": _cpu_model(),
        "memory_mib": psutil.virtual_memory().total // 2**20,
        "argv": [re.sub(r"[A-Za-z][A-Za-z0-9+.-]*://.*", _shown, word, flags=re.DOTALL) for word in sys.argv],
        "pid": os.getpid(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }


def _shown(found: re.Match[str]) -> str:
    return shown_uri(found[0])


def num_cores() -> int:
    """Return how many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _git(root: Path, *command: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-c", f"safe.directory={root}", *command],
            cwd=root,
            capture_output=True,
            timeout=20,
            check=False,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.TimeoutExpired):  # no git on this machine: the facts are simply not known
        return None
    return done.stdout.decode(errors="replace").rstrip("\n") if done.returncode == 0 else None
