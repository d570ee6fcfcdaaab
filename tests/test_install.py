"""What `.ci/install.sh` decides and says; pip, apt-get and nvidia-smi are stand-ins that keep what they were given."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PINS = (ROOT / "constraints.txt").read_text().splitlines()
TORCH, TORCHVISION = (next(line for line in PINS if line.startswith(f"{name}==")) for name in ("torch", "torchvision"))
PYTHON = """#!/bin/sh
case "$*" in
    "-m pip"*)
        shift 4
        echo "pip $*" >>{calls}
        case "$*" in
            *".ci/locks/$PIP_REFUSES.txt"*) echo "ERROR: $PIP_SAYS" >&2; exit 1 ;;
        esac ;;
    *importlib.metadata*) exit 1 ;;  # torch is not installed
    *) exec {python} "$@" ;;
esac
"""


class Machine:
    """A checkout with a `.venv` that is empty but for a Python, and a machine with nothing installed."""

    def __init__(self, place: Path) -> None:
        self.checkout, self.tools, self.calls = place / "checkout", place / "tools", place / "calls"
        shutil.copytree(ROOT / ".ci" / "locks", self.checkout / ".ci" / "locks")
        self.tools.mkdir()
        for name in ("pyproject.toml", "constraints.txt", ".ci/install.sh"):
            shutil.copy2(ROOT / name, self.checkout / name)
        self.program("python", PYTHON.format(calls=self.calls, python=sys.executable))
        (self.checkout / ".venv" / "bin").mkdir(parents=True)
        (self.checkout / ".venv" / "bin" / "python").symlink_to(self.tools / "python")
        for name in ("apt-get", "sudo"):
            self.program(name, f'#!/bin/sh\necho "{name} $*" >>{self.calls}\n')

    def program(self, name: str, text: str) -> None:
        (self.tools / name).write_text(text)
        (self.tools / name).chmod(0o755)

    def start(self, part: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """Install a part."""
        environment = {"PATH": f"{self.tools}:{os.environ['PATH']}", "HOME": os.environ["HOME"], "PYTHON": sys.executable}
        words = ["bash", str(self.checkout / ".ci" / "install.sh"), part]
        return subprocess.run(words, env={**environment, **settings}, capture_output=True, text=True, check=False)

    def install(self, part: str, **settings: str) -> str:
        """Install a part; return what was said."""
        done = self.start(part, **settings)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def called(self) -> list[str]:
        """Return the calls since the last look."""
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        self.calls.unlink(missing_ok=True)
        return lines


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def index() -> Iterator[str]:
    """An index that has the tested torch."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(f"<a>{TORCH.replace('==', '-')}%2Bcpu-cp311-cp311-manylinux_2_28_x86_64.whl</a>".encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/whl/cpu"
    server.shutdown()
    server.server_close()


def test_the_demo_installs_no_debian_package_and_nothing_that_only_tests_need(machine: Machine) -> None:
    said = machine.install("demo", OBOWLAB_TORCH_INDEX="")
    assert said.splitlines()[1].startswith("== Installing into .venv: demo (disk, download and time")
    torch, libraries, obowlab = machine.called()
    locked = "pip install --no-deps --no-build-isolation --require-hashes "
    assert torch == f"{locked}-r .ci/locks/torch.txt"
    assert libraries == f"{locked}-r .ci/locks/build.txt -r .ci/locks/demo.txt"
    assert obowlab == "pip install --no-deps --no-build-isolation -e ."
    assert "GB" in said


def test_versions_are_free_within_their_ranges_where_the_lock_is_not_used_or_does_not_fit(machine: Machine) -> None:
    said = machine.install("demo", OBOWLAB_TORCH_INDEX="", OBOWLAB_LOCK="0")
    torch, obowlab = machine.called()
    assert torch == f"pip install -c constraints.txt {TORCH} {TORCHVISION}"
    assert obowlab == "pip install -c constraints.txt -e ."
    assert "not the lock" in said
    (machine.checkout / ".venv" / ".installed-demo").unlink()
    done = machine.start("demo", OBOWLAB_TORCH_INDEX="", PIP_REFUSES="demo", PIP_SAYS="No matching distribution found")
    assert done.returncode == 0
    assert (
        "the locked versions (build demo) could not be installed, as said above; versions that pyproject.toml allows are taken"
        in done.stdout
    )
    assert "No matching distribution found" in done.stderr
    assert machine.called()[-1] == "pip install -c constraints.txt -e ."


