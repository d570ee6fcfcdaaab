"""Tests find on a machine what `.ci/install.sh` installs, and nothing by chance."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import hermetic

ROOT = Path(__file__).resolve().parents[1]
SLURM = ("sacct", "sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun")


@pytest.fixture
def crowded(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine where everything is installed and set, by programs that fail."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in (*SLURM, "docker", "nvidia-smi", "sudo", "cat"):
        (tools / name).write_text("#!/bin/sh\nexit 1\n")
        (tools / name).chmod(0o755)
    settings = dict.fromkeys(("CUDA_VISIBLE_DEVICES", "MLFLOW_TRACKING_URI", "OBOWLAB_RUNS_ROOT", "SLURM_JOB_ID", "PGHOST"), "7")
    kept = {name: text for name, text in os.environ.items() if name not in (hermetic.ENTERED, "OBOWLAB_TEST_GPU")}
    return {**kept, **settings, "PATH": f"{os.environ['PATH']}:{tools}", "HOME": str(tmp_path)}


def test_programs_settings_and_gpus_of_the_machine_are_hidden(crowded: dict[str, str], tmp_path: Path) -> None:
    code = "import os, shutil, sys; from tests import hermetic; hermetic.enter()\n"
    code += "print([name for name in sys.argv[1:] if shutil.which(name)], os.environ['HOME'])\n"
    code += "print(sorted(name for name in os.environ if name.startswith(('CUDA', 'MLFLOW', 'OBOWLAB_R', 'SLURM', 'PG'))))\n"
    code += "print(repr(os.environ['CUDA_VISIBLE_DEVICES']))"
    words = [sys.executable, "-c", code, "cat", "docker", "nvidia-smi", "sudo", *SLURM]
    done = subprocess.run(words, env=crowded, cwd=ROOT, capture_output=True, text=True, check=True)
    programs, settings, gpus = done.stdout.splitlines()
    assert programs.startswith("['cat'] ")
    assert not programs.endswith(str(tmp_path))
    assert settings == "['CUDA_VISIBLE_DEVICES']"
    assert gpus == "''"


def test_gpus_that_are_asked_for_are_seen_as_chosen(crowded: dict[str, str]) -> None:
    code = "import os; from tests import hermetic; hermetic.enter()\n"
    code += "print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['PYTHONPATH'])"
    environment = {**crowded, "OBOWLAB_TEST_GPU": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["7", f"{ROOT}:{ROOT}/.gpu-kit/site"]


def test_this_session_is_such_a_one() -> None:
    assert [name for name in SLURM if shutil.which(name)] == []
    assert hermetic.enter() in Path.home().parents
    assert not any(name.startswith(("MLFLOW_", "OBOWLAB_RUNS", "SLURM_", "http_proxy")) for name in os.environ)


def test_without_postgresql_and_chromium_their_tests_are_skipped_with_a_sentence(crowded: dict[str, str]) -> None:
    environment = {**crowded, "OBOWLAB_TEST_HIDE": "postgresql,chromium", "OBOWLAB_TEST_ALL": "1"}
    users = re.compile(r"\b(browser|postgresql|lab): ")
    modules = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if users.search(path.read_text())]
    words = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", "-m", "postgresql or chromium", *modules]
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert re.search(r"^\d+ skipped, \d+ deselected", done.stdout.splitlines()[-1])
    reasons = set(re.findall(r"SKIPPED \[\d+\] \S+: (.*)", done.stdout))
    assert reasons == {
        "PostgreSQL is not installed (Debian package postgresql)",
        "the services need PostgreSQL (Debian package postgresql)",
        "there is no Chromium with its chromedriver (Debian packages chromium, chromium-driver)",
    }


def test_an_unknown_group_is_named(crowded: dict[str, str]) -> None:
    words = [sys.executable, "-c", "from tests import hermetic; hermetic.enter()"]
    environment = {**crowded, "OBOWLAB_TEST_HIDE": "postgres"}
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "OBOWLAB_TEST_HIDE (make test HIDE=...) has postgres; known are" in done.stderr
