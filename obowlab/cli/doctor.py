"""`obowlab doctor`: one line for everything a run needs, and for each failure the command that fixes it.

What may be broken is tried in a process of its own, so that a library that does not load is a line and not a crash.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import click

from obowlab import text
from obowlab.cli.options import ROOTS, MachineOptions, dry_run_option, json_flag, machine_options, when_interrupted, would
from obowlab.cli.output import MIN_PROSE, coloured, print_json, show_progress, terminal_width
from obowlab.errors import UserError

if TYPE_CHECKING:
    from obowlab.config import Machine

MIN_PYTHON = (3, 11)
MIN_FREE_DISK = 2e9
MIN_FREE_MEMORY = 2e9
PROBE_TIMEOUT_S = 120.0

FFCV_PACKAGES = {"libturbojpeg": "libturbojpeg0-dev", "opencv4": "libopencv-dev"}
"""pkg-config's name of what ffcv is built with -> Debian's package."""

_PIP = f"{shlex.quote(sys.executable)} -m pip"

_TORCH = """
import json, torch, torchvision
cuda = torch.cuda.is_available()
print(json.dumps({
    "torch": torch.__version__, "torchvision": torchvision.__version__, "built_for": torch.version.cuda, "cuda": cuda,
    "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
    "nccl": torch.distributed.is_available() and torch.distributed.is_nccl_available(),
    "gloo": torch.distributed.is_available() and torch.distributed.is_gloo_available(),
    "sum": float(torch.ones(8, 8).matmul(torch.ones(8, 8)).sum()),
}))
"""
_FFCV = "import json, importlib.metadata as m, ffcv, ffcv.libffcv; print(json.dumps({'version': m.version('ffcv')}))"
_MLFLOW = "import json, mlflow; print(json.dumps({'version': mlflow.__version__}))"


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: what was checked.
        status: `fail` when runs cannot work, `warn` when something optional is missing.
        text: what was found.
        fix: the command that fixes it; empty when all is well or when no command can.
    """

    name: str
    status: Literal["ok", "warn", "fail"]
    text: str
    fix: str = ""


@click.command()
@machine_options(*ROOTS)
@json_flag
@dry_run_option
def doctor(as_json: bool, options: MachineOptions, dry_run: bool) -> int:
    """Check this machine and print the command that fixes what is missing.

    The exit code is 1 when something a run needs is missing; what is optional only warns.
    """
    machine = options.machine()
    if dry_run:
        would("import torch, mlflow and ffcv in processes of their own and look at disk, memory, data and the tracking server")
        return 0
    when_interrupted("nothing was changed.")
    checks = examine(machine, progress=(lambda line: None) if as_json else show_progress)
    if as_json:
        print_json([asdict(check) for check in checks])
    else:
        _print(checks)
    return int(any(check.status == "fail" for check in checks))


def examine(machine: Machine, *, progress: Callable[[str], None]) -> list[Check]:
    """Check everything a run needs on this machine; nothing is changed.

    Args:
        machine: where runs and data are.
        progress: called with what is being checked, and with nothing at the end.
    """
    progress("Loading torch, mlflow and ffcv, in processes of their own ...")
    with ThreadPoolExecutor(3) as pool:  # they wait for processes
        torch, mlflow, ffcv = pool.map(probe, (_TORCH, _MLFLOW, _FFCV))
    progress("Looking at the disk, the tracking store and the data ...")
    checks = [
        *_python(),
        *_torch_and_cuda(torch),
        *_mlflow(mlflow),
        *_ffcv(ffcv),
        *_system_libraries(ffcv_is_built=not isinstance(ffcv, str)),
        *_memory(),
        *_disk(machine),
        *_shared_store(machine),
        *_tracking(machine),
        *_data(machine),
    ]
    progress("")
    return checks


def _print(checks: list[Check]) -> None:
    width = max(len(check.name) for check in checks)
    for check in checks:
        status = coloured(f"{check.status:<4}", {"ok": "green", "warn": "yellow", "fail": "red"}[check.status])
        room = max(MIN_PROSE, terminal_width() - width - 8)
        first, *more = text.wrap(check.text, room) if sys.stdout.isatty() else [check.text]
        click.echo(f"{status}  {check.name:<{width}}  {first}")
        for line in more:
            click.echo(f"{'':<4}  {'':<{width}}  {line}")
        if check.fix:  # in one line, to be copied
            click.echo(f"{'':<4}  {'':<{width}}  {check.fix}")


