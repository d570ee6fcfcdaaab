"""The SQLite file in which MLflow keeps what is mirrored: moved with its run store, of an older MLflow, damaged.

MLflow writes the absolute place of artifacts into every row. A run store that was moved or copied would go on writing to where it
was, so the rows are corrected before the file is used. Nothing here imports mlflow.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import re
import shlex
import sqlite3
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from obowlab.errors import UserError
from obowlab.files.opening import kind_of
from obowlab.files.sharing import leads_astray

SQLITE = "sqlite:///"
ARTIFACTS = "mlartifacts"
PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("logged_models", "artifact_location"),
)
"""The columns in which MLflow writes where artifacts are."""

BUSY_TIMEOUT_S = 30.0
CHECK_S = 10.0
"""Longest time to look for damaged pages, in seconds."""

DAMAGES = ("malformed", "not a database")
"""What SQLite says of a file that is damaged."""

logger = logging.getLogger(__name__)


def database_path(uri: str) -> Path | None:
    """Return the file of a SQLite store, absolute; None for another store."""
    return Path(uri.removeprefix(SQLITE)).absolute() if uri.startswith(SQLITE) else None


def local_folder(uri: str) -> Path | None:
    """Return the folder that an artifact URI names; None when it is not on this machine."""
    address = urllib.parse.urlsplit(uri)
    return Path(urllib.parse.unquote(address.path)) if address.scheme == "file" and address.netloc in ("", "localhost") else None


def make_usable(uri: str) -> None:
    """Let a SQLite store that was moved or copied say where its artifacts are now; a right one costs a millisecond.

    A place that is the same folder under another name (a symbolic link, a second mount) is left as it is.

    Raises:
        UserError: the file is damaged, of another version of MLflow, or was moved and cannot be written to.
    """
    path = database_path(uri)
    if path is None or not path.exists():
        return
    with _opened(path) as database:
        problem = _schema_problem(database, uri=uri)
        if problem is not None:
            raise UserError(problem)
        if not _former_places(database, path=path):
            return
        try:
            database.execute("BEGIN IMMEDIATE")
            former = _former_places(database, path=path)  # another process may have been first
            for place in former:
                _replace(database, place, (path.parent / ARTIFACTS).as_uri())
            database.commit()
            told = former if database.execute("SELECT 1 FROM runs LIMIT 1").fetchone() else []
        except sqlite3.OperationalError as error:
            raise UserError(
                f"The MLflow store {path} was moved here, and its records of where its files are cannot be corrected ({error}): "
                "let somebody who may write to it run `obowlab runs sync`."
            ) from None
    if told:
        old = ", ".join(sorted({str(local_folder(place)) for place in told}))
        logger.info(
            "The run store was moved or copied: %s now looks for its files in %s instead of %s. "
            "`obowlab runs sync` sends what is missing there.",
            path,
            path.parent / ARTIFACTS,
            old,
        )


def problem_of(uri: str) -> str | None:
    """Return one sentence on what keeps a SQLite store from being used as it is, changing nothing; None when nothing does."""
    path = database_path(uri)
    if path is None or not path.exists():
        return None
    try:
        with _opened(path) as database:
            problem = _schema_problem(database, uri=uri)
            if problem is None and _former_places(database, path=path):
                problem = f"{path} was moved or copied and still names the place it comes from: `obowlab runs sync` corrects it."
            return problem
    except UserError as error:
        return str(error)


def damage_of(uri: str) -> str | None:
    """Return one sentence when pages of a SQLite store are damaged, which its other pages do not tell; None when none are.

    All of the file is read, for at most `CHECK_S`.
    """
    path = database_path(uri)
    if path is None or not path.exists():
        return None
    end = time.monotonic() + CHECK_S
    try:
        with _opened(path) as database:
            database.set_progress_handler(lambda: int(time.monotonic() > end), 10000)
            try:
                found = database.execute("PRAGMA quick_check(1)").fetchone()[0]
            except sqlite3.OperationalError:  # the time is over, or the file is locked
                return None
        return None if found == "ok" else damage_sentence(path)
    except UserError as error:
        return str(error)


def damage_sentence(path: Path) -> str:
    """Return one sentence on a damaged store, with the command that makes a new one."""
    return (
        f"The MLflow store {path} is damaged: restore it from a copy, or `obowlab runs sync --rebuild` "
        "puts it aside and fills a new one from the run folders."
    )


def upgrade_sentence(uri: str) -> str:
    """Return one sentence on a store of an older MLflow, with the command that upgrades it; the URI may hold a password."""
    return f"The MLflow store was made by an older MLflow: back it up, then run `mlflow db upgrade {shlex.quote(uri)}`."


def put_aside(uri: str) -> Path:
    """Move a SQLite store and its artifacts into a folder beside, and return it; what was in them stays there.

    Raises:
        UserError: this is no SQLite store, there is none, or the disk refuses.
    """
    path = database_path(uri)
    if path is None:
        raise UserError("--rebuild is for the SQLite file of a run store; its owner restores a server or another database.")
    aside = path.with_name(f"{path.name}.before-{time.strftime('%Y%m%d-%H%M%S')}")
    there = [path.with_name(f"{path.name}{end}") for end in ("", "-journal", "-wal", "-shm")] + [path.parent / ARTIFACTS]
    there = [one for one in there if one.exists()]
    if not there:
        raise UserError(f"There is no MLflow store {path} to put aside; `obowlab runs sync` makes one.")
    try:
        aside.mkdir()
        for one in there:
            one.rename(aside / one.name)
    except OSError as error:
        raise UserError(f"Cannot put the MLflow store {path} aside: {error.strerror}.") from None
    return aside


# ------------------------------------------------------------------------------------------------------------- helpers


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a store that exists; a damaged one, or one that may not be read, is a UserError."""
    kind = "a link that somebody made to what is not theirs" if leads_astray(path) else kind_of(path.stat().st_mode)
    if kind is not None:
        raise UserError(f"The MLflow store {path} is not used, for it is {kind}: let its owner move it away.")
    try:
        file = f"{path.as_uri()}?mode=rw"
        with closing(sqlite3.connect(file, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None)) as database:
            yield database
    except sqlite3.DatabaseError as error:
        if any(word in str(error) for word in DAMAGES):
            raise UserError(damage_sentence(path)) from None
        raise UserError(f"The MLflow store {path} cannot be used ({error}).") from None


