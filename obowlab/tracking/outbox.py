"""What of a run belongs into MLflow, and how much of it a store has already; knows nothing of MLflow itself."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import BaseModel, ConfigDict

from obowlab.files.opening import files_in, is_regular, kind_of, open_file
from obowlab.files.records import damaged_line, parse_checked, read_checked, read_lines, with_checksum
from obowlab.files.replacing import write_atomic
from obowlab.runs.detection_facts import DETECTION_FILE, DETECTION_FOLDER, detection_folders
from obowlab.runs.folder import TAG, RunFolder
from obowlab.runs.info import MODEL_FOLDER, Status
from obowlab.runs.metric_log import Point, parse_point
from obowlab.runs.metrics import METRIC_FILES, METRICS, mlflow_name, unit_of
from obowlab.runs.trash import is_deleted
from obowlab.tracking.model_card import model_card

STATUSES: dict[Status, str] = {
    "created": "SCHEDULED",
    "running": "RUNNING",
    "interrupted": "KILLED",
    "failed": "FAILED",
    "unevaluated": "FINISHED",  # the tag obowlab.status says what it lacks
    "finished": "FINISHED",
}
ENDED = ("KILLED", "FAILED", "FINISHED")
TRIAL = "obowlab.trial"
"""The label of a run that a study made."""

LONGEST_TAG = 5000
WORDS_FOLDER = "words"
"""Where `obowlab words` puts the gallery of a run's visual words."""

GALLERY = re.compile(r"index\.html|words\.json|[A-Za-z0-9._-]+-[0-9]{3,}\.(jpg|png|webp)")
"""What `obowlab words` writes; whatever else lies there stays there."""

LONGEST_LINE = 2**16
"""No line of a metric file is longer, in bytes."""


class Sent(BaseModel):
    """What one store has of a run."""

    model_config = ConfigDict(extra="ignore")

    experiment: str | None = None
    run_id: str | None = None
    params: bool = False
    tags: dict[str, str] = {}
    dataset: str | None = None
    offsets: dict[str, int] = {}
    last_steps: dict[str, int] = {}
    nonfinite: dict[str, int] = {}
    files: dict[str, str] = {}
    model_version: str | None = None
    card: str | None = None
    status: str | None = None
    deleted: bool = False

    def forget(self) -> None:
        """Begin anew: the store has nothing."""
        for name, field in type(self).model_fields.items():
            setattr(self, name, field.get_default(call_default_factory=True))


