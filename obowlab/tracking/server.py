"""Where MLflow keeps what is mirrored: a SQLite file in the run store, or the server a user names.

mlflow is imported inside the functions only: the command line must start without it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from obowlab.errors import UserError
from obowlab.files.locks import locked
from obowlab.files.sharing import share, shared_folder
from obowlab.runs.metrics import mlflow_name
from obowlab.text import is_shown_whole, without_secrets
from obowlab.text import shown_uri as shown_uri
from obowlab.tracking.local_store import (
    ARTIFACTS,
    DAMAGES,
    SQLITE,
    damage_sentence,
    database_path,
    local_folder,
    make_usable,
    problem_of,
    upgrade_sentence,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

IN_FULL = "sqlite+pysqlite:///"
"""Means the same as `SQLITE`, but MLflow does not make the folder of such a file anew where a store was taken away."""

DATABASE = "mlflow.db"
EXPERIMENT = "obowlab"
REPORTS = "-reports"
"""What the name of the experiment of reports, tables and studies ends in; the training runs' is the name before it."""

RESULTS_VIEW = "results"
"""Name of the view of the run list that shows results."""
_RESULTS = ("linear_top1", "knn_top1", "fewshot_1shot", "fewshot_5shot")
_COLUMNS = {
    **{f"tags.`{mlflow_name(name, source='student')}`": 210 for name in _RESULTS},  # with intervals; no run has it: no column
    "params.`recipe`": 160,
    "params.`seed`": 60,
    "params.`training.epochs`": 130,
    "tags.`obowlab.status`": 130,
}
"""Columns of this view, with their widths in pixels."""

REQUEST_TIMEOUT_S = 8.0
_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql")
logger = logging.getLogger(__name__)
QUOTE_HINT = "write @ / : ? # and spaces in a user's name, password or parameter as %40 %2F %3A %3F %23 %20"
LOGIN_HINT = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or ~/.mlflow/credentials"


def store_uri(tracking_uri: str | None, *, runs_root: Path) -> str:
    """Return the URI of the MLflow store: the given one, or the SQLite file of the run store.

    Args:
        tracking_uri: `machine.tracking_uri`, which MLFLOW_TRACKING_URI sets.
        runs_root: where runs are kept.

    Raises:
        UserError: MLflow no longer writes to plain folders, or cannot have the run store's path in an address.
    """
    if not tracking_uri:
        if re.search(r"\?|%[0-9A-Fa-f]{2}", str(runs_root.absolute())):
            raise UserError(
                f"MLflow cannot keep its database in {runs_root.absolute()}, whose name has a ? or a % before two digits: choose "
                "another --runs-root, or set MLFLOW_TRACKING_URI."
            )
        return f"{SQLITE}{runs_root.absolute() / DATABASE}"
    scheme = re.match(r"([a-z]+)(\+\w+)?:", tracking_uri)
    if scheme is None or scheme[1] not in _SCHEMES:
        raise UserError(
            f"MLflow cannot write to '{shown_uri(tracking_uri)}' (MLFLOW_TRACKING_URI or tracking_uri): "
            "name a server, http://HOST:PORT, or a database, sqlite:////FOLDER/mlflow.db."
        )
    if not is_shown_whole(tracking_uri):
        raise UserError(f"{shown_uri(tracking_uri)} (MLFLOW_TRACKING_URI or tracking_uri): {QUOTE_HINT}.")
    return tracking_uri


def complaint(error: Exception, *, uri: str) -> str:
    """Return one sentence on an error of a store, without passwords and without a full stop.

    Args:
        error: raised by MLflow, a database driver or the network.
        uri: of the store.
    """
    answer = getattr(getattr(error, "response", None), "status_code", None)  # of a file; other requests have MLflow's own codes
    code = getattr(error, "error_code", None)
    if answer == 401 or code == "UNAUTHENTICATED":
        return f"{shown_uri(uri)} does not take the login ({LOGIN_HINT})"
    if answer == 403 or code == "PERMISSION_DENIED":
        return f"{shown_uri(uri)} does not let this account write there; ask for the role of a writer"
    path, reason = database_path(uri), " ".join(without_secrets(str(error), uri=uri).partition("[SQL:")[0].split())
    if path is not None and any(word in reason for word in DAMAGES):
        return damage_sentence(path).removesuffix(".")
    if "out-of-date database schema" in reason:
        return upgrade_sentence(shown_uri(uri)).removesuffix(".")
    return f"{shown_uri(uri)}: {reason or type(error).__name__}"


