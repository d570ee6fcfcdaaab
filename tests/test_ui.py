"""Who gets what from the server of `obowlab ui`: strangers on the same machine, pages of other ports, browsers, scripts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import requests

from obowlab.tracking.guard import TOKEN_VARIABLE, Answer, Guard, is_foreign, new_token
from tests.processes import wait_until
from tests.services import free_ports

GUARD = Guard("s3cret-token", "obowlab-5000")
HOST = "127.0.0.1:5000"
COOKIE = {"host": HOST, "cookie": "a=b; obowlab-5000=s3cret-token"}
DELETE = "/ajax-api/2.0/mlflow/runs/delete"


def verdict(method: str = "GET", path: str = "/", *, query: str = "", **headers: str) -> Answer | None:
    return GUARD.check(method, path, query=query, headers={name.replace("_", "-"): text for name, text in headers.items()})


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"cookie": "obowlab-5000=s3cret-toke"},
        {"cookie": "obowlab-5001=s3cret-token"},
        {"cookie": "obowlab-5000="},
        {"cookie": "\x00;;=="},
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer "},
        {"authorization": "Basic s3cret-token"},
        {"authorization": "Basic czNjcmV0LXRva2Vu"},  # as a user's name
        {"authorization": "Bearer s3cret-tokén"},
        {"authorization": "s3cret-token"},
    ],
)
def test_a_stranger_gets_nothing(headers: dict[str, str]) -> None:
    for method, path in (("GET", "/"), ("GET", "/health"), ("HEAD", "/"), ("POST", DELETE), ("OPTIONS", DELETE)):
        answer = verdict(method, path, host=HOST, **headers)
        assert answer is not None
        assert answer.status == 401
        assert "s3cret" not in str(answer)
    for query in ("token=", "token=wrong", "token=s3cret-token%00", "Token=s3cret-token"):
        assert (answer := verdict(query=query)) is not None
        assert answer.status == 401
    assert (answer := verdict("POST", DELETE, query="token=s3cret-token")) is not None
    assert answer.status == 401


def test_scripts_and_the_cookie_of_the_printed_address_pass() -> None:
    assert verdict("POST", DELETE, host=HOST, authorization="Bearer s3cret-token") is None
    assert verdict("POST", DELETE, host=HOST, authorization="basic YW55Ym9keTpzM2NyZXQtdG9rZW4=") is None
    assert verdict("POST", DELETE, **COOKIE, origin=f"http://{HOST}", sec_fetch_site="same-origin") is None
    answer = verdict(path="/dashboard", query="a=1&token=s3cret-token&b=%26", host=HOST, sec_fetch_site="none")
    assert answer is not None
    assert (answer.status, dict(answer.headers)["Location"]) == (303, "/dashboard?a=1&b=%26")
    cookie = dict(answer.headers)["Set-Cookie"]
    assert cookie == "obowlab-5000=s3cret-token; Path=/; HttpOnly; SameSite=Strict"
    elsewhere = verdict(path="//example.org/", query="token=s3cret-token")
    assert elsewhere is not None
    assert dict(elsewhere.headers)["Location"] == "/example.org/"
    assert len(new_token()) > 40
    assert new_token() != new_token()


@pytest.mark.parametrize(
    ("foreign", "headers"),
    [
        (True, {"origin": "http://127.0.0.1:8081"}),
        (True, {"origin": "http://localhost:5000"}),
        (True, {"origin": "https://example.org"}),
        (True, {"origin": "null"}),
        (True, {"origin": ""}),
        (True, {"origin": "http://127.0.0.1:5000.example.org"}),
        (True, {"sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors"}),
        (True, {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"}),
        (False, {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}),  # a link
        (False, {"sec-fetch-site": "none", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}),
        (False, {"origin": "http://127.0.0.1:5000", "sec-fetch-site": "same-origin"}),
        (False, {}),
    ],
)
def test_a_page_of_another_server_is_known_by_what_the_browser_says(foreign: bool, headers: dict[str, str]) -> None:
    assert is_foreign("GET", headers={"host": HOST, **headers}) is foreign
    answer = GUARD.check("GET", "/", query="", headers={**COOKIE, **headers})
    assert (answer is not None and answer.status == 403) is foreign
    if "sec-fetch-mode" in headers:
        assert is_foreign("POST", headers={"host": HOST, **headers}) is (headers["sec-fetch-site"] != "none")


# ------------------------------------------------------------------------------------------------------------ a real server


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, Path]]:
    """`obowlab ui` on an empty store: its address, its token and its store, in which a stranger has planted a module."""
    root = tmp_path_factory.mktemp("ui")
    for name in ("mlflow", "uvicorn", "obowlab"):
        (root / f"{name}.py").write_text(f"from pathlib import Path\nPath({str(root / 'planted')!r}).touch()\n")
    (port,) = free_ports(1)
    words = [sys.executable, "-m", "obowlab.cli", "ui", "--port", str(port), "--runs-root", str(root)]
    environment = {"PYTHONPATH": str(Path(__file__).parents[1]), "HOME": str(root)}
    server = subprocess.Popen(words, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address, token = server.stdout.readline().split(": ", 1)[1].strip().split("?token=")
        yield address.rstrip("/"), token, root
    finally:
        server.terminate()
        server.wait(20)


def script(served: tuple[str, str, Path], path: str, **body: Any) -> Any:
    """Ask as a script does, with the token."""
    headers = {"Authorization": f"Bearer {served[1]}"}
    answer = requests.request("POST" if body else "GET", served[0] + path, headers=headers, json=body or None, timeout=30)
    assert answer.status_code == 200, answer.text
    return answer.json()


def new_run(served: tuple[str, str, Path]) -> str:
    created = script(served, "/api/2.0/mlflow/runs/create", experiment_id="0", start_time=1)
    return str(created["run"]["info"]["run_id"])


def stage(served: tuple[str, str, Path], run_id: str) -> str:
    return str(script(served, f"/api/2.0/mlflow/runs/get?run_id={run_id}")["run"]["info"]["lifecycle_stage"])


def test_another_user_of_the_machine_can_neither_read_nor_delete(served: tuple[str, str, Path]) -> None:
    run_id = new_run(served)
    for path in ("/", "/health", "/version", "/api/2.0/mlflow/experiments/search?max_results=1", "/graphql", "/static-files/x"):
        assert requests.get(served[0] + path, timeout=30).status_code == 401, path
    for path in (DELETE, "/api/2.0/mlflow/runs/delete", "/api/3.0/mlflow/traces", "/v1/traces"):
        assert requests.post(served[0] + path, json={"run_id": run_id}, timeout=30).status_code == 401, path
    put = requests.put(f"{served[0]}/api/2.0/mlflow-artifacts/artifacts/x.txt", data=b"x", timeout=30)
    assert put.status_code == 401
    assert stage(served, run_id) == "active"
    assert not (served[2] / "planted").exists(), "a module in the store was imported"


def test_the_token_is_in_no_command_line(served: tuple[str, str, Path]) -> None:
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert any(b"ui_server" in line for line in lines)
    assert not any(served[1].encode() in line for line in lines)


def test_mlflows_own_client_logs_in_with_the_token(served: tuple[str, str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    client = mlflow.MlflowClient(served[0])
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(mlflow.exceptions.MlflowException, match="401"):
        client.search_experiments()
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", served[1])
    assert [experiment.name for experiment in client.search_experiments()] == ["Default"]


class _Attack(BaseHTTPRequestHandler):
    """A page of another port that sends requests with the cookies of whoever looks at it."""

    target = ""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(f"<!doctype html><title>sending</title><script>{self.target}</script>".encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def attacker() -> Iterator[str]:
    found = HTTPServer(("127.0.0.1", 0), _Attack)
    Thread(target=found.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{found.server_port}/"
    found.shutdown()
    found.server_close()


def test_a_page_of_another_port_deletes_nothing(served: tuple[str, str, Path], attacker: str, browser: Any) -> None:
    run_id = new_run(served)
    browser.get(f"{served[0]}/?token={served[1]}#/experiments/0")
    assert "token" not in browser.current_url
    wait_until(lambda: "Default" in browser.execute_script("return document.body.innerText"))
    mine = f"return fetch('/ajax-api/2.0/mlflow/runs/get?run_id={run_id}').then(answer => answer.status)"
    assert browser.execute_script(mine) == 200, "its own page is logged in"
    assert served[1] not in browser.execute_script("return document.cookie")
    send = "const send = (more) => fetch('%s', {method: 'POST', credentials: 'include', body: '%s', ...more}).catch(() => 0);"
    body = f'{{"run_id": "{run_id}"}}'
    how = "send({mode: 'no-cors'}), send({headers: {'Content-Type': 'application/json'}})"
    _Attack.target = send % (served[0] + DELETE, body) + f"Promise.all([{how}]).then(() => {{ document.title = 'sent'; }});"
    browser.get(attacker)
    wait_until(lambda: browser.title == "sent")
    assert stage(served, run_id) == "active"


def test_a_server_without_a_token_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(KeyError):
        Guard.of_environment(5000)
    monkeypatch.setenv(TOKEN_VARIABLE, "x")
    assert Guard.of_environment(5000) == Guard("x", "obowlab-5000")
    assert TOKEN_VARIABLE not in os.environ, "programs that it starts need no token"
