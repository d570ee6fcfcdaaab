"""Put files of something that is not a run (a report, a table, a study) into MLflow, once for each content."""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from obowlab.config import Machine
from obowlab.errors import UserError
from obowlab.files.locks import locked
from obowlab.files.sharing import share
from obowlab.tracking.local_store import local_folder
from obowlab.tracking.outbox import LONGEST_TAG
from obowlab.tracking.server import (
    complaint,
    connect,
    experiment_id,
    fail_fast,
    lost_artifacts,
    prepare_store,
    shown_uri,
    store_uri,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

KIND, NAME, FILE, METRIC = "obowlab.kind", "obowlab.name", "obowlab.file.", "obowlab.metric."
"""Tags by which a publication is found again, and those that remember the content of a file and the value of a metric."""

LOCK = ".publish.lock"
ENTRIES_PER_REQUEST = 100


@dataclass(frozen=True)
class Published:
    """What `publish` did.

    Attributes:
        run_id: of the MLflow run; None when the store could not be asked.
        sent: the files that were new or had changed, by name.
        warning: one sentence when the store could not be reached or refused; None when all is well.
    """

    run_id: str | None = None
    sent: tuple[str, ...] = ()
    warning: str | None = None


def publish(
    kind: str,
    *,
    name: str,
    machine: Machine,
    files: Mapping[str, str | Path],
    tags: Mapping[str, str] | None = None,
    metrics: Mapping[str, float] | None = None,
    timeout_s: float = 30.0,
) -> Published:
    """Make one MLflow run of this kind and name have these files, tags and metrics; never raises because of the store.

    The run is found by its tags `obowlab.kind` and `obowlab.name`, or created. A file is sent when its content is not the one
    that the run's tags remember, so the same content is not sent again; artifacts that are no longer named stay.

    Args:
        kind: `report`, `table`, `study`, ...; a word.
        name: of the thing, unique within its kind.
        machine: says where the store is.
        files: artifact path to its text, or to the file to send.
        tags: further tags, whole names; the latest value counts.
        metrics: MLflow name to value, finite; a changed value becomes one more point.
        timeout_s: longest time this may take, in seconds; a store that is slower gives a warning.

    Raises:
        UserError: MLflow cannot write to such an address; the disk refuses a new local store.
    """
    assert all(math.isfinite(value) for value in (metrics or {}).values())
    uri = store_uri(machine.tracking_uri, runs_root=machine.runs_root)
    work = _Work(kind, name=name, machine=machine, uri=uri, files=files, tags=dict(tags or {}), metrics=dict(metrics or {}))
    thread = threading.Thread(target=work.carry_out, args=(timeout_s,), name="publish", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        return Published(warning=_warning(kind, name, f"{shown_uri(uri)} did not answer within {timeout_s:.0f} s"))
    return work.done


@dataclass
class _Work:
    kind: str
    name: str = field(kw_only=True)
    machine: Machine = field(kw_only=True)
    uri: str = field(kw_only=True)
    files: Mapping[str, str | Path] = field(kw_only=True)
    tags: dict[str, str] = field(kw_only=True)
    metrics: dict[str, float] = field(kw_only=True)
    done: Published = field(default_factory=Published)

    def carry_out(self, timeout_s: float) -> None:
        """Send what is new; an error becomes the warning of `done`."""
        try:
            fail_fast(request_s=timeout_s)
            self.machine.runs_root.mkdir(parents=True, exist_ok=True)
            with locked(self.machine.runs_root / LOCK):  # two processes must not both create the run
                prepare_store(self.uri)
                self._send(connect(self.uri))
        except UserError as error:
            self.done = Published(warning=_warning(self.kind, self.name, str(error)))
        # No error of a store, a proxy or a driver may end the command that publishes; it is reported instead.
        except Exception as error:
            self.done = Published(warning=_warning(self.kind, self.name, complaint(error, uri=self.uri)))

    def _send(self, client: MlflowClient) -> None:
        from mlflow.entities import Metric, RunTag

        run_id, known = self._find(client)
        content = {name: _digest(source) for name, source in self.files.items()}
        lost = lost_artifacts(client, run_id, names=content)
        new = [name for name, digest in content.items() if known.get(f"{FILE}{name}") != digest or name in lost]
        if new:
            with tempfile.TemporaryDirectory(prefix="obowlab-publish-") as folder:
                for name in new:
                    _put(self.files[name], Path(folder) / name)
                _log(client, run_id, Path(folder))
        now = round(time.time() * 1000)
        points = [Metric(key, value, now, 0) for key, value in self.metrics.items() if known.get(f"{METRIC}{key}") != repr(value)]
        wanted = {
            **{key: value[:LONGEST_TAG] for key, value in self.tags.items()},
            **{f"{METRIC}{key}": repr(value) for key, value in self.metrics.items()},
            **{f"{FILE}{name}": digest for name, digest in content.items()},
        }
        changed = [RunTag(key, value) for key, value in wanted.items() if known.get(key) != value]
        # Last, and file tags at the end of all: killed before, the same content is simply sent once more.
        for start in range(0, len(points), ENTRIES_PER_REQUEST):
            client.log_batch(run_id, metrics=points[start : start + ENTRIES_PER_REQUEST])
        for start in range(0, len(changed), ENTRIES_PER_REQUEST):
            client.log_batch(run_id, tags=changed[start : start + ENTRIES_PER_REQUEST])
        self.done = Published(run_id=run_id, sent=tuple(new))

    def _find(self, client: MlflowClient) -> tuple[str, dict[str, str]]:
        """Return the run's id and its tags; a deleted run is not found and a new one takes its place."""
        experiment = experiment_id(client, uri=self.uri, runs_root=self.machine.runs_root, reports=True)
        alike = client.search_runs(
            [experiment], filter_string=f"tags.`{KIND}` = '{self.kind}'", order_by=["attributes.start_time ASC"], max_results=1000
        )
        for run in alike:  # by name here: MLflow's filters know no escape for a quote in it
            if run.data.tags.get(NAME) == self.name:
                return str(run.info.run_id), dict(run.data.tags)
        tags = {KIND: self.kind, NAME: self.name}
        run_name = self.name if self.kind in self.name else f"{self.kind} {self.name}"
        made = client.create_run(experiment, run_name=run_name, tags=tags)
        client.set_terminated(made.info.run_id)
        return str(made.info.run_id), tags


def _log(client: MlflowClient, run_id: str, folder: Path) -> None:
    """Send files into a run that everybody of the store fills in turn: on this machine, its folders are the group's."""
    place = local_folder(str(client.get_run(run_id).info.artifact_uri))
    if place is None:
        client.log_artifacts(run_id, str(folder))
        return
    names = sorted(path.relative_to(folder) for path in folder.rglob("*"))  # folders before what is in them
    for name in names:
        if (folder / name).is_file():
            (place / name).unlink(missing_ok=True)  # one of another user could not be written over
    client.log_artifacts(run_id, str(folder))
    for path in (place.parent, place, *(place / name for name in names)):
        share(path)


def _warning(kind: str, name: str, reason: str) -> str:
    return f"MLflow does not have the {kind} '{name}' as it is now ({reason}); the same command sends it again."


def _digest(source: str | Path) -> str:
    digest = hashlib.sha256()
    if isinstance(source, str):
        digest.update(source.encode())
    else:
        with source.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()


def _put(source: str | Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(source, str):
        path.write_text(source, encoding="utf-8")
    else:
        shutil.copyfile(source, path)