def probe(code: str, *, timeout_s: float = PROBE_TIMEOUT_S) -> dict[str, Any] | str:
    """Run Python code that prints one JSON object in a process of its own; return it, or in one line what went wrong."""
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return f"no answer within {timeout_s:.0f} s"
    if done.returncode < 0:
        return f"killed by signal {-done.returncode}"
    if done.returncode > 0:
        lines = done.stderr.strip().splitlines()
        return lines[-1].strip() if lines else f"exit code {done.returncode}"
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _python() -> list[Check]:
    text = f"{sys.version.split()[0]} at {sys.executable}"
    if sys.version_info >= MIN_PYTHON:
        return [Check("python", "ok", text)]
    return [Check("python", "fail", f"{text}; {'.'.join(map(str, MIN_PYTHON))} or newer is needed", "python3.11 -m venv .venv")]


def _torch_and_cuda(found: dict[str, Any] | str) -> list[Check]:
    from obowlab.launch.system import installed_gpus

    if isinstance(found, str):
        return [Check("torch", "fail", f"does not load: {found}", f"{_PIP} install --force-reinstall torch torchvision")]
    checks = [Check("torch", "ok", f"{found['torch']}, torchvision {found['torchvision']}, CPU arithmetic works")]
    if found["sum"] != 512.0:
        checks = [Check("torch", "fail", "a matrix product is wrong", f"{_PIP} install --force-reinstall torch")]
    if found["cuda"]:
        checks.append(Check("cuda", "ok", f"{len(found['gpus'])} GPU(s): {', '.join(found['gpus'])}; CUDA {found['built_for']}"))
        if found["nccl"]:
            checks.append(Check("nccl", "ok", "available"))
        else:
            checks.append(Check("nccl", "warn", "torch was built without it: several GPUs will not work", _torch_for_cuda()))
    elif installed_gpus():
        checks.append(
            Check(
                "cuda",
                "warn",
                f"there is an NVIDIA driver, but torch (built for {found['built_for']}) cannot use it",
                _torch_for_cuda(),
            )
        )
    else:
        checks.append(Check("cuda", "warn", "no GPU: runs go to the CPU"))
    if not found["gloo"]:
        checks.append(Check("gloo", "warn", "torch was built without it: --procs above 1 will not work on the CPU"))
    return checks


def _torch_for_cuda() -> str:
    return f"{_PIP} install --force-reinstall torch torchvision --index-url https://download.pytorch.org/whl/cu128"


def _mlflow(found: dict[str, Any] | str) -> list[Check]:
    if isinstance(found, str):
        return [Check("mlflow", "fail", f"does not load: {found}", f"{_PIP} install --force-reinstall 'mlflow>=3.4,<4'")]
    return [Check("mlflow", "ok", found["version"])]


def _ffcv(found: dict[str, Any] | str) -> list[Check]:
    if not isinstance(found, str):
        return [Check("ffcv", "ok", found["version"])]
    if "No module named 'ffcv'" in found:
        found = "not installed: the torch loader is used, several times slower"
    else:
        found = f"does not load: {found}"
    return [Check("ffcv", "warn", found, f"{_PIP} install ffcv numba setuptools")]


