"""What a run is, how far it is, and its results: the small files of its folder."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from obowlab import __version__
from obowlab.config import Recipe
from obowlab.errors import UserError
from obowlab.files import read_checked

Status = Literal["created", "running", "interrupted", "failed", "unevaluated", "finished"]
"""`unevaluated`: the training is done, and its evaluation could not be made."""
TRAINED: tuple[Status, ...] = ("unevaluated", "finished")
"""The states of a run that nothing trains any more, and whose results count."""
ENCODER_FILE = "encoder.safetensors"
"""The encoder of a run; it is there as soon as the training is done."""
CHECKPOINT_FILES = ("checkpoint.pt", "checkpoint.previous.pt")
"""What a run resumes from: the newest, and the one before it."""


class RunInfo(BaseModel):
    """What a run is (`run.json`); written once, but for the evaluation of its recipe (`RunFolder.set_evaluation`)."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    run_id: str
    name: str
    seed: int
    fingerprint: str
    recipe_values: dict[str, Any] = Field(alias="recipe")
    sources: dict[str, str] = {}
    created_at: float
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
            raise UserError(
                f"Run '{self.run_id}' was created by obowlab {self.version}, whose recipe version {__version__} cannot read; "
                "install that version, or start the run again with --fresh."
            ) from None


class State(BaseModel):
    """How far a run is (`state.json`); replaced atomically."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    status: Status = "created"
    step: int = 0
    total_steps: int | None = None
    message: str = ""
    pid: int | None = None
    host: str | None = None
    attempt: int = 0
    trained_s: float | None = None
    memory_mib: float | None = None
    updated_at: float = 0.0


def read_info(path: Path) -> RunInfo:
    """Read `run.json` of a run folder.

    Raises:
        UserError: there is none, or it is damaged.
    """
    file = path / "run.json"
    try:
        return RunInfo.model_validate(read_checked(file))
    except FileNotFoundError:
        raise UserError(f"{path} is not a run folder: it has no run.json.") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): ask the owner of the folder for the right to.") from None
    except ValueError:
        raise UserError(f"{file} is damaged; move the folder away and start the run again.") from None


def read_state(path: Path) -> State:
    """Read `state.json` of a run folder; a new state when there is none.

    Raises:
        UserError: it is damaged.
    """
    try:
        return State.model_validate_json((path / "state.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return State()
    except OSError as error:
        raise UserError(f"{path / 'state.json'} cannot be read ({error.strerror}): ask its owner for the right to.") from None
    except ValueError:
        raise UserError(f"{path / 'state.json'} is damaged; remove it; the run then continues from its checkpoint.") from None


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
        UserError: the file is damaged.
    """
    try:
        result = read_checked(path)
        if not {"subject", "protocol", "protocol_hash"} <= result.keys():
            raise ValueError("no evaluation result")
    except ValueError:
        raise UserError(f"{path} is damaged: put a copy back, or remove it and measure again with 'obowlab eval'.") from None
    return result
