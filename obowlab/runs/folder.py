"""The run folder: the one record of a training run, which everything else reads.

A run lives in `RUNS_ROOT/RUN_ID`. Every file has one writer: `run.json`, `machine.json` and `cost.json` the launcher,
`state.json`, `metrics.jsonl`, `online.jsonl`, `attempts.jsonl` and `results/` the process that trains or evaluates,
`system.jsonl` and `mirror.json` the launcher; only `labels.json` has several, which take turns. Whole files are written
beside and renamed; line files are appended and survive `kill -9` up to the last complete line. Nothing here imports torch or
mlflow.
"""

from __future__ import annotations

import difflib
import json
import os
import socket
import time
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from obowlab import __version__
from obowlab.config import Evaluation, Loaded, Machine, canonical_hash
from obowlab.errors import UserError
from obowlab.files.locks import locked
from obowlab.files.opening import UnusableFileError, open_file, user_name
from obowlab.files.records import append_whole, cut_torn_tail, read_all, read_checked, read_lines, with_checksum
from obowlab.files.replacing import write_atomic
from obowlab.files.sharing import is_others
from obowlab.runs.info import (
    RunInfo,
    State,
    read_info,
    read_machine,
    read_result,
    read_state,
    refuse_newer,
    write_machine,
)
from obowlab.runs.listing import believable, run_ids
from obowlab.runs.locks import Lock, hold
from obowlab.runs.metric_log import MetricLog, Point, parse_point, read_points
from obowlab.runs.names import meaning_of, run_id_of, split_run_id

COST_FILE = "cost.json"
TAG = "obowlab.tag."
"""How the labels begin that a user gave a run."""


