"""What is shown and stored of the addresses of databases and servers: never a user, a password or a parameter."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obowlab.errors import UserError
from obowlab.runs import provenance
from obowlab.studies.storage import open_storage, storage_url
from obowlab.text import is_shown_whole, shown_uri, without_secrets
from obowlab.tracking.server import complaint, store_uri
from tests.command_line import Obowlab

SECRETS = (
    "pa/ss@w0rd",
    "p@ss:w0rd",
    "pass w0rd",
    "p?ss#w0rd",
    "50%off100%",
    "a@b/c@d",
    "://x@y",
    "p\nss w0rd",
    "päss wörd",
    "a'b\"c",
)
PLAIN = "postgresql://db.example.org:5432/optuna"


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("postgresql://me:pa/ss@w0rd@host:5432/db", "postgresql://host:5432/db"),
        ("postgresql+psycopg://me:secret@host/db?sslmode=require", "postgresql+psycopg://host/db"),
        ("postgresql://host/db?user=me&password=secret", "postgresql://host/db"),
        ("postgresql://a:1,b:2/db", "postgresql://a:1,b:2/db"),
        ("postgresql:///optuna", "postgresql:///optuna"),
        ("postgresql://me:sec?ret@host/db", "postgresql://***"),
        ("postgresql://me:sec#ret@host/db", "postgresql://***"),
        ("postgresql://host/db?password=sec@ret", "postgresql://***"),
        ("postgresql://me:secret", "postgresql://***"),
        ("postgresql://host/db;password=secret", "postgresql://***"),
        ("https://me:secret@[::1]:5000/mlflow?token=x", "https://[::1]:5000/mlflow"),
        ("https://host/x", "https://host/x"),
        ("sqlite:////data/me@home/mlflow.db?key=secret", "sqlite:////data/me@home/mlflow.db"),
        ("sqlite+pysqlcipher://:secret@/file.db", "sqlite+pysqlcipher:///file.db"),
        ("journal:////runs/my studies/s.journal", "journal:////runs/my studies/s.journal"),
        ("me:secret@host", "***"),
        ("host=x password=secret", "***"),
        ("me:secret@x://host", "***"),
        ("./mlruns", "./mlruns"),
        ("databricks", "databricks"),
    ],
)
def test_scheme_host_and_database_are_shown(address: str, shown: str) -> None:
    assert shown_uri(address) == shown
    assert shown_uri(shown) == shown
    assert is_shown_whole(address) is not shown.endswith("***")


def forms(secret: str) -> list[str]:
    """Return a password as people and programs write it into an address."""
    written = (secret, quote(secret), quote(secret, safe=""), quote_plus(secret))
    before = [f"postgresql://me:{each}@db.example.org:5432/optuna" for each in written]
    inside = [f"{PLAIN}?user=me&password={each}&sslmode=require" for each in written]
    return [*before, *inside, *(address.replace("postgresql", "https") for address in before)]


@given(st.text(min_size=4, max_size=30).filter(lambda text: text not in PLAIN + "https postgresql://***"))
def test_no_password_is_shown_however_it_is_written(secret: str) -> None:
    for address in forms(secret):
        assert secret not in shown_uri(address), address
        message = f"cannot use {address!r} with {secret} ({quote(secret)}); {secret!r} is wrong at {address}"
        said = without_secrets(message, uri=address)
        for part in (secret, quote(secret), repr(secret)[1:-1]):
            assert part not in said.replace("cannot use", "").replace("is wrong at", "").replace("with", ""), address


@pytest.mark.parametrize("secret", SECRETS)
def test_every_command_and_message_hides_it(
    secret: str, obowlab: Obowlab, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = [piece for piece in re.split(r"[\s/@:?#%'\"]+", secret) if len(piece) >= 4] or [secret]
    for address in forms(secret)[:8]:
        _, out, err = obowlab("tune", "kappa-delta", "--scale", "demo", "--dry-run", "--storage", address.replace("5432", "9"))
        assert "Traceback" not in out + err
        assert not [piece for piece in pieces if piece in out + err], (address, out, err)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        _, out, err = obowlab("runs", "list")
        assert not [piece for piece in pieces if piece in out + err], address
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        monkeypatch.setattr(sys, "argv", ["obowlab", "tune", f"--storage={address}", "--storage", address])
        assert not [piece for piece in pieces if piece in str(provenance.environment()["argv"])], address
        error = ValueError(f"invalid literal for int() with base 10: '{secret}@host:5432' in {address}")
        assert not [piece for piece in pieces if piece in complaint(error, uri=address)], address


def test_a_piece_of_a_password_that_a_driver_takes_for_the_host_is_hidden() -> None:
    for address in ("postgresql://u:p@ss@host/db", "postgresql://u:p@s@host:5432/db", "postgresql://u:a@b@host,other/db"):
        said = without_secrets("failed to resolve host 'ss@host', 's@host' or \"b@host\": unknown", uri=address)
        assert said == "failed to resolve host 'host', 'host' or \"host\": unknown", address


def test_a_message_stays_readable() -> None:
    said = "could not connect to server at db.example.org:5432: Connection refused"
    assert without_secrets(said, uri="postgresql://me:secret@db.example.org:5432/optuna?sslmode=require") == said
    path = "/data/me@home/mlflow.db"
    assert without_secrets(f"unable to open {path}", uri=f"sqlite:///{path}") == f"unable to open {path}"
    assert without_secrets("no secret", uri="postgresql:///optuna?password=secret") == "no ***"


def test_an_address_that_can_be_read_in_two_ways_is_refused_before_it_is_used(tmp_path: Path) -> None:
    for address in ("postgresql://me:sec?ret@host/db", "postgresql://host/db?password=sec@ret"):
        with pytest.raises(UserError, match="%40") as caught:
            storage_url(address, runs_root=tmp_path)
        assert "sec" not in str(caught.value).replace("parameter", "")
        with pytest.raises(UserError, match="%40"):
            store_uri(address, runs_root=tmp_path)
    with pytest.raises(UserError, match="Cannot use postgresql") as caught:
        open_storage(storage_url("postgresql://me:pa%2Fss%40w0rd@127.0.0.1:9/x", runs_root=tmp_path))
    assert "w0rd" not in str(caught.value)