def _schema_problem(database: sqlite3.Connection, *, uri: str) -> str | None:
    """Compare the schema with the installed MLflow's."""
    tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if "experiments" not in tables:
        return f"{database_path(uri)} is no MLflow store (it has no experiments): choose another file, or remove it."
    rows = database.execute("SELECT version_num FROM alembic_version").fetchall() if "alembic_version" in tables else []
    known = _schema_versions()
    if not known:
        return None  # MLflow keeps them elsewhere; it says itself what it does not like
    version = rows[0][0] if rows else None
    if version is not None and version not in known:
        return f"The MLflow store {database_path(uri)} was made by a newer MLflow: `pip install --upgrade mlflow`."
    return None if version is not None and known[version] else upgrade_sentence(uri)


@functools.cache
def _schema_versions() -> dict[str, bool]:
    """Return every schema version that the installed MLflow knows, and whether it is the latest; without importing mlflow."""
    found = importlib.util.find_spec("mlflow")
    if found is None or found.origin is None:
        return {}
    versions, before = [], set()
    for script in (Path(found.origin).parent / "store/db_migrations/versions").glob("*.py"):
        text = script.read_text(encoding="utf-8")
        versions += re.findall(r"^revision(?:: str)? = [\"'](\w+)[\"']", text, re.MULTILINE)
        for line in re.findall(r"^down_revision\b.*?= (.+)", text, re.MULTILINE):
            before |= set(re.findall(r"\w+", line))
    return {version: version not in before for version in versions}


def _former_places(database: sqlite3.Connection, *, path: Path) -> list[str]:
    """Return the artifact URIs, up to `mlartifacts`, that experiments name and that are not beside the file."""
    here = path.parent / ARTIFACTS
    locations = [row[0] for row in database.execute("SELECT DISTINCT artifact_location FROM experiments") if row[0]]
    found = (re.match(rf"(file://.*/{ARTIFACTS})(/|$)", location) for location in locations)
    places = {match[1] for match in found if match is not None}
    return sorted(place for place in places if not _is_same(local_folder(place), here))


def _is_same(place: Path | None, here: Path) -> bool:
    """Return whether a place is not for us to correct: it is the one here, under whatever name, or on another machine."""
    return place is None or place == here or place.resolve() == here.resolve() or _is_same_folder(place.parent, here.parent)


def _is_same_folder(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _replace(database: sqlite3.Connection, former: str, place: str) -> None:
    for table, column in PLACES:
        if any(row[1] == column for row in database.execute(f"PRAGMA table_info({table})")):
            database.execute(
                f"UPDATE {table} SET {column} = ?1 || substr({column}, length(?2) + 1) "
                f"WHERE {column} = ?2 OR substr({column}, 1, length(?2) + 1) = ?2 || '/'",
                (place, former),
            )
