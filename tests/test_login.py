"""The login at a tracking server: where it comes from, what is said when it is refused, what `obowlab doctor` makes of it."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from obowlab.cli import doctor
from obowlab.config import Machine
from obowlab.tracking.server import answers, complaint, login

SECRET = "se cret:%&/"
CREDENTIALS = f"[mlflow]\nmlflow_tracking_username = filed\nmlflow_tracking_password = {SECRET}\n"


pytestmark = pytest.mark.usefixtures("workplace")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A server that takes alice's login and one token, and has lost its database for the user called broken."""
    known = {f"Basic {base64.b64encode(f'alice:{SECRET}'.encode()).decode()}": 200, "Bearer token": 200}
    known[f"Basic {base64.b64encode(f'broken:{SECRET}'.encode()).decode()}"] = 500

    class Door(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status = known.get(self.headers.get("Authorization", ""), 401) if self.path == "/version" else 404
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    found = HTTPServer(("127.0.0.1", 0), Door)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{found.server_port}"
    found.shutdown()
    found.server_close()


def test_an_account_comes_from_the_address_the_environment_or_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert login("http://host:5000") is None
    file = tmp_path / "home" / ".mlflow" / "credentials"
    file.parent.mkdir(parents=True)
    file.write_text(CREDENTIALS)
    assert login("http://host:5000") == ("filed", SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "alice")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "other")
    assert login("http://host:5000") == ("alice", "other")
    assert login("http://bob:p%40ss@host:5000") == ("bob", "p@ss")


def test_a_server_is_asked_with_the_login_that_there_is(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert answers(server, timeout_s=5) == 401
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "token")
    assert answers(f"{server}/", timeout_s=5) == 200
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "alice")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    assert answers(server, timeout_s=5) == 200
    assert answers(server.replace("://", "://alice:wrong@"), timeout_s=5) == 401
    with pytest.raises(OSError, match="refused"):
        answers("http://127.0.0.1:9", timeout_s=5)


def test_doctor_says_what_is_wrong_with_the_login(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tracking_uri=server)

    def said() -> tuple[str, str]:
        (check,) = doctor._tracking(machine)
        assert SECRET not in check.text
        return check.status, check.text

    assert said() == ("warn", f"{server} asks for a login; runs continue and keep their points")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "alice")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    assert said() == ("warn", f"{server} does not take the login that is set; runs continue and keep their points")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    assert said() == ("ok", f"{server} answers")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "broken")
    assert said() == ("warn", f"{server} answers with 500; runs continue and keep their points")


@pytest.mark.parametrize(("status", "code", "part"), [(401, "UNAUTHENTICATED", "login"), (403, "PERMISSION_DENIED", "write")])
def test_a_refusal_is_one_sentence_whoever_reports_it(status: int, code: str, part: str) -> None:
    import requests
    from mlflow.exceptions import MlflowException

    answer = requests.Response()
    answer.status_code = status
    of_a_file = requests.HTTPError(f"{status} Client Error for url: http://alice:{SECRET}@host", response=answer)
    for error in (of_a_file, MlflowException("API request failed.\nResponse body: '<html>'", error_code=_number(code))):
        text = complaint(error, uri="http://alice:secret@host:5000")
        assert part in text
        assert "secret" not in text
        assert "\n" not in text
        assert "html" not in text
    assert complaint(ValueError("two\n lines"), uri="http://host") == "http://host: two lines"


def _number(name: str) -> int:
    from mlflow.protos.databricks_pb2 import ErrorCode

    return int(ErrorCode.Value(name))
