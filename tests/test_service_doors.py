"""Who may do what at the services: strangers, readers, writers, web pages of other ports; each attack and its answer."""

from __future__ import annotations

import base64
import json
import re
import shutil
import socket
import ssl
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import requests
import yaml

from dashboards.services.login import ATTEMPTS, WINDOW_S, Attempts
from dashboards.services.setup import CERTIFICATE, PRIVATE_KEY, draw_certificate
from dashboards.services.write_env import SECRET
from obowlab.report.model import Site
from obowlab.report.pages import build_site
from tests.lab import Lab
from tests.processes import wait_until
from tests.services import COMPOSE, GRPC, LOOPBACK, Stack, close_site, missing_tools

OTHER = "http://127.0.0.1:8081"
"""A page of another port of the same machine."""

CREATE = "/api/2.0/mlflow/users/create"
DOORS = ((5000, "/version"), (8081, "/index.html"), (8082, "/api/studies"))


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """The services with two accounts, nothing trained."""
    if lacks := missing_tools():
        pytest.skip(lacks)
    root = Path(tempfile.mkdtemp(prefix="obowlab-doors-"))  # pytest's own folders are closed to PostgreSQL's user
    root.chmod(0o711)
    places = {"DATA": str(root / "data"), "BACKUPS": str(root / "backups")}
    stack = Stack(root, settings={**places, "MLFLOW_WORKERS": "1", "UPLOAD_LIMIT": "64MB"})
    lab = Lab(stack)
    try:
        stack.start("web")
        report = stack.folders("worker")["/lab/site"] / "report"
        report.mkdir(parents=True)
        (report / "index.html").write_text("<!doctype html><title>report</title>")
        (report / ".obowlab-report").write_text("mark")
        (report / ".hidden").mkdir()
        (report / ".hidden" / "page.html").write_text("hidden")
        yield lab
    finally:
        stack.stop()
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="module")
def accounts(lab: Lab) -> dict[str, tuple[str, str]]:
    """Rita, who may read, and Will, who may write."""
    return {name: account(lab, name, *words) for name, words in (("rita", ["--reader"]), ("will", []))}


def account(lab: Lab, name: str, *words: str) -> tuple[str, str]:
    done = lab.stack.call("setup", "user", name, *words)
    assert done.returncode == 0, done.stderr
    said = dict(line.split("=", 1) for line in done.stdout.splitlines())
    return said["MLFLOW_TRACKING_USERNAME"], said["MLFLOW_TRACKING_PASSWORD"]


def ask(lab: Lab, method: str, path: str, *, port: int, account: tuple[str, str] | None, **options: Any) -> requests.Response:
    return requests.request(method, lab.stack.address(port) + path, auth=account, timeout=60, **options)


def study(lab: Lab, account: tuple[str, str], name: str) -> requests.Response:
    body = {"study_name": name, "directions": ["minimize"]}
    return ask(lab, "POST", "/api/studies", port=8082, account=account, json=body)