class Outbox:
    """What one store should have of one run folder."""

    def __init__(self, folder: RunFolder, *, store: str) -> None:
        """Open the outbox of a run for the store of this (password-free) name."""
        self.folder = folder
        self.store = store

    # ------------------------------------------------------------------------------------------------- memory

    def load(self) -> Sent:
        """Return what the store has; nothing when `mirror.json` is lost: then all is sent once more and recognised."""
        try:
            return Sent.model_validate(self._stores().get(self.store, {}))
        except ValueError:
            return Sent()

    def save(self, sent: Sent) -> None:
        """Remember what the store has."""
        stores = {**self._stores(), self.store: sent.model_dump()}
        write_atomic(self.folder.mirror_path, with_checksum(json.dumps({"stores": stores}, indent=1)))

    def _stores(self) -> dict[str, Any]:
        try:
            return dict(read_checked(self.folder.mirror_path)["stores"])
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    # -------------------------------------------------------------------------------------------------- items

    def pending(self) -> int:
        """Return how many metric values, files and facts the store does not have."""
        sent = self.load()
        if self.is_deleted:
            return int(sent.run_id is not None and not sent.deleted)
        points = sum(len(point.values) for name in METRIC_FILES for _, point in self.points(name, sent=sent))
        files = sum(self.is_new(path, sent=sent) for path in (*self.results(), *self.artifacts()))
        files += sum(name not in sent.files for name in self.documents())
        files += sum(sent.tags.get(name) != text for name, text in self._labels().items()) + len(self.dropped_tags(sent))
        model = self.model_is_new(sent) + self.card_is_new(sent)
        return points + files + (not sent.params) + (sent.status != self.status()) + model

    @property
    def is_deleted(self) -> bool:
        """Whether the user deleted the run, so that its folder is in the trash."""
        return is_deleted(self.folder.path)

    def dropped_tags(self, sent: Sent) -> list[str]:
        """Return the names of tags that a user took off the run and the store still has."""
        labels = self._labels()
        return [name for name in sent.tags if name.startswith(TAG) and name not in labels]

    def status(self) -> str:
        """Return MLflow's word for the run's state."""
        return STATUSES[self.folder.current_state().status]

    def points(self, name: str, *, sent: Sent) -> Iterator[tuple[int, Point]]:
        """Yield every complete line of a metric file that the store does not have, with the offset behind it."""
        path = self.folder.path / f"{name}.jsonl"
        if not os.path.lexists(path):
            return
        offset, last_step = sent.offsets.get(name, 0), sent.last_steps.get(name, -1)
        with open_file(path) as file:
            if offset and _step_before(file, offset) != last_step:
                offset = 0  # a power cut took lines that were sent; their steps are logged again, perhaps at other offsets
            file.seek(offset)
            for line in file:
                try:
                    point = parse_point(parse_checked(line)) if line.endswith(b"\n") else None
                except ValueError:
                    point = None
                if point is None:  # still being written, or torn: the writer cuts it off when it resumes
                    self._check_damage(path)
                    return
                offset += len(line)
                if point.step > last_step:
                    yield offset, point

    def _check_damage(self, path: Path) -> None:
        """Refuse to stop for good before a damaged line, because no later start will write it again.

        Raises:
            UserError: intact lines follow, or the run is finished.
        """
        list(read_lines(path, check=parse_point))
        if self.folder.state.status == "finished":
            raise damaged_line(path, 1 + sum(1 for _ in read_lines(path, check=parse_point)))

    def results(self) -> list[Path]:
        """Return the files of all evaluation results."""
        return self.folder.result_files()

    def artifacts(self) -> list[Path]:
        """Return the files to keep beside the numbers: the log only when it is complete, a page after the images it shows.

        Regular files of the run's owner only: who may write to a run store could put a link to anybody's file there.
        """
        owner = self.folder.owner
        gallery = [path for path in files_in(self.folder.path / WORDS_FOLDER, owner=owner) if GALLERY.fullmatch(path.name)]
        detections = [
            path
            for folder in detection_folders(self.folder.path)
            for path in files_in(folder, owner=owner)
            if DETECTION_FILE.fullmatch(path.name)
        ]
        shown = sorted((*gallery, *detections), key=lambda path: (path.suffix == ".html", path))
        return [*(path for path in self._kept() if is_regular(path, owner=owner)), *shown]

    def left_out(self) -> list[str]:
        """Return what is not sent of what belongs to a run, each with the reason in words."""
        reasons = []
        folders = [self.folder.path / name for name in (WORDS_FOLDER, DETECTION_FOLDER, "results")]
        for path in (*self._kept(), *folders):
            if os.path.lexists(path) and not is_regular(path, owner=self.folder.owner):
                mode = path.lstat().st_mode
                reason = "" if path in folders and stat.S_ISDIR(mode) else kind_of(mode) or "another user's"
                reasons += [f"{path.name} (it is {reason})"] if reason else []
        return reasons

    def _kept(self) -> list[Path]:
        names = [
            "run.json",
            "machine.json",
            "attempts.jsonl",
            "dirty.diff",
            "cost.json",
            *(["log.txt"] if self.status() in ENDED else []),
        ]
        return [self.folder.path / name for name in names]

    def documents(self) -> dict[str, str]:
        """Return texts to keep as artifacts that are no files of the run folder, by name."""
        units = {
            metric.name: {"unit": metric.unit, "direction": metric.direction, "help": metric.help} for metric in METRICS.values()
        }
        return {
            "recipe.json": json.dumps(self.folder.info.recipe_values, indent=1),
            "metrics.json": json.dumps(units, indent=1),
        }

    def model_is_new(self, sent: Sent) -> bool:
        """Return whether there is an encoder that the store should have a version of: of a finished run, not of a trial."""
        finished = self.folder.state.status == "finished" and is_regular(self.folder.path / MODEL_FOLDER / "MLmodel")
        return finished and sent.model_version is None and TRIAL not in self.folder.labels()

    @property
    def model_name(self) -> str:
        """The name under which the encoders of this recipe are registered."""
        return f"obowlab-{self.folder.info.name}"

    def card(self, sent: Sent) -> str | None:
        """Return the card of the model version; None when the store has no version."""
        version = sent.model_version
        return None if version is None else model_card(self.folder, name=self.model_name, version=version)

    def card_is_new(self, sent: Sent) -> bool:
        """Return whether the store has another card than the present one, or none."""
        card = self.card(sent)
        return card is not None and sent.card != digest_of(card)

    def is_new(self, path: Path, *, sent: Sent) -> bool:
        """Return whether the store lacks this file or has an older one; a file that has just disappeared counts as sent."""
        try:
            return sent.files.get(self._key(path)) != _stamp(path)
        except FileNotFoundError:
            return False

    def mark(self, path: Path, *, sent: Sent) -> None:
        """Note that the store has this file."""
        sent.files[self._key(path)] = _stamp(path)

    def place(self, result: Mapping[str, Any]) -> str:
        """Return the source of a result for `mlflow_name`: its subject, and the data set when it is not the run's own."""
        dataset = result.get("details", {}).get("dataset")
        own = dataset in (None, self.folder.info.recipe.data.dataset)
        return str(result["subject"]) if own else f"{result['subject']}/{dataset}"

    def tags(self, sent: Sent) -> dict[str, str]:
        """Return the facts of the run as they are now."""
        info, state = self.folder.info, self.folder.current_state()
        facts = self.folder.facts()
        versions = facts.get("versions", {})
        plain = {
            key: value
            for key, value in facts.items()
            if isinstance(value, str | int | float | bool) and key not in ("time", "pid", "step")
        }
        tags: dict[str, Any] = {
            **{f"obowlab.{key}": value for key, value in plain.items()},
            **{f"obowlab.version.{package}": version for package, version in versions.items()},
            "obowlab.recipe": info.name,
            "obowlab.seed": info.seed,
            "obowlab.fingerprint": info.fingerprint,
            "obowlab.status": state.status,
            "obowlab.message": state.message or "-",
            "obowlab.nonfinite": ", ".join(f"{name}: {count}" for name, count in sorted(sent.nonfinite.items())),
            "mlflow.note.content": self._description(facts),
            "mlflow.source.name": f"obowlab run {info.name} --seed {info.seed}",
            "mlflow.source.git.commit": facts.get("commit"),
            **self._labels(),
        }
        for kind, numbers in self.folder.cost().items():
            tags |= {f"obowlab.{kind}.{name}": value for name, value in numbers.items()}
        for result in self.folder.results():
            place = self.place(result)
            protocol = f"version {result.get('version')}, {result['protocol_hash']}"
            tags[f"obowlab.eval.{place.replace('/', '.')}.{result['protocol']}"] = protocol
            for measurement in result["measurements"]:
                tags[mlflow_name(measurement["name"], source=place)] = _with_interval(measurement)
        return {key: str(value)[:LONGEST_TAG] for key, value in tags.items() if value not in (None, "")}

    def _description(self, facts: Mapping[str, Any]) -> str:
        """Return the run in a few lines of Markdown: title, results with their intervals, recipe, data and commit."""
        info = self.folder.info
        rows: dict[str, dict[str, str]] = {}
        for result in self.folder.results():
            for measurement in result["measurements"]:
                rows.setdefault(measurement["name"], {})[self.place(result)] = _with_interval(measurement).strip()
        places = list(dict.fromkeys(place for row in rows.values() for place in row))
        table = [f"| | {' | '.join(places)} |", f"|---|{'---:|' * len(places)}"]
        table += [f"| {name} [{unit_of(name)}] | {' | '.join(row.get(at, '') for at in places)} |" for name, row in rows.items()]
        origin = [
            f"recipe `{info.name}`, seed {info.seed}",
            f"data `{info.recipe.data.dataset}` {facts.get('data_hash', '')[:12]}",
        ]
        if facts.get("commit"):  # None where git was not to be had
            origin.append(f"commit {facts['commit'][:12]}{' with changes' if facts.get('dirty') else ''}")
        paragraphs = [info.recipe.title, "\n".join(table) if rows else "", " · ".join(origin)]
        return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)

    def _labels(self) -> dict[str, str]:
        return {name: text[:LONGEST_TAG] for name, text in self.folder.labels().items() if text}

    def _key(self, path: Path) -> str:
        return str(path.relative_to(self.folder.path))


def digest_of(content: str) -> str:
    """Return the SHA-256 (hex) of a text."""
    return hashlib.sha256(content.encode()).hexdigest()


def _step_before(file: BinaryIO, offset: int) -> int | None:
    """Return the step of the line that ends at an offset; None when no line ends there."""
    file.seek(max(0, offset - LONGEST_LINE))
    before = file.read(min(offset, LONGEST_LINE))
    lines = before.splitlines(keepends=True)
    if len(before) < min(offset, LONGEST_LINE) or not lines or not lines[-1].endswith(b"\n"):
        return None
    try:
        return parse_point(parse_checked(lines[-1])).step
    except ValueError:
        return None


def _with_interval(measurement: Mapping[str, Any]) -> str:
    """Return a measured value with the half-width of its 95 % interval; as texts they sort as the values do."""
    return f"{measurement['value']:6.2f} ± {measurement['interval']:.2f}"


def _stamp(path: Path) -> str:
    facts = path.lstat()
    return f"{facts.st_size}-{facts.st_mtime_ns}"
