"""A report as one file in MLflow: pages that link to each other must be unpacked together to be read."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

from obowlab.config import Machine
from obowlab.lab.report.figures import counts
from obowlab.lab.report.site import Site
from obowlab.track.publish import Published, publish

ARCHIVE = "report.zip"
EARLIEST = (1980, 1, 1, 0, 0, 0)
"""The date of every file in an archive: the same pages make the same bytes."""


def send_report(site: Site, *, folder: Path, machine: Machine) -> Published:
    """Send a built report to MLflow, as the artifact of one run tagged `obowlab.kind = report`; unchanged, nothing is sent.

    Args:
        site: what the report says, for the tags.
        folder: where it was built.
        machine: says where MLflow is.
    """
    with tempfile.TemporaryDirectory(prefix="obowlab-report-") as place:
        archive = Path(place) / ARCHIVE
        pack(folder, target=archive)
        return publish(
            "report",
            name="report",
            machine=machine,
            files={ARCHIVE: archive},
            tags={
                "obowlab.as_of": site.as_of,
                "obowlab.tables": ", ".join(f"{table.name} {table.scale}" for table in site.tables),
                "mlflow.note.content": f"The report of all runs. Unpack {ARCHIVE} and open report/index.html.",
            },
            metrics={f"report/runs_{state}": float(count) for state, count in counts(site.runs).items()},
        )


def pack(folder: Path, *, target: Path) -> None:
    """Write every file of a folder into a .zip below `report/`; equal files give equal bytes."""
    with zipfile.ZipFile(target, "w", compression=zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            entry = zipfile.ZipInfo(f"report/{path.relative_to(folder).as_posix()}", date_time=EARLIEST)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, path.read_bytes(), compress_type=zipfile.ZIP_DEFLATED)
