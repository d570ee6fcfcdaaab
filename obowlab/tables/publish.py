"""Results tables in MLflow."""

from __future__ import annotations

from collections.abc import Sequence

from obowlab.config import Machine
from obowlab.tables import render
from obowlab.tables.model import Table
from obowlab.tracking.publish import publish


def publish_tables(tables: Sequence[Table], *, machine: Machine) -> str | None:
    """Keep each table in MLflow: one run per table and scale, whose artifacts are the rendered table.

    Returns:
        A warning when the store cannot be reached, or refuses; None when all are there.
    """
    for table in tables:
        published = publish(
            "table",
            name=" ".join((table.name, table.scale, *table.changes)),
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