class RunFolder:
    """One run's folder; open it with `create`, `open` or `find`."""

    def __init__(self, path: Path, info: RunInfo) -> None:
        self.path = path
        self.info = info

    @property
    def run_id(self) -> str:
        """The name of the run and of its folder."""
        return self.info.run_id

    # ------------------------------------------------------------------------------------------------ opening

    @classmethod
    def create(cls, loaded: Loaded, *, seed: int, runs_root: Path) -> RunFolder:
        """Make the folder of a new run, or open it when it is there already.

        Raises:
            UserError: the recipe's name cannot be part of a folder name, the folder is another user's, or the disk refuses.
        """
        run_id = run_id_of(loaded, seed=seed)
        path = runs_root / run_id
        if os.path.lexists(path / "run.json"):
            return cls.open(path)
        refuse_others(path)
        info = RunInfo(
            run_id=run_id,
            name=loaded.name,
            seed=seed,
            fingerprint=loaded.recipe.fingerprint(seed=seed),
            recipe_values=loaded.recipe.model_dump(mode="json"),
            sources=dict(loaded.sources),
            created_at=round(time.time(), 3),
            version=__version__,
        )
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_atomic(path / "state.json", State(updated_at=info.created_at).model_dump_json(indent=1))
            # Last: its presence makes the folder a run.
            write_atomic(path / "run.json", with_checksum(info.model_dump_json(indent=1, by_alias=True)))
        except OSError as error:
            raise UserError(f"Cannot create the run folder {path} (--runs-root): {error.strerror}.") from None
        return cls(path, info)

    @property
    def owner(self) -> int:
        """The user id of who made the run: whoever may write to the store may have put anything else into its folder."""
        return self.path.stat().st_uid

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open a run's folder.

        Raises:
            UserError: it is not a run folder, or its `run.json` is damaged.
        """
        return cls(path, read_info(path))

    @classmethod
    def find(cls, ref: str, *, runs_root: Path) -> RunFolder:
        """Open the run that a path or a name stands for.

        A name is, in this order, an id, a recipe (`demo`), a recipe and seed (`demo-s0`), the 8 digits at an id's end, or the
        beginning of an id. The first of these that any run has counts, and the name of a shipped recipe is no beginning, so
        `demo` never means a run of `demo-full`.

        Raises:
            UserError: none or several match; names them, or the nearest.
        """
        given = Path(ref)
        if (given / "run.json").is_file():
            return cls.open(given.absolute())
        known = run_ids(runs_root)
        meaning, matches = meaning_of(ref, known=known)
        if len(matches) == 1:
            return cls.open(runs_root / matches[0])
        if matches:
            listed = f"{', '.join(matches[:8])}{', ...' * (len(matches) > 8)}"
            raise UserError(f"'{ref}' is {meaning} of {len(matches)} runs: {listed}. Name one of them.")
        names = [split_run_id(run_id)[0] for run_id in known]
        close = difflib.get_close_matches(ref, [*known, *dict.fromkeys(names)], n=1, cutoff=0.5)
        hint = f"Did you mean '{close[0]}'?" if close else "'obowlab runs list' shows what is there."
        raise UserError(f"There is no run '{ref}' in {runs_root}. {hint}")

    # ------------------------------------------------------------------------------------------------- state

    @property
    def state(self) -> State:
        """The state as last written."""
        return read_state(self.path)

    def current_state(self) -> State:
        """Return the state, `interrupted` when it says `running` but nothing trains the run any more."""
        return believable(self.state, self.path)

    def set_state(self, **changes: Any) -> State:
        """Replace the given fields of the state atomically; `updated_at` is set by itself.

        `running` also names this process as the one that works, unless `pid` is given.

        Raises:
            pydantic.ValidationError: a value of the wrong type.
        """
        unknown = set(changes) - set(State.model_fields)
        assert not unknown, f"unknown state fields {unknown}"
        if changes.get("status") == "running":
            changes = {"pid": os.getpid(), "host": socket.gethostname(), **changes}
        state = State.model_validate({**self.state.model_dump(), **changes, "updated_at": round(time.time(), 3)})
        write_atomic(self.path / "state.json", state.model_dump_json(indent=1))
        return state

    def lock(self) -> AbstractContextManager[Lock]:
        """Hold the run exclusively, for as long as the context and this process last.

        A launcher holds it and gives its token to the process it starts; that one then holds a lock of its own, so that the run
        stays taken when the launcher dies first.

        Raises:
            RunTakenError: another process has it; names its process id and host.
            UserError: the folder cannot be written to, or its file system has no locks.
        """
        return hold(self.path)

    # ------------------------------------------------------------------------------------------------ records

    def set_evaluation(self, evaluation: Evaluation) -> None:
        """Measure the run with other settings from now on; its identity and the results that are there stay.

        The caller holds the run.
        """
        if self.info.recipe.evaluation == evaluation:
            return
        values = {**self.info.recipe_values, "evaluation": evaluation.model_dump(mode="json")}
        info = RunInfo.model_validate({**self.info.model_dump(by_alias=True), "recipe": values})
        write_atomic(self.path / "run.json", with_checksum(info.model_dump_json(indent=1, by_alias=True)))
        self.info = info

    @property
    def machine(self) -> Machine:
        """The machine of the last launch; without its tracking server, which may hold a password."""
        return read_machine(self.path)

    def write_machine(self, machine: Machine) -> None:
        """Write where and with what the run is trained."""
        write_machine(self.path, machine)

    def append_attempt(self, facts: Mapping[str, Any]) -> int:
        """Add one line to `attempts.jsonl` and return the attempt's number, from 1."""
        path = self.path / "attempts.jsonl"
        cut_torn_tail(path)
        number = len(self.attempts()) + 1
        line = with_checksum(json.dumps({"attempt": number, "time": round(time.time(), 3), **facts}, default=str))
        with open_file(path, "ab", buffering=0) as file:
            append_whole(file, line.encode() + b"\n")
            os.fsync(file.fileno())
        return number

    def attempts(self) -> list[dict[str, Any]]:
        """Return the facts of every start of this run, oldest first."""
        return list(read_lines(self.path / "attempts.jsonl", check=_check_attempt))

    def facts(self) -> dict[str, Any]:
        """Return the facts of all attempts in one, the latest counting."""
        return {key: value for attempt in self.attempts() for key, value in attempt.items()}

    def write_artifact(self, name: str, content: str | bytes) -> Path:
        """Write a file of the run, or of a folder in it, atomically and return its path.

        Raises:
            OSError: the disk refuses, or the run folder is away: it is not made anew.
        """
        path = self.path / name
        if path.parent != self.path:
            path.parent.mkdir(exist_ok=True)
        write_atomic(path, content)
        return path

    def metric_log(self, name: str = "metrics") -> MetricLog:
        """Open `NAME.jsonl` for appending; `metrics` and `online` belong to training, `system` to the launcher."""
        return MetricLog(self.path / f"{name}.jsonl")

    def metrics(self, name: str = "metrics") -> list[Point]:
        """Read every complete line of a metric file.

        Raises:
            UserError: a line is damaged.
        """
        return read_points(self.path / f"{name}.jsonl")

    def results(self) -> list[dict[str, Any]]:
        """Return every evaluation result, the oldest first.

        Raises:
            UserError: one is damaged.
        """
        results = [read_result(path) for path in self.result_files()]
        return sorted(results, key=lambda result: float(result.get("measured_at", 0.0)))

    def result_files(self) -> list[Path]:
        """Return the files of all evaluation results; of a folder that is a link, none."""
        place = self.path / "results"
        return [] if place.is_symlink() else sorted(place.glob("*.json"))

    def add_result(self, result: Mapping[str, Any]) -> Path:
        """Write one evaluation result; the same protocol, weights and data, of the same training, replace an earlier one.

        Args:
            result: at least `subject`, `protocol` and `protocol_hash`; JSON values.
        """
        identity = [result.get(key) for key in ("subject", "protocol", "version", "protocol_hash", "weights_hash", "data_hash")]
        if trained_in := result.get("details", {}).get("trained_in"):
            identity.append(trained_in)
        name = f"{result['subject']}-{result['protocol']}-{canonical_hash(identity)[:8]}.json"
        dated = {**result, "measured_at": round(time.time(), 3)}
        return self.write_artifact(f"results/{name}", with_checksum(json.dumps(dated, indent=1, allow_nan=False)))

    def trained_s(self) -> float | None:
        """Return the seconds spent on training steps, all starts together; None when nothing was logged."""
        state = self.state
        if state.trained_s is not None:
            return state.trained_s
        total_s, last_step = 0.0, 0  # a run of an older version: from its points, at the cost of reading them all
        for point in map(parse_point, read_all(self.path / "metrics.jsonl")):
            total_s += point.values.get("step_time_s", 0.0) * (point.step - last_step)
            last_step = point.step
        return round(total_s, 1) if last_step else None

    def mlflow_run_id(self) -> str | None:
        """Return the id of the MLflow run that mirrors this one, in the store it was sent to last; None when it never was."""
        ids = self.mlflow_runs()
        return list(ids.values())[-1] if ids else None

    def mlflow_runs(self) -> dict[str, str]:
        """Return MLflow's id of this run in every store, by its address without passwords; the last last."""
        return {store: run_id for store, (_, run_id) in self.mlflow_places().items()}

    def mlflow_places(self) -> dict[str, tuple[str | None, str]]:
        """Return the experiment, where it is known, and MLflow's id of this run in every store, as `mlflow_runs`."""
        try:
            stores = read_checked(self.mirror_path)["stores"]
            return {
                str(store): (None if sent.get("experiment") is None else str(sent["experiment"]), str(sent["run_id"]))
                for store, sent in stores.items()
                if sent.get("run_id")
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def cost(self) -> dict[str, dict[str, Any]]:
        """Return what this run was expected to cost (`quote`) and, once finished, what it did (`truth`), as far as known."""
        try:
            cost = read_checked(self.path / COST_FILE)
        except (OSError, ValueError):
            return {}  # nothing depends on it
        return {kind: numbers for kind, numbers in cost.items() if isinstance(numbers, dict)}

    def labels(self) -> dict[str, str]:
        """Return the labels that studies, tables and users gave this run: MLflow tag name to text."""
        try:
            labels = read_checked(self.path / "labels.json")
            refuse_newer(self.path / "labels.json", labels)
            if not all(isinstance(text, str) for text in labels.values()):
                raise ValueError("a label is no text")
            return labels
        except FileNotFoundError:
            return {}
        except (UnusableFileError, ValueError):
            raise UserError(f"{self.path / 'labels.json'} is damaged; remove it; only labels are lost.") from None

    def add_labels(self, labels: Mapping[str, str], *, remove: Collection[str] = ()) -> bool:
        """Label this run with the study or table it belongs to; the mirror makes tags of it, also when the run is finished.

        Other labels stay, a label of the same name is replaced; several processes may add at once.

        Args:
            labels: MLflow tag name, `obowlab.WORD...`, to text.
            remove: names of labels to take away.

        Returns:
            Whether anything changed; of somebody else's run never, whose labels are theirs.
        """
        assert all(name.startswith("obowlab.") for name in labels), f"labels are called obowlab.NAME, not {list(labels)}"
        if is_others(self.path):
            return False
        file = self.path / "labels.json"
        with locked(self.path / "labels.lock"):
            before = self.labels()
            after = {name: text for name, text in (before | dict(labels)).items() if name not in remove}
            if after == before:
                return False
            if after:
                write_atomic(file, with_checksum(json.dumps(after, indent=1)))
            else:
                file.unlink()
        return True

    def tags(self) -> list[str]:
        """Return the names that a user gave this run with `obowlab runs tag`, sorted; they change nothing of its identity."""
        return sorted(name.removeprefix(TAG) for name in self.labels() if name.startswith(TAG))

    @property
    def mirror_path(self) -> Path:
        """Where the mirror records what it has sent of this run."""
        return self.path / "mirror.json"


def refuse_others(path: Path) -> None:
    """Refuse to train in a run folder that somebody else made, who may have put anything into it; an absent one passes.

    Raises:
        UserError: names the owner.
    """
    try:
        others = is_others(path) or (path.is_symlink() and is_others(path.resolve()))
        owner = user_name(path.stat().st_uid)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"The run folder {path} cannot be looked into ({error.strerror}): choose another --runs-root.") from None
    if others:
        raise UserError(
            f"The run folder {path} belongs to {owner}: train the run in a --runs-root of your own, or under another recipe name."
        )


def _check_attempt(line: dict[str, Any]) -> None:
    if not isinstance(line.get("versions", {}), dict):
        raise ValueError("no attempt")