def login(uri: str) -> tuple[str, str] | None:
    """Return the account that MLflow would use with a server: from its address, the environment or ~/.mlflow/credentials.

    Args:
        uri: http(s) address of the server.
    """
    import configparser
    import urllib.parse

    address = urllib.parse.urlsplit(uri)
    if address.username:
        return urllib.parse.unquote(address.username), urllib.parse.unquote(address.password or "")
    file = configparser.ConfigParser(interpolation=None)
    file.read(Path("~/.mlflow/credentials").expanduser(), encoding="utf-8")
    known = file["mlflow"] if file.has_section("mlflow") else {}
    name, password = (
        os.environ.get(f"MLFLOW_TRACKING_{key}") or known.get(f"mlflow_tracking_{key}".lower())
        for key in ("USERNAME", "PASSWORD")
    )
    return (name, password) if name and password else None


def answers(uri: str, *, timeout_s: float) -> int:
    """Ask a tracking server for its version, with the login if there is one; return the HTTP status.

    Args:
        uri: http(s) address of the server.
        timeout_s: longest time to wait, in seconds.

    Raises:
        OSError: it does not answer.
        ValueError: this is no address.
    """
    import base64
    import urllib.error
    import urllib.request

    request = urllib.request.Request(f"{shown_uri(uri).rstrip('/')}/version")
    account = login(uri)
    if account is not None:
        request.add_header("Authorization", f"Basic {base64.b64encode(':'.join(account).encode()).decode()}")
    elif token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def artifact_location(uri: str, *, runs_root: Path) -> str | None:
    """Return where artifacts of a new experiment go; None leaves it to the server."""
    if uri.startswith("http"):
        return None
    path = database_path(uri)
    return ((path.parent if path is not None else runs_root.absolute()) / ARTIFACTS).as_uri()


def lost_artifacts(client: MlflowClient, run_id: str, *, names: Iterable[str]) -> set[str]:
    """Return which of these artifacts of a run are gone: of a store whose files are on this machine; none of another.

    Args:
        client: of the store.
        run_id: MLflow's id of the run.
        names: artifact paths of files and folders.
    """
    folder = local_folder(str(client.get_run(run_id).info.artifact_uri))
    return {name for name in names if folder is not None and not (folder / name).exists()}


def prepare_store(uri: str) -> None:
    """Create the SQLite store if it is not there yet, and correct one that was moved; other stores belong to their owners.

    Several processes may call this at once, and one may be killed in it: the file is filled beside, under a lock, and renamed.

    Raises:
        UserError: the disk refuses, or the store is damaged or of another version of MLflow.
    """
    path = database_path(uri)
    if path is None:
        return
    if _is_filled(path):
        make_usable(uri)
        for shared in (path, path.parent / ARTIFACTS):
            if shared.exists():
                share(shared)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f".{path.name}.lock")):
            if _is_filled(path):
                return
            beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
            fail_fast()
            from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

            artifacts = artifact_location(uri, runs_root=path.parent)
            assert artifacts is not None
            try:
                beside.open("xb").close()
                SqlAlchemyStore(f"{SQLITE}{beside}", artifacts).engine.dispose()  # type: ignore[no-untyped-call]
                share(beside)
                shared_folder(path.parent / ARTIFACTS)
                beside.replace(path)
            finally:
                beside.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"Cannot create the MLflow store {path} (--runs-root): {error.strerror}.") from None


def _is_filled(path: Path) -> bool:
    """Return whether there is a file with anything in it: SQLite takes an empty one for a database without tables."""
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False


