"""Where a result comes from: the code's commit and changes, the software, the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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


PATHS = ("obowlab", "experiments", "ablations", "pyproject.toml")
"""What of a checkout changes results."""

SECRETS = tuple(
    f":(exclude,icase,glob)**/{name}"
    for name in ("*.env*", "*.pem", "*.key", "id_*", "*credential*", "*secret*", "*password*", "*token*", ".netrc", ".npmrc")
)
"""What is never read for a run, even where somebody put it into the package."""


@dataclass(frozen=True)
class Code:
    """The state of the checkout that holds this package; all None when it was installed from a wheel without `COMMIT_VARIABLE`.

    Attributes:
        commit: full hash of HEAD.
        branch: its branch; None on a detached head.
        dirty: whether files of `PATHS` differ from HEAD, or there are new ones.
        diff: `git diff HEAD` of them without `SECRETS`, and the list of new files; empty when clean.
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
    branch = _git(root, "symbolic-ref", "--short", "-q", "HEAD")
    with _neutral(root, commit=commit) as environment:
        diff = _git(root, "diff", "HEAD", "--no-color", "--no-ext-diff", "--no-textconv", "--", *PATHS, *SECRETS, **environment)
        new = _git(root, "ls-files", "--others", "--exclude-standard", "--", *PATHS, *SECRETS, **environment)
    if diff is None or new is None:
        return Code(commit=commit, branch=branch)
    text = "".join(f"{part}\n" for part in (diff, *(f"new file, not in git: {name}" for name in new.splitlines())) if part)
    return Code(commit=commit, branch=branch, dirty=bool(text), diff=text)


@contextmanager
def _neutral(root: Path, *, commit: str) -> Iterator[dict[str, str]]:
    """Yield variables with which git compares a checkout by no configuration but an empty one.

    That of a checkout of somebody else may name programs to be run by a mere comparison: monitors, filters, other comparers.
    """
    with tempfile.TemporaryDirectory(prefix="obowlab-git-") as folder:
        place, kind = Path(folder), "sha256" if len(commit) == 64 else "sha1"
        for name in ("refs", "objects"):
            (place / name).mkdir()
        (place / "HEAD").write_text(f"{commit}\n")
        (place / "config").write_text(
            f"[core]\nrepositoryformatversion = 1\nfileMode = false\n[extensions]\nobjectFormat = {kind}\n"
        )
        found = (_git(root, "rev-parse", "--git-path", name) or "" for name in ("objects", "index"))
        objects, index = (str(root / path) for path in found)  # relative to the checkout, or absolute
        yield {"GIT_DIR": folder, "GIT_WORK_TREE": str(root), "GIT_OBJECT_DIRECTORY": objects, "GIT_INDEX_FILE": index}


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


def _git(root: Path, *command: str, **variables: str) -> str | None:
    """Return what git prints, without the line's end; None when it fails. No configuration but the checkout's own counts."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-c", f"safe.directory={root}", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", *command],
            cwd=root,
            capture_output=True,
            timeout=20,
            check=False,
            env={
                **inherited,
                "GIT_OPTIONAL_LOCKS": "0",
                "GIT_CONFIG_NOSYSTEM": "1",
                "GIT_CONFIG_GLOBAL": os.devnull,
                **variables,
            },
        )
    except (OSError, subprocess.TimeoutExpired):  # no git on this machine: the facts are simply not known
        return None
    return done.stdout.decode(errors="replace").rstrip("\n") if done.returncode == 0 else None
