"""What is sent to MLflow of a run, and in which order: the requests behind `Mirror.sync`."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from obowlab.config import flatten
from obowlab.errors import UserError
from obowlab.files.opening import copy_file, copy_tree
from obowlab.runs.info import MODEL_FOLDER, read_result
from obowlab.runs.metrics import METRIC_FILES, mlflow_name
from obowlab.tracking.local_store import database_path
from obowlab.tracking.outbox import ENDED, Outbox, Sent, digest_of
from obowlab.tracking.server import (
    REQUEST_TIMEOUT_S,
    connect,
    experiment_id,
    fail_fast,
    lost_artifacts,
    prepare_store,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

DELETED_TAG = "obowlab.deleted"
"""On a model version whose run was deleted; its text is the run's name."""

METRICS_PER_REQUEST = 1000
PARAMS_PER_REQUEST = 100


class OutOfTimeError(Exception):
    """The time limit of a sync has passed between two requests."""


class Sending:
    """The requests that bring one run into one store; how far it is, `mirror.json` says after each of them.

    Attributes:
        count: metric values, files and facts sent so far.
    """

    def __init__(self, outbox: Outbox, *, uri: str, runs_root: Path) -> None:
        """Open nothing yet: the first `send_all` connects.

        Args:
            outbox: what the store should have.
            uri: the store's address, as MLflow takes it.
            runs_root: the folder of run folders; its experiment is named after it.
        """
        self.outbox = outbox
        self.folder = outbox.folder
        self.uri = uri
        self.runs_root = runs_root
        self.count = 0
        self._client: MlflowClient | None = None

    def disconnect(self) -> None:
        """Forget the connection; the next `send_all` makes a new one."""
        self._client = None

    def send_all(self, end: float) -> None:
        """Send what the store does not have yet, until `end` of the monotonic clock.

        Raises:
            UserError: the store, or this run in it, was taken away or deleted.
            OutOfTimeError: the time limit has passed; what was sent is recorded.
            Exception: whatever MLflow, a driver or a proxy raises.
        """
        outbox, sent = self.outbox, self.outbox.load()
        store = database_path(self.uri)
        if sent.run_id is not None and store is not None and not store.parent.is_dir():
            raise UserError(f"The folder of the MLflow store {store} is away; what is pending follows when it is there again.")
        if outbox.is_deleted:
            self._delete_run(sent)
            return
        if self._client is None or sent.run_id is None:
            prepare_store(self.uri)
            client = connect(self.uri)
            self._find_run(client, sent)
            self._client = client
        client = self._client
        self._send_params(client, sent)
        for name in METRIC_FILES:
            self._send_points(client, sent, name=name, end=end)
        for path in outbox.results():
            if outbox.is_new(path, sent=sent):
                self._send_result(client, sent, path)
        self._send_tags(client, sent)
        self._send_dataset(client, sent)
        self._send_status(client, sent)
        for name, text in outbox.documents().items():
            if name not in sent.files:
                client.log_text(_id(sent), text, name)
                sent.files[name] = "sent"
                self._done(sent)
        for path in outbox.artifacts():
            if outbox.is_new(path, sent=sent):
                _in_time(end)
                folder = path.parent.relative_to(self.folder.path).as_posix()
                self._send_file(client, sent, path, folder=None if folder == "." else folder, owner=self.folder.owner)
                outbox.mark(path, sent=sent)
                self._done(sent)
        if outbox.model_is_new(sent):
            _in_time(end)
            fail_fast(request_s=max(REQUEST_TIMEOUT_S, end - time.monotonic()))  # the server may have to forward it
            self._register_model(client, sent)
        if outbox.card_is_new(sent):
            self._send_card(client, sent)

    def _send_file(self, client: MlflowClient, sent: Sent, path: Path, *, folder: str | None, owner: int | None = None) -> None:
        """Send a copy of a regular file: MLflow itself would open whatever has its name by then."""
        with tempfile.TemporaryDirectory(prefix="obowlab-mirror-") as place:
            copy_file(path, Path(place) / path.name, owner=owner)
            client.log_artifact(_id(sent), str(Path(place) / path.name), folder)

    def _delete_run(self, sent: Sent) -> None:
        """Mark the run and its model version as deleted, as its user did; `_find_run` brings the run back."""
        path = database_path(self.uri)
        if sent.run_id is None or sent.deleted:
            return
        if path is None or path.exists():
            from mlflow.exceptions import MlflowException

            prepare_store(self.uri)
            client = connect(self.uri)
            self._mark_version(client, sent, deleted=True)
            try:
                client.delete_run(sent.run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        sent.deleted = True
        self._done(sent)

    def _mark_version(self, client: MlflowClient, sent: Sent, *, deleted: bool) -> None:
        """Tag the model version of a deleted run, or take the tag off: the version stays, for others may load it."""
        from mlflow.exceptions import MlflowException

        if sent.model_version is None:
            return
        try:
            if deleted:
                client.set_model_version_tag(self.outbox.model_name, sent.model_version, DELETED_TAG, self.folder.run_id)
            else:
                client.delete_model_version_tag(self.outbox.model_name, sent.model_version, DELETED_TAG)
        except MlflowException as error:  # somebody deleted the version, or took the tag off
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise

    def _find_run(self, client: MlflowClient, sent: Sent) -> None:
        """Find this run in the store by the remembered id, else by its tags, else create it."""
        from mlflow.exceptions import MlflowException

        if sent.run_id is not None:
            try:
                known = client.get_run(sent.run_id).info
                is_active, sent.experiment = known.lifecycle_stage == "active", str(known.experiment_id)
                if sent.deleted:  # with `obowlab runs delete`, and restored since
                    if not is_active:
                        client.restore_run(sent.run_id)
                    self._mark_version(client, sent, deleted=False)
                    is_active, sent.deleted = True, False
                    self._done(sent)
                if is_active:
                    self._forget_lost(client, sent)
                    return
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
            else:
                raise UserError(
                    f"The MLflow run of {self.folder.run_id} was deleted; restore it there, or remove "
                    f"{self.folder.mirror_path} to send it again."
                )
        info, started = self.folder.info, str(self.folder.info.created_at)
        sent.forget()  # the first time, or another database answers under this address
        experiment = experiment_id(client, uri=self.uri, runs_root=self.runs_root)
        found = client.search_runs([experiment], filter_string=f"tags.`obowlab.run_id` = '{info.run_id}'")
        sent.experiment = experiment
        same = [run.info.run_id for run in found if run.data.tags.get("obowlab.created_at") == started]
        if same:
            sent.run_id = same[0]
        else:
            made = client.create_run(
                experiment,
                run_name=info.run_id,
                start_time=round(info.created_at * 1000),
                tags={"obowlab.run_id": info.run_id, "obowlab.created_at": started},
            )
            sent.run_id = made.info.run_id
        for run in found:
            if run.info.run_id not in same:  # the same recipe and seed, put aside with --fresh
                client.set_tag(run.info.run_id, "obowlab.superseded_by", sent.run_id)
        self._done(sent)

    def _forget_lost(self, client: MlflowClient, sent: Sent) -> None:
        """Send files again that the store has lost: somebody removed them, or they stayed where the store was moved from."""
        lost = lost_artifacts(client, _id(sent), names=[*sent.files, MODEL_FOLDER])
        sent.files = {name: stamp for name, stamp in sent.files.items() if name not in lost}
        if MODEL_FOLDER in lost:
            sent.model_version = sent.card = None

    def _send_params(self, client: MlflowClient, sent: Sent) -> None:
        if sent.params:
            return
        from mlflow.entities import Param

        info = self.folder.info
        values = {"recipe": info.name, "seed": info.seed, **flatten(info.recipe)}
        # MLflow keeps the first value for good, and another one there refuses the whole request: settings of the evaluation may
        # have changed since the run was first sent to this store.
        there = client.get_run(_id(sent)).data.params
        missing = {key: value for key, value in values.items() if key not in there}
        params = [Param(key, value if isinstance(value, str) else json.dumps(value)) for key, value in missing.items()]
        for start in range(0, len(params), PARAMS_PER_REQUEST):
            client.log_batch(_id(sent), params=params[start : start + PARAMS_PER_REQUEST])
        sent.params = True
        self._done(sent)

    def _send_points(self, client: MlflowClient, sent: Sent, *, name: str, end: float) -> None:
        batch: list[Metric] = []
        start = sent.offsets.get(name)
        for offset, point in self.outbox.points(name, sent=sent):
            metrics, odd = _metrics(point.values, step=point.step, time_s=point.time, source=name)
            if len(batch) + len(metrics) > METRICS_PER_REQUEST:
                _in_time(end)
                client.log_batch(_id(sent), metrics=batch)
                self._done(sent, count=len(batch))  # with the offset behind the last line of the batch
                batch = []
            batch.extend(metrics)
            _count(odd, sent)
            sent.offsets[name], sent.last_steps[name] = offset, point.step
        if batch:
            _in_time(end)
            client.log_batch(_id(sent), metrics=batch)
        if sent.offsets.get(name) != start:
            self._done(sent, count=len(batch))

    def _send_result(self, client: MlflowClient, sent: Sent, path: Path) -> None:
        result = read_result(path)
        place = self.outbox.place(result)
        values = {measurement["name"]: float(measurement["value"]) for measurement in result["measurements"]}
        # The time it was measured, which stays with copies of the file: sent again, a value is the same point.
        time_s = float(result.get("measured_at", path.stat().st_mtime_ns / 1e9))
        # MLflow draws values of step 0 as bars, beside those of other runs. Its latest value is that of the highest step, and
        # earlier versions sent the last one of the training.
        known = [client.get_metric_history(_id(sent), mlflow_name(name, source=place)) for name in values]
        step = max((point.step for points in known for point in points), default=0)
        metrics, odd = _metrics(values, step=step, time_s=time_s, source=place)
        client.log_batch(_id(sent), metrics=metrics)
        self._send_file(client, sent, path, folder="results")
        _count(odd, sent)
        self.outbox.mark(path, sent=sent)
        self._done(sent, count=len(metrics) + 1)

    def _send_tags(self, client: MlflowClient, sent: Sent) -> None:
        from mlflow.entities import RunTag

        changed = {key: value for key, value in self.outbox.tags(sent).items() if sent.tags.get(key) != value}
        if changed:
            client.log_batch(_id(sent), tags=[RunTag(key, value) for key, value in changed.items()])
            sent.tags = {**sent.tags, **changed}
            self._done(sent)
        for name in self.outbox.dropped_tags(sent):
            client.delete_tag(_id(sent), name)
            del sent.tags[name]
            self._done(sent)

    def _send_dataset(self, client: MlflowClient, sent: Sent) -> None:
        facts = self.folder.facts()
        digest = facts.get("data_hash")
        if not digest or sent.dataset == digest:
            return
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.exceptions import MlflowException

        dataset = Dataset(
            name=self.folder.info.recipe.data.dataset,
            digest=str(digest)[:32],  # MLflow takes 36 characters; the whole hash is a tag
            source_type="obowlab",
            source=json.dumps({"content_hash": digest}),
            profile=json.dumps({key: facts[key] for key in ("num_images", "num_classes") if key in facts}),
        )
        inputs = [DatasetInput(dataset, tags=[InputTag("mlflow.data.context", "training")])]
        try:
            client.log_inputs(_id(sent), datasets=inputs)
        except MlflowException:  # another run was adding the same images: now they are there
            client.log_inputs(_id(sent), datasets=inputs)
        sent.dataset = str(digest)
        self._done(sent)

    def _send_status(self, client: MlflowClient, sent: Sent) -> None:
        status = self.outbox.status()
        if sent.status == status:
            return
        if status in ENDED:
            client.set_terminated(_id(sent), status=status, end_time=round(self.folder.state.updated_at * 1000))
        else:
            client.update_run(_id(sent), status=status)
        sent.status = status
        self._done(sent)

    def _register_model(self, client: MlflowClient, sent: Sent) -> None:
        """Upload the encoder and make it a model version, unless a version of this run exists already."""
        from mlflow.exceptions import MlflowException

        info, run_id, name = self.folder.info, _id(sent), self.outbox.model_name
        try:
            client.create_registered_model(name, tags={"obowlab.recipe": info.name})
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        found = list(client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"))
        if not found or lost_artifacts(client, run_id, names=[MODEL_FOLDER]):
            with tempfile.TemporaryDirectory(prefix="obowlab-mirror-") as place:
                copy_tree(self.folder.path / MODEL_FOLDER, Path(place), owner=self.folder.owner)
                client.log_artifacts(run_id, place, MODEL_FOLDER)
        if not found:
            source = f"{client.get_run(run_id).info.artifact_uri}/{MODEL_FOLDER}"
            tags = {"obowlab.run_id": info.run_id, "obowlab.fingerprint": info.fingerprint}
            found = [client.create_model_version(name, source=source, run_id=run_id, tags=tags, await_creation_for=0)]
        sent.model_version = str(found[0].version)
        self._done(sent)

    def _send_card(self, client: MlflowClient, sent: Sent) -> None:
        """Describe the model version: on its page, and in its folder."""
        card = self.outbox.card(sent)
        assert card is not None
        client.update_model_version(self.outbox.model_name, str(sent.model_version), description=card)
        client.log_text(_id(sent), card, f"{MODEL_FOLDER}/README.md")
        sent.card = digest_of(card)
        self._done(sent)

    def _done(self, sent: Sent, *, count: int = 1) -> None:
        self.outbox.save(sent)
        self.count += count


def _in_time(end: float) -> None:
    if time.monotonic() > end:
        raise OutOfTimeError


def _id(sent: Sent) -> str:
    assert sent.run_id is not None
    return sent.run_id


def _metrics(values: Mapping[str, float], *, step: int, time_s: float, source: str) -> tuple[list[Metric], list[str]]:
    """Return what MLflow takes, and the names of the values that are not finite."""
    from mlflow.entities import Metric

    timestamp = round(time_s * 1000)
    finite = [
        Metric(mlflow_name(name, source=source), value, timestamp, step) for name, value in values.items() if math.isfinite(value)
    ]
    return finite, [name for name, value in values.items() if not math.isfinite(value)]


def _count(odd: list[str], sent: Sent) -> None:
    for name in odd:
        sent.nonfinite[name] = sent.nonfinite.get(name, 0) + 1
