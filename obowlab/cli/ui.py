"""`obowlab ui`: the MLflow UI on the local store, or the Optuna dashboard on the studies, for this machine only."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from obowlab.cli.options import MachineOptions, dry_run_option, machine_options, would
from obowlab.errors import UserError
from obowlab.signals import on_signals

if TYPE_CHECKING:
    from obowlab.config import Machine

HOST = "127.0.0.1"
START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 5.0
PORT, STUDIES_PORT = 5000, 8080


@click.command()
@click.option(
    "--port", type=click.IntRange(min=1, max=65535), metavar="N", help="Port on 127.0.0.1. [default: 5000; 8080 for --studies]"
)
@click.option("--studies", is_flag=True, help="Show the studies of `obowlab tune` in the Optuna dashboard instead.")
@click.option(
    "--storage", metavar="URL", envvar="OBOWLAB_STUDY_STORAGE", help="Of the studies. [default: the journal in the run store]"
)
@click.option("--open", "opened", is_flag=True, help="Show it in the browser.")
@machine_options("runs_root", "machine_file")
@dry_run_option
def ui(port: int | None, studies: bool, storage: str | None, opened: bool, options: MachineOptions, dry_run: bool) -> int:
    """Browse the runs in MLflow on this machine.

    Serves the local store on the loopback interface until Ctrl-C. From another machine, use the printed ssh line.
    """
    machine = options.machine()
    if studies:
        return _serve_studies(machine, storage=storage, port=port or STUDIES_PORT, dry_run=dry_run, opened=opened)
    return _serve_runs(machine, port=port or PORT, dry_run=dry_run, opened=opened)


def _serve_runs(machine: Machine, *, port: int, dry_run: bool, opened: bool) -> int:
    from obowlab.tracking.server import artifact_location, fail_fast, prepare_store, refusal, runs_page, shown_uri, store_uri
    from obowlab.tracking.ui_server import ARTIFACTS_VARIABLE, STORE_VARIABLE

    if machine.tracking_uri is not None and machine.tracking_uri.startswith(("http://", "https://")):
        raise UserError(
            "Runs go to a tracking server (MLFLOW_TRACKING_URI or tracking_uri of the machine file): open its address instead."
        )
    store = store_uri(machine.tracking_uri, runs_root=machine.runs_root)
    if dry_run:
        would(f"serve {shown_uri(store)} at http://{HOST}:{port}")
        return 0
    if not machine.runs_root.is_dir():
        raise UserError(f"There are no runs in {machine.runs_root} (--runs-root); `obowlab run demo` makes one.")
    _refuse_taken(port)
    prepare_store(store)
    problem = refusal(store)
    if problem is not None:
        raise UserError(problem)
    fail_fast()
    command = [sys.executable, "-P", "-m", "obowlab.tracking.ui_server", HOST, str(port)]  # not from a store that others fill
    artifacts = artifact_location(store, runs_root=machine.runs_root)
    assert artifacts is not None  # of a server only
    return _serve(
        command,
        cwd=machine.runs_root,
        environment={STORE_VARIABLE: store, ARTIFACTS_VARIABLE: artifacts, "PYTHONWARNINGS": "ignore"},  # MLflow's own
        port=port,
        health="/health",
        page=lambda: runs_page(store, runs_root=machine.runs_root),
        what=f"MLflow UI of {shown_uri(store)}",
        opened=opened,
    )


def _serve_studies(machine: Machine, *, storage: str | None, port: int, dry_run: bool, opened: bool) -> int:
    from obowlab.studies.storage import STORAGE_VARIABLE, exists, storage_url
    from obowlab.tracking.server import shown_uri

    url = storage_url(storage, runs_root=machine.runs_root)
    if dry_run:
        would(f"serve the studies of {shown_uri(url)} at http://{HOST}:{port}/dashboard")
        return 0
    if not exists(url):
        raise UserError(f"There are no studies in {shown_uri(url)}; `obowlab tune kappa-delta --scale demo` makes one.")
    _refuse_taken(port)
    command = [sys.executable, "-P", "-m", "obowlab.studies.dashboard", HOST, str(port)]
    return _serve(
        command,
        cwd=Path.cwd(),
        environment={STORAGE_VARIABLE: url},
        port=port,
        health="/dashboard",
        page=lambda: "/dashboard",
        what=f"Optuna dashboard of {shown_uri(url)}",
        opened=opened,
    )


def _serve(
    command: list[str],
    *,
    cwd: Path,
    environment: Mapping[str, str],
    port: int,
    health: str,
    page: Callable[[], str],
    what: str,
    opened: bool,
) -> int:
    """Serve until Ctrl-C; `health` is a path that answers once the server is ready, `page` finds the one to begin with."""
    from obowlab.tracking.guard import PARAMETER, TOKEN_VARIABLE, new_token

    name = what.partition(" of ")[0]
    token = new_token()
    click.echo(f"Starting the {name} ...", err=True)
    with _serving(command, cwd=cwd, environment={**environment, TOKEN_VARIABLE: token}) as server:
        path, mark, view = page().partition("#")  # of which a server sees nothing
        address = f"http://{HOST}:{port}{path}?{PARAMETER}={token}{mark}{view}"
        if not _answers(server, port=port, health=health, token=token):
            raise UserError(f"The {name} did not start (exit code {server.poll()}); its messages are above.")
        click.echo(f"{what}: {address}")
        click.echo(f"From another machine: ssh -L {port}:{HOST}:{port} {os.environ.get('USER', 'USER')}@{socket.gethostname()}")
        click.echo("Its token is the login of this start; scripts set MLFLOW_TRACKING_TOKEN to it. Ctrl-C ends it.")
        if opened:
            import webbrowser

            if not webbrowser.open(address):
                click.echo("Warning: there is no browser to show it; open the address yourself.", err=True)
        code = server.wait()
    click.echo(f"The {name} ended with exit code {code}.", err=True)
    return 1


def _refuse_taken(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(f"Port {port} of {HOST} cannot be used ({error.strerror}); choose another --port.") from None


@contextmanager
def _serving(command: list[str], *, cwd: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Start the server in a process group of its own, and end the whole group when the context is left."""
    with on_signals(_interrupt, (signal.SIGTERM, signal.SIGHUP)):  # as Ctrl-C, so that the server never outlives this process
        server = subprocess.Popen(command, cwd=cwd, env={**os.environ, **environment}, stdout=sys.stderr, start_new_session=True)
        try:
            yield server
        finally:
            _end_group(server)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _end_group(server: subprocess.Popen[bytes]) -> None:
    """Ask every process of the server's group to end, and kill those that do not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
        except ProcessLookupError:
            break
        try:
            server.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            continue
    server.wait()


def _answers(server: subprocess.Popen[bytes], *, port: int, health: str, token: str) -> bool:
    """Wait until the server answers; False when it ends or takes too long."""
    deadline = time.monotonic() + START_TIMEOUT_S
    request = urllib.request.Request(f"http://{HOST}:{port}{health}", headers={"Authorization": f"Bearer {token}"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with direct.open(request, timeout=2):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    return False
