"""A report as one .zip file in MLflow: pages that link to each other must be unpacked together.

Sending takes longer than writing the report, most of it the import of mlflow, so a process of its own does it
(`python -m obowlab.report.publish`, an `Upload` in JSON on standard input) and writes the outcome into a log.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from obowlab.config import Machine
from obowlab.files.locks import locked
from obowlab.files.opening import is_regular, open_file, read_file
from obowlab.files.sharing import shared_file, shared_folder
from obowlab.tracking.local_store import make_usable
from obowlab.tracking.publish import Published, publish
from obowlab.tracking.server import shown_uri, store_uri

if TYPE_CHECKING:
    from obowlab.report.model import Site

ARCHIVE = "report.zip"
EARLIEST = (1980, 1, 1, 0, 0, 0)
"""The date of every file in an archive: the same pages make the same bytes."""

LOG = ".logs/report.log"
LOCK = ".report.lock"
PATIENCE_S = 600.0
"""Longest time to wait for another process that sends a report, in seconds."""


class Upload(BaseModel):
    """A report that MLflow shall get.

    Attributes:
        folder: where it is.
        stamp: of its first page, which distinguishes it from a report that replaced it.
        machine: says where MLflow is.
        tags: of the report's run in MLflow.
        metrics: of the same.
    """

    model_config = ConfigDict(frozen=True)

    folder: Path
    stamp: str
    machine: Machine
    tags: dict[str, str]
    metrics: dict[str, float]


def prepare_upload(site: Site, *, folder: Path, machine: Machine) -> Upload:
    """Return what `send` and `send_in_background` take.

    Args:
        site: what the report shows, for the tags.
        folder: where it is.
        machine: says where MLflow is.
    """
    from obowlab.report.figures import counts

    return Upload(
        folder=folder.absolute(),
        stamp=_stamp(folder),
        machine=machine,
        tags={
            "obowlab.as_of": site.as_of,
            "obowlab.tables": ", ".join(f"{table.name} {table.scale}" for table in site.tables),
            "mlflow.note.content": f"The report of all runs. Unpack {ARCHIVE} and open report/index.html.",
        },
        metrics={f"report/runs_{state}": float(count) for state, count in counts(site.runs).items()},
    )


def send(upload: Upload) -> Published | None:
    """Send a report as the artifact of one run tagged `obowlab.kind = report`; unchanged, nothing is sent.

    Several processes take turns. A report that has been replaced meanwhile is left to the process that sends its successor.

    Returns:
        The outcome; None for a report that is no longer there.
    """
    with (
        locked(upload.machine.runs_root / LOCK, patience_s=PATIENCE_S),
        tempfile.TemporaryDirectory(prefix="obowlab-report-") as place,
    ):
        archive = Path(place) / ARCHIVE
        try:
            pack(upload.folder, target=archive)
        except FileNotFoundError:  # it is being replaced
            return None
        if _stamp(upload.folder) != upload.stamp:
            return None
        return publish(
            "report",
            name="report",
            machine=upload.machine,
            files={ARCHIVE: archive},
            tags=upload.tags,
            metrics=upload.metrics,
        )


def send_in_background(upload: Upload) -> Path:
    """Send a report by a process that outlives this one, and return the log that it writes.

    Raises:
        OSError: the log or the process cannot be created.
        UserError: the MLflow store is damaged or of another version of MLflow.
    """
    # Here, so that what it says is seen on the terminal.
    make_usable(store_uri(upload.machine.tracking_uri, runs_root=upload.machine.runs_root))
    log = upload.machine.runs_root / LOG
    shared_folder(log.parent)
    with open_file(shared_file(log), "ab") as sink:
        sender = subprocess.Popen(
            [sys.executable, "-m", "obowlab.report.publish"],
            stdin=subprocess.PIPE,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )
    assert sender.stdin is not None
    with sender.stdin as stdin:  # not as an argument: the address of a server may hold a password
        stdin.write(upload.model_dump_json().encode())
    return log


def pack(folder: Path, *, target: Path) -> None:
    """Write every file of a folder into a .zip below `report/`; equal files give equal bytes."""
    with zipfile.ZipFile(target, "w", compression=zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(path for path in folder.rglob("*") if is_regular(path)):
            entry = zipfile.ZipInfo(f"report/{path.relative_to(folder).as_posix()}", date_time=EARLIEST)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, read_file(path), compress_type=zipfile.ZIP_DEFLATED)


def main() -> int:
    """Send the report that standard input names and print one line about the outcome."""
    upload = Upload.model_validate_json(sys.stdin.buffer.read())
    published = send(upload)
    if published is None:
        line = f"{upload.folder} was replaced before it was sent; the newer report is sent instead."
    elif published.warning is not None:
        line = f"Warning: {published.warning}"
    else:
        store = shown_uri(store_uri(upload.machine.tracking_uri, runs_root=upload.machine.runs_root))
        line = f"{upload.folder} is in {store}, run {published.run_id}{'' if published.sent else '; nothing was new'}."
    print(time.strftime("%Y-%m-%d %H:%M:%S"), line, flush=True)
    return int(published is not None and published.warning is not None)


def _stamp(folder: Path) -> str:
    """Return what distinguishes a report from one that replaces it; empty for none."""
    try:
        facts = (folder / "index.html").stat()
    except FileNotFoundError:
        return ""
    return f"{facts.st_ino}-{facts.st_mtime_ns}"


if __name__ == "__main__":
    sys.exit(main())
