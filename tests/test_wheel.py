"""The wheel holds what a command needs, and works in an environment of its own: no checkout, no git, no make."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
from email import message_from_string
from email.message import Message
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BUNDLED = "obowlab/_project"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this checkout."""
    if find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed (the extra `test` brings it)")
    place = tmp_path_factory.mktemp("wheel")
    words = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(place)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (found,) = place.glob("*.whl")
    return found


def _read(wheel: Path, name: str) -> str:
    with ZipFile(wheel) as archive:
        (path,) = (each for each in archive.namelist() if each.endswith(f".dist-info/{name}"))
        return archive.read(path).decode()


def test_it_holds_the_package_and_the_project_files_that_commands_read(wheel: Path) -> None:
    def files(folder: str, pattern: str) -> set[str]:
        return {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).glob(pattern) if path.is_file()}

    with ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {name for name in held if not name.startswith(BUNDLED)} == files("obowlab", "**/*.py")
    project = files("experiments", "**/*.toml") | files("ablations", "*.toml") | files("dashboards/report", "*")
    assert {f"{BUNDLED}/{name}" for name in project | files("dashboards", "*")} <= held
    others = {name for name in held if name.startswith(BUNDLED)} - {f"{BUNDLED}/{name}" for name in project}
    assert not [name for name in others if not name.startswith((f"{BUNDLED}/ablations/results/", f"{BUNDLED}/dashboards/"))]
    assert not [name for name in held if "dashboards/services" in name]


def test_its_metadata_is_what_pyproject_says(wheel: Path) -> None:
    metadata: Message = message_from_string(_read(wheel, "METADATA"))
    assert (metadata["Name"], metadata["Version"], metadata["License-Expression"]) == (
        "obowlab",
        PROJECT["version"],
        "Apache-2.0",
    )
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata.get_all("Provides-Extra") == sorted(PROJECT["optional-dependencies"])
    needed = [each for each in metadata.get_all("Requires-Dist", []) if "extra ==" not in each]
    assert len(needed) == len(PROJECT["dependencies"])
    assert "obowlab = obowlab.cli:main" in _read(wheel, "entry_points.txt")


@pytest.mark.long
def test_it_runs_the_demo_from_an_empty_folder_in_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:
    place = tmp_path / "environment"
    venv.create(place, symlinks=True)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(place / "bin/python"),
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
            wheel,
        ],
        check=True,
    )
    (library,) = place.glob("lib/python*/site-packages")
    # The libraries of this environment are seen; a checkout that is installed in it is not: its own .pth file is not followed.
    (library / "tested.pth").write_text(sysconfig.get_path("purelib") + "\n")
    folder = tmp_path / "empty"
    folder.mkdir()
    environment = {
        "PATH": str(place / "bin"),
        "HOME": str(tmp_path / "home"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }

    def say(*words: str) -> str:
        done = subprocess.run([*words], cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    assert str(library) in say("python", "-c", "import obowlab; print(obowlab.__file__)")
    small = (
        "--set",
        "training.epochs=1",
        "--set",
        "data.images_per_class=20",
        "--set",
        "evaluation.protocols=['knn']",
        "--no-quote",
    )
    assert "knn_top1" in say("obowlab", "run", "demo", *small)
    assert "demo-s0-" in say("obowlab", "runs", "list")
    assert "kappa-delta" in say("obowlab", "tune", "--list")
    assert "demo-bownet" in say("obowlab", "config", "list")
    assert "soft codes" in say("obowlab", "table", "table3", "--scale", "demo")
    assert f"sqlite:///{folder}/runs/mlflow.db" in say("obowlab", "ui", "--dry-run")
    assert "words/index.html" in say("obowlab", "words", "demo")
    assert "Wrote demo.safetensors" in say("obowlab", "weights", "export", "demo", "--out", "demo.safetensors")
    assert "knn_top1" in say("obowlab", "eval", "demo.safetensors", "--dataset", "synthetic", "--protocol", "knn")
    say("obowlab", "report")
    assert (folder / "report" / "index.html").is_file()
    assert (folder / "report" / "words.js").is_file()