def test_a_page_of_another_port_can_neither_make_an_account_nor_write(lab: Lab) -> None:
    body = {"username": "mallory", "password": "mallory's password"}
    for headers in (
        {"Origin": OTHER},
        {"Origin": "http://localhost:5000"},
        {"Origin": "null"},
        {"Origin": "https://example.org"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"},
    ):
        for path in (CREATE, "/api/2.0/mlflow/users/create-ui", "/api/2.0/mlflow/runs/delete", "/graphql"):
            assert ask(lab, "POST", path, port=5000, account=lab.admin, json=body, headers=headers).status_code == 403, headers
        assert ask(lab, "DELETE", "/api/studies/1", port=8082, account=lab.admin, headers=headers).status_code == 403
        assert ask(lab, "POST", "/api/studies", port=8082, account=lab.admin, json={}, headers=headers).status_code == 403
    assert lab.ask("/api/2.0/mlflow/users/get?username=mallory", account=lab.admin).status_code == 404
    preflight = {"Origin": OTHER, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    answer = ask(lab, "OPTIONS", CREATE, port=5000, account=None, headers=preflight)
    assert answer.status_code == 403
    assert "Access-Control-Allow-Origin" not in answer.headers


def test_own_pages_and_followed_links_work(lab: Lab) -> None:
    for port, path in DOORS:
        address = lab.stack.address(port)
        for headers in (
            {"Origin": address, "Sec-Fetch-Site": "same-origin"},
            {"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"},
            {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"},
        ):
            assert ask(lab, "GET", path, port=port, account=lab.worker, headers=headers).status_code == 200, (port, headers)
        frame = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}
        assert ask(lab, "GET", path, port=port, account=lab.worker, headers=frame).status_code == 403
    secure = {"Origin": "https://127.0.0.1:" + lab.stack.address(5000).rpartition(":")[2]}  # behind a proxy with TLS
    assert ask(lab, "GET", "/version", port=5000, account=lab.worker, headers=secure).status_code == 200


def test_a_reader_looks_at_studies_and_a_writer_changes_them(lab: Lab, accounts: dict[str, tuple[str, str]]) -> None:
    reader, writer = accounts["rita"], accounts["will"]
    made = study(lab, writer, "kept")
    assert made.status_code == 201, made.text
    number = made.json()["study_summary"]["study_id"]
    assert study(lab, reader, "another").status_code == 403
    for method in ("DELETE", "POST", "PUT", "PATCH", "OPTIONS", "MOVE"):
        claims = {"X-Forwarded-Method": "GET", "X-HTTP-Method-Override": "GET"}
        answer = ask(lab, method, f"/api/studies/{number}", port=8082, account=reader, headers=claims)
        assert answer.status_code == 403, method
    for method in ("GET", "HEAD"):
        claims = {"X-HTTP-Method-Override": "DELETE"}
        assert ask(lab, method, "/api/studies", port=8082, account=reader, headers=claims).status_code == 200
    names = [
        found["study_name"] for found in ask(lab, "GET", "/api/studies", port=8082, account=reader).json()["study_summaries"]
    ]
    assert names == ["kept"]
    assert ask(lab, "DELETE", f"/api/studies/{number}", port=8082, account=writer).status_code == 204
    assert study(lab, lab.admin, "of the administrator").status_code == 201


def test_passwords_can_be_tried_a_few_times_and_nobody_is_locked_out(lab: Lab) -> None:
    owner = account(lab, "olga")
    fresh = account(lab, "frieda")
    assert lab.ask("/version", account=owner).status_code == 200
    for port, path in DOORS:
        tries = [lab.ask(path, port=port, account=("olga", f"guess {port} {i}")) for i in range(ATTEMPTS + 2)]
        assert tries[-1].status_code == 429
        assert 0 < int(tries[-1].headers["Retry-After"]) <= WINDOW_S
        assert lab.ask(path, port=port, account=owner).status_code == 200, "whoever uses the account goes on"
    assert lab.ask("/version", account=fresh).status_code == 200, "other accounts too"
    claims = {"X-Forwarded-For": "203.0.113.7"}
    assert lab.ask("/version", account=("olga", "guess"), headers=claims).status_code == 429, "an address is not what one claims"


def test_uploads_have_a_limit(lab: Lab, accounts: dict[str, tuple[str, str]]) -> None:
    writer = accounts["will"]
    created = lab.ask("/api/2.0/mlflow/runs/create", account=writer, json={"experiment_id": "0"}).json()["run"]["info"]
    place = f"/api/2.0/mlflow-artifacts/artifacts/0/{created['run_id']}/artifacts"
    whole = b"x" * (40 * 10**6)  # more than other requests may have
    assert ask(lab, "PUT", f"{place}/a.bin", port=5000, account=writer, data=whole).status_code == 200
    assert ask(lab, "GET", f"{place}/a.bin", port=5000, account=writer).content == whole

    def too_much() -> Iterator[bytes]:
        for _ in range(70):
            yield b"x" * 10**6

    for port, path, body in (
        (5000, f"{place}/b.bin", b"x" * (70 * 10**6)),
        (5000, f"{place}/c.bin", too_much()),  # without saying how much it will be
        (5000, "/api/2.0/mlflow/runs/log-batch", b"x" * (40 * 10**6)),
        (8082, "/api/studies", b"x" * (40 * 10**6)),
    ):
        method = "PUT" if "artifacts" in path else "POST"
        assert ask(lab, method, path, port=port, account=writer, data=body).status_code == 413, path
    listed = lab.ask(f"/api/2.0/mlflow/artifacts/list?run_id={created['run_id']}", account=writer).json()
    assert [file["path"] for file in listed["files"]] == ["a.bin"]


def test_the_report_runs_only_its_own_scripts_and_shows_no_hidden_file(lab: Lab) -> None:
    answer = lab.ask("/index.html", port=8081, account=lab.worker)
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'; script-src 'self';" in policy
    assert "frame-ancestors 'none'" in policy
    for path in ("/.obowlab-report", "/.hidden/page.html", "/%2ehidden/page.html", "/x/../.obowlab-report"):
        assert lab.ask(path, port=8081, account=lab.worker).status_code == 404, path


def test_the_object_store_wants_a_certificate_and_logs_no_key(lab: Lab, accounts: dict[str, tuple[str, str]]) -> None:
    created = lab.ask("/api/2.0/mlflow/runs/create", account=accounts["will"], json={"experiment_id": "0"}).json()["run"]["info"]
    place = f"/api/2.0/mlflow-artifacts/artifacts/0/{created['run_id']}/artifacts/note.txt"
    assert ask(lab, "PUT", place, port=5000, account=accounts["will"], data=b"note" * 1000).status_code == 200
    (key,) = [key for key in lab.objects() if created["run_id"] in key]
    attacks = (
        (8888, "GET", f"/buckets/mlflow/{key}"),
        (8888, "DELETE", f"/buckets/mlflow/{key}"),
        (9333, "GET", "/col/delete?collection=mlflow"),
        (9333, "GET", "/dir/assign"),
        (9340, "GET", "/ui/index.html"),
    )
    folder = lab.stack.folders("objects")["/data"]
    foreign = lab.stack.root / "foreign"
    foreign.mkdir()
    draw_certificate(foreign)
    for port, method, path in attacks:
        assert status_of(method, lab.stack.address(port) + path) in (400, None), "HTTP where HTTPS is wanted"
        address = lab.stack.address(port).replace("http:", "https:") + path
        for shown in (None, foreign):
            pair = None if shown is None else (str(shown / CERTIFICATE), str(shown / PRIVATE_KEY))
            assert status_of(method, address, cert=pair, verify=str(folder / CERTIFICATE)) is None, (port, path)
    for port in (9333, 9340, 8888):  # with their certificate they answer
        address = lab.stack.address(port).replace("http:", "https:")
        pair = (str(folder / CERTIFICATE), str(folder / PRIVATE_KEY))
        assert status_of("GET", address, cert=pair, verify=pair[0]) in (200, 401), port
    for port in (9333, 9340, 8888, 8333):
        assert grpc_answer(lab.stack.ports[port] + GRPC, folder=None) == b"", port
        assert grpc_answer(lab.stack.ports[port] + GRPC, folder=folder) != b"", "what is refused is there"
    assert ask(lab, "GET", place, port=5000, account=accounts["will"]).content == b"note" * 1000
    for secret in ("OBJECTS_ACCESS_KEY", "OBJECTS_SECRET_KEY", "OBJECTS_TOKEN_KEY"):
        assert lab.stack.settings[secret] not in lab.stack.log("objects")
    for name in ("s3.json", "security.toml", CERTIFICATE, PRIVATE_KEY):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    drawn = (folder / PRIVATE_KEY).read_bytes()
    assert lab.stack.call("key").returncode == 0
    assert (folder / PRIVATE_KEY).read_bytes() == drawn, "what runs keeps its certificate"


def status_of(method: str, address: str, **options: Any) -> int | None:
    """Return the status of an answer; None when the server ends the connection instead."""
    try:
        return requests.request(method, address, timeout=60, **options).status_code
    except requests.ConnectionError:
        return None


def grpc_answer(port: int, *, folder: Path | None) -> bytes:
    """Return what gRPC answers to the first words of HTTP/2, with the certificate of a folder or none; empty: it refuses."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if folder is not None:
        context.load_cert_chain(folder / CERTIFICATE, folder / PRIVATE_KEY)
    with socket.create_connection((LOOPBACK, port), timeout=30) as plain:
        try:
            with context.wrap_socket(plain) as sealed:
                sealed.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
                return sealed.recv(100)
        except (ssl.SSLError, ConnectionError):
            return b""


def test_a_deleted_account_is_gone(lab: Lab) -> None:
    name, password = account(lab, "gone")
    done = lab.stack.call("setup", "delete", "gone")
    assert (done.returncode, done.stdout) == (0, "The account gone is deleted; it may be let in for another minute.\n")
    again = lab.stack.call("setup", "delete", "gone")
    assert (again.returncode, again.stderr.splitlines()[-1]) == (1, "There is no account gone.")
    assert lab.stack.call("setup", "delete", "worker").returncode == 1
    assert lab.ask("/version", account=(name, password)).status_code == 401


def test_the_role_of_backups_reads_and_changes_nothing_and_what_it_saves_can_be_encrypted(lab: Lab) -> None:
    stack, folder = lab.stack, str(lab.stack.root / "backups")
    stack._run_first_scripts()  # a second time changes nothing
    for statement in ("DROP TABLE runs", "DELETE FROM experiments", "CREATE TABLE public.mine (x int)", "CREATE ROLE mine"):
        refused = run_sql(stack, statement)
        assert refused.returncode != 0
        assert "permission denied" in refused.stderr or "must be" in refused.stderr, refused.stderr
    assert run_sql(stack, "SELECT count(*) FROM experiments").returncode == 0
    saved = stack.call("backup", "save", folder, BACKUP_PASSPHRASE="pass phrase")
    assert saved.returncode == 0, saved.stderr
    (backup,) = Path(folder).iterdir()
    assert {path.suffix for path in backup.iterdir()} == {".enc", ".json"}
    assert not [path for path in backup.glob("*.enc") if b"PGDMP" in path.read_bytes() or b"ustar" in path.read_bytes()]
    for changed, said in (
        ({}, "is encrypted: set BACKUP_PASSPHRASE"),
        ({"BACKUP_PASSPHRASE": "another"}, "is damaged, or was made with another BACKUP_PASSPHRASE"),
    ):
        for action in ("check", "restore"):
            done = stack.call("restore", action, str(backup), **changed)
            assert done.returncode == 1
            assert said in done.stderr
    manifest = json.loads((backup / "manifest.json").read_text())
    (forged := Path(shutil.copytree(backup, stack.root / "forged")) / "manifest.json").write_text(
        json.dumps({key: value for key, value in manifest.items() if key not in ("signature", "salt")})
    )
    done = stack.call("restore", "check", str(forged.parent), BACKUP_PASSPHRASE="pass phrase")
    assert "is neither encrypted nor signed" in done.stderr
    before = lab.objects()
    done = stack.call("restore", "restore", str(backup), BACKUP_PASSPHRASE="pass phrase")
    assert done.returncode == 0, done.stderr
    assert lab.objects() == before
    assert stack.call("backup", "save", folder).returncode == 0, "the role may still read what was restored"


def run_sql(stack: Stack, statement: str) -> Any:
    words = ["psql", "--no-psqlrc", "--dbname=mlflow", f"--command={statement}"]
    surroundings = {**stack._surroundings("backup"), **stack.environment("backup")}
    return subprocess.run(words, env=surroundings, capture_output=True, text=True, check=False)


class _Attack(BaseHTTPRequestHandler):
    """A page of another port that sends requests with the login that the browser keeps."""

    script = ""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(f"<!doctype html><title>sending</title><script>{self.script}</script>".encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_in_a_browser_another_port_makes_no_account(lab: Lab, browser: Any) -> None:
    found = HTTPServer(("127.0.0.1", 0), _Attack)
    Thread(target=found.serve_forever, daemon=True).start()
    token = base64.b64encode(":".join(lab.admin).encode()).decode()
    headers = {"Content-Type": "application/json", "Authorization": f"Basic {token}"}
    body = json.dumps({"username": "mallory", "password": "the password of mallory"})
    how = json.dumps({"method": "POST", "credentials": "include", "headers": headers, "body": body})
    _Attack.script = f"fetch('{lab.uri}{CREATE}', {how}).catch(() => 0).then(() => {{ document.title = 'sent'; }});"
    try:
        browser.get(f"http://127.0.0.1:{found.server_port}/")
        wait_until(lambda: browser.title == "sent")
    finally:
        found.shutdown()
        found.server_close()
    assert lab.ask("/api/2.0/mlflow/users/get?username=mallory", account=lab.admin).status_code == 404


# -------------------------------------------------------------------------------------------------------- without services


def test_nobody_else_can_put_a_link_into_the_site_of_make_services(tmp_path: Path) -> None:
    root = tmp_path / "services"
    site = root / "volumes" / "site"
    (report := site / "report").mkdir(parents=True)
    (report / "index.html").write_text("report")
    for folder in (site, report):
        folder.chmod(0o777)
    for folder in (root, site.parent):
        for mode in (0o775, 0o757):
            folder.chmod(mode)
            with pytest.raises(SystemExit, match=f"others may write to {folder} \\(chmod go-w {folder}\\)"):
                close_site(site, root=root)
        folder.chmod(0o755)
    close_site(site, root=root)
    assert stat.S_IMODE(site.stat().st_mode) == 0o700
    for link, target in ((report / "key.txt", "/etc/hostname"), (report / "folder", "/etc"), (site / "report.old", "report")):
        link.symlink_to(target)
        with pytest.raises(SystemExit, match=f"{link} is a link"):
            close_site(site, root=root)
        link.unlink()
    close_site(site, root=root)


def test_a_report_takes_away_the_links_of_the_one_before(tmp_path: Path) -> None:
    out = tmp_path / "report"
    build_site(Site(as_of="", version="0"), out=out)
    (out / "link.txt").symlink_to("/etc/hostname")
    (out / "runs").symlink_to("/etc")
    build_site(Site(as_of="", version="0"), out=out)
    assert not [path for path in out.rglob("*") if path.is_symlink()]


def test_a_link_in_the_container_of_the_report_leads_to_no_secret() -> None:
    web = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]["web"]
    sources = [volume["source"] if isinstance(volume, dict) else volume.split(":")[0] for volume in web["volumes"]]
    assert sources == ["./dashboards/services/Caddyfile", "site"]
    assert not [name for name in re.findall(r"\$\{(\w+)", str(web["environment"])) if SECRET.fullmatch(name)]
    assert web["read_only"]


def test_attempts_are_counted_by_address_and_account() -> None:
    now = [0.0]
    attempts = Attempts(clock=lambda: now[0])

    def wrong(address: str, name: str, times: int) -> None:
        for i in range(times):
            attempts.note(address=address, name=name, password=str(i), right=False)

    def wait_s(address: str, name: str, password: str = "?") -> float:
        return attempts.wait_s(address=address, name=name, password=password)

    wrong("here", "olga", ATTEMPTS - 1)
    assert wait_s("here", "olga") == 0
    wrong("here", "olga", 1)
    assert wait_s("here", "olga") == WINDOW_S
    assert wait_s("there", "olga") == wait_s("here", "frieda") == 0
    now[0] = WINDOW_S - 1
    assert wait_s("here", "olga") == 1
    now[0] = WINDOW_S
    assert wait_s("here", "olga") == 0
    attempts.note(address="there", name="olga", password="right", right=True)
    wrong("here", "olga", ATTEMPTS)
    assert wait_s("here", "olga") == WINDOW_S
    assert wait_s("here", "olga", "right") == 0
    attempts.note(address="here", name="olga", password="right", right=False)  # it was changed meanwhile
    assert wait_s("here", "olga", "right") == WINDOW_S
    for i in range(5 * ATTEMPTS):
        wrong("sprayer", f"name {i}", 1)
    assert wait_s("sprayer", "another") == WINDOW_S
    wrong("many", "x", 20_000)
    assert len(attempts._wrong) <= 10_000
