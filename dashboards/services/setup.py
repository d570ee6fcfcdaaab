"""Prepare the services for use: the bucket, the tables of the studies, the role of those who may write, the accounts of MLflow.

Usage: python setup.py prepare | user NAME [--reader] | delete NAME | keys FOLDER. What is there already stays as it is. Addresses
and passwords come from the environment (docker-compose.yml, service `setup`); accounts are made through MLflow, as its
administrator.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

BUCKET = "mlflow"
WRITER = "writer"
WORKSPACE = "default"
GRANTS = ("experiment", "registered_model")
"""What a writer may change, whatever account created it: runs belong to their experiment, versions to their model."""

PARTS = ("master", "volume", "filer")
"""Parts of SeaweedFS that talk HTTP and gRPC with each other; people and MLflow use the S3 gateway, which asks for keys."""
CERTIFICATE = "tls.crt"
PRIVATE_KEY = "tls.key"


def make_bucket() -> None:
    """Create the bucket of MLflow's artifacts unless it is there."""
    import boto3

    client = boto3.client("s3")
    if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
        client.create_bucket(Bucket=BUCKET)


def make_tables() -> None:
    """Make the tables of the studies unless they are there: the dashboard does not start on an empty database."""
    from optuna.storages import RDBStorage

    RDBStorage("postgresql+psycopg:///optuna")


def login_app() -> Any:
    """Return a client of MLflow's login app, as the administrator of the environment.

    Raises:
        SystemExit: MLflow does not take the administrator's password.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.server.auth.client import AuthServiceClient

    client = AuthServiceClient(os.environ["MLFLOW_TRACKING_URI"])
    try:
        client.get_user(os.environ["MLFLOW_TRACKING_USERNAME"])
    except MlflowException as error:
        if error.error_code != "UNAUTHENTICATED" and "401" not in str(error):
            raise
        raise SystemExit(
            "MLflow does not take MLFLOW_ADMIN_PASSWORD of .env: the account was made with another one, or it was changed in "
            "MLflow since. Put the one that counts into .env."
        ) from None
    return client


def writer_role(client: Any) -> int:
    """Return the id of the role that may write, made where it is missing."""
    found = [role for role in client.list_roles(WORKSPACE) if role.name == WRITER]
    role = found[0] if found else client.create_role(WORKSPACE, WRITER, "may write to every experiment and registered model")
    granted = {permission.resource_type for permission in client.list_role_permissions(role.id)}
    for kind in GRANTS:
        if kind not in granted:
            client.add_role_permission(role.id, kind, "*", "EDIT")
    return int(role.id)


def make_user(client: Any, *, name: str, password: str, writer: bool) -> None:
    """Create an account, or give an existing one this password and this role."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_user(name, password)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        client.update_user_password(name, password)
    role = writer_role(client)
    has = role in [found.id for found in client.list_user_roles(name)]
    if writer and not has:
        client.assign_role(name, role)
    if has and not writer:
        client.unassign_role(name, role)


def delete_user(client: Any, *, name: str) -> None:
    """Delete an account; its runs and models stay.

    Raises:
        SystemExit: there is none.
    """
    from mlflow.exceptions import MlflowException

    try:
        client.delete_user(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise SystemExit(f"There is no account {name}.") from None


def write_keys(folder: Path) -> None:
    """Write what SeaweedFS starts with, for its owner only.

    `s3.json` holds the key of the gateway: SeaweedFS logs one that it gets from the environment. `security.toml` makes its parts
    ask each other for a certificate, which is drawn once; the master takes no token.
    """
    os.umask(0o077)
    credentials = [{"accessKey": os.environ["AWS_ACCESS_KEY_ID"], "secretKey": os.environ["AWS_SECRET_ACCESS_KEY"]}]
    identity = {"name": BUCKET, "credentials": credentials, "actions": ["Admin"]}
    if not (folder / CERTIFICATE).exists():
        draw_certificate(folder)
    _write(folder / "s3.json", json.dumps({"identities": [identity]}))
    _write(folder / "security.toml", _security(folder))


def draw_certificate(folder: Path) -> None:
    """Make a private key and its certificate in a folder: whoever has both counts as a part of the object store."""
    words = "openssl req -x509 -nodes -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -days 36500 -subj /CN=objects"
    extensions = ("subjectAltName=IP:127.0.0.1", "extendedKeyUsage=serverAuth,clientAuth")
    key, certificate = (folder / f"{name}.new" for name in (PRIVATE_KEY, CERTIFICATE))
    for each in (key, certificate):
        each.unlink(missing_ok=True)
    added = [word for extension in extensions for word in ("-addext", extension)]
    subprocess.run(
        [*words.split(), *added, "-keyout", str(key), "-out", str(certificate)],
        stderr=subprocess.DEVNULL,
        check=True,
    )
    key.replace(folder / PRIVATE_KEY)
    certificate.replace(folder / CERTIFICATE)


def _security(folder: Path) -> str:
    """Return SeaweedFS's security.toml: gRPC and HTTP of every part, with a certificate on both sides."""
    authority = f"ca = {json.dumps(str(folder / CERTIFICATE))}\n"
    own = f"cert = {json.dumps(str(folder / CERTIFICATE))}\nkey = {json.dumps(str(folder / PRIVATE_KEY))}\n"
    sections = [f"[grpc]\n{authority}", f"[https.client]\nenabled = true\n{own}{authority}"]
    sections += [f"[grpc.{part}]\n{own}" for part in (*PARTS, "s3", "client")]
    sections += [f"[https.{part}]\n{own}{authority}" for part in PARTS]
    return "\n".join(sections)


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f"{path.name}.new")
    beside.unlink(missing_ok=True)
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    beside.replace(path)


def main(words: list[str]) -> None:
    """Do what the words say."""
    parser = argparse.ArgumentParser(description="Prepare the services for use.")
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("prepare", help="make the bucket, the tables, the role `writer` and the account `worker`")
    user = actions.add_parser("user", help="make an account, or give an existing one a new password, and print it")
    user.add_argument("name")
    user.add_argument("--reader", action="store_true", help="may look at everything, change nothing of others")
    actions.add_parser("delete", help="delete an account").add_argument("name")
    actions.add_parser("keys", help="write the keys of the object store to a folder").add_argument("folder", type=Path)
    given = parser.parse_args(words)
    if given.action == "keys":
        write_keys(given.folder)
        return
    if given.action == "prepare":
        make_bucket()
        make_tables()
        make_user(login_app(), name="worker", password=os.environ["WORKER_PASSWORD"], writer=True)
        print(f"bucket {BUCKET}, tables of the studies, role {WRITER} and account worker are there")
        return
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}", given.name) or given.name in ("admin", "worker"):
        raise SystemExit("A user's name is letters, digits and ._@- and neither admin nor worker, which .env is about.")
    if given.action == "delete":
        delete_user(login_app(), name=given.name)
        print(f"The account {given.name} is deleted; it may be let in for another minute.")
        return
    password = secrets.token_urlsafe(18)
    make_user(login_app(), name=given.name, password=password, writer=not given.reader)
    print(f"MLFLOW_TRACKING_USERNAME={given.name}\nMLFLOW_TRACKING_PASSWORD={password}")


if __name__ == "__main__":
    main(sys.argv[1:])
