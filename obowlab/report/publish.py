"""A report as one file in MLflow: pages that link to each other must be unpacked together to be read.

Sending takes longer than building, most of it the import of mlflow, so a process of its own does it
(`python -m obowlab.report.publish`, its orders on standard input) and writes into a log how that went.
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
from obowlab.files import file_lock
from obowlab.tracking.publish import Published, publish
from obowlab.tracking.server import shown_uri, store_uri

if TYPE_CHECKING:
    from obowlab.report.model import Site

ARCHIVE = "report.zip"
EARLIEST = (1980, 1, 1, 0, 0, 0)
"""The date of every file in an archive: the same pages make the same bytes."""

LOG = ".logs/report.log"
LOCK = ".report.lock"


class Parcel(BaseModel):
    """A built report on its way to MLflow.

    Attributes:
        folder: where it was built.
        stamp: of its first page, which tells it from a report that took its place.
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


def make_parcel(site: Site, *, folder: Path, machine: Machine) -> Parcel:
    """Make what `send` and `send_behind` take.

    Args:
        site: what the report says, for the tags.
        folder: where it was built.
        machine: says where MLflow is.
    """
    from obowlab.report.figures import counts

    return Parcel(
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


def send(parcel: Parcel) -> Published | None:
    """Send a report as the artifact of one run tagged `obowlab.kind = report`; unchanged, nothing is sent.

    Several processes take turns. A report that another one has replaced meanwhile is left to the process that sends that one.

    Returns:
        What came of it; None for a report that is no longer there.
    """
    with file_lock(parcel.machine.runs_root / LOCK), tempfile.TemporaryDirectory(prefix="obowlab-report-") as place:
        archive = Path(place) / ARCHIVE
        try:
            pack(parcel.folder, target=archive)
        except FileNotFoundError:  # it is being replaced
            return None
        if _stamp(parcel.folder) != parcel.stamp:
            return None
        return publish(
            "report",
            name="report",
            machine=parcel.machine,
            files={ARCHIVE: archive},
            tags=parcel.tags,
            metrics=parcel.metrics,
        )


def send_behind(parcel: Parcel) -> Path:
    """Let a process of its own send a report, which outlives this one, and return the log that it writes to.

    Raises:
        OSError: the log or the process cannot be made.
    """
    log = parcel.machine.runs_root / LOG
    log.parent.mkdir(exist_ok=True)
    with log.open("ab") as sink:
        sender = subprocess.Popen(
            [sys.executable, "-m", "obowlab.report.publish"],
            stdin=subprocess.PIPE,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )
    assert sender.stdin is not None
    with sender.stdin as orders:  # not as an argument: the address of a server may hold a password
        orders.write(parcel.model_dump_json().encode())
    return log


def pack(folder: Path, *, target: Path) -> None:
    """Write every file of a folder into a .zip below `report/`; equal files give equal bytes."""
    with zipfile.ZipFile(target, "w", compression=zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            entry = zipfile.ZipInfo(f"report/{path.relative_to(folder).as_posix()}", date_time=EARLIEST)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, path.read_bytes(), compress_type=zipfile.ZIP_DEFLATED)


def main() -> int:
    """Send the report that standard input names; one line says what came of it."""
    parcel = Parcel.model_validate_json(sys.stdin.buffer.read())
    published = send(parcel)
    if published is None:
        said = f"{parcel.folder} was replaced before it was sent; the newer report is sent instead."
    elif published.warning is not None:
        said = f"Warning: {published.warning}"
    else:
        store = shown_uri(store_uri(parcel.machine.tracking_uri, runs_root=parcel.machine.runs_root))
        said = f"{parcel.folder} is in {store}, run {published.run_id}{'' if published.sent else '; nothing was new'}."
    print(time.strftime("%Y-%m-%d %H:%M:%S"), said, flush=True)
    return int(published is not None and published.warning is not None)


def _stamp(folder: Path) -> str:
    """Return what tells a report from one that takes its place; empty for none."""
    try:
        facts = (folder / "index.html").stat()
    except FileNotFoundError:
        return ""
    return f"{facts.st_ino}-{facts.st_mtime_ns}"


if __name__ == "__main__":
    sys.exit(main())