def connect(uri: str) -> MlflowClient:
    """Return a client of the store, which must exist."""
    from mlflow import MlflowClient
    from mlflow.tracking._tracking_service import utils

    if database_path(uri) is not None:
        uri = uri.replace(SQLITE, IN_FULL, 1)
    # Where the files of a run go is cached for the process under the run's id, which a copied store has too.
    getattr(utils, "_artifact_repos_cache", {}).clear()
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def refusal(uri: str) -> str | None:
    """Return one sentence on why a store cannot be used as it is, changing nothing; None when it can.

    Args:
        uri: of a database, or of a server; only one that is no SQLite file needs mlflow for this.
    """
    if database_path(uri) is not None:
        return problem_of(uri)
    fail_fast()
    os.environ.setdefault("PGCONNECT_TIMEOUT", "5")
    try:
        if not uri.startswith(("http://", "https://")):
            import sqlalchemy

            sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool).connect().close()  # MLflow asks again for two minutes
        connect(uri).search_experiments(max_results=1)
    except Exception as error:  # of MLflow, SQLAlchemy or a driver, which may be missing
        return f"{complaint(error, uri=uri)}."
    return None


def experiment_id(client: MlflowClient, *, uri: str, runs_root: Path, reports: bool = False) -> str:
    """Return the id of the experiment of the training runs, creating it when it is not there yet.

    Args:
        client: of the store.
        uri: of the store.
        runs_root: where runs are kept, and artifacts of a store without its own place for them.
        reports: that of reports, tables and studies instead.

    Raises:
        UserError: it was deleted.
    """
    from mlflow.exceptions import MlflowException

    name = f"{os.environ.get('MLFLOW_EXPERIMENT_NAME') or EXPERIMENT}{REPORTS if reports else ''}"
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            place = artifact_location(uri, runs_root=runs_root)
            return str(client.create_experiment(name, artifact_location=place, tags=_experiment_tags(reports=reports)))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)  # another launcher was first
            assert experiment is not None
    if experiment.lifecycle_stage != "active":
        raise UserError(f"The MLflow experiment '{name}' was deleted; restore it there or set MLFLOW_EXPERIMENT_NAME to another.")
    for key, value in _experiment_tags(reports=reports).items():
        known = experiment.tags.get(key, "inferred")
        if known != value and ("inferred" in known or key.endswith(RESULTS_VIEW)):
            try:
                client.set_experiment_tag(experiment.experiment_id, key, value)
            except MlflowException as error:  # it is about how a page looks; runs go there all the same
                logger.debug("%s", error)
    return str(experiment.experiment_id)


def runs_page(uri: str, *, runs_root: Path) -> str:
    """Return the page of the training runs with their results, relative to the server's address.

    The front page where there is no such experiment and none can be made: it was deleted, or the store is read-only.

    Args:
        uri: of a database that MLflow can use.
        runs_root: where runs are kept.
    """
    from mlflow.exceptions import MlflowException

    try:
        experiment = experiment_id(connect(uri), uri=uri, runs_root=runs_root)
    except (UserError, MlflowException):
        return "/"
    return f"/#/experiments/{experiment}/runs?workflowType=machine_learning&viewStateShareKey={RESULTS_VIEW}"


def _experiment_tags(*, reports: bool) -> dict[str, str]:
    """Return what MLflow's pages go by: without a kind, an experiment is taken for one of language models."""
    kind = {"mlflow.experimentKind": "custom_model_development"}
    if reports:
        return {**kind, "mlflow.note.content": "Reports, tables and studies of the training runs, as `obowlab` sends them."}
    # What "Share" in MLflow's list of runs would put there, as plain JSON.
    view = {"selectedColumns": list(_COLUMNS), "columnOrder": list(_COLUMNS), "columnWidths": _COLUMNS}
    return {**kind, f"mlflow.sharedViewState.{RESULTS_VIEW}": json.dumps(view)}


def fail_fast(*, request_s: float = REQUEST_TIMEOUT_S) -> None:
    """Make MLflow fail fast instead of retrying for minutes, and print nothing; for the whole process.

    MLflow knows such settings as environment variables only. They are not put back: a request that hangs in a background
    thread reads them too.

    Args:
        request_s: longest time one request may take, in seconds.
    """
    os.environ.update(
        {
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
            "MLFLOW_HTTP_REQUEST_TIMEOUT": str(max(1, round(request_s))),
            "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
            "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # for its import, which sets its loggers up
        }
    )
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # errors come as exceptions