def test_a_file_with_another_hash_ends_the_installation(machine: Machine) -> None:
    says = "THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE."
    done = machine.start("demo", OBOWLAB_TORCH_INDEX="", PIP_REFUSES="demo", PIP_SAYS=says)
    assert done.returncode == 1
    assert says in done.stderr
    assert "install with OBOWLAB_LOCK=0" in done.stderr
    assert len(machine.called()) == 2
    assert not (machine.checkout / ".venv" / ".installed-demo").exists()


def test_a_part_adds_what_is_missing_and_a_change_of_the_requirements_installs_again(machine: Machine) -> None:
    machine.install("demo", OBOWLAB_TORCH_INDEX="")
    assert machine.install("demo", OBOWLAB_TORCH_INDEX="") == ""
    machine.called()
    said = machine.install("test", OBOWLAB_TORCH_INDEX="", OBOWLAB_FFCV="0", OBOWLAB_BROWSER="0")
    assert "== Installing into .venv: train test (" in said
    assert any("-r .ci/locks/demo.txt -r .ci/locks/train.txt -r .ci/locks/test.txt" in line for line in machine.called())
    assert machine.install("demo") == ""
    stamp = machine.checkout / ".venv" / ".installed-test"
    os.utime(machine.checkout / "pyproject.toml", (stamp.stat().st_mtime + 10,) * 2)
    assert "== Installing into .venv: demo train test (" in machine.install("test", OBOWLAB_TORCH_INDEX="", OBOWLAB_FFCV="0")


def test_torch_comes_from_the_index_that_is_named(machine: Machine, index: str) -> None:
    said = machine.install("demo", OBOWLAB_TORCH_INDEX=index)
    torch, *_ = machine.called()
    assert f"--no-deps --index-url {index} {TORCH} torchvision==" in torch
    assert f"PyTorch from {index}" in said


@pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="this machine has an NVIDIA GPU, which cannot be hidden")
def test_without_a_gpu_an_index_of_cpu_wheels_is_used_if_it_answers(machine: Machine, index: str) -> None:
    script = machine.checkout / ".ci" / "install.sh"
    machine.program("uname", '#!/bin/sh\ncase "$1" in -s) echo Linux ;; *) echo x86_64 ;; esac\n')
    text = script.read_text()
    away = "http://127.0.0.1:9/whl/cpu"
    script.write_text(text.replace("https://download.pytorch.org/whl/cpu", index))
    machine.install("demo")
    assert f"--index-url {index} {TORCH}" in machine.called()[0]
    (machine.checkout / ".venv" / ".installed-demo").unlink()
    script.write_text(text.replace("https://download.pytorch.org/whl/cpu", away))
    said = machine.install("demo")
    assert "--index-url" not in machine.called()[0]
    assert f"There is no NVIDIA GPU here, but {away}, which has PyTorch without CUDA, does not answer." in said
    assert "PyTorch with its CUDA libraries: 6.8 GB" in said
    (machine.checkout / ".venv" / ".installed-demo").unlink()
    machine.program("nvidia-smi", "#!/bin/sh\n")
    script.write_text(text.replace("https://download.pytorch.org/whl/cpu", index))
    said = machine.install("demo")
    assert "--index-url" not in machine.called()[0]
    assert "There is no NVIDIA GPU here" not in said


def test_another_part_is_refused(machine: Machine) -> None:
    done = subprocess.run(["bash", str(machine.checkout / ".ci/install.sh"), "all"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "Usage: .ci/install.sh demo|train|test|dev\n"
