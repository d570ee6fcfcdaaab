"""What a run is, how far it is, and its results: the small files of its folder."""

from __future__ import annotations

import json
import math
import re
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from obowlab import __version__
from obowlab.config import Machine, Recipe
from obowlab.errors import UserError, refusal_of
from obowlab.files.opening import UnusableFileError, read_file
from obowlab.files.records import parse_checked, read_checked
from obowlab.files.replacing import write_atomic

Status = Literal["created", "running", "interrupted", "failed", "unevaluated", "finished"]
"""`unevaluated`: the training is done, and its evaluation could not be made."""
TRAINED: tuple[Status, ...] = ("unevaluated", "finished")
"""The states of a run that nothing trains any more, and whose results count."""
ENCODER_FILE = "encoder.safetensors"
"""The encoder of a run; it is there as soon as the training is done."""
CLASSIFIER_FILE = "classifier.safetensors"
DETECTOR_FILE = "detector.safetensors"
"""Beside it, of a run whose method learns one from labels."""
MODEL_FOLDER = "model"
"""The encoder as an MLflow model."""
CHECKPOINT_FILES = ("checkpoint.pt", "checkpoint.previous.pt")
"""What a run resumes from: the newest, and the one before it."""

DAMAGED = (UserError, OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""What reading a run of another version, or a damaged one, may raise: of many runs, the others are shown."""

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,254}$"
"""What recipes and runs may be called: files are named after them."""

FORMAT = 1
"""Of `run.json`, `state.json` and results that name none. A file that names a higher one is of a newer version, and not read."""

LAST_SECOND = 4102444800.0
"""Times are before the year 2100, in seconds since 1970."""


class RunInfo(BaseModel):
    """What a run is (`run.json`); written once, but for the evaluation of its recipe (`RunFolder.set_evaluation`)."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True, allow_inf_nan=False)

    run_id: str = Field(pattern=NAME)
    name: str = Field(pattern=NAME)
    seed: int
    fingerprint: str
    recipe_values: dict[str, Any] = Field(alias="recipe")
    sources: dict[str, str] = {}
    created_at: float = Field(ge=0, lt=LAST_SECOND)
    version: str

    @cached_property
    def recipe(self) -> Recipe:
        """The resolved recipe this run was created with.

        Raises:
            UserError: this version of obowlab does not know one of its settings.
        """
        try:
            return Recipe.model_validate_json(json.dumps(self.recipe_values))
        except ValueError:
            if _is_newer(self.version):
                raise UserError(
                    f"Run '{self.run_id}' was created by obowlab {self.version}, whose recipe version {__version__} cannot read: "
                    "update obowlab, and leave the run as it is."
                ) from None
            raise UserError(
                f"Run '{self.run_id}' was created by obowlab {self.version}, whose recipe version {__version__} cannot read; "
                "install that version, or start the run again with --fresh."
            ) from None


class State(BaseModel):
    """How far a run is (`state.json`); replaced atomically."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    status: Status = "created"
    step: int = 0
    total_steps: int | None = None
    message: str = ""
    pid: int | None = None
    host: str | None = None
    attempt: int = 0
    trained_s: float | None = None
    memory_mib: float | None = None
    updated_at: float = Field(0.0, ge=0, lt=LAST_SECOND)


def read_info(path: Path) -> RunInfo:
    """Read `run.json` of a run folder.

    Raises:
        UserError: there is none, it is damaged, or of a newer version.
    """
    file, version = path / "run.json", None
    try:
        values = read_checked(file)
        refuse_newer(file, values)
        version = values.get("version")
        return RunInfo.model_validate(values)
    except FileNotFoundError:
        raise UserError(f"{path} is not a run folder: it has no run.json.") from None
    except OSError as error:
        raise UserError(cannot_be_read(file, error)) from None
    except ValueError:
        if isinstance(version, str) and _is_newer(version):
            raise UserError(_newer(file, f"obowlab {version}")) from None
        raise UserError(f"{file} is damaged; move the folder away and start the run again.") from None


def read_state(path: Path) -> State:
    """Read `state.json` of a run folder; a new state when there is none.

    Raises:
        UserError: it is damaged, or of a newer version.
    """
    file, status = path / "state.json", None
    try:
        values = parse_checked(read_file(file))
        refuse_newer(file, values)
        status = values.get("status")
        return State.model_validate(values)
    except FileNotFoundError:
        return State()
    except OSError as error:
        raise UserError(cannot_be_read(file, error)) from None
    except ValueError:
        if isinstance(status, str) and re.fullmatch(r"[a-z][a-z_-]*", status) and status not in get_args(Status):
            raise UserError(_newer(file, f"a newer version of obowlab, which knows the status '{status[:40]}'")) from None
        raise UserError(f"{file} is damaged; remove it; the run then continues from its checkpoint.") from None


def read_machine(path: Path) -> Machine:
    """Read `machine.json` of a run folder; the defaults when there is none.

    Raises:
        UserError: it is damaged, or of a newer version.
    """
    file, version = path / "machine.json", None
    try:
        values = parse_checked(read_file(file))
        refuse_newer(file, values)
        version = values.pop("version", None)
        return Machine.model_validate_json(json.dumps(values))
    except FileNotFoundError:
        return Machine()
    except OSError as error:
        raise UserError(cannot_be_read(file, error)) from None
    except ValueError as error:
        if isinstance(version, str) and _is_newer(version):
            raise UserError(_newer(file, f"obowlab {version}")) from None
        # One that names no version: nothing is wrong with it but what we do not know.
        if isinstance(error, ValidationError) and {one["type"] for one in error.errors()} == {"extra_forbidden"}:
            names = ", ".join(str(one["loc"][-1])[:40] for one in error.errors()[:3])
            raise UserError(_newer(file, f"a newer version of obowlab, which knows the setting {names}")) from None
        raise UserError(f"{file} is damaged; start the run again with 'obowlab run' to replace it.") from None


def write_machine(path: Path, machine: Machine) -> None:
    """Write `machine.json` of a run folder, without the tracking server, which may hold a password."""
    values = {"version": __version__, **machine.model_dump(mode="json", exclude={"tracking_uri"})}
    write_atomic(path / "machine.json", json.dumps(values, indent=1))


def no_checkpoint(info: RunInfo, *, reason: str) -> UserError:
    """Return the error for a run that can be looked into only with a checkpoint, and has none that is usable.

    Args:
        info: of the run.
        reason: one or more sentences.
    """
    return UserError(
        f"{reason} Run '{info.run_id}' can be looked into only with its checkpoint: train it with `obowlab run {info.name}`, or "
        "bring it along with `obowlab runs export --checkpoint`."
    )


def read_result(path: Path) -> dict[str, Any]:
    """Read one evaluation result.

    Raises:
        UserError: the file is damaged, or of a newer version.
    """
    try:
        result = read_checked(path)
        refuse_newer(path, result)
        _check_result(result)
    except OSError as error:
        raise UserError(cannot_be_read(path, error)) from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path} is damaged: put a copy back, or remove it and measure again with 'obowlab eval'.") from None
    return result


def _check_result(result: dict[str, Any]) -> None:
    """Raise one of a few errors for what is no evaluation result."""
    if not all(isinstance(result[key], str) for key in ("subject", "protocol", "protocol_hash")):
        raise ValueError("no evaluation result")
    if not isinstance(result.get("details", {}), dict) or not math.isfinite(float(result.get("measured_at", 0.0))):
        raise ValueError("no evaluation result")
    for measurement in result.setdefault("measurements", []):
        if not isinstance(measurement["name"], str) or isinstance(measurement["value"], str):
            raise ValueError("no measurement")
        float(measurement["value"])


def _is_newer(version: str) -> bool:
    """Return whether a version, such as 1.20.0, is later than this one; False for what is no version."""
    ours, theirs = ([int(number) for number in re.findall(r"\d{1,9}", one)[:3]] for one in (__version__, version[:40]))
    return theirs > ours


def refuse_newer(file: Path, values: dict[str, Any]) -> None:
    """Raise a `UserError` for a file of a higher format than ours, also where it could be read: its words may mean others."""
    written = values.get("format")
    if isinstance(written, int) and written > FORMAT:
        raise UserError(_newer(file, "a newer version of obowlab"))


def _newer(file: Path, made_by: str) -> str:
    return f"{file} was written by {made_by}; this is {__version__}: update obowlab to read it, and leave the file as it is."


def cannot_be_read(file: Path | str, error: OSError) -> str:
    """Return one sentence on a file of a run that the operating system refuses to read."""
    if isinstance(error, UnusableFileError):
        return f"{file} is not used, for {error.strerror}: let its owner move it away."
    if isinstance(error, PermissionError):
        return f"{file} cannot be read ({error.strerror}): ask the owner of the folder for the right to."
    return refusal_of(error, file=file)
