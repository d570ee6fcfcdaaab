"""What every settings model is made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
Range = tuple[Annotated[float, Field(ge=0.0)], Annotated[float, Field(ge=0.0)]]
Level = Literal["conv4", "conv5"]
Padding = Literal["torchvision", "same"]


class Section(BaseModel):
    """A frozen group of settings; unknown keys and values of the wrong type are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


SectionT = TypeVar("SectionT", bound=Section)


CONFLICT = "conflict"
"""Type of the error of `conflict` among pydantic's."""


def conflict(reason: str, *, keys: Iterable[str]) -> PydanticCustomError:
    """Return the error that settings do not go together, for the validators of a section.

    Args:
        reason: in a sentence without its full stop.
        keys: the settings that are to blame, relative to the section; the message names the one that was set, and where.
    """
    return PydanticCustomError(CONFLICT, "{reason}", {"reason": reason, "keys": list(keys)})


def canonical_hash(value: Any) -> str:
    """Return the SHA-256 (hex) of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()
