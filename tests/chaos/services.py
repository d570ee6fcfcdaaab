"""Real services to be killed: PostgreSQL, an MLflow server on it, and an object store for its artifacts."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.chaos import forks, object_store
from tests.chaos.forks import Child

BUCKET = "artifacts"
PATIENCE_S = 120.0


def tools() -> Path | None:
    """Return where PostgreSQL's programs are; None where it is not installed."""
    found = shutil.which("initdb") or next((str(p) for p in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))), None)
    return None if found is None else Path(found).resolve().parent


def lacking() -> str | None:
    """Return what of the services is not installed, or None."""
    if tools() is None:
        return "PostgreSQL is not installed (Debian package postgresql)"
    for package in ("psycopg", "boto3"):
        try:
            __import__(package)
        except ImportError:
            return f"the Python package {package} is not installed"
    return None


class Services:
    """The three of them, each of which can be killed with -9 and started again on what it left on the disk."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.ports = {name: _free_port() for name in ("database", "objects", "server")}
        self._database: subprocess.Popen[bytes] | None = None
        self._objects: Child | None = None
        self._server: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        """The address of the MLflow server."""
        return f"http://127.0.0.1:{self.ports['server']}"

    @property
    def database_url(self) -> str:
        """The address of the database."""
        return f"postgresql://chaos@127.0.0.1:{self.ports['database']}/postgres"

    def start(self, name: str) -> None:
        """Start one of `database`, `objects`, `server` and wait until it answers."""
        {"database": self._start_database, "objects": self._start_objects, "server": self._start_server}[name]()

    def kill(self, name: str) -> bool:
        """Kill -9 a service with all its processes; False when it did not live."""
        if name == "objects":
            return self._objects is not None and self._objects.kill_family()
        process = self._database if name == "database" else self._server
        if process is None or process.poll() is not None:
            return False
        for pid in forks.process_tree(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()  # so that nobody takes its process id for a living one
        return True

    def query(self, statement: str) -> list[Sequence[Any]]:
        """Ask the database."""
        import psycopg

        with psycopg.connect(self.database_url, connect_timeout=10) as connection:
            return list(connection.execute(statement.encode()).fetchall())

    # -------------------------------------------------------------------------------------------------- one by one

    def _start_database(self) -> None:
        found = tools()
        assert found is not None
        data = self.place / "postgresql"
        user = "postgres" if os.geteuid() == 0 else None  # the server refuses to run as root
        if not data.exists():
            data.mkdir(parents=True)
            if user is not None:
                shutil.chown(data, user, user)
            command = [str(found / "initdb"), "-D", str(data), "-U", "chaos", "--auth=trust", "--no-sync", "-E", "UTF8"]
            quiet = subprocess.DEVNULL
            subprocess.run(command, check=True, cwd="/", stdout=quiet, stderr=quiet, user=user, group=user)
        port = self.ports["database"]
        options = ["-p", str(port), "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "fsync=off"]
        with (self.place / "postgresql.log").open("ab") as log:
            self._database = subprocess.Popen(
                [str(found / "postgres"), "-D", str(data), *options],
                cwd="/",
                stdout=log,
                stderr=log,
                start_new_session=True,
                user=user,
                group=user,
            )
        _wait_for(lambda: self.query("SELECT 1"), what="the database")

    def _start_objects(self) -> None:
        port = self.ports["objects"]
        self._objects = forks.fork(
            lambda: object_store.serve(self.place / "objects", port=port), place=self.place, name="objects"
        )
        _wait_for(lambda: _put(f"http://127.0.0.1:{port}/{BUCKET}"), what="the object store")

    def _start_server(self) -> None:
        environment = {
            **os.environ,
            "AWS_ACCESS_KEY_ID": "chaos",
            "AWS_SECRET_ACCESS_KEY": "chaos",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_MAX_ATTEMPTS": "1",
            "MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{self.ports['objects']}",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        words = [
            "server", "--host", "127.0.0.1", "--port", str(self.ports["server"]), "--workers", "1",
            "--backend-store-uri", self.database_url.replace("postgresql:", "postgresql+psycopg:"),
            "--artifacts-destination", f"s3://{BUCKET}",
        ]  # fmt: skip
        with (self.place / "server.log").open("ab") as log:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "mlflow", *words], env=environment, stdout=log, stderr=log, start_new_session=True
            )
        _wait_for(lambda: urllib.request.urlopen(f"{self.uri}/health", timeout=2).read(), what="the MLflow server")


@contextmanager
def running(place: Path, *, template: Path, names: Sequence[str] = ("database", "objects", "server")) -> Iterator[Services]:
    """Start services whose database has MLflow's tables already; the template is made at the first use."""
    place.chmod(0o755)
    if not (template / "whole").exists():
        _make_template(template)
    services = Services(place)
    subprocess.run(["cp", "-a", str(template / "postgresql"), str(place / "postgresql")], check=True)
    try:
        for name in names:
            services.start(name)
        yield services
    finally:
        for name in ("server", "objects", "database"):
            services.kill(name)


def _make_template(template: Path) -> None:
    shutil.rmtree(template, ignore_errors=True)
    template.mkdir(parents=True)
    services = Services(template)
    try:
        for name in ("database", "objects", "server"):
            services.start(name)
    finally:
        for name in ("server", "objects", "database"):
            services.kill(name)
    (template / "postgresql" / "postmaster.pid").unlink(missing_ok=True)
    (template / "whole").touch()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _put(url: str) -> None:
    urllib.request.urlopen(urllib.request.Request(url, method="PUT", data=b""), timeout=2).read()


def _wait_for(ask: Callable[[], object], *, what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            ask()
        # Not there yet: refused, reset, starting up, in recovery; each client says it in its own way.
        except Exception:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
        else:
            return
