"""One MLflow run about many: the summary of a study, kept up to date beside the runs it is about."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

from obowlab.errors import UserError
from obowlab.track.mirror import EXPERIMENT
from obowlab.track.store import artifact_location, connect, no_patience, prepare_store, shown_uri, store_uri


def send_summary(
    *,
    kind: str,
    name: str,
    files: Mapping[str, str],
    tags: Mapping[str, str],
    metrics: Mapping[str, float],
    runs_root: Path,
    tracking_uri: str | None,
) -> str | None:
    """Create or renew the MLflow run that sums up a study; never raises for a store's sake.

    Callers take turns: two at once could create the run twice.

    Args:
        kind: what is summed up, for example `study`; tag `obowlab.kind`.
        name: of it; tag `obowlab.KIND` and the run's name.
        files: name to content, kept as artifacts.
        tags: further tags, under their full names.
        metrics: name to value.
        runs_root: where runs are kept, and with them the default store.
        tracking_uri: `machine.tracking_uri`.

    Returns:
        One sentence when the store could not be reached or refused; None when all is well.
    """
    uri = store_uri(tracking_uri, runs_root=runs_root)
    try:
        no_patience()
        prepare_store(uri)
        from mlflow.entities import Metric, RunTag

        client = connect(uri)
        experiment_name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        found = client.get_experiment_by_name(experiment_name)
        experiment = (
            found.experiment_id
            if found is not None
            else client.create_experiment(experiment_name, artifact_location=artifact_location(uri, runs_root=runs_root))
        )
        same = client.search_runs(
            [experiment], filter_string=f"tags.`obowlab.kind` = '{kind}' and tags.`obowlab.{kind}` = '{name}'", max_results=1
        )
        identity = {"obowlab.kind": kind, f"obowlab.{kind}": name}
        run = same[0] if same else client.create_run(experiment, run_name=name, tags=identity)
        now = round(time.time() * 1000)
        client.log_batch(
            run.info.run_id,
            metrics=[Metric(key, value, now, 0) for key, value in metrics.items()],
            tags=[RunTag(key, value[:5000]) for key, value in tags.items()],
        )
        for file, content in files.items():
            client.log_text(run.info.run_id, content, file)
        client.set_terminated(run.info.run_id, status="FINISHED", end_time=now)
    except UserError as error:
        return str(error)
    # Whatever a store, a proxy or a driver raises: the study is complete without this window on it.
    except Exception as error:
        return shown_uri(f"{uri}: {' '.join(str(error).split())[:200] or type(error).__name__}")
    return None
