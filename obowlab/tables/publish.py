"""Results tables and the labels of their runs in MLflow."""

from __future__ import annotations

from collections.abc import Sequence

from obowlab.config import Machine
from obowlab.runs.folder import RunFolder
from obowlab.tables import render
from obowlab.tables.model import Table
from obowlab.tracking.mirror import Mirror
from obowlab.tracking.publish import publish

MIRROR_TIMEOUT_S = 60.0


def publish_tables(tables: Sequence[Table], *, machine: Machine) -> str | None:
    """Keep each table in MLflow: one run per table and scale, whose artifacts are the rendered table.

    Returns:
        A warning when the store cannot be reached, or refuses; None when all are there.
    """
    for table in tables:
        published = publish(
            "table",
            name=f"{table.name} {table.scale}",
            machine=machine,
            files={
                f"{table.name}.md": render.markdown(table),
                f"{table.name}.html": render.html([table]),
                f"{table.name}.json": render.as_json([table]),
            },
            tags={"obowlab.scale": table.scale, "mlflow.note.content": render.markdown(table)},
        )
        if published.warning is not None:
            return published.warning
    return None


def sync_labels(folders: Sequence[RunFolder], *, machine: Machine) -> str | None:
    """Send the labels that runs got after their own mirror was done.

    Returns:
        A warning when the store cannot be reached; the next sync of a run sends them. None when all are there.
    """
    for folder in folders:
        report = Mirror(folder, tracking_uri=machine.tracking_uri).sync(timeout_s=MIRROR_TIMEOUT_S)
        if report.error is not None:
            return f"MLflow lacks tags of these runs ({report.error}); `obowlab runs sync` sends them."
    return None
