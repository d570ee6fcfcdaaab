"""Where trials are kept: a journal file in the run store, or the SQLite file or PostgreSQL server a user names.

All studies share one storage, so that one dashboard shows them all. The run folders stay the truth about runs; the storage
holds what the sampler has to know.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

from obowlab.errors import UserError
from obowlab.files.sharing import shared_file, shared_folder
from obowlab.studies.schema import STUDIES
from obowlab.text import is_shown_whole, shown_uri, without_secrets
from obowlab.tracking.server import QUOTE_HINT

JOURNAL = "studies.journal"
STORAGE_VARIABLE = "OBOWLAB_STUDY_STORAGE"
CONNECT_TIMEOUT_S = 10
NETWORK_FILE_SYSTEMS = (
    *("nfs", "nfs3", "nfs4", "cifs", "smbfs", "smb2", "smb3", "afs"),
    *("lustre", "gpfs", "beegfs", "ceph", "gfs2", "pvfs2", "orangefs", "glusterfs"),
    *("fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.s3fs", "fuse.rclone", "fuse.juicefs"),
)
_EXAMPLES = "postgresql://USER@HOST/DATABASE, sqlite:////FOLDER/studies.db or journal:////FOLDER/studies.journal"


def storage_url(given: str | None, *, runs_root: Path) -> str:
    """Return the address of the storage: the given one in the form that is opened, or the journal of the run store.

    Args:
        given: `--storage` or `$OBOWLAB_STUDY_STORAGE`.
        runs_root: where runs are kept.

    Raises:
        UserError: another kind of storage, or SQLite on a network file system, which corrupts it.
    """
    if not given:
        return f"journal:///{runs_root.absolute() / STUDIES / JOURNAL}"
    scheme = re.match(r"([a-z]+)(\+[a-z0-9]+)?://", given)
    kind = scheme[1] if scheme else None
    if scheme is not None and kind in ("postgres", "postgresql"):
        if not is_shown_whole(given):
            raise UserError(f"--storage {shown_uri(given)}: {QUOTE_HINT}.")
        return "postgresql+psycopg://" + given[scheme.end() :]
    if kind in ("sqlite", "journal"):
        path = Path(given.partition(":///")[2]).expanduser()
        if not path.name:
            raise UserError(f"--storage {shown_uri(given)} names no file; for example {_EXAMPLES}.")
        path = path.absolute()
        if kind == "sqlite" and (system := file_system(path)) in NETWORK_FILE_SYSTEMS:
            raise UserError(
                f"--storage {shown_uri(given)} lies on a network file system ({system}), where SQLite loses trials; "
                "leave --storage out for a journal file, or use postgresql://..."
            )
        return f"{kind}:///{path}"
    raise UserError(f"--storage cannot be '{shown_uri(given)}': use {_EXAMPLES}.")


def file_system(path: Path) -> str:
    """Return the type of the file system on which a path lies or would lie, by Linux's mount table; empty if unknown."""
    table = Path("/proc/self/mountinfo")
    try:
        lines = table.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    here, best = path.resolve(), (-1, "")
    for line in lines:
        before, _, after = line.partition(" - ")
        point = Path(re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), before.split()[4]))
        if here.is_relative_to(point) and len(point.parts) >= best[0]:  # a later mount hides an earlier one
            best = (len(point.parts), after.split()[0])
    return best[1]


def exists(url: str) -> bool:
    """Return whether there is something to open without making it; a database server is taken to be there."""
    kind, _, path = url.partition(":///")
    return kind not in ("sqlite", "journal") or Path(path).is_file()


def open_storage(url: str, *, make: bool = True) -> BaseStorage:
    """Open a storage, making it first where it is a file or an empty database.

    Args:
        url: as `storage_url` returns it.
        make: whether to make what is not there; without it, an empty database is a mistake of the user.

    Raises:
        UserError: the server does not answer or refuses, the file cannot be used, or the driver is not installed.
    """
    kind, _, path = url.partition(":///")
    shown = shown_uri(url)
    try:
        if kind == "journal":
            shared_folder(Path(path).parent)
            return JournalStorage(JournalFileBackend(str(shared_file(Path(path)))))
        if kind == "sqlite":
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            if make:
                shared_file(Path(path))
            return RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}}, skip_table_creation=not make)
        # A trial lasts hours: connections that a server or a router dropped meanwhile are replaced before use.
        arguments = {"connect_timeout": CONNECT_TIMEOUT_S}
        engine = {"pool_pre_ping": True, "connect_args": arguments}
        return RDBStorage(url, engine_kwargs=engine, skip_table_creation=not make)
    except ImportError:
        raise UserError(f"{shown} needs the PostgreSQL driver: pip install 'obowlab[postgresql]'.") from None
    except (OSError, ValueError, KeyError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"Cannot use {shown} (--storage): {_first_line(reason, url=url)}.") from None
    # SQLAlchemy and the drivers raise families of their own; all of them mean that this storage cannot be used.
    except Exception as error:
        reason = _first_line(str(error.__cause__ or error), url=url)
        raise UserError(f"Cannot use {shown} (--storage): {reason}.") from None


def _first_line(message: str, *, url: str) -> str:
    return " ".join(without_secrets(message, uri=url).splitlines()[:1]).strip().rstrip(".")


def open_existing(name: str, *, url: str) -> optuna.Study | None:
    """Open a study without making anything; None when the storage or the study is not there.

    Args:
        name: of the study.
        url: as `storage_url` returns it.

    Raises:
        UserError: as `open_storage`.
    """
    if not exists(url):
        return None
    try:
        return optuna.load_study(study_name=name, storage=open_storage(url, make=False))
    except KeyError:
        return None


def study_names(url: str) -> list[str]:
    """Return the names of the studies in a storage; none where there is no storage.

    Args:
        url: as `storage_url` returns it.

    Raises:
        UserError: as `open_storage`.
    """
    return optuna.get_all_study_names(open_storage(url, make=False)) if exists(url) else []


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Optuna's own messages and its warnings about experimental options off the terminal."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", module="optuna")
        yield