def _system_libraries(*, ffcv_is_built: bool) -> list[Check]:
    if ffcv_is_built:
        return []  # it has found and linked them
    if not shutil.which("pkg-config"):
        return [Check("pkg-config", "warn", "not installed: ffcv cannot be built", "sudo apt-get install pkg-config")]
    checks = [Check("pkg-config", "ok", "installed")]
    for library, package in FFCV_PACKAGES.items():
        done = subprocess.run(["pkg-config", "--modversion", library], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            checks.append(Check(library, "ok", done.stdout.strip()))
        else:
            checks.append(Check(library, "warn", "not installed: ffcv cannot be built", f"sudo apt-get install {package}"))
    return checks


def _memory() -> list[Check]:
    import psutil

    from obowlab.runs.provenance import num_cores

    memory = psutil.virtual_memory()
    found = f"{text.size(memory.available)} of {text.size(memory.total)} free, {num_cores()} CPU core(s)"
    if memory.available >= MIN_FREE_MEMORY:
        return [Check("memory", "ok", found)]
    return [Check("memory", "warn", f"{found}: small batches only", "obowlab run NAME --set training.batch_size=32 --workers 1")]


def _disk(machine: Machine) -> list[Check]:
    checks = []
    for name, root, option in (
        ("runs folder", machine.runs_root, "--runs-root"),
        ("data folder", machine.data_root, "--data-root"),
    ):
        place = next(parent for parent in (root, *root.parents) if parent.exists())
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            fix = f"obowlab doctor {option} DIR   # and give the same option to obowlab run, or set it in the machine file"
            checks.append(Check(name, "fail" if option == "--runs-root" else "warn", f"cannot write below {place}", fix))
            continue
        free = shutil.disk_usage(place).free
        if free >= MIN_FREE_DISK:
            checks.append(Check(name, "ok", f"{root}, {text.size(free)} free"))
        else:
            checks.append(
                Check(
                    name,
                    "fail" if free < MIN_FREE_DISK / 10 else "warn",
                    f"{root}, only {text.size(free)} free",
                    f"du -xh --max-depth=2 {place} | sort -h | tail",
                )
            )
    return checks


def _shared_store(machine: Machine) -> list[Check]:
    """Look for what others of the group made in the run store, and this user may not write to."""
    from obowlab.runs.store import CACHES, check_store, closed, opening

    root = machine.runs_root
    if not root.is_dir() or not os.access(root, os.W_OK | os.X_OK):
        return []  # `_disk` says so
    try:
        check_store(root, tracking=True)
    except UserError as error:
        command = re.search(r"`([^`]+)`", str(error))
        return [Check("run store", "fail", str(error), command[1] if command is not None else "")]
    if missed := closed(root, CACHES):
        what = f"{', '.join(map(str, missed))} cannot be written to: features and curves are computed again each time"
        return [Check("run store", "warn", what, f"{opening(root, missed)}   # by the owner")]
    return []


def _tracking(machine: Machine) -> list[Check]:
    from obowlab.tracking.local_store import damage_of
    from obowlab.tracking.server import answers, login, refusal, shown_uri, store_uri

    try:
        uri = store_uri(machine.tracking_uri, runs_root=machine.runs_root)
    except UserError as error:
        return [Check("tracking", "fail", str(error), "unset MLFLOW_TRACKING_URI")]
    shown = shown_uri(uri)
    if not uri.startswith("http"):
        problem = refusal(uri) or damage_of(uri)
        if problem is not None:
            command = re.search(r"`([^`]+)`", problem)
            return [Check("tracking", "warn", problem, command[1] if command is not None else "")]
        return [Check("tracking", "ok", f"{shown}; no server is needed")]
    later = "runs continue and keep their points"
    try:
        status = answers(uri, timeout_s=5)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        text = f"{shown} does not answer ({reason}); {later}"
        return [Check("tracking", "warn", text, "obowlab runs sync   # once it is back; or: unset MLFLOW_TRACKING_URI")]
    if status == 200:
        return [Check("tracking", "ok", f"{shown} answers")]
    if status in (401, 403):
        text = f"{shown} does not take the login that is set" if login(uri) else f"{shown} asks for a login"
        fix = "export MLFLOW_TRACKING_USERNAME=... MLFLOW_TRACKING_PASSWORD=...   # or ~/.mlflow/credentials"
        return [Check("tracking", "warn", f"{text}; {later}", fix)]
    return [Check("tracking", "warn", f"{shown} answers with {status}; {later}", "obowlab runs sync   # once it works again")]


def _data(machine: Machine) -> list[Check]:
    from obowlab.data.datasets import list_datasets

    checks = []
    for listing in list_datasets(machine.data_root):
        name = f"data {listing.name}"
        if listing.problem is not None:
            checks.append(Check(name, "warn", listing.problem, f"obowlab data verify {listing.name}"))
        elif listing.manifests:
            counts = ", ".join(f"{manifest.num_images} {manifest.split}" for manifest in listing.manifests)
            checks.append(Check(name, "ok", f"{counts} images"))
        elif listing.name == "synthetic":
            checks.append(Check(name, "ok", "drawn on first use"))
        else:
            checks.append(Check(name, "warn", "not prepared", f"obowlab data prepare {listing.name} --source DIR"))
    return checks
